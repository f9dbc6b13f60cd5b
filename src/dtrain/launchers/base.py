"""What a launcher is. What only some can do are protocols of their own, asked for by isinstance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from dtrain import catalog
from dtrain.job.launcher_options import AnyOptions, LauncherOptions
from dtrain.launch_plan import Facts, LaunchPlan
from dtrain.run.rundir import RunDir


class Launch(Protocol):
    """A launch that has been started, in the hands of whoever follows it."""

    def poll(self) -> int | None:
        """The exit code once nothing of it runs any more, else None. Never blocks."""

    def stop(self) -> None:
        """Ask all workers to leave in order."""

    def kill(self) -> None:
        """End everything at once."""


class Launcher(Protocol):
    """Where processes start. Has no state: what must be remembered is in the run directory."""

    options_model: type[LauncherOptions]
    """The `options:` of its profiles."""

    def complete(self, plan: LaunchPlan, facts: Facts) -> LaunchPlan:
        """Add node names, the rendezvous endpoint and all commands. Pure.

        Raises:
            PlanError: an option is missing or makes no sense; says which flag sets it.
        """

    def start(self, plan: LaunchPlan) -> Launch:
        """Start exactly that plan; its run directory is already written.

        Raises:
            LaunchError: it cannot be started.
        """

    def is_running(self, run: RunDir) -> bool:
        """Whether the run's newest attempt is still going."""

    def cancel(self, run: RunDir, timeout_s: float) -> None:
        """End the run in order, and by force once `timeout_s` seconds have passed."""


@runtime_checkable
class Surveying(Protocol):
    """Asks its cluster, before planning, for what a plan depends on."""

    def survey(self, facts: Facts, options: AnyOptions) -> Facts:
        """The facts with those of the cluster; as they were where it does not answer."""


@runtime_checkable
class Detachable(Protocol):
    """Has launches that go on without the command that started them."""

    def can_detach(self, plan: LaunchPlan) -> bool:
        """Whether this one does."""


@runtime_checkable
class HostChecking(Protocol):
    """Starts processes on this host, which may not have what they need."""

    def lacking(self, plan: LaunchPlan) -> str:
        """What this host lacks for the plan, as a sentence; empty when nothing."""


@runtime_checkable
class Previewable(Protocol):
    """Has more to show of a plan than its commands, as a script that is submitted."""

    def preview(self, plan: LaunchPlan) -> list[str]:
        """Lines for `dtrain plan`."""


@runtime_checkable
class Describable(Protocol):
    """Knows more of a run than its state, as how its job stands in a queue."""

    def describe(self, run: RunDir) -> dict[str, str]:
        """Fields for `dtrain status`."""


@runtime_checkable
class Dependable(Protocol):
    """Can start a run when the job of another has succeeded."""

    def dependency_on(self, run: RunDir) -> str | None:
        """What option `dependency` is to be; None when there is nothing to wait for.

        Raises:
            PlanError: the run has no job, or it has failed.
        """


class Submitted(Launch, Protocol):
    """A launch that goes on without us."""

    said: str
    """How it stands, for people."""


@runtime_checkable
class ArrayCapable(Protocol):
    """Submits several runs as one array."""

    def preview_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
        """Lines for `dtrain launch --array --dry-run`."""

    def start_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> Sequence[Submitted]:
        """Submit runs whose directories are written, as one array; a launch for each.

        Args:
            plans: of the elements, in order.
            at_once: how many may run at a time; None: as many as there is room for.

        Raises:
            PlanError: it is refused.
        """


class Several:
    """Several launches as one: over when all are, with the worst exit code."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self._launches = launches

    def poll(self) -> int | None:
        codes = [launch.poll() for launch in self._launches]
        return None if None in codes else max(code for code in codes if code is not None)

    def stop(self) -> None:
        for launch in self._launches:
            launch.stop()

    def kill(self) -> None:
        for launch in self._launches:
            launch.kill()


def load(name: str) -> Launcher:
    """The launcher of that name.

    Raises:
        PlanError: there is none.
    """
    launcher: Launcher = catalog.load("launcher", name)()
    return launcher
