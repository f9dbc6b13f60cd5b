"""`dtrain verify`: check that the training is the same in every layout."""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import completers
from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.errors import UsageError, quoted

if TYPE_CHECKING:
    from dtrain.verification.session import Progress


def _list(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> list[str]:
    return [part.strip() for text in given for part in text.split(",") if part.strip()]


def _is_count(text: str) -> bool:
    from dtrain.job.units import is_number

    return is_number(text) and int(text) >= 1


def _numbers(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> list[int]:
    numbers = []
    for text in _list(context, option, given):
        if not _is_count(text):
            raise click.BadParameter(f"{quoted(text)} is not a number from 1 on", context, option)
        numbers.append(int(text))
    return numbers


def _samples(_context: click.Context, _option: click.Parameter, given: str) -> int | str:
    if given in ("all", "auto"):
        return given
    if not _is_count(given):
        raise click.BadParameter(f"{quoted(given)} is not a number of samples, 'auto' or 'all'")
    return int(given)


def _one_job(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> str:
    numbers = [text for text in given if _is_count(text)]
    if len(given) > 1 and numbers:
        text = f"--gpus takes no number in verify; use --gpus --procs {numbers[0]}"
        raise UsageError(text, code="usage.unexpected-argument")
    if len(given) > 1:
        text = f"one job at a time, not {' '.join(given)}"
        raise UsageError(text, code="usage.unexpected-argument")
    if given[0].endswith(".py"):
        text = f"verify needs a job.yaml with a task; {quoted(given[0])} is a script"
        raise UsageError(text, code="verify.script")
    return given[0]


def _writable(context: click.Context, option: click.Parameter, given: str | None) -> str | None:
    if given is not None:
        folder = os.path.dirname(os.path.abspath(given))
        if not os.path.isdir(folder):
            raise click.BadParameter(f"no such directory: {folder}", context, option)
        if not os.access(given if os.path.exists(given) else folder, os.W_OK):
            raise click.BadParameter(f"cannot be written: {given}", context, option)
    return given


@click.command(
    "verify",
    cls=shared.Command,
    examples=(
        ("dtrain verify job.yaml", "Every strategy and size that this machine can run."),
        ("dtrain verify --strategy ddp,fsdp --procs 2 job.yaml", "Only these."),
    ),
)
@click.argument(
    "job",
    nargs=-1,
    required=True,
    callback=_one_job,
    metavar="JOB",
    shell_complete=completers.files,
)
@shared.option(
    shared.WHAT,
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Set a field of job.yaml, for example train.global_batch_size=32; repeatable.",
)
@shared.option(
    shared.WHAT,
    "--steps",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    metavar="K",
    help="Optimizer steps of each run.",
)
@shared.option(
    shared.WHAT,
    "--epoch-samples",
    default="auto",
    callback=_samples,
    metavar="N|all",
    help="Samples of an epoch.  [default: so few that the runs have a short last batch and a "
    "second epoch]",
)
@shared.option(
    shared.WHAT,
    "--trainer",
    "trainers",
    multiple=True,
    callback=_list,
    metavar="NAME,…",
    help="Only these trainers.",
)
@shared.option(
    shared.WHAT,
    "--deep",
    is_flag=True,
    help="Run everything in fp64: rounding differences nearly vanish, real errors stay.",
)
@shared.option(
    shared.SIZE,
    "--nodes",
    multiple=True,
    callback=_numbers,
    metavar="N,…",
    help="Numbers of nodes, for example 1,2.",
)
@shared.option(
    shared.SIZE,
    "--procs",
    multiple=True,
    callback=_numbers,
    metavar="N,…",
    help="Processes per node, for example 1,2,4.",
)
@shared.option(shared.SIZE, "--gpus", is_flag=True, help="Give each process a GPU.")
@shared.option(
    shared.SIZE,
    "--strategy",
    "strategies",
    multiple=True,
    callback=_list,
    metavar="NAME,…",
    help="Only these strategies.",
)
@shared.option(
    shared.SIZE,
    "--only",
    is_flag=True,
    help="Run only what is named: not also micro-batches, a resumed run and strategy exact.",
)
@shared.option(
    shared.WHERE,
    "--launcher",
    "launchers",
    multiple=True,
    callback=_list,
    metavar="NAME,…",
    help="Where processes start; as for `dtrain launch`.",
)
@shared.option_option
@shared.option(
    shared.WHERE,
    "--keep",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Keep the run directories here.",
)
@shared.option(
    shared.WATCH,
    "--html",
    type=click.Path(dir_okay=False),
    callback=_writable,
    metavar="FILE",
    help="Write the report as a page, with pictures.",
)
@shared.json_option
def command(html: str | None, as_json: bool, **options: Any) -> int:  # fmt: skip
    """Run JOB for a few steps under every strategy and size available here, and compare: is each
    the same training?

    Samples, losses, gradients and parameters are compared with those of a single process. What
    differs is run again in fp64, where rounding differences nearly vanish and real errors stay.
    The exit code is 1 if one of them is not the same training.
    """
    from dtrain.verification import text
    from dtrain.verification.session import Session

    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # temporary directories must be removed
    waiting = _Waiting()
    shows = not as_json and out.on_terminal()
    with Session(**options, watch=waiting.show if shows else None) as session:
        for part in text.run_and_report(session, shutil.get_terminal_size().columns, out.paint):
            if not as_json:
                waiting.echo(part)
    report = session.report
    if as_json:
        shared.print_json(report.to_json())
    if html is not None:
        from dtrain.verification import html as page

        page.write(report, html)
        if not as_json:
            click.echo(f"written: {html}")
    return 0 if report.same else 1


class _Waiting:
    """The last line of a terminal, which shows what runs, and for how long."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._began = 0.0
        self._shown = ""

    def show(self, progress: Progress) -> None:
        """Write the line again if it has changed."""
        from dtrain.verification import text

        if progress != self._progress:
            self._progress, self._began = progress, time.monotonic()
        width = shutil.get_terminal_size().columns
        line = text.waiting(progress, time.monotonic() - self._began, width)
        if line != self._shown:
            click.echo(f"\r\x1b[K{line}", nl=False)
            self._shown = line

    def echo(self, line: str) -> None:
        click.echo(("\r\x1b[K" if self._shown else "") + line)
        self._shown = ""
