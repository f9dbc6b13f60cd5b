"""Every error has a code, every code is explained, and every sentence is asserted in one file."""

from __future__ import annotations

from dtrain.codes import CODES
from dtrain.codes.launch import LAUNCH
from dtrain.codes.training import TRAINING
from support import codes

USED = {code for site in codes.sites() for code in site.codes}


def test_every_error_and_every_problem_has_a_code() -> None:
    bare = [site.place for site in codes.sites() if not site.codes and not site.passed_on]
    assert len(codes.sites()) > 300, "sites are found at all"
    assert bare == [], 'give a literal `code="area.what"` there'


def test_every_code_in_use_is_explained() -> None:
    assert sorted(USED - CODES.keys()) == [], "write its cause and remedy in dtrain/codes"


def test_every_explained_code_is_in_use() -> None:
    assert sorted(LAUNCH.keys() - USED) == []
    assert sorted(TRAINING.keys() - USED) == []


def test_a_code_is_explained_once() -> None:
    assert LAUNCH.keys() & TRAINING.keys() == set()


def test_a_code_has_its_form_a_cause_and_a_remedy() -> None:
    assert [code for code in CODES if not codes.FORM.fullmatch(code)] == []
    texts = [text for entry in CODES.values() for text in entry]
    assert [text for text in texts if not text.endswith((".", "…")) or len(text) > 250] == []


def test_the_messages_are_those_of_the_golden_file() -> None:
    assert codes.GOLDEN.read_text() == codes.golden(), (
        "read the difference, then run: cd tests && python -m support.codes"
    )
