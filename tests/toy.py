"""An application that has every command and does nothing."""

from __future__ import annotations

import pytest
import typer

from splitfl import (
    config,
    config_audit,
    config_compare,
    config_federation,
    config_keys,
    config_mesh,
    config_offsite,
    config_owner,
    config_privacy,
)
from splitfl.options import Settings, command, run_app

COMMANDS: dict[str, type[Settings]] = {
    "kit": config.KitSettings,
    "serve": config.ServeSettings,
    "status": config_owner.StatusSettings,
    "usage": config_owner.UsageSettings,
    "tune": config.TuneSettings,
    "generate": config.GenerateSettings,
    "evaluate": config.EvaluateSettings,
    "audit": config_audit.AuditSettings,
    "compare": config_compare.CompareSettings,
    "doctor": config.DoctorSettings,
    "demo": config.DemoSettings,
    "bench": config.BenchSettings,
    "emulator": config_offsite.EmulatorSettings,
    "fetch": config_offsite.FetchSettings,
    "plugin": config_offsite.PluginSettings,
    "fedmod": config_mesh.FedmodSettings,
    "margin": config_offsite.MarginSettings,
    "federate": config_federation.FederateSettings,
}
KEYS: dict[str, type[Settings]] = {
    "new": config_keys.KeysNew,
    "show": config_keys.KeysShow,
    "identity": config_keys.KeysIdentity,
    "allow": config_keys.KeysAllow,
    "revoke": config_keys.KeysRevoke,
}
LEDGER: dict[str, type[Settings]] = {
    "show": config_privacy.LedgerShow,
    "budget": config_privacy.LedgerBudget,
    "export": config_privacy.LedgerExport,
}
TUNE = "tune --kit kit/ --owner tcp://127.0.0.1:5555 --owner-key o.key --key h.key_secret --train r.jsonl --out run/"


class Toy:
    """An application with every command, whose handlers only remember their settings or do what they are told."""

    def __init__(self) -> None:
        self.app = typer.Typer(no_args_is_help=True, add_completion=False)
        self.got: list[Settings] = []
        self.error: BaseException | None = None
        self.code: int | None = None
        keys = typer.Typer()
        self.app.add_typer(keys, name="keys")
        ledger = typer.Typer()
        self.app.add_typer(ledger, name="ledger")
        for group, commands in ((self.app, COMMANDS), (keys, KEYS), (ledger, LEDGER)):
            for name, settings_class in commands.items():
                command(group, settings_class, name, self.handle)

    def handle(self, given: Settings) -> int | None:
        self.got.append(given)
        if self.error is not None:
            raise self.error
        return self.code

    def __call__(self, words: str | list[str]) -> int:
        with pytest.raises(SystemExit) as stop:
            run_app(self.app, words.split() if isinstance(words, str) else words)
        return stop.value.code


def settings_of(toy, words):
    assert toy(words) == 0
    return toy.got.pop()


def refusal(toy, capsys, words):
    """The lines of an error that a person meets, after the checks that hold for every one of them."""
    code = toy(words)
    printed = capsys.readouterr()
    assert code == 2
    assert not toy.got, "the command ran"
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    return printed.err
