"""Where processes start. Each launcher gets one `python -m dtrain.node RUN_DIR` to run per node."""
