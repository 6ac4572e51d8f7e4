"""Optimal Brain Surgeon on XOR: which weight of a 2-2-1 network can go."""
