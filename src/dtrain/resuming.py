"""Plans the next attempt of a run, and refuses options that make no sense for it."""

from __future__ import annotations

from dtrain.errors import UsageError
from dtrain.launchers import status
from dtrain.planning import Prepared, Request, plan_attempt
from dtrain.run.attempts import Handle, Held
from dtrain.run.remote.checkpoints import RemoteCheckpoints
from dtrain.run.rundir import RunDir


def plan_resume(run: RunDir, request: Request) -> Prepared:
    """Plan the next attempt of a run; errors as for `plan_run`.

    Raises:
        UsageError: the run is running or has finished, or an option would have no effect.
    """
    _check_state(run, request)
    _refuse_without_effect(run, request)
    prepared = plan_attempt(run, request)
    spec = prepared.job.spec
    _refuse_to_end_before(run, spec.train.steps if spec.program is None else None)
    if spec.profile is not None and any(f.startswith("profile") for f in fields_of(request)):
        _refuse_passed(run, spec.profile.steps)
    return prepared


def _check_state(run: RunDir, request: Request) -> None:
    """Refuse options that make no sense for the state of this run.

    If there are several commands, one per node, only the one of node 0 decides.
    """
    if (rank := request.options.get("node_rank")) and str(rank.value) != "0":
        return
    state, _ = status.state_of(run)
    if state == "running":
        raise Held(run, Handle.read(run))
    if state == "succeeded" and not any(
        field.partition(".")[0] == "train" for field in fields_of(request)
    ):
        raise UsageError(
            f"run {run.id} has finished; to train longer, set a later end, for example "
            "--set train.epochs=20",
            code="run.finished",
        )


def _refuse_without_effect(run: RunDir, request: Request) -> None:
    """Refuse settings that only a new run can have."""
    why = {
        "name": "a run keeps its name",
        "checks.inject": "faults are injected only in a run's first attempt",
    }
    if {"checkpoint.init_from", "checkpoint.init_strict"} & fields_of(request) and _has_any(run):
        of_start = "the run has a checkpoint, and continues from that"
        why |= {"checkpoint.init_from": of_start, "checkpoint.init_strict": of_start}
    for field in fields_of(request):
        if field in why:
            raise UsageError(
                f"--set {field} has no effect here: {why[field]}; launch a new run",
                code="run.setting-without-effect",
            )


def _has_any(run: RunDir) -> bool:
    """Return whether the run has a checkpoint."""
    remote = RemoteCheckpoints.of(run)
    return any(run.checkpoints.glob("step-*") if remote is None else remote.folders())


def fields_of(request: Request) -> set[str]:
    """Return the fields of the job that the command sets."""
    return {text.partition("=")[0].strip() for text in request.overrides} | {*request.fields}


def _refuse_to_end_before(run: RunDir, end: int | None) -> None:
    """Refuse an end before the newest checkpoint. The workers check an end given in epochs."""
    newest = _newest_step(run)
    if end is not None and end < newest:
        raise UsageError(
            f"run {run.id} has a checkpoint of step {newest}, which is after train.steps={end}; "
            "set a later end",
            code="run.end-passed",
        )


def _refuse_passed(run: RunDir, steps: tuple[int, int]) -> None:
    first, last = steps
    newest = _newest_step(run)
    if last <= newest:
        raise UsageError(
            f"run {run.id} continues after step {newest}, so steps {first}:{last} will not be "
            "trained again; profile later ones",
            code="run.profile-passed",
        )


def _newest_step(run: RunDir) -> int:
    """Return the step of the newest checkpoint; 0 if there is none."""
    names = (path.name.removeprefix("step-") for path in run.checkpoints.glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)
