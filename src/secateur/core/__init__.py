"""What every method may use."""
