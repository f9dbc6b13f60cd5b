"""Names of stored weights, and those of the model that they belong to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.train.weights.matching import Names, match, tied

LAYERS = ["first.weight", "first.bias", "last.weight"]


def before(prefix: str, names: list[str]) -> list[str]:
    return [prefix + name for name in names]


@pytest.mark.parametrize(
    ("own", "stored", "prefix", "added", "matched"),
    [
        (LAYERS, LAYERS, "", False, 3),
        (LAYERS, before("module.", LAYERS), "module.", False, 3),
        (LAYERS, before("module._orig_mod.", LAYERS), "module.", False, 3),
        (LAYERS, before("_orig_mod.", LAYERS), "", False, 3),
        # averages of the weights have a counter too
        (LAYERS, [*before("module.", LAYERS), "n_averaged"], "module.", False, 3),
        (LAYERS, before("model.", LAYERS), "model.", False, 3),
        (LAYERS, before("a.b.", LAYERS), "a.b.", False, 3),
        # a part of a larger model, and a smaller model
        (LAYERS, [*before("net.", LAYERS), "loss.weight"], "net.", False, 3),
        ([*LAYERS, "head.weight"], before("net.", LAYERS), "net.", False, 3),
        ([*before("net.", LAYERS), "head.weight"], LAYERS, "net.", True, 3),
        (before("net.", LAYERS), [*LAYERS, "head.weight"], "net.", True, 3),
        (before("net.", LAYERS), before("module.", LAYERS), "net.", True, 3),
        # a model whose own part is called like what DDP adds
        (before("module.", LAYERS), before("module.", LAYERS), "", False, 3),
        # some names are the same: nothing is guessed
        ([*LAYERS, "a.x"], [*before("net.", LAYERS), "a.x"], "", False, 1),
        # no prefix explains all names of a side
        ([*LAYERS, "a.x"], [*before("net.", LAYERS), "b.x"], "", False, 0),
        (LAYERS, [], "", False, 0),
    ],
)
def test_prefixes(
    own: list[str], stored: list[str], prefix: str, added: bool, matched: int
) -> None:
    found = match([(name,) for name in own], stored)
    assert (found.prefix, found.added) == (prefix, added)
    assert sorted(found.stored.values()) == sorted(stored)
    theirs = [found.stored[name] for name in own if name in found.stored]
    assert len(theirs) == matched
    kinds = [each.rpartition(".")[2] for each in own if each in found.stored]
    assert [each.rpartition(".")[2] for each in theirs] == kinds


def test_of_two_parts_that_would_do_none_is_chosen() -> None:
    own = [*before("student.", LAYERS), *before("teacher.", LAYERS)]
    found = match([(name,) for name in own], LAYERS)
    assert found.ambiguous == ["student.", "teacher."]
    assert not set(own) & found.stored.keys()


def test_a_stored_name_of_a_shared_tensor_is_enough_for_a_prefix() -> None:
    own = [("embed.weight", "head.weight"), ("norm.weight",)]
    found = match(own, ["t.head.weight", "t.norm.weight", "t.more.weight"])
    assert found == Names(
        {
            "head.weight": "t.head.weight",
            "norm.weight": "t.norm.weight",
            "more.weight": "t.more.weight",
        },
        "t.",
    )


def test_tensors_of_one_memory_are_together() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    second.weight = first.weight
    state = nn.ModuleDict({"first": first, "second": second}).state_dict()
    assert tied({**state, "none": torch.empty(0), "nothing": torch.empty(0)}) == [
        ("first.weight", "second.weight"),
        ("first.bias",),
        ("second.bias",),
        ("none",),
        ("nothing",),
    ]
