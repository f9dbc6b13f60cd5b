"""The Python interface to the commands: `dtrain.launch`, and the `Run` that it returns."""
