"""`python -P -m dtrain.train.doctor PARENT FOLDER [REFERENCE …]`: import torch and a job's classes.

`dtrain doctor` starts it, because only a process of the training plane imports these. It prints one
line of JSON for each import, and ends with the process PARENT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from dtrain.errors import DtrainError
from dtrain.procs import add_current_directory, die_with_parent
from dtrain.run import failures


def main() -> None:
    """Import what the command line names, and print the result of each import."""
    parent, folder, *references = sys.argv[1:]
    die_with_parent(int(parent))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the user's code prints is not the answer
    add_current_directory()
    steps = [("torch", _torch), *((each, _load_of(each, folder)) for each in references)]
    for name, step in steps:
        found = _tried(step)
        print(json.dumps({"name": name, **found}), file=out, flush=True)
        if "error" in found:
            break
    out.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the user's module must not keep it


def _tried(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of an import with the seconds that it took, or its error."""
    began = time.monotonic()
    try:
        return {**step(), "seconds": time.monotonic() - began}
    except BaseException as error:  # a module may call sys.exit
        frames = failures.user_frames(error.__traceback__, blank=isinstance(error, DtrainError))
        where = f"{frames[-1].file}:{frames[-1].line}" if frames else ""
        if isinstance(error, SyntaxError) and error.filename:
            where = f"{error.filename}:{error.lineno}"
        lines = str(error).splitlines() or ["without a message"]
        name = "" if isinstance(error, DtrainError) else f"{type(error).__name__}: "
        missing = isinstance(error, ModuleNotFoundError)
        return {"error": f"{name}{lines[0]}", "where": where, "is_missing_module": missing}


def _torch() -> dict[str, Any]:
    import torch

    is_available = torch.cuda.is_available()
    return {"version": torch.__version__, "gpus": torch.cuda.device_count() if is_available else 0}


def _load_of(reference: str, folder: str) -> Callable[[], dict[str, Any]]:
    def load() -> dict[str, Any]:
        from dtrain.train.importing import load_class

        load_class("task", reference, folder)
        return {}

    return load


if __name__ == "__main__":
    main()
