"""The training plane: everything that runs inside a worker, with torch."""
