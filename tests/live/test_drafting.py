"""`splitfl generate --draft` on a finished run, over CURVE: the text of plain generation, in fewer round trips."""

from __future__ import annotations

import json
import shutil

import pytest

from splitfl.emulator import write_emulator
from splitfl.kit import open_kit
from splitfl.load import quiet_library
from tests.families import save_model
from tests.live.child import splitfl_here
from tests.live.models import whole_model

pytestmark = pytest.mark.slow

NEW = 16


@pytest.fixture
def generate(finished, tmp_path):
    def run(*words, code=0):
        splitfl_here("generate", "--run", finished, "--prompt", "Agnes sang", "--max-new-tokens", str(NEW), *words,
                     "--json", tmp_path / "text.json", code=code)  # fmt: skip
        if code:
            return None
        record = json.loads((tmp_path / "text.json").read_text(encoding="utf-8"))
        return {result["metric"]: result["value"] for result in record["results"]}

    return run


def test_guesses_change_the_round_trips_and_not_the_text(generate, finished, tiny_llama, tmp_path):
    plain = generate()
    assert plain["round trips"] == plain["new tokens"]
    kit = open_kit(tiny_llama[1])
    with quiet_library():  # an emulator that keeps every layer is right each time
        full = whole_model(tiny_llama[0], "causal-lm")
        write_emulator(full, kit, tmp_path / "all", kept=tuple(kit.plan.trunk_layers), chosen_by="uniform")
    guessed = generate("--draft", "emulator", "--emulator", tmp_path / "all", "--draft-tokens", "4")
    assert guessed["text"] == plain["text"]
    assert guessed["round trips"] <= -(-plain["new tokens"] // 5) + 1
    assert guessed["guesses kept"] > 0
    shutil.copytree(tmp_path / "all", finished / "emulator")
    try:
        assert generate("--draft", "emulator")["round trips"] < plain["round trips"]
    finally:
        shutil.rmtree(finished / "emulator")
    ends = generate("--draft", "ends")
    assert ends["text"] == plain["text"]
    assert ends["positions sent"] == plain["positions sent"] + ends["guesses sent"] - ends["guesses kept"]
    pieces = generate("--prefill-chunk", "1")
    assert pieces["text"] == plain["text"]
    assert pieces["round trips"] == plain["round trips"] + plain["prompt tokens"] - 1


def test_what_cannot_guess_is_refused(generate, tmp_path, capsys):
    generate("--draft", "emulator", code=4)
    assert "needs an emulator" in capsys.readouterr().err
    with quiet_library():
        save_model("llama", tmp_path / "other")
    generate("--draft", "model", "--draft-model", tmp_path / "other", code=2)
    assert "vocabulary of 97 tokens" in " ".join(capsys.readouterr().err.split())
