"""Direct preference optimisation: the run (`training`), its `reference`, its answers (`generated`)."""
