"""Logging per rank with the standard library. Nothing is configured at import."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_MARK = "_dtrain_handler"


def setup_logging(run: RunDir, ranks: RankInfo, attempt: int, *, own_file: bool) -> None:
    """Configure the root logger of a worker. A later call replaces the configuration.

    Args:
        run: the run.
        ranks: the ranks of this process.
        attempt: the attempt, for the path of the rank's file.
        own_file: whether ranks share a console and each needs a file. Then rank 0 logs INFO to
            stdout, the others only WARNING and above to stderr, and each rank logs INFO to its own
            file too. False means that stdout is already the file of this rank, for example under
            dtrain's agent. Then every rank logs INFO to it.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, _MARK, False)]:
        root.removeHandler(handler)
        handler.close()
    if not own_file:
        _add(root, logging.StreamHandler(sys.stdout), logging.INFO)
    else:
        is_zero = ranks.is_rank_zero
        stream = logging.StreamHandler(sys.stdout if is_zero else sys.stderr)
        _add(root, stream, logging.INFO if is_zero else logging.WARNING)
        _add(root, _file(run.rank_log(attempt, ranks.node_rank, ranks.rank)), logging.INFO)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def _file(path: Path) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    return logging.FileHandler(path)


def _add(root: logging.Logger, handler: logging.Handler, level: int) -> None:
    setattr(handler, _MARK, True)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(FORMAT))
    root.addHandler(handler)
