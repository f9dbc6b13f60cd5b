"""Lists in messages."""

from __future__ import annotations

from dtrain.words import few, numbered


def test_the_first_are_shown_and_the_others_are_counted() -> None:
    assert few([]) == ""
    assert few([0.123456, 2]) == "0.1235, 2"
    assert few("abcdef", 2, sep="; ") == "a; b and 4 more"
    assert numbered("rank", [3]) == "rank 3"
    assert numbered("rank", iter(range(14))).endswith("10, 11 and 2 more")
    assert numbered("attribute", ["a", "b"]) == "attributes a, b"
