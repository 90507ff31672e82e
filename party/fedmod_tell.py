"""What `splitfl fedmod` says at its end: figures in words, ``--json``, the report."""

from __future__ import annotations

from collections.abc import Mapping

from party.evaluate import Score
from party.fedmod_run import FedmodRun
from party.opening import say
from splitfl.config_mesh import FedmodSettings
from splitfl.errors import UsageError
from splitfl.metrics import Result, peak_rss_bytes, write_results
from splitfl.report import as_size, write_report


def in_words(score: Score) -> str:
    """One line."""
    return f"loss {score.loss:.4f}, accuracy {score.accuracy:.3f}, macro F1 {score.macro_f1 or 0.0:.3f}"


def tell_end(
    settings: FedmodSettings, run: FedmodRun, scores: Mapping[str, Score | None], totals: Mapping[str, float]
) -> None:
    """Write and print what a finished run has to show.

    Args:
        settings: of the run.
        run: where.
        scores: held-out figures: ``before`` training (None after a resume), ``local`` (without peers), ``after``, and
            the last two with this server's own thresholds.
        totals: ``seconds``, ``bytes_sent``, ``bytes_received``.
    """
    moved = f"{as_size(totals['bytes_sent'])} sent, {as_size(totals['bytes_received'])} received"
    say(f"{moved}, {totals['seconds']:.0f} s")
    if settings.json is not None:
        write_results(settings.json, "fedmod", settings, _results(scores, totals))
    try:
        say(f"report: {write_report(run.path)}")
    except UsageError as error:  # the extra is not installed; the run is complete without a page
        say(str(error))
    say(f"adapter: {run.adapter}")


def _results(scores: Mapping[str, Score | None], totals: Mapping[str, float]) -> list[Result]:
    results = []
    for case, score in scores.items():
        if score is None:
            continue
        alone = scores.get(case.replace("after", "local")) if case.startswith("after") else None
        against = None if alone is None else alone.macro_f1
        results.append(Result(case=case, metric="held-out macro F1", value=score.macro_f1, unit="", reference=against))
        results.append(Result(case=case, metric="held-out accuracy", value=score.accuracy, unit="share"))
        results.append(Result(case=case, metric="held-out loss", value=score.loss, unit="nats"))
    for name, unit in (("seconds", "s"), ("bytes_sent", "bytes"), ("bytes_received", "bytes")):
        results.append(Result(case="run", metric=name.replace("_", " "), value=totals[name], unit=unit))
    results.append(Result(case="run", metric="peak memory", value=peak_rss_bytes(), unit="bytes"))
    return results
