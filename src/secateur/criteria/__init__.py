"""Scores of weights: one method a file, and the file name is the registry."""
