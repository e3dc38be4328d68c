"""The device mesh, shardings, and the processes of a run."""
