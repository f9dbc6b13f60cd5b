"""Completions that a shell may offer on a command line: runs, profiles, fields, options, files.

`--help` imports this module, so each function imports its own needs when a shell asks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _offers(names: Callable[[click.Context], Iterable[str]]) -> Completer:
    """Offer the names that begin with the written text. Offer none if they cannot be found."""

    @functools.wraps(names)
    def complete(
        context: click.Context, _parameter: click.Parameter, written: str
    ) -> list[CompletionItem]:
        try:
            return [CompletionItem(name) for name in names(context) if name.startswith(written)]
        except Exception:  # a shell would show a traceback in the middle of the line
            return []

    return complete


def files(
    _context: click.Context, _parameter: click.Parameter, written: str
) -> list[CompletionItem]:
    """Let the shell complete names of files."""
    return [CompletionItem(written, type="file")]


@_offers
def runs(context: click.Context) -> list[str]:
    from dtrain.run.remote.store import is_url
    from dtrain.run.rundir import list_runs

    folder = context.params.get("runs") or "runs"
    if is_url(folder):  # too slow for a key press
        return ["last"]
    return ["last", *(run.id for run in reversed(list_runs(folder)))]


def _offers_list(names: Callable[[click.Context], Iterable[str]]) -> Completer:
    """Offer the names for the last part of a list such as `run,state`."""

    @functools.wraps(names)
    def complete(
        context: click.Context, parameter: click.Parameter, written: str
    ) -> list[CompletionItem]:
        before, comma, last = written.rpartition(",")
        found = _offers(names)(context, parameter, last)
        return [CompletionItem(f"{before}{comma}{item.value}") for item in found]

    return complete


@_offers_list
def states(_context: click.Context) -> Iterable[str]:
    from dtrain.searching.query import STATES

    return STATES


@_offers_list
def columns(context: click.Context) -> list[str]:
    from dtrain.run.remote.store import is_url
    from dtrain.run.rundir import list_runs
    from dtrain.searching.fields import known
    from dtrain.searching.index import entry

    folder = context.params.get("runs") or "runs"
    newest = [] if is_url(folder) else list_runs(folder)[-1:]  # all are too slow for a key press
    return known(map(entry, newest))


@_offers
def profiles(_context: click.Context) -> list[str]:
    from pathlib import Path

    from dtrain.job.profile import profile_names, search_path

    return profile_names(search_path(Path()))


@_offers
def strategies(_context: click.Context) -> list[str]:
    from dtrain import catalog

    return catalog.names("strategy")


@_offers
def trainers(_context: click.Context) -> list[str]:
    from dtrain import catalog

    return [name for name in catalog.names("trainer") if name != catalog.SCRIPT]


@_offers
def fields(_context: click.Context) -> list[str]:
    """Offer every field of job.yaml that holds one value, for example `train.epochs=`."""
    from dtrain.job.errors import fields_of, model_at
    from dtrain.job.located import dotted
    from dtrain.job.spec import JobSpec

    return [f"{dotted(keys)}=" for keys in fields_of(JobSpec) if model_at(JobSpec, keys) is None]


@_offers
def options(context: click.Context) -> list[str]:
    """Offer every option of the launcher that is named on the line."""
    from dtrain.job.profile import load_profile
    from dtrain.launchers import base

    name = context.params.get("launcher") or "local"
    profile = load_profile(name, ".")
    model = base.load(profile.spec.launcher).options_model
    return [f"{option}=" for option in model.model_fields]
