"""Settings of `--record`, at the party and at the owner. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from splitfl.config_common import SIZE
from splitfl.config_distillation import KD_PROTOCOL
from splitfl.config_federation import WHOLE_PROTOCOLS
from splitfl.config_privacy import OFFLINE_PROTOCOL
from splitfl.errors import UsageError
from splitfl.options import Panel, Settings

RECORDING = Panel("Recording (see docs/audit-recording.md)")
_LIMIT = "2GB"


@dataclass(frozen=True, kw_only=True)
class TuneRecording(Settings):
    """Options of `splitfl tune`."""

    record: Annotated[bool, "Keep what crosses in the run directory, encrypted with your key, for `splitfl audit`.",
                      RECORDING] = False  # fmt: skip
    record_limit: Annotated[
        str, "Most that the recording may take; beyond it the run goes on unrecorded.", SIZE, RECORDING
    ] = _LIMIT

    def check_recording(self, protocol: str, federate: str | None, summation: str) -> None:
        """Refuse to record where nothing crosses in the clear, and a limit of nothing.

        Args:
            protocol: of the run.
            federate: the coordinator's address, if there is one.
            summation: how updates are summed there.
        """
        if not self.record:
            _check_limit(self.record_limit)
            return
        if protocol == KD_PROTOCOL:
            raise UsageError(
                f"--record with protocol {protocol!r}: what leaves are answers on public rows, which no attack of "
                "`splitfl audit` reads.",
                hint="leave --record out",
            )
        if protocol == OFFLINE_PROTOCOL and federate is None:
            raise UsageError(
                f"--record with protocol {protocol!r}: nothing crosses while it trains. Its one release is the "
                "adapter, which the run directory holds.",
                hint="leave --record out: `splitfl audit RUN` reads the adapter",
            )
        if protocol in (*WHOLE_PROTOCOLS, OFFLINE_PROTOCOL) and summation != "plain":
            raise UsageError(
                f"--record with protocol {protocol!r} and --sum {summation}: no activation crosses, and no update "
                "leaves in the clear.",
                hint="leave --record out, or use --sum plain if the coordinator may see every update",
            )


@dataclass(frozen=True, kw_only=True)
class ServeRecording(Settings):
    """Options of `splitfl serve`."""

    record: Annotated[
        Path | None, "Directory that keeps what crosses, one file a session, encrypted with your key.", RECORDING
    ] = None
    record_limit: Annotated[
        str, "Most that the recordings may take; beyond it sessions go on unrecorded.", SIZE, RECORDING
    ] = _LIMIT

    def check_recording(self) -> None:
        """Refuse a limit of nothing."""
        if self.record is None:
            _check_limit(self.record_limit)


def _check_limit(limit: str) -> None:
    if limit != _LIMIT:
        raise UsageError("--record-limit has no effect without --record.", hint="add --record, or leave it out")
