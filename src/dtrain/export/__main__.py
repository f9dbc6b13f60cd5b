"""`python -m dtrain.export RUN_DIR --to FORMAT`: the process that `dtrain export` starts.

It is a separate process, since it imports torch and the user's task.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import warnings
from pathlib import Path

from dtrain.errors import DtrainError, format_error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dtrain.export", description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--to", required=True)
    parser.add_argument("--step", type=int)
    parser.add_argument("--averaged", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    # the exporters warn about their own deprecations and about optional packages
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from dtrain.export.run import export
    from dtrain.run.rundir import RunDir

    try:
        done = export(
            RunDir(arguments.run_dir),
            arguments.to,
            step=arguments.step,
            output=arguments.output,
            averaged=arguments.averaged,
        )
    except DtrainError as error:
        print(format_error(error), file=sys.stderr)
        return error.exit_code
    print("\n".join(done.lines()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
