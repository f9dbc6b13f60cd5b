"""Mistakes in tasks: `verify` finds each, names its class and cause, and lets its twin pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dtrain.verification.judge import Judge
from dtrain.verification.layouts import Layout
from support import JOBS
from support.mistakes import MISTAKES, REFUSED, Mistake
from support.warm_runner import WarmRunner, of_one


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(class, whether it makes its mistake) → its judge, with the reference run once."""
    made: dict[tuple[str, bool], Judge] = {}

    def judge(name: str, mistake: bool) -> Judge:
        if (name, mistake) not in made:
            runner = WarmRunner(
                JOBS / "mistakes" / "job.yaml",
                overrides=(f"task=mistakes.py:{name}", f"args.mistake={str(mistake).lower()}"),
                max_train_samples=29,  # 12, 12 and 5 a step: the fourth begins a new epoch
                max_eval_samples=17,
                keep=tmp_path_factory.mktemp("runs"),
            )
            made[name, mistake] = Judge(runner)
        return made[name, mistake]

    return judge


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.id)
def test_a_mistake_is_found_and_its_cause_named(judges: Any, mistake: Mistake) -> None:
    result = of_one(judges(mistake.name, True), mistake.layout)
    assert result.verdict == "different", result
    assert result.finding is not None
    found = result.finding
    assert (found.rule, found.step) == (mistake.rule, mistake.step), found
    assert mistake.text in f"{found.observation} {found.likely_cause}", found


@pytest.mark.parametrize("mistake", REFUSED, ids=lambda mistake: mistake.id)
def test_a_mistake_that_a_launch_refuses_is_told_in_its_words(
    judges: Any, mistake: Mistake
) -> None:
    result = of_one(judges(mistake.name, True), mistake.layout)
    assert result.verdict == "failed", result
    assert mistake.text in result.failure


@pytest.mark.parametrize(
    ("name", "layout"),
    list(dict.fromkeys((mistake.name, mistake.layout) for mistake in [*MISTAKES, *REFUSED])),
    ids=lambda value: value.name if isinstance(value, Layout) else value,
)
def test_the_same_task_without_the_mistake_passes(judges: Any, name: str, layout: Layout) -> None:
    result = of_one(judges(name, False), layout)
    assert result.passed, result
    assert result.finding is None
