"""Devices and processes: the mesh and what lies where on it."""
