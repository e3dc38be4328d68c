"""Environments and tools: what a policy plays against, turn by turn."""
