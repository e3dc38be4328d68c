"""Where code of users runs: event loops in threads, and spawned processes."""
