"""No causal family of the installed library is silently wrong, and docs/families.md says what is true."""

from __future__ import annotations

import pytest

from tests.equivalence.sweep import families, judge
from tests.equivalence.table import PAGE, listed, versions


def page_is_of_these_libraries() -> bool:
    return versions() in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_a_family_is_exact_or_refused(family):
    found = judge(family)
    assert found.verdict != "wrong", found
    if page_is_of_these_libraries():
        assert listed().get(family) == found.verdict, "run `python -m tests.equivalence.table`"


# Trunks of one layer whose cache slot holds no keys: it counts by its state, or there is nothing to cache at all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cut"), [("nemotron_h", (3, 2)), ("nemotron_h", (4, 1)), ("jamba", (0, 5)), ("lfm2", (1, 4))]
)
def test_a_trunk_without_attention_generates_the_same_tokens(family, cut):
    assert judge(family, cut).verdict == "exact"


def test_the_page_lists_every_family_of_its_libraries():
    verdicts = listed()
    assert set(verdicts.values()) <= {"exact", "refused", "not built"}
    assert sum(verdict == "exact" for verdict in verdicts.values()) >= 40
    if page_is_of_these_libraries():
        assert set(verdicts) == set(families())
