"""The interface of launchers. Optional features are separate protocols, checked with isinstance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dtrain import catalog
from dtrain.doctor.diagnosis import Diagnosis
from dtrain.job.launcher_options import AnyOptions, LauncherOptions
from dtrain.launch_plan import Facts, LaunchPlan
from dtrain.run.rundir import RunDir


class Launch(Protocol):
    """A launch that has been started, controlled by the process that follows it."""

    def poll(self) -> int | None:
        """Return the exit code once none of its processes runs, else None. This never blocks."""

    def stop(self) -> None:
        """Ask all workers to exit cleanly."""

    def kill(self) -> None:
        """End everything at once."""


class Launcher(Protocol):
    """A way to start processes. It has no state: everything to remember is in the run directory."""

    options_model: type[LauncherOptions]
    """The model of the `options:` of its profiles."""

    def complete(self, plan: LaunchPlan, facts: Facts) -> LaunchPlan:
        """Add node names, the rendezvous endpoint and all commands. This is a pure function.

        Raises:
            PlanError: an option is missing or makes no sense; the message names the flag that sets
                it.
        """

    def start(self, plan: LaunchPlan) -> Launch:
        """Start exactly that plan. Its run directory is already written.

        Raises:
            LaunchError: it cannot be started.
        """

    def is_running(self, run: RunDir) -> bool:
        """Return whether the run's newest attempt is still running."""

    def cancel(self, run: RunDir, timeout_s: float) -> None:
        """End the run cleanly, and by force once `timeout_s` seconds have passed."""


@runtime_checkable
class Surveying(Protocol):
    """A launcher that queries its cluster, before planning, for facts that the plan depends on."""

    def survey(self, facts: Facts, options: AnyOptions) -> Facts:
        """Return the facts with those of the cluster added, or unchanged if the cluster does not
        answer."""


@runtime_checkable
class Detachable(Protocol):
    """A launcher whose launches can continue without the command that started them."""

    def can_detach(self, plan: LaunchPlan) -> bool:
        """Return whether the launch of this plan does."""


@runtime_checkable
class HostChecking(Protocol):
    """A launcher that starts processes on this host, which may lack what they need."""

    def lacking(self, plan: LaunchPlan) -> str:
        """Return a sentence about what this host lacks for the plan, or an empty text."""


@runtime_checkable
class Diagnosing(Protocol):
    """A launcher that can check its cluster before a launch."""

    def diagnose(self, plan: LaunchPlan) -> Diagnosis:
        """Return what `dtrain doctor` reports of the cluster for this plan."""


@runtime_checkable
class Previewable(Protocol):
    """A launcher that can show more of a plan than its commands, for example a script to submit."""

    def preview(self, plan: LaunchPlan) -> list[str]:
        """Return lines for `dtrain plan`."""


@runtime_checkable
class Describable(Protocol):
    """A launcher that knows more of a run than its state, for example its job's state in a
    queue."""

    def describe(self, run: RunDir) -> dict[str, str]:
        """Return fields for `dtrain status`."""


@runtime_checkable
class Dependable(Protocol):
    """A launcher that can start a run after the job of another run has succeeded."""

    def dependency_on(self, run: RunDir) -> str | None:
        """Return the value for option `dependency`, or None when there is nothing to wait for.

        Raises:
            PlanError: the run has no job, or it has failed.
        """


class Submitted(Launch, Protocol):
    """A launch that continues without the launching process."""

    description: str
    """The state of the launch, for users. It is empty until it is known."""


@dataclass(frozen=True)
class Slot:
    """The part of a launcher's machines that one run of a sweep has while it runs."""

    cores: int | None = None
    """The number of this host's cores. None means all."""
    gpus: str | None = None
    """The GPUs of this host, as CUDA_VISIBLE_DEVICES names them. None means all."""


@runtime_checkable
class Shareable(Protocol):
    """A launcher whose machines can train several runs side by side."""

    def slots(self, plan: LaunchPlan, runs: int, at_once: int | None) -> list[Slot]:
        """Return a slot for each run that can run at the same time.

        Args:
            plan: the plan of a run that needs as much as any other.
            runs: how many runs there are.
            at_once: how many the user wants at the same time. None means as many as find place.
        """


@runtime_checkable
class ArrayCapable(Protocol):
    """A launcher that can submit several runs as one array."""

    def preview_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
        """Return lines for `dtrain launch --sweep --dry-run`."""

    def start_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> Sequence[Submitted]:
        """Submit runs whose directories are written, as one array. Return a launch for each.

        Args:
            plans: the plans of the elements, in the order of the array.
            at_once: the number of runs that may run at a time. None means no limit.

        Raises:
            PlanError: it is refused.
        """


class LaunchGroup:
    """Several launches as one. It ends when all have ended, with the worst exit code."""

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
    """Return the launcher of that name.

    Raises:
        PlanError: there is none.
    """
    launcher: Launcher = catalog.load("launcher", name)()
    return launcher
