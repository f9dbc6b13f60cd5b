"""The Python face of the command line: `dtrain.launch`, and the `Run` that it returns."""
