"""The options of `splitfl fedmod`: what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from party.fedmod_run import FedmodRun
from splitfl.config_mesh import FedmodSettings
from splitfl.errors import UsageError
from tests.live.child import splitfl_here

NEEDED = {
    "model": "m", "out": Path("o"), "key": Path("k"), "peers": Path("p"), "train": Path("t"), "rounds": 1,
    "local_steps": 1,
}  # fmt: skip


def made(**options) -> FedmodSettings:
    return FedmodSettings(**{**NEEDED, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peer": ("a",)}, "NAME=VALUE"),
        ({"peer": ("a=tcp://x:1", "a=tcp://y:1")}, "twice"),
        ({"peer": ("a=http://x",)}, "tcp://HOST:PORT"),
        ({"peer": ("a=tcp://x:0",)}, "cannot be reached"),
        ({"peer": ("a=tcp://*:5",)}, "cannot be reached"),
        ({"peer": ("a=tcp://x:1",), "deny": ("a",)}, "both a --peer and a --deny"),
        ({"tags": ("good, bad tag",)}, "cannot be a tag"),
        ({"require_tag": ("x" * 65,)}, "cannot be a tag"),
        ({"tags": (",".join(map(str, range(17))),)}, "too many --tags"),
        ({"tags": ("a",), "shared_tags": 2}, "you have 1 --tags"),
        ({"min_similarity": 1.5}, "from -1 to 1"),
        ({"validation_share": 0.0}, "0.02"),
        ({"sketch_delta": 1.0}, "between 0 and 1"),
        ({"rounds": 0}, "1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(UsageError) as refused:
        made(**options)
    assert words in str(refused.value)


def test_tags_may_stand_in_one_word_with_commas():
    assert made(tags=("hate, nsfw", "spam", "hate")).tag_list() == ("hate", "nsfw", "spam")
    assert made(peer=("a=tcp://x:1",)).addresses() == {"a": "tcp://x:1"}


def test_a_run_of_peers_is_no_run_of_tune_and_says_how_it_is_used(tmp_path, capsys):
    FedmodRun(tmp_path / "run").begin(made(), None)
    splitfl_here("evaluate", "--run", tmp_path / "run", "--eval", tmp_path / "rows.jsonl", code=2)
    said = capsys.readouterr().err
    assert "is a run of `splitfl fedmod`" in said
    assert "PeftModel.from_pretrained(MODEL, RUN/adapter)" in said
