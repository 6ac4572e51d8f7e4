"""Contract suites and small networks for authors of methods."""
