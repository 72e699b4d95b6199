"""Why rewards are learned from pairs and not from rankings, as an experiment."""
