"""`python -m dtrain`: the same as `dtrain`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C ends it without a traceback from the first import on.

    A command that must clean up or stop workers installs its own handler for Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from dtrain.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
