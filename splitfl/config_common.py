"""Options and checks that several commands share. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from splitfl.errors import UsageError
from splitfl.options import Check, Panel, above, at_least
from splitfl.options.values import is_address, is_device, is_shape, is_size, on_loopback, parse_address

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Memory: TypeAlias = Literal["keep", "recompute"]
Truncation: TypeAlias = Literal["error", "right", "drop"]

LINK = Panel("Owner and keys")
MACHINE = Panel("This machine")
ROWS = Panel("Rows")
TRAINING = Panel("Training (names of transformers.TrainingArguments)")
ADAPTER = Panel("Adapter (names of peft.LoraConfig)")

ADDRESS = Check(test=is_address, expected="tcp://HOST:PORT")
REMOTE = Check(
    test=lambda a: is_address(a) and parse_address(a)[1] > 0 and parse_address(a)[0] != "*",
    expected="tcp://HOST:PORT, with the port that the owner's `splitfl serve` printed",
)
SIZE = Check(test=is_size, expected="a size such as 4GB or 512MiB")
DEVICE = Check(test=is_device, expected="cpu, cuda or cuda:N")
SHAPE = Check(test=is_shape, expected="ROWSxLENGTH, such as 8x128")
PAIR = Check(test=lambda text: text.partition("=")[0] != "" and text.partition("=")[2] != "", expected="NAME=VALUE")
DELTA = Check(test=lambda value: 0 < value < 1, expected="between 0 and 1, such as 1e-6")
MICRO_BATCHES = Check(
    test=lambda text: text == "auto" or (text.isascii() and text.isdigit() and int(text) > 0),
    expected="1, 2, 3 ... or auto",
)
NOT_EMPTY = Check(test=bool, expected="some text")
PLAIN_NAME = Check(
    test=lambda name: name.replace("-", "").replace("_", "").replace(".", "").isalnum() and name[0] not in ".-",
    expected="letters, digits, dots, dashes and underscores",
)

JsonFile: TypeAlias = Annotated[Path | None, "Write the figures to this file as JSON."]
Threads: TypeAlias = Annotated[int | None, "CPU threads. Default: torch's own choice.", at_least(1), MACHINE]
Device: TypeAlias = Annotated[str, "Where to compute: cpu, cuda or cuda:N.", DEVICE, MACHINE]
Timeout: TypeAlias = Annotated[float, "Longest wait for one answer of the owner, in seconds.", above(0), LINK]
EvalBatch: TypeAlias = Annotated[int, "Rows in one evaluation batch.", at_least(1)]
MaxLength: TypeAlias = Annotated[int | None, "Longest row, in tokens. Default: the model's limit.", at_least(2), ROWS]
LedgerFile: TypeAlias = Annotated[Path | None, "Ledger file. Default: $SPLITFL_LEDGER, or in the user's data folder."]
Columns: TypeAlias = Annotated[
    tuple[str, ...], "FIELD=COLUMN: read FIELD from another column of the file. May be repeated.", PAIR, ROWS
]


def check_link(insecure: bool, address: str | None, keys: dict[str, Path | None]) -> None:
    """Refuse an open channel beyond loopback, and an encrypted one without keys.

    Args:
        insecure: whether no keys are to be used.
        address: of the owner.
        keys: option to the file that was given for it.

    Raises:
        UsageError: it is one of those, or something is missing.
    """
    if address is None:
        raise UsageError("Missing option --owner.", expected="the address that the owner's `splitfl serve` printed")
    if insecure and not on_loopback(address):
        raise UsageError(
            f"--insecure-loopback was given, but {address} is not a loopback address.",
            expected="tcp://127.0.0.1:PORT or tcp://[::1]:PORT",
            hint="leave --insecure-loopback out, and use keys",
        )
    for option, path in keys.items():
        if insecure and path is not None:
            raise UsageError(f"{option} has no effect with --insecure-loopback.", hint="give one of the two")
        if not insecure and path is None:
            raise UsageError(
                f"Missing option {option}.",
                hint="make keys with `splitfl keys new NAME`; the option may also stand in a file given with --config",
            )
