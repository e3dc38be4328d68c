"""Prompts to scored completions: sampling, generation and reward functions."""
