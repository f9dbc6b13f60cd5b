"""`dtrain plan`: everything that a launch would do, and the source of each value."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared
from dtrain.words import counted

if TYPE_CHECKING:
    from dtrain.launch_plan import Command, LaunchPlan
    from dtrain.planning import Prepared


@click.command(
    "plan",
    cls=shared.LaunchCommand,
    examples=(
        ("dtrain plan --explain job.yaml", "What a launch would do, and where each value is from."),
        ("dtrain plan --launcher slurm --nodes 2 job.yaml", "The batch script of a launch."),
    ),
)
@shared.job_argument
@shared.script_arguments
@shared.job_options
@shared.preflight_option
@shared.explain_option
@shared.option(
    shared.MORE, "--write", is_flag=True, help="Write the run directory, to start workers by hand."
)
@shared.json_option
def command(job: str | None, explain: bool, write: bool, as_json: bool, **options: Any) -> None:
    """Show every command, variable and file of a launch of JOB; start nothing."""
    from dtrain.planning import plan_run

    prepared = plan_run(shared.job_of(job, options), shared.request(options))
    if write:
        from dtrain.launchers import prepare

        prepare.prepare(prepared.plan, prepared.job.spec, prepared.job.text)
    show(prepared, as_json, explain, written=write)


def show(prepared: Prepared, as_json: bool, explain: bool, *, written: bool = False) -> None:
    plan = prepared.plan
    if as_json:
        value = {"plan": plan.to_json()}
        if explain:
            value["sources"] = prepared.job.sources
            value["option_sources"] = _option_sources(prepared)
        shared.print_json(value)
        return
    lines = [*_lines(plan, written), *plan.notes, *_preview(prepared)]
    if short := prepared.lacking:
        lines.append(f"this cannot be launched on this host: {short}")
    click.echo("\n".join(lines))
    if explain:
        click.echo("\n".join(_explained(prepared)))


def _preview(prepared: Prepared) -> list[str]:
    from dtrain.launchers.base import Previewable

    launcher = prepared.launcher
    return launcher.preview(prepared.plan) if isinstance(launcher, Previewable) else []


def _lines(plan: LaunchPlan, written: bool) -> list[str]:
    nodes = counted(plan.nodes, "node", least=plan.min_nodes)
    what = f"{plan.trainer} × {plan.strategy} × {plan.launcher}"
    procs = counted(plan.procs_per_node, "process", "processes")
    ranks = counted(plan.world_size, "rank")
    threads = counted(plan.threads_per_proc, "thread")
    lines = [
        f"run        {plan.run_id} (attempt {plan.attempt}): {what}",
        f"size       {nodes} × {procs} = {ranks} on {plan.device}, {plan.backend}, {threads} each",
    ]
    if plan.program:
        lines.insert(1, f"program    {shlex.join(plan.program)}")
    if plan.replicas > 1:
        lines.append(f"replicas   {plan.replicas} in the one process")
    for node_rank, name in enumerate(plan.node_names):
        first = node_rank * plan.procs_per_node
        last = first + plan.procs_per_node - 1
        spread = f"rank {first}" if first == last else f"ranks {first}-{last}"
        lines.append(f"node {node_rank:<5} {name or '(named when it joins)'}: {spread}")
    lines += [
        f"rendezvous {_endpoint(plan)}; nodes wait {plan.join_timeout_s:.0f} s for one another",
        f"restarts   {f'at most {plan.max_restarts}' if plan.max_restarts else 'none'}",
        *(["preflight  all nodes, before the workers start"] if plan.preflight else []),
        "files",
        *(f"  {path}" for path in plan.files),
        "environment of every worker, in addition to RANK, WORLD_SIZE and the like",
        *(f"  {name}={value}" for name, value in plan.worker_env.items()),
        "commands",
        *(f"  {_command(each)}" for each in plan.commands if not each.by_hand),
    ]
    by_hand = [each for each in plan.commands if each.by_hand]
    if by_hand:
        lines += ["commands to start the workers by hand, without dtrain's agents"]
        if not written:
            same = f"the same `dtrain plan` with --write --run-id {shlex.quote(plan.run_id)}"
            lines.append(f"  # first, where all hosts see it: {same}")
        lines += [f"  {_command(each)}" for each in by_hand]
    return lines


def _endpoint(plan: LaunchPlan) -> str:
    if not plan.rdzv_port:
        return "on the first node of the job, at a port that is free there"
    return f"{plan.rdzv_host}:{plan.rdzv_port}"


def _command(command: Command) -> str:
    settings = [f"{name}={shlex.quote(value)}" for name, value in command.env.items()]
    line = " ".join([*(["env", *settings] if settings else []), *map(shlex.quote, command.argv)])
    return f"{line}  # on {command.where}"


def _explained(prepared: Prepared) -> list[str]:
    tables = [
        ("where each value came from", prepared.job.spec, prepared.job.sources),
        (
            f"options of launcher {prepared.plan.launcher!r}",
            prepared.plan.options,
            _option_sources(prepared),
        ),
    ]
    lines: list[str] = []
    for title, values, sources in tables:
        width = max(map(len, sources), default=0)
        rows = [(name, _value(values, name), source) for name, source in sources.items()]
        lines += ["", title] if rows else []
        lines += [f"  {name:<{width}}  {value!s:<12}  {source}" for name, value, source in rows]
    return lines


def _option_sources(prepared: Prepared) -> dict[str, str]:
    """Return where each option of the launcher was written, or `default`."""
    options, written = prepared.plan.options, prepared.plan.sources
    names = (
        name for name in type(options).model_fields if not isinstance(getattr(options, name), dict)
    )
    sections = (
        name
        for name in written
        if name.partition(".")[0] in type(options).model_fields and "." in name
    )
    return {name: written.get(name, "default") for name in (*names, *sections)}


def _value(spec: Any, field: str) -> Any:
    from dtrain.environ import shown

    name = field.rpartition(".")[2]
    value = spec
    for part in field.split("."):
        if value is None:
            return None
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return shown(name, value)
