"""A real owner: `python -m splitfl serve` in a process of its own, with fresh keys, on a free port."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from party.connect import open_session
from party.session import Memory, Session, Tap
from splitfl.kit import open_kit
from splitfl.wire.keys import AllowList, new_keys
from splitfl.wire.messages import DtypeName
from tests.live.child import Child, child

PARTIES = ("hospital", "clinic")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A running owner and what a party needs to reach it."""

    address: str
    model_dir: Path
    kit_dir: Path
    keys: Path | None
    """Folder with everybody's keys; None on an unencrypted loopback channel."""
    running: Child

    def link(self, party: str = PARTIES[0], *, address: str | None = None) -> list[str | Path]:
        """Options by which a command of `party` reaches this owner, perhaps through a relay at `address`."""
        words: list[str | Path] = ["--kit", self.kit_dir, "--owner", address or self.address]
        if self.keys is None:
            return [*words, "--insecure-loopback"]
        return [*words, "--owner-key", self.keys / "owner.key", "--key", self.keys / f"{party}.key_secret"]

    def session(
        self, party: str = PARTIES[0], *, address: str | None = None, wire_dtype: DtypeName = "float32",
        memory: Memory = "keep", tap: Tap | None = None,
    ) -> Session:  # fmt: skip
        """An open session of `party`, in this process; to be closed by whoever asked."""
        return open_session(
            open_kit(self.kit_dir).plan,
            address or self.address,
            owner_key=None if self.keys is None else self.keys / "owner.key",
            key=None if self.keys is None else self.keys / f"{party}.key_secret",
            insecure_loopback=self.keys is None,
            wire_dtype=wire_dtype,
            memory=memory,
            timeout_s=60.0,
            tap=tap,
        )


@contextmanager
def serve(
    model_dir: Path, kit_dir: Path, folder: Path, *, insecure_loopback: bool = False,
    options: Sequence[str | Path] = (),
) -> Iterator[Owner]:  # fmt: skip
    """Start an owner and wait until it is ready; on the way out it is told to stop, and must do so in order."""
    keys = None if insecure_loopback else make_keys(folder / "keys")
    security: list[str | Path] = ["--insecure-loopback"]
    if keys is not None:
        security = ["--key", keys / "owner.key_secret", "--parties", keys / "parties"]
    what: list[str | Path] = ["--model", model_dir, "--kit", kit_dir, "--bind", "tcp://127.0.0.1:0"]
    with child(["-m", "splitfl", "serve", *what, *security, *options], folder) as running:
        try:
            _, address, _ = running.stdout.wait_for("ready ").split()
        except AssertionError:
            running.end()
            raise AssertionError(f"the owner did not get ready:\n{running.stderr.text}") from None
        yield Owner(address=address, model_dir=model_dir, kit_dir=kit_dir, keys=keys, running=running)
        assert running.end() == 0, running.stderr.text


def make_keys(folder: Path) -> Path:
    """Pairs for the owner and all `PARTIES`, and the allow-list `parties` with the latter on it."""
    for name in ("owner", *PARTIES):
        new_keys(name, folder)
    allow = AllowList(folder / "parties")
    for name in PARTIES:
        allow.add(folder / f"{name}.key")
    return folder
