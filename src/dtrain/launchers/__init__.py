"""Launchers, which start processes. Each runs one `python -m dtrain.node RUN_DIR` per node."""
