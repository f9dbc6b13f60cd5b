"""`dtrain launch --array FIELD=VALUE,VALUE`: one run for each value."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared
from dtrain.console import out

if TYPE_CHECKING:
    from dtrain.launchers.array import Element
    from dtrain.launchers.base import ArrayCapable

_VALUE = re.compile(r"""(?:[^,\[\]{}"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+""")


def launch(
    job: str | None,
    fields: tuple[str, ...],
    options: dict[str, Any],
    *,
    at_once: int | None,
    detach: bool,
    quiet: bool,
) -> int:
    """Submit a run for each combination of values, and follow them. Return the exit code."""
    from dtrain.launchers.array import drive_array

    launcher, elements = prepare(job, fields, options)
    return drive_array(
        launcher, elements, out.say, at_once=at_once, detach=detach, quiet=quiet, paint=out.state
    )


def show(
    job: str | None, fields: tuple[str, ...], at_once: int | None, options: dict[str, Any]
) -> None:
    """Print the planned launch: each run's values, and the script."""
    launcher, elements = prepare(job, fields, options)
    for element in elements:
        click.echo(f"{element.plan.run_id}: {element.chosen}")
    plans = [element.plan for element in elements]
    for note in plans[0].notes:
        click.echo(note)
    click.echo("\n".join(launcher.preview_array(plans, at_once)))


def prepare(
    job: str | None, fields: tuple[str, ...], options: dict[str, Any]
) -> tuple[ArrayCapable, list[Element]]:
    """Return a plan for each combination of values. Errors are those of `plan_run`.

    Raises:
        UsageError: a value is given twice, or the launcher submits no arrays.
    """
    from dtrain.errors import UsageError
    from dtrain.launchers.array import Element
    from dtrain.launchers.base import ArrayCapable
    from dtrain.planning import plan_run

    choices = list(product(*(values(text) for text in fields)))
    if len(set(choices)) != len(choices):
        raise UsageError(
            f"--array: a value is given twice: {', '.join(fields)}", code="usage.array-repeats"
        )
    program = shared.job_of(job, options)
    asked, found = shared.request(options), list[Element]()
    launcher: Any = None
    for index, chosen in enumerate(choices):
        overrides = (*asked.overrides, *chosen)
        prepared = plan_run(program, replace(asked, overrides=overrides, suffix=f"-{index}"))
        launcher, plan = prepared.launcher, prepared.plan
        if not isinstance(launcher, ArrayCapable):
            raise UsageError(
                f"launcher {plan.launcher!r} has no --array; launcher 'slurm' has",
                code="usage.array-unsupported",
            )
        asked = replace(asked, run_id=plan.run_id.removesuffix(f"-{index}"))
        text = prepared.job.text
        found.append(Element(plan, prepared.job.spec, text, ", ".join(chosen)))
    return launcher, found


def values(text: str) -> list[str]:
    """Split `train.lr=0.1,0.01` into `train.lr=0.1` and `train.lr=0.01`.

    A list in brackets is one value.

    Raises:
        UsageError: it does not have this form.
    """
    from dtrain.errors import UsageError

    field, _, listed = text.partition("=")
    written = _VALUE.findall(listed)
    found = [value.strip() for value in written]
    if not field or not all(found) or not found or ",".join(written) != listed:
        raise UsageError(
            f"--array {text}: expected FIELD=VALUE,VALUE,…, for example train.lr=0.1,0.01",
            code="usage.array-syntax",
        )
    return [f"{field}={value}" for value in found]
