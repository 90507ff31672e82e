"""docs/rounds.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitfl.config_federation import FederateSettings
from splitfl.options import fields_of
from splitfl.rounds.records import PHASES
from splitfl.wire.round_messages import ROUND_REFUSALS, ROUNDS_VERSION, FromParty, kind_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rounds.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the pages are not part of an installed package")


def test_the_tables_of_the_page_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    codes = dict(re.findall(r"^\| `(\w+)` \| (the two sides.*|[a-z].*?) \|$", page.split("| code |")[1], re.MULTILINE))
    assert codes == ROUND_REFUSALS
    said = re.findall(r"^\| `(\w+)` \|", page.split("| from a party |")[1].split("| code |")[0], re.MULTILINE)
    assert said == [kind_of(message) for message in FromParty.__args__]
    phases = page.split("| phase |")[1].split("\n\n")[0]
    assert [name for name in PHASES if name not in phases] == ["finished"]
    assert f"Version {ROUNDS_VERSION}." in page


def test_every_option_that_the_page_names_exists():
    options = {field.flag for field in fields_of(FederateSettings)} | {"--out"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8"))) <= options
