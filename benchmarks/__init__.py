"""Measurements against peers; each program writes one JSON file to `results/`."""
