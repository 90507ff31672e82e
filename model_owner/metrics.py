"""Figures for Prometheus, and whether the owner is healthy, over HTTP on this machine: `serve --metrics-bind`.

Labels have few values, all known beforehand: kinds of work, directions, refusal codes, reasons. The one exception is
`party`, the name on the allow-list, for the first `MOST_PARTIES` names; all later ones are counted together as
`OTHERS`. Nothing has a label for a session or a row. Needs prometheus-client, from the extra `owner`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil

import splitfl
from model_owner.observer import Ended, Served, SessionFacts
from splitfl.errors import ResourceError

try:
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        Info,
        disable_created_metrics,
        generate_latest,
    )
except ImportError as error:
    raise ResourceError(
        "An owner's metrics (--metrics-bind) need prometheus-client.", hint="pip install 'splitfl[owner]'"
    ) from error

MOST_PARTIES = 64
OTHERS = "(others)"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_REQUEST_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """The owner at one moment; read by the thread that answers HTTP."""

    starting: bool = False
    """The model is being loaded; nobody can connect yet."""
    draining: bool = False
    sessions: int = 0
    waiting: int = 0
    """Requests that no worker has taken yet."""
    waiting_bytes: int = 0
    """Of requests that wait or are computed."""
    memory_used: int = 0
    memory_limit: int = 0
    state_failing: bool = False
    spent: dict[str, int] = field(default_factory=dict)
    """Party to tokens that count against its query budget."""
    budgets: dict[str, int] = field(default_factory=dict)
    """Party to its query budget, where it has one."""


class Metrics:
    """Counts what the server tells (an `Observer`).

    Args:
        look: gives what is not told but looked at; called for each scrape, from another thread than the server's.
    """

    def __init__(self, look: Callable[[], Look] = Look) -> None:
        disable_created_metrics()  # a second series for each counter, which nobody reads
        self.look = look
        self.registry = CollectorRegistry(auto_describe=True)
        self._names: set[str] = set()
        self._lock, self._one_scrape = threading.Lock(), threading.Lock()
        registry = self.registry
        Info("splitfl", "The program that serves.", registry=registry).info({"version": splitfl.__version__})

        def count(name: str, words: str, *labels: str) -> Counter:
            return Counter(name, words, labels, registry=registry)

        def spread(name: str, words: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, words, labels, buckets=buckets, registry=registry)

        self._opened = count("splitfl_sessions_opened", "Sessions opened.", "party")
        self._ended = count("splitfl_sessions_ended", "Sessions ended, by reason.", "why")
        self._requests = count("splitfl_requests", "Requests answered, by kind of work.", "work")
        self._tokens = count("splitfl_tokens", "Tokens served, by kind of work.", "work")
        self._party_tokens = count("splitfl_party_tokens", "Tokens served, by party.", "party")
        self._bytes = count("splitfl_bytes", "Bytes of requests (in) and answers (out).", "direction")
        self._refusals = count("splitfl_refusals", "Refusals, by code.", "code")
        self._answer_s = spread("splitfl_answer_seconds", "From a request to its answer.", _SECONDS, "work")
        self._queue_s = spread("splitfl_queue_seconds", "How long work waited for a worker.", _SECONDS)
        self._step_s = spread("splitfl_step_seconds", "How long a worker computed.", _SECONDS)
        self._batch_requests = spread("splitfl_batch_requests", "Requests in one pass of the trunk.", _COUNTS)
        self._batch_rows = spread("splitfl_batch_rows", "Rows in one pass of the trunk.", _COUNTS)
        self._set_gauges()

    def _set_gauges(self) -> None:
        process = psutil.Process()

        def gauge(name: str, words: str, value: Callable[[Look], float]) -> None:
            Gauge(name, words, registry=self.registry).set_function(lambda: value(self.look()))

        gauge("splitfl_sessions_open", "Sessions open now.", lambda look: look.sessions)
        gauge("splitfl_queue_requests", "Requests that wait for a worker.", lambda look: look.waiting)
        gauge("splitfl_queue_bytes", "Bytes of requests under way.", lambda look: look.waiting_bytes)
        gauge("splitfl_memory_used_bytes", "Held in kept steps and caches.", lambda look: look.memory_used)
        gauge("splitfl_memory_limit_bytes", "The memory budget.", lambda look: look.memory_limit)
        gauge("splitfl_resident_bytes", "Resident memory of the process.", lambda _: process.memory_info().rss)
        gauge("splitfl_draining", "1 while the owner is shutting down.", lambda look: look.draining)
        gauge("splitfl_state_failing", "1 while the state cannot be written.", lambda look: look.state_failing)
        self._spent = Gauge("splitfl_budget_spent_tokens", "Used up of the query budget.", ["party"],
                            registry=self.registry)  # fmt: skip
        self._budget = Gauge("splitfl_budget_total_tokens", "The query budget, where there is one.", ["party"],
                             registry=self.registry)  # fmt: skip

    # ---- what an observer is told

    def session_opened(self, facts: SessionFacts) -> None:
        """Count it."""
        self._opened.labels(self._name(facts.party)).inc()

    def session_ended(self, facts: SessionFacts, why: Ended, seconds: float) -> None:
        """Count it."""
        self._ended.labels(why).inc()

    def request_served(self, served: Served) -> None:
        """Count it, its tokens, bytes and seconds."""
        self._requests.labels(served.work).inc()
        self._tokens.labels(served.work).inc(served.tokens)
        self._party_tokens.labels(self._name(served.party)).inc(served.tokens)
        self._bytes.labels("in").inc(served.bytes_in)
        self._bytes.labels("out").inc(served.bytes_out)
        self._answer_s.labels(served.work).observe(served.seconds)

    def refused(self, code: str, session: str | None) -> None:
        """Count it."""
        self._refusals.labels(code).inc()

    def work_done(self, waited_s: float, took_s: float) -> None:
        """Note both times."""
        self._queue_s.observe(waited_s)
        self._step_s.observe(took_s)

    def batch_done(self, requests: int, rows: int, tokens: int) -> None:
        """Note its size."""
        self._batch_requests.observe(requests)
        self._batch_rows.observe(rows)

    # ---- what is asked

    def page(self) -> bytes:
        """All figures, in Prometheus' text format."""
        look = self.look()
        with self._one_scrape:
            for gauge, by_party in ((self._spent, look.spent), (self._budget, look.budgets)):
                gauge.clear()
                for party, tokens in by_party.items():
                    gauge.labels(self._name(party)).inc(tokens)
            return generate_latest(self.registry)

    def _name(self, party: str) -> str:
        """The party's name, or `OTHERS` once there are too many."""
        with self._lock:
            if party not in self._names:
                if len(self._names) >= MOST_PARTIES:
                    return OTHERS
                self._names.add(party)
            return party


class MetricsServer:
    """Answers ``/metrics`` and ``/healthz`` (200 while the owner serves, 503 before and after) until it is closed.

    Args:
        metrics: what to show.
        host: to bind to.
        port: 0 takes a free one.

    Raises:
        ResourceError: the address cannot be served.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        class Handler(_Handler):
            shown = metrics

        class Listener(ThreadingHTTPServer):
            address_family = _family(host)
            daemon_threads = True
            request_queue_size = 64

        try:
            self._server = Listener((host, port), Handler)
        except OSError as error:
            raise ResourceError(
                f"The address {host}:{port} of --metrics-bind cannot be served: {str(error.strerror).lower()}.",
                hint="choose another port, or 0 for a free one; the host must be an address of this machine",
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self._server.server_address[1]}"
        """Without a path."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _family(host: str) -> Any:
    import socket

    return socket.AF_INET6 if ":" in host else socket.AF_INET


class _Handler(BaseHTTPRequestHandler):
    shown: Metrics
    timeout = _REQUEST_TIMEOUT_S
    server_version = "splitfl"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer."""
        match self.path.partition("?")[0]:
            case "/metrics":
                self._say(HTTPStatus.OK, self.shown.page(), CONTENT_TYPE_LATEST)
            case "/healthz":
                look = self.shown.look()
                status = HTTPStatus.SERVICE_UNAVAILABLE if look.starting or look.draining else HTTPStatus.OK
                self._say(status, b"draining\n" if look.draining else b"starting\n" if look.starting else b"serving\n")
            case _:
                self._say(HTTPStatus.NOT_FOUND, b"/metrics or /healthz\n")

    def _say(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: scrapes are no news."""
