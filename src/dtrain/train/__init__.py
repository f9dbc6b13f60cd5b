"""The training plane: everything that runs inside a worker. torch lives here."""
