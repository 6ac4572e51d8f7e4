"""Curvature of a network's loss: products, diagonals, Gram matrices, inverses, spectra and what they cost in memory."""
