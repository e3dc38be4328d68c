"""Checkpoints of pytrees, verified when they are read."""
