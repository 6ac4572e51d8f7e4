"""Measurements: one a file, and the file name is the registry."""
