"""So that `python slurm/cluster up` works from a checkout, with nothing installed."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.cli import main  # noqa: E402  (needs the line above)

sys.exit(main())
