"""Settings of `splitfl keys`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from splitfl.config_common import PLAIN_NAME
from splitfl.options import Settings


@dataclass(frozen=True, kw_only=True)
class KeysNew(Settings):
    """Make a CURVE key pair: NAME.key to give away, NAME.key_secret (mode 0600) to keep."""

    name: Annotated[str, typer.Argument(help="Who the key is for."), PLAIN_NAME]
    out: Annotated[Path, "Directory for the two files."] = Path("keys")


@dataclass(frozen=True, kw_only=True)
class KeysShow(Settings):
    """Show the fingerprints of key files and allow-lists."""

    paths: Annotated[tuple[Path, ...], typer.Argument(help="Key files, or directories of them.")]


@dataclass(frozen=True, kw_only=True)
class KeysIdentity(Settings):
    """Write NAME.key again, with the key that signs in secure sums: for pairs made before there was one."""

    key: Annotated[Path, typer.Argument(help="The party's own secret key file (NAME.key_secret).")]


@dataclass(frozen=True, kw_only=True)
class KeysAllow(Settings):
    """Put a party's public key on the owner's allow-list."""

    key: Annotated[Path, typer.Argument(help="The party's public key file (NAME.key).")]
    parties: Annotated[Path, "Directory that is the allow-list."]


@dataclass(frozen=True, kw_only=True)
class KeysRevoke(Settings):
    """Take a party off the owner's allow-list; a running server refuses it from then on."""

    name: Annotated[str, typer.Argument(help="The party's name on the list."), PLAIN_NAME]
    parties: Annotated[Path, "Directory that is the allow-list."]
