"""A module with a relative import, which fails or is killed where it is asked to."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from .beside import describe


def main() -> None:
    into, *asked = sys.argv[1:]
    describe(sys.modules["__main__"], Path(into))
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    print(f"ranks together: {int(total)}, arguments {asked}")
    if dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if "raise" in asked:
            raise ValueError("raised as asked")
        if "segfault" in asked:
            os.kill(os.getpid(), signal.SIGSEGV)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
