"""Charts of any values: complete pictures, few points, round ticks."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest

from dtrain.page.chart import Line, Mark, Point, chart, safe


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[], [1.0], [2.0, 2.0, 2.0], [None, math.nan, 0.0, 1e-9, 1e300], [-math.inf], [-5.0, 1e-300]],
)
def test_any_values_can_be_drawn(values: list[float | None], log: bool) -> None:
    points: list[Point] = list(enumerate(values, 1))
    picture = chart([Line("a", points, "good")], title="<t>", log=log, marks=[Mark("limit", 1e-5)])
    ElementTree.fromstring(picture)
    assert "nan" not in picture
    assert "inf" not in picture


def test_a_gap_is_not_drawn_over() -> None:
    points: list[Point] = [(1, 1.0), (2, 2.0), (3, None), (4, 4.0)]
    picture = chart([Line("a", points, "run0")], title="t")
    drawn = [each.partition('"')[0].split() for each in picture.split('points="')[1:]]
    assert [len(each) for each in drawn] == [2, 2]  # a single point is drawn twice, as a dot
    assert drawn[1][0] == drawn[1][1]


def test_of_many_points_the_lowest_and_highest_stay() -> None:
    points: list[Point] = [(step, 1.0) for step in range(100_000)]
    points[31_234], points[77_777] = (31_234, 9.0), (77_777, -9.0)
    picture = chart([Line("a", points, "run0")], title="t")
    ((_, _, kept),) = json.loads(picture.split('json">')[1].split("</script>")[0])
    assert len(kept) < 900
    assert [31_234, 9.0] in kept
    assert [77_777, -9.0] in kept
    assert kept == sorted(kept)
    assert (kept[0][0], kept[-1][0]) == (0, 99_999)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 2.3], ["0", "1", "2"]),
        ([0.1, 0.1], ["0.09", "0.10", "0.11"]),
        ([1000.0, 6000.0], ["2,000", "4,000", "6,000"]),
        ([1e-7, 5e-7], ["2e-07", "4e-07"]),
    ],
)
def test_ticks_are_round_numbers(values: list[float], ticks: list[str]) -> None:
    picture = chart([Line("a", list(enumerate(values)), "run0")], title="t")
    shown = picture.split('class="y">')[1].split("</div>")[0]
    found = [each.partition("<")[0] for each in shown.split(">") if each[:1].isdigit()]
    assert set(ticks) <= set(found), found


def test_data_cannot_end_its_script() -> None:
    assert "</script>" not in safe(json.dumps("</script><b>"))
    assert json.loads(safe(json.dumps("</script><b>"))) == "</script><b>"
