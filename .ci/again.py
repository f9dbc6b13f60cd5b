"""Run the tests that failed in the last run of pytest once more, each alone.

`again.py EXIT_STATUS` takes the exit status of that run: only 1 means that all tests ran and some
failed. A test that passes now is listed as `flaky: NAME`. Ours is 0 when all of them pass and there
are at most three.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")
MOST = 3


def main() -> int:
    """Try again; the exit status."""
    if sys.argv[1:] != ["1"]:
        print(f"pytest ended with {sys.argv[1:]}: not all tests were run", flush=True)
        return 1
    failed = sorted(json.loads(LAST_FAILED.read_text())) if LAST_FAILED.exists() else []
    if not failed:
        print("pytest failed, and has not noted a test that did", flush=True)
        return 1
    if len(failed) > MOST:
        print(f"{len(failed)} tests failed; up to {MOST} are tried again", flush=True)
        return 1
    print(f"once more, alone: {', '.join(failed)}", flush=True)
    alone = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    codes = {name: subprocess.run([*alone, name], check=False).returncode for name in failed}
    for name, code in codes.items():
        print(f"failed again: {name}" if code else f"flaky: {name}", flush=True)
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
