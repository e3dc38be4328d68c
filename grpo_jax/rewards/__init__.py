"""Reward functions: TRL's convention, and how they are called."""
