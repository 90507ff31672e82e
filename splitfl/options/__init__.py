"""The machinery behind every command: one frozen record of settings gives options, help, types and the config file."""

from splitfl.options.command import command
from splitfl.options.console import explain, run_app
from splitfl.options.file import load_table, plain_settings, read_config, read_part, to_toml
from splitfl.options.origin import Origin, origin_of_settings, read_again
from splitfl.options.records import Check, Panel, Settings, above, at_least, between, fields_of
from splitfl.options.values import on_loopback, parse_address, parse_pairs, parse_shape, parse_size

__all__ = [
    "Check",
    "Origin",
    "Panel",
    "Settings",
    "above",
    "at_least",
    "between",
    "command",
    "explain",
    "fields_of",
    "load_table",
    "on_loopback",
    "origin_of_settings",
    "parse_address",
    "parse_pairs",
    "parse_shape",
    "parse_size",
    "plain_settings",
    "read_again",
    "read_config",
    "read_part",
    "run_app",
    "to_toml",
]
