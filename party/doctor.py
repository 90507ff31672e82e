"""`splitfl doctor`: check the installation, and whatever is named: kit, keys, the owner's address, the plan."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from party.connect import open_session
from splitfl.config import DoctorSettings
from splitfl.errors import ModelError, SplitflError, UsageError
from splitfl.kit import open_kit
from splitfl.load import is_trunk_tensor, tensor_names
from splitfl.metrics import Result, write_results
from splitfl.report import as_size
from splitfl.wire.keys import fingerprint, load_keys, load_public

_LEAST_FREE_BYTES = 1 << 30

Finding = tuple[str, bool, str]
"""What was checked, whether it is well, and what was found or what to do."""


def examine(settings: DoctorSettings) -> int:
    """Run every check that the settings allow and print the findings; 0 if all is well, 1 if not."""
    findings = list(_findings(settings))
    table = Table("", "check", box=None)
    table.add_column("found", overflow="fold")
    for name, well, found in findings:
        table.add_row("[green]ok[/]" if well else "[red]no[/]", name, found)
    Console(soft_wrap=True).print(table)
    if settings.json is not None:
        results = [Result(case=name, metric="well", value=int(well), unit=found) for name, well, found in findings]
        write_results(settings.json, "doctor", settings, results)
    return 0 if all(well for _, well, _ in findings) else 1


def _findings(settings: DoctorSettings) -> Iterator[Finding]:
    yield "python", sys.version_info >= (3, 11), platform.python_version() + ("" if sys.version_info >= (3, 11) else
                                                                              ", needs 3.11 or newer")  # fmt: skip
    yield from _packages()
    yield _check("CUDA", _cuda)
    yield _check("disk", _disk)
    if settings.key is not None:
        yield _check(f"key {settings.key}", lambda: fingerprint(load_keys(settings.key or Path()).public))
    if settings.owner_key is not None:
        yield _check(f"key {settings.owner_key}", lambda: fingerprint(load_public(settings.owner_key or Path())))
    if settings.kit is not None:
        yield _check(f"kit {settings.kit}", lambda: _kit(settings.kit or Path()))
    if settings.owner is not None:
        yield _check(f"owner {settings.owner}", lambda: _owner(settings))


def _check(name: str, look: Callable[[], str]) -> Finding:
    try:
        return name, True, look()
    except SplitflError as error:
        return name, False, str(error).replace("\n", " ")


def _packages() -> Iterator[Finding]:
    """Each dependency that the installed metadata names: is its version inside the range?"""
    seen: set[str] = set()
    for requirement in importlib.metadata.requires("splitfl") or []:
        name = re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]
        if name in seen or name == "splitfl":
            continue
        seen.add(name)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if extra is None:
                yield name, False, "not installed; run `pip install splitfl` again"
            else:
                yield name, True, f"not installed; belongs to the extra: pip install 'splitfl[{extra[1]}]'"
            continue
        wanted = re.sub(r"^\[[^\]]*\]", "", requirement.split(";")[0].removeprefix(name)).strip()  # psycopg[binary]>=3
        well = _in_range(version, wanted)
        yield name, well, version if well else f"{version}, but {wanted} is needed"


def _in_range(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return not wanted or SpecifierSet(wanted).contains(version.split("+")[0], prereleases=True)


def _cuda() -> str:
    torch = importlib.import_module("torch")
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none; computing on the CPU"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < _LEAST_FREE_BYTES:
        raise UsageError(f"only {as_size(free)} are free here", hint="free some space before tuning")
    return f"{as_size(free)} free here"


def _kit(path: Path) -> str:
    kit = open_kit(path)
    leaked = [name for name in tensor_names(path) if is_trunk_tensor(name, kit.plan)]
    if leaked:
        raise ModelError(f"the kit holds {len(leaked)} tensors of the trunk", hint="ask the owner for a proper kit")
    tokenizer = "tokenizer" if (path / "tokenizer.json").is_file() else "no tokenizer"
    plan = kit.plan
    return (
        f"{plan.model_type}, {plan.task}, layers {plan.party_layers} of {plan.layers}, {tokenizer}, plan {plan.digest}"
    )


def _owner(settings: DoctorSettings) -> str:
    if settings.kit is None or settings.owner_key is None or settings.key is None:
        raise UsageError("to say hello, --kit, --owner-key and --key are needed as well")
    session = open_session(
        open_kit(settings.kit).plan,
        settings.owner or "",
        owner_key=settings.owner_key,
        key=settings.key,
        timeout_s=10.0,
    )
    try:
        welcome = session.welcome
        assert welcome is not None  # noqa: S101
        return (
            f"serves this plan; splitfl {welcome.server}, up to {welcome.max_tokens} rows x positions, "
            f"{welcome.memory}, lease {welcome.lease_s:.0f} s"
        )
    finally:
        session.close()
