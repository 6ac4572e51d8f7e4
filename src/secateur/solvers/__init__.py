"""Which weights of one layer go and how the others make up for it: one method a file, the file name is the registry."""
