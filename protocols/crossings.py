"""What several protocols let cross, told once."""

from __future__ import annotations

from splitfl.privacy.disclosure import Crossing, Direction

UP: Direction = "party to owner"
DOWN: Direction = "owner to party"

EVERY_BATCH = "every batch, at every training step and every evaluation pass"
EVERY_STEP = "every training step"


def _one(message: str, direction: Direction, content: str, how_often: str, tensor: str | None = None) -> Crossing:
    return Crossing(
        message=message, tensor=tensor, direction=direction, content=content, how_often=how_often, bound="none"
    )


CONVERSATION = (
    _one(
        "hello",
        UP,
        "fingerprints of kit and trunk, protocol name, wire dtype and codings, wire version",
        "once a session, and again after a lost link",
    ),
    _one("release", UP, "numbers of caches and steps that are not needed any more", "now and then"),
    _one("bye", UP, "end of the session", "once"),
    _one("welcome", DOWN, "limits of the session", "once a session, and again after a lost link"),
    _one("refused", DOWN, "a refusal with its code and reason", "when a request is not allowed"),
    _one("closed", DOWN, "end of the session", "once"),
)
"""What every session says, whatever its protocol."""


def forward(how_often: str) -> tuple[Crossing, ...]:
    """Activations up, and the trunk's output down."""
    return (
        _one(
            "forward",
            UP,
            "activations of the rows at the lower cut; now and then, to check the owner, the same moved by random "
            "numbers, and random numbers alone",
            how_often,
            "hidden",
        ),
        _one("forward", UP, "which positions are padding: the length of every row", how_often, "mask"),
        _one("forward", UP, "position numbers, where the batch does not count them from 0", how_often, "positions"),
        _one("forward_done", DOWN, "the trunk's output for those activations", how_often, "hidden"),
    )


def backward(how_often: str) -> tuple[Crossing, ...]:
    """Gradients up and down."""
    return (
        _one("backward", UP, "gradient of the loss at the upper cut, which depends on labels", how_often, "gradient"),
        _one("backward_done", DOWN, "that gradient carried through the trunk to the lower cut", how_often, "gradient"),
    )


def handout() -> tuple[Crossing, ...]:
    """Files of the emulator down, and what asks for them."""
    once = "before training, in parts, until all of the emulator has come"
    return (
        _one("fetch", UP, "which bytes of which file of the emulator are wanted; nothing of a row", once),
        _one("piece", DOWN, "those bytes: some of the trunk's layers, compressed", once, "piece"),
    )


def rounds() -> tuple[Crossing, ...]:
    """What crosses between a party and the coordinator of a federation."""
    up: Direction = "party to coordinator"
    down: Direction = "coordinator to party"
    once = "once a round, and the same bytes again if a round begins anew"
    return (
        _one("enter", up, "digests of model, cut, rule and adapter layout; the number of training rows", "once"),
        _one(
            "put",
            up,
            "the adapter's values (and a new head's) after training on the rows: as they are with --sum plain, masked "
            "or encrypted otherwise; keys, shares and signatures of the sum",
            once,
            "update",
        ),
        _one("report", up, "scores on held-out rows, their number, a digest of the next state", "once a round"),
        _one("piece", down, "the result of the sum, and states of the federation", once, "update"),
        _one("task", down, "what is to be done next, and who takes part", "whenever it is asked for"),
    )


def distillation() -> tuple[Crossing, ...]:
    """What crosses between a party and the coordinator where models learn from what all say about public rows."""
    up: Direction = "party to coordinator"
    down: Direction = "coordinator to party"
    once = "once a round, and the same bytes again if a round begins anew"
    return (
        _one(
            "enter",
            up,
            "digests of the public rows, the tokenizer, the classes and what is sent; the number of training rows",
            "once",
        ),
        _one(
            "put",
            up,
            "for each position of the public rows the likeliest tokens or classes and their log-probabilities, as this "
            "party's tuned model has them: as they are with --sum plain, masked otherwise; the party's weight; keys, "
            "shares and signatures of a masked sum",
            once,
            "logits",
        ),
        _one("report", up, "scores on held-out rows, their number, a digest of the mean", "once a round"),
        _one("piece", down, "the mean over the parties of what models say about the public rows", once, "logits"),
        _one("task", down, "what is to be done next, and who takes part", "whenever it is asked for"),
    )


NEVER = ("rows, text or token ids", "labels or the loss", "adapter weights", "any tensor of the trunk")
