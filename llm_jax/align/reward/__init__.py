"""Training reward models: `training` (tuned), `probe` (a head on features that are kept)."""
