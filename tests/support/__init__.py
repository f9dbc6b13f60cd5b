"""Helpers of the tests. Each module is about one thing that tests start or look at."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "tests" / "jobs"
EXAMPLES = ROOT / "examples"
