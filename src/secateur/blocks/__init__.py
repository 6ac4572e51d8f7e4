"""Layers that a method brings along, as plain ``nn.Module`` classes: one method a file."""
