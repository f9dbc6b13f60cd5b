import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.job.units import parse_duration, parse_nodes, parse_real, parse_size, parse_whole


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (90, 90),
        (0.5, 0.5),
        ("90", 90),
        ("90s", 90),
        ("30m", 1800),
        ("30 min", 1800),
        ("2h", 7200),
        ("2 hours", 7200),
        ("1d", 86400),
        ("1h30m", 5400),
        ("1h 30m 5s", 5405),
        ("1.5h", 5400),
        ("0.1s", 0.1),
        ("01:30:00", 5400),
        ("1:30", 90),
        ("90:00", 5400),
        ("2-01:00:00", 2 * 86400 + 3600),
        (" 30M ", 1800),
    ],
)
def test_durations_as_people_write_them(written: object, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    "written",
    ["", " ", "h", "3 fortnights", "30m1h", "1h1h", "-5s", "1:60", "1:60:00", "2-25:00:00", "1e3s"],
)
def test_what_is_no_duration(written: str) -> None:
    with pytest.raises(ValueError, match=f"duration.*{written!r}"):
        parse_duration(written)


@pytest.mark.parametrize("value", [True, None, [], math.inf, math.nan])
def test_other_values_are_no_durations(value: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(value)


@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_duration_spellings_agree(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert parse_duration(f"{days}d{hours}h{minutes}m{seconds}s") == total
    assert parse_duration(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == total


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (512, 512),
        (1e9, 10**9),
        ("512", 512),
        ("512B", 512),
        ("512MB", 512 * 10**6),
        ("16GB", 16 * 10**9),
        ("16 gb", 16 * 10**9),
        ("4GiB", 4 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("0.1TiB", None),
    ],
)
def test_sizes(written: object, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="size"):
            parse_size(written)
    else:
        assert parse_size(written) == size


@pytest.mark.parametrize("written", ["16G", "512M", "4Gi", "16 k"])
def test_a_size_that_may_mean_two_things_is_explained(written: str) -> None:
    with pytest.raises(ValueError, match=rf"{written!r}.* \d+[KMG]B .* \d+[KMG]iB"):
        parse_size(written)


@pytest.mark.parametrize("written", ["", "many", "1.5", "1.0001KB", "-3MB", True, None, 1.5])
def test_what_is_no_size(written: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(written)


@pytest.mark.parametrize(
    ("written", "nodes"),
    [
        (2, (2, 2)),
        ("2", (2, 2)),
        ("2:4", (2, 4)),
        ("2 : 4", (2, 4)),
        ([2, 4], (2, 4)),
        ((2, 4), (2, 4)),
        (2.0, (2, 2)),
    ],
)
def test_nodes(written: object, nodes: tuple[int, int]) -> None:
    assert parse_nodes(written) == nodes


@pytest.mark.parametrize(
    "written", ["", "two", "2-4", "1:2:3", [1, 2, 3], [1, "2"], 1.5, True, None]
)
def test_what_is_no_number_of_nodes(written: object) -> None:
    with pytest.raises(ValueError, match="number"):
        parse_nodes(written)


def test_a_range_of_nodes_is_min_to_max() -> None:
    with pytest.raises(ValueError, match=r"4:2 .*min:max"):
        parse_nodes("4:2")


def test_numbers_are_not_booleans_nor_text() -> None:
    assert parse_whole(1e4) == 10000
    for wrong in (True, "4", 1.5, math.inf, None):
        with pytest.raises(ValueError, match="whole number"):
            parse_whole(wrong)
    for wrong in (False, "0.1", math.nan):
        with pytest.raises(ValueError, match="a number"):
            parse_real(wrong)


@given(
    st.one_of(
        st.text(),
        st.integers(),
        st.floats(),
        st.booleans(),
        st.none(),
        st.lists(st.integers() | st.text(), max_size=3),
        st.from_regex(r"[0-9:.\-]{1,6} ?[dhmskMGTiB]{0,3}", fullmatch=True),
    )
)
def test_any_value_is_read_or_refused_in_words(value: object) -> None:
    for parse in (parse_duration, parse_size, parse_nodes, parse_whole, parse_real):
        with contextlib.suppress(ValueError):
            parse(value)
