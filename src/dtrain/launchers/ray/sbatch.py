"""`python -m dtrain.launchers.ray.sbatch`: print a batch script with a Ray cluster in it.

For who has Slurm but works with Ray; `dtrain launch --launcher slurm` needs no Ray. As in
`python -m dtrain.launchers.ray.sbatch --nodes 2 --cpus 8 -- --nodes 2 job.yaml | sbatch`: what
comes after `--` is for `dtrain launch --launcher ray`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from dtrain.assets import asset_dir
from dtrain.launchers import templates


def main() -> None:
    """Print the script of the arguments."""
    print(render(sys.argv[1:]), end="")


def render(arguments: Sequence[str]) -> str:
    """The script of these arguments, of which `--help` tells."""
    parser = argparse.ArgumentParser(
        prog="python -m dtrain.launchers.ray.sbatch", description=__doc__
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the Slurm job")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of each node")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each node")
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="FLAG=VALUE", help="any flag of sbatch"
    )
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help="of shell")
    parser.add_argument("launch", nargs="+", help="arguments of `dtrain launch --launcher ray`")
    given = parser.parse_args(arguments)
    for flag in given.slurm:
        if not flag.isprintable():
            parser.error(f"--slurm {flag!r}: a line break cannot stand in a batch script")
    flags = [f"nodes={given.nodes}", f"cpus-per-task={given.cpus}", *given.slurm]
    if given.gpus:
        flags.insert(0, f"gpus-per-node={given.gpus}")
    command = [
        *(sys.executable, "-P", "-m", "dtrain.launchers.ray.in_slurm"),
        *(f"--cpus={given.cpus}", f"--gpus={given.gpus}", "--", *given.launch),
    ]
    return templates.fill(
        asset_dir("slurm") / "ray.sbatch.j2",
        {
            "sbatch_options": [f"--{flag}" for flag in flags],
            "setup_lines": given.setup,
            "command": shlex.join(command),
        },
    )


if __name__ == "__main__":
    main()
