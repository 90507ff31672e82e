"""A coordinator and parties in processes of their own, as people start them, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from splitfl.wire.keys import AllowList, new_keys
from tests.live.child import Child, child

PARTIES = ("hospital", "clinic", "surgery")


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Keys of everybody, and a running coordinator."""

    folder: Path
    address: str
    running: Child

    def words(self, name: str, out: Path, *options: object) -> list[str]:
        """`splitfl tune` of a party."""
        keys = self.folder / "keys"
        link = ["--federate", self.address, "--coordinator-key", keys / "coordinator.key"]
        own = ["--key", keys / f"{name}.key_secret", "--peers", self.folder / "parties", "--out", out]
        return [str(word) for word in ("-m", "splitfl", "tune", *link, *own, *options)]

    def start(self, stack: ExitStack, name: str, out: Path, *options: object) -> Child:
        """The same, started."""
        return stack.enter_context(child(self.words(name, out, *options), self.folder))


def make_keys(folder: Path, names: Sequence[str] = PARTIES) -> None:
    """Pairs for the coordinator and the parties, and the allow-list ``parties``."""
    new_keys("coordinator", folder / "keys")
    allow = AllowList(folder / "parties")
    for name in names:
        new_keys(name, folder / "keys")
        allow.add(folder / "keys" / f"{name}.key")


@contextmanager
def coordinate(folder: Path, *options: object) -> Iterator[Federation]:
    """A coordinator that is ready; keys must be there."""
    words = ["-m", "splitfl", "federate", "--bind", "tcp://127.0.0.1:0", "--parties", folder / "parties"]
    words += ["--key", folder / "keys" / "coordinator.key_secret", "--state", folder / "state", *options]
    with child([str(word) for word in words], folder) as running:
        _, address, _ = running.stdout.wait_for("ready ").split()
        yield Federation(folder=folder, address=address, running=running)
