"""What happens while a network trains: one method a file, and the file name is the registry."""
