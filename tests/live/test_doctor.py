"""`splitfl doctor` on what is installed: ranges are read as they stand in the metadata."""

from __future__ import annotations

import importlib.metadata

import pytest

from party import doctor


@pytest.mark.parametrize(
    ("requirement", "well"),
    [
        ("pytest>=1", True),
        ("pytest[more]>=1,<1000; extra == 'postgres'", True),
        ("pytest[one, two]<1; extra == 'postgres'", False),
        ("pytest", True),
        ("no-such-thing[more]>=3; extra == 'postgres'", True),
        ("no-such-thing>=3", False),
    ],
)
def test_a_requirement_with_extras_of_its_own_is_understood(monkeypatch, requirement, well):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [requirement])
    ((_, found, words),) = doctor._packages()
    assert found is well, words


def test_what_this_project_requires_can_be_read():
    assert all(isinstance(words, str) for _, _, words in doctor._packages())
