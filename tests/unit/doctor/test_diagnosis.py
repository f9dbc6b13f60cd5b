"""How findings are shown."""

from __future__ import annotations

import pytest

from dtrain.codes import CODES
from dtrain.doctor import diagnosis
from dtrain.doctor.diagnosis import CHECK_CODES, Diagnosis, Status

FULL = Diagnosis("shm", "problem", "/dev/shm has 65.5 kB free of 65.5 kB, for 2 loader processes",
                 "mount -o remount,size=8G /dev/shm (for a container: --shm-size=8g)")  # fmt: skip


def test_every_check_is_explained() -> None:
    assert {*CHECK_CODES.values()} == {code for code in CODES if code.startswith("doctor.")}
    assert [*CHECK_CODES.values()] == [f"doctor.{name}" for name in CHECK_CODES]


def test_a_code_is_that_of_the_check_unless_the_error_has_one() -> None:
    assert Diagnosis("shm", "ok", "much").code == ""
    assert Diagnosis("shm", "warning", "little").code == "doctor.shm"
    assert Diagnosis("plan", "problem", "no", "", "job.unknown-field").code == "job.unknown-field"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_are_folded_between_words_and_aligned(width: int) -> None:
    lines = diagnosis.lines(FULL, width)
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("problem  shm       /dev/shm has ")
    assert all(line.startswith(" " * 19) for line in lines[1:])
    words = " ".join(" ".join(lines).split())
    assert words == f"problem shm {FULL.fact} [doctor.shm] try: {FULL.remedy}"
    assert len(lines) == {60: 4, 80: 4, 200: 2}[width]


def test_a_file_has_no_width_and_a_terminal_has_colours() -> None:
    assert len(diagnosis.lines(FULL, None)) == 2
    painted = diagnosis.lines(FULL, None, lambda text, colour: f"<{colour}>{text}</>")
    assert painted[0].startswith("<red>problem</>  shm ")
    assert painted[0].endswith("<dim>[doctor.shm]</>")


@pytest.mark.parametrize(
    ("statuses", "worst", "summary"),
    [
        ([], "ok", "0 checks: no problem"),
        (["ok"], "ok", "1 check: no problem"),
        (["ok", "warning", "warning"], "warning", "3 checks: 2 warnings"),
        (["problem", "ok", "warning"], "problem", "3 checks: 1 problem, 1 warning"),
    ],
)
def test_the_worst_decides(statuses: list[Status], worst: Status, summary: str) -> None:
    found = [Diagnosis("shm", status, "") for status in statuses]
    assert diagnosis.worst(found) == worst
    assert diagnosis.summary(found) == summary
