"""The roof: every command of `splitfl`. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from splitfl import __version__
from splitfl.config import (
    BenchSettings,
    DemoSettings,
    DoctorSettings,
    EvaluateSettings,
    GenerateSettings,
    KitSettings,
    ServeSettings,
    TuneSettings,
)
from splitfl.config_audit import AuditSettings
from splitfl.config_compare import CompareSettings
from splitfl.config_federation import FederateSettings
from splitfl.config_keys import KeysAllow, KeysIdentity, KeysNew, KeysRevoke, KeysShow
from splitfl.config_mesh import FedmodSettings
from splitfl.config_offsite import EmulatorSettings, FetchSettings, MarginSettings, PluginSettings
from splitfl.config_owner import StatusSettings, UsageSettings
from splitfl.config_privacy import LedgerBudget, LedgerExport, LedgerShow
from splitfl.options import command, run_app
from splitfl.quiet import silence_library_warnings

app = typer.Typer(
    help="Tune a language model that its owner will not hand out, on data that its holder will not hand out.",
    no_args_is_help=True,
    add_completion=True,
)
keys = typer.Typer(help="CURVE keys: who may speak with whom.", no_args_is_help=True)
app.add_typer(keys, name="keys")
ledger = typer.Typer(help="What each data set has released so far, and what is left.", no_args_is_help=True)
app.add_typer(ledger, name="ledger")


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _keys_new(settings: KeysNew) -> None:
    from splitfl.wire.keys import fingerprint, load_public, new_keys

    public, secret = new_keys(settings.name, settings.out)
    print(f"public  {public}   give this one away")
    print(f"secret  {secret}   keep this one; mode 0600")
    print(f"fingerprint  {fingerprint(load_public(public))}")


def _keys_show(settings: KeysShow) -> None:
    from splitfl.wire.keys import find_signing, fingerprint, load_public
    from splitfl.wire.signing import signing_fingerprint

    for path in settings.paths:
        files = sorted(path.glob("*.key")) if path.is_dir() else [path]
        for file in files:
            print(f"{fingerprint(load_public(file))}  {file}")
            signing = find_signing(file)
            if signing is not None:
                print(f"{signing_fingerprint(signing)}  {file} (signing)")


def _keys_identity(settings: KeysIdentity) -> None:
    from splitfl.wire.keys import load_signing, renew_public
    from splitfl.wire.signing import signing_fingerprint

    public = renew_public(settings.key)
    print(f"public  {public}   give this one away again: it holds the signing key now")
    print(f"signing fingerprint  {signing_fingerprint(load_signing(public))}")


def _keys_allow(settings: KeysAllow) -> None:
    from splitfl.wire.keys import AllowList, fingerprint, load_public

    name = AllowList(settings.parties).add(settings.key)
    print(f"admitted {name}  {fingerprint(load_public(settings.key))}")


def _keys_revoke(settings: KeysRevoke) -> None:
    from splitfl.wire.keys import AllowList

    AllowList(settings.parties).revoke(settings.name)
    print(f"revoked {settings.name}; a running server ends its sessions")


def _ledger_show(settings: LedgerShow) -> None:
    from splitfl.ledger_command import show

    show(settings)


def _ledger_budget(settings: LedgerBudget) -> None:
    from splitfl.ledger_command import budget

    budget(settings)


def _ledger_export(settings: LedgerExport) -> None:
    from splitfl.ledger_command import export

    export(settings)


def _kit(settings: KitSettings) -> None:
    from party.make_kit import make_kit

    make_kit(settings)


def _emulator(settings: EmulatorSettings) -> int:
    from model_owner.emulate import make_emulator

    return make_emulator(settings)


def _fetch(settings: FetchSettings) -> None:
    from party.fetch import fetch

    fetch(settings)


def _plugin(settings: PluginSettings) -> None:
    from model_owner.plugin import plugin
    from party.evaluate import evaluate

    plugin(settings, evaluate)


def _margin(settings: MarginSettings) -> int:
    from model_owner.margin import measure_margin

    return measure_margin(settings)


def _serve(settings: ServeSettings) -> None:
    from model_owner.serve import serve

    serve(settings)


def _status(settings: StatusSettings) -> None:
    from model_owner.status import status

    status(settings)


def _usage(settings: UsageSettings) -> None:
    from model_owner.usage import export_usage

    export_usage(settings)


def _federate(settings: FederateSettings) -> int:
    from model_owner.rounds.federate import federate

    return federate(settings)


def _tune(settings: TuneSettings) -> int:
    from party.tune import tune

    return tune(settings)


def _fedmod(settings: FedmodSettings) -> int:
    from party.fedmod import fedmod

    return fedmod(settings)


def _evaluate(settings: EvaluateSettings) -> None:
    from party.use import evaluate_run

    evaluate_run(settings)


def _generate(settings: GenerateSettings) -> None:
    from party.use import generate_from_run

    generate_from_run(settings)


def _audit(settings: AuditSettings) -> None:
    from party.audit import audit

    audit(settings)


def _compare(settings: CompareSettings) -> None:
    from splitfl.compare.command import compare

    compare(settings)


def _doctor(settings: DoctorSettings) -> int:
    from party.doctor import examine

    return examine(settings)


def _demo(settings: DemoSettings) -> None:
    from splitfl.demo import demo

    demo(settings)


def _bench(settings: BenchSettings) -> None:
    from splitfl.bench.run import bench

    bench(settings)


command(keys, KeysNew, "new", _keys_new)
command(keys, KeysShow, "show", _keys_show)
command(keys, KeysIdentity, "identity", _keys_identity)
command(keys, KeysAllow, "allow", _keys_allow)
command(keys, KeysRevoke, "revoke", _keys_revoke)
command(ledger, LedgerShow, "show", _ledger_show)
command(ledger, LedgerBudget, "budget", _ledger_budget)
command(ledger, LedgerExport, "export", _ledger_export)
command(app, KitSettings, "kit", _kit)
command(app, EmulatorSettings, "emulator", _emulator)
command(app, FetchSettings, "fetch", _fetch)
command(app, PluginSettings, "plugin", _plugin)
command(app, MarginSettings, "margin", _margin)
command(app, ServeSettings, "serve", _serve)
command(app, StatusSettings, "status", _status)
command(app, UsageSettings, "usage", _usage)
command(app, TuneSettings, "tune", _tune)
command(app, FederateSettings, "federate", _federate)
command(app, FedmodSettings, "fedmod", _fedmod)
command(app, EvaluateSettings, "evaluate", _evaluate)
command(app, GenerateSettings, "generate", _generate)
command(app, AuditSettings, "audit", _audit)
command(app, CompareSettings, "compare", _compare)
command(app, DoctorSettings, "doctor", _doctor)
command(app, DemoSettings, "demo", _demo)
command(app, BenchSettings, "bench", _bench)


def main(words: list[str] | None = None) -> NoReturn:
    """Run `splitfl` with these words, or with those of the command line."""
    silence_library_warnings()
    run_app(app, words)


if __name__ == "__main__":
    main(sys.argv[1:])
