"""What `dtrain init` does: find what the place has, read an existing script, write the files."""
