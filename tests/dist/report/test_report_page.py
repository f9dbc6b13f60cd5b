"""The page of `dtrain report` in a real browser, of long runs that were written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dtrain.report.history import read
from dtrain.report.page import page, page_of
from dtrain.run.rundir import RunDir
from support import ROOT
from support.browser import hover, opened


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about two runs of 4,000 steps, of 8 and of 12 ranks."""
    folder = tmp_path_factory.mktemp("report")
    runs = [folder / "runs" / name for name in ("first-000000", "second-<b>&\"'")]
    benchmark.write_run(runs[0], 4000, 8)
    benchmark.write_run(runs[1], 4000, 12)
    file = folder / "page.html"
    file.write_text(page_of([RunDir(run) for run in runs]), encoding="utf-8")
    return file


def test_hover_values(written: Path) -> None:
    with opened(written) as shown:
        text = hover(shown, ".plot")
        assert "step 2000" in text
        assert "first-000000 train: 0.0" in text
        assert "second-<b>&\"' train: 0.0" in text
        slow = hover(shown, ".heat svg", x=0.25, y=1.5 / 8)
        assert slow.startswith("rank 1, 0:01:")
        assert slow.endswith(" ms")
        shown.mouse.move(0, 0)
        assert shown.locator("#hover").is_hidden()


def test_the_slow_rank_is_darker(written: Path) -> None:
    """In the first heat map, the row of rank 1 has the strongest shade; the others have weak."""
    with opened(written) as shown:
        strength = shown.evaluate(
            """() => {
                const found = {};
                for (const path of document.querySelector('.heat').querySelectorAll('path'))
                    for (const cell of path.getAttribute('d').matchAll(/M(\\d+) (\\d+)h/g))
                        (found[cell[2]] ??= []).push(Number(path.style.opacity));
                return found;
            }"""
        )
        mean = {row: sum(each) / len(each) for row, each in strength.items()}
        assert max(mean, key=lambda row: mean[row]) == "1"
        assert mean.pop("1") > 2 * max(mean.values())


@pytest.mark.parametrize("width", [390, 1200, 2400])
def test_no_width_makes_the_page_scroll_sideways(written: Path, width: int) -> None:
    with opened(written, width=width) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        box = shown.locator(".plot svg").first.bounding_box()
        assert box is not None
        assert box["width"] > 200


def test_light_and_dark(written: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        with opened(written, scheme=scheme) as shown:  # type: ignore[arg-type]
            colours[scheme] = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}


def test_every_picture_has_a_title_and_a_table(written: Path) -> None:
    with opened(written) as shown:
        pictures, titles = shown.locator("svg"), shown.locator("svg > title")
        assert pictures.count() == titles.count() > 8
        assert shown.locator("table").count() >= 7
        folded = shown.locator("summary").all_inner_texts()
        assert "The values as a table" in folded
        shown.locator("summary").first.click()
        cells = shown.locator("details[open] td").all_inner_texts()
        assert "4000" in cells


def test_a_long_run_of_many_ranks_is_a_small_page(benchmark: Any, tmp_path: Path) -> None:
    benchmark.write_run(tmp_path / "runs" / "long-000000", 20_000, 64)
    history = read(RunDir(tmp_path / "runs" / "long-000000"))
    assert len(history.series["train", "loss"]) == 20_000
    assert history.phases.straggler() is not None
    assert len(page([history])) < 5_000_000
