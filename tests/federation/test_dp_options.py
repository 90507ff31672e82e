"""Which options of a bound go together, said before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitfl.config import TuneSettings
from splitfl.config_federation import FederateSettings
from splitfl.errors import UsageError

DP = {"dp_noise_multiplier": 1.0, "dp_delta": 1e-5, "dp_clip": 1.0, "dp_rounds": 3}
NOISE = {"sum_noise": 1.0, "sum_norm": 0.5, "sum_delta": 1e-5, "dp_rounds": 3}
LITERAL = {"protocol": "dp-lora", "preset": "paper"}


def tuning(**changes):
    given = {
        "kit": Path("kit"), "out": Path("run"), "train": Path("rows"), "protocol": "fed-params", "model": "model",
        "federate": "tcp://127.0.0.1:1", "coordinator_key": Path("c"), "key": Path("k"), "peers": Path("p"),
    }  # fmt: skip
    return TuneSettings(**{**given, **changes})


@pytest.mark.parametrize(
    "changes",
    [DP, {**DP, "protocol": "dp-lora"}, *({**NOISE, "sum": name} for name in ("mask", "mask+hidden", "bfv", "ckks")),
     LITERAL, {}],
)  # fmt: skip
def test_these_go_together(changes):
    tuning(**changes).check()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({**DP, "dp_rounds": None}, "Missing option --dp-rounds"),
        ({"dp_rounds": 3}, "--dp-rounds has no effect"),
        ({**DP, "dp_delta": None}, "without --dp-delta"),
        ({**DP, "dp_clip": None}, "without --dp-clip"),
        ({**DP, "dp_freeze_a": True}, "the rule says what is frozen"),
        ({**DP, "protocol": "fed-split", "model": None, "owner": "tcp://127.0.0.1:2"}, "says nothing of what is sent"),
        ({**DP, **NOISE}, "were both given"),
        ({**NOISE, "sum": "plain"}, "reads every update with that share alone"),
        ({**NOISE, "sum_norm": None}, "without --sum-norm"),
        ({**NOISE, "sum_delta": None}, "without --sum-delta"),
        ({"sum_dropouts": 1}, "has no effect without --sum-noise"),
        ({"protocol": "dp-lora"}, "without a word about noise"),
        ({"preset": "paper"}, "--preset with protocol 'fed-params'"),
        ({**LITERAL, **DP}, "no bound"),
        ({**LITERAL, **NOISE}, "no bound"),
        ({"noise": "gauss", "clip": 1.0, "sigma": 1.0}, "no activation, gradient or label is sent"),
    ],
)
def test_these_do_not(changes, words):
    with pytest.raises(UsageError, match=words):
        tuning(**changes).check()


def test_a_coordinator_knows_of_the_noise_and_then_takes_two_parties():
    given = {"key": Path("k"), "parties": Path("p"), "state": Path("s"), "min_parties": 2}
    noise = {name: value for name, value in NOISE.items() if name != "dp_rounds"}
    FederateSettings(**given, **noise).check()
    with pytest.raises(UsageError, match="protects nothing between 2 parties"):
        FederateSettings(**given).check()
    with pytest.raises(UsageError, match="that share alone"):
        FederateSettings(**given, **noise, sum="plain").check()
