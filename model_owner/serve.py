"""`splitfl serve`: load the trunk, bind, admit, answer until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from model_owner.admission import Admission, Everyone, ServerLimits
from model_owner.answer import Answerer
from model_owner.batching import Batcher
from model_owner.handout import Handout, handing_out
from model_owner.logs import logging_to
from model_owner.memory import MemoryBudget, measure
from model_owner.parallel import Ranks, SharedTrunk, check_division, follow, placing, ranks_of_environment
from model_owner.quotas import FILE_NAME, Quotas
from model_owner.recording import RecordedSocket, Recorder
from model_owner.reload import Reload
from model_owner.scheduler import Scheduler
from model_owner.server import Server
from model_owner.trunk import Trunk
from model_owner.watch import Watch, watching
from splitfl.config import ServeSettings
from splitfl.cut import Plan
from splitfl.errors import ModelError, ResourceError
from splitfl.kit import DTYPES, open_kit
from splitfl.load import fingerprint_trunk, load_config, load_trunk_side, parameter_count
from splitfl.metrics import Result, peak_rss_bytes, write_results
from splitfl.options import origin_of_settings
from splitfl.options.values import parse_size
from splitfl.report import as_size
from splitfl.wire.channel import OwnerSocket
from splitfl.wire.keys import AllowList, KeyPair, fingerprint, load_keys

log = logging.getLogger("splitfl.owner")

_LONGEST_WITHOUT_LIMIT = 32_768  # positions, for models without a position table
_SESSIONS_PER_PARTY = 4


def serve(settings: ServeSettings) -> None:
    """Host the trunk until SIGTERM or Ctrl-C.

    Raises:
        ModelError: the kit was cut from another model.
        KeyFileError, ResourceError, UsageError: as their names say.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(settings.log_file, level=settings.log_level, form=settings.log_format))
        ranks = _ranks(settings)
        if ranks is not None and stack.enter_context(ranks).number:
            _follow(settings, ranks)
        else:
            _load_and_serve(settings, stack.enter_context(watching(settings)), ranks)


def _ranks(settings: ServeSettings) -> Ranks | None:
    """The processes that share the trunk, if there are several."""
    if not settings.tensor_parallel:
        return None
    ranks = ranks_of_environment(settings.device)
    check_division(open_kit(settings.kit).plan, load_config(Path(settings.model)), ranks.count)
    return ranks


def _follow(settings: ServeSettings, ranks: Ranks) -> None:
    """Compute along with the process that serves. It says when to stop: until its sessions are closed it needs this."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    follow(_load(settings, open_kit(settings.kit).plan, ranks), ranks)


def _load_and_serve(settings: ServeSettings, watch: Watch, ranks: Ranks | None) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    kit = open_kit(settings.kit)
    plan = kit.plan
    keys, admission = _security(settings)
    quotas = Quotas(_quota_file(settings), watch.account)
    with handing_out(settings.emulator, kit) as handout:  # first of all: it is quick, and may be the wrong one
        trunk = _load(settings, plan, ranks)
        budget = MemoryBudget(parse_size(settings.memory_budget))
        answerer = Answerer(trunk, budget, measure(trunk, caches=plan.task == "causal-lm"))
        asyncio.run(_serve(settings, plan, answerer, keys, admission, handout, watch, quotas))


def limits_of(settings: ServeSettings, plan: Plan) -> ServerLimits:
    """What any session is allowed."""
    return ServerLimits(
        max_tokens=settings.max_tokens,
        max_length=min(plan.max_length or _LONGEST_WITHOUT_LIMIT, settings.max_tokens),
        max_sessions=settings.max_sessions,
        lease_s=settings.lease,
        recompute=settings.memory == "recompute",
        max_sessions_per_party=_sessions_per_party(settings),
        max_waiting_bytes=parse_size(settings.memory_budget),
        deadline_s=settings.deadline,
        cache_lease_s=settings.cache_lease,
    )


def _sessions_per_party(settings: ServeSettings) -> int:
    """Never all of them; but where nobody has a key, all parties are one."""
    if settings.insecure_loopback:
        return settings.max_sessions
    return max(1, min(_SESSIONS_PER_PARTY, settings.max_sessions - 1))


def _quota_file(settings: ServeSettings) -> Path | None:
    """What was named; else the file in the allow-list's folder, if there is one."""
    found = None if settings.parties is None else settings.parties / FILE_NAME
    return settings.parties_config or (found if found is not None and found.is_file() else None)


def _security(settings: ServeSettings) -> tuple[KeyPair | None, Admission]:
    if settings.insecure_loopback:
        return None, Everyone()
    assert settings.key is not None  # noqa: S101  `ServeSettings.check` saw to it
    assert settings.parties is not None  # noqa: S101
    return load_keys(settings.key), AllowList(settings.parties)


def _load(settings: ServeSettings, plan: Plan, ranks: Ranks | None) -> Trunk:
    model_dir = Path(settings.model)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(
            f"--device {settings.device} was asked for, but torch finds no CUDA device here.",
            expected="cpu",
            hint="install a CUDA build of torch and check the driver with nvidia-smi, or leave --device out",
        )
    found = fingerprint_trunk(model_dir, plan)
    if found != plan.trunk:
        raise ModelError(
            f"The kit {settings.kit} was cut from trunk {plan.trunk}, the model {model_dir} has trunk {found}.",
            hint="serve the model that the kit was written from, or write the kit again",
        )
    dtype = DTYPES[plan.dtype if settings.dtype == "auto" else settings.dtype]
    if ranks is not None:
        base = load_trunk_side(model_dir, plan, dtype=dtype, placing=placing(ranks))
        return Trunk(base, plan) if ranks.number else SharedTrunk(base, plan, ranks)
    spread = None if settings.device_map is None else {"device_map": settings.device_map}
    return Trunk(load_trunk_side(model_dir, plan, dtype=dtype, device=settings.device, placing=spread), plan)


async def _serve(
    settings: ServeSettings, plan: Plan, answerer: Answerer, keys: KeyPair | None, admission: Admission,
    handout: Handout | None, watch: Watch, quotas: Quotas,
) -> None:  # fmt: skip
    trunk, limits = answerer.trunk, limits_of(settings, plan)
    recorder = _recorder(settings, keys, admission)
    socket = (OwnerSocket if recorder is None else partial(RecordedSocket, recorder=recorder))(
        settings.bind,
        keys=keys,
        allow=admission if isinstance(admission, AllowList) else None,
        max_message_bytes=limits.max_tokens * max(plan.width, 4) * 4,
        insecure_loopback=settings.insecure_loopback,
    )
    await socket.start()
    scheduler = Scheduler(settings.workers, settings.threads, watch.observer)
    batcher = Batcher(answerer, "off" if settings.tensor_parallel else settings.batching, watch.observer)
    server = Server(socket, plan, answerer, scheduler, admission, limits, handout, watch.observer, quotas,
                    batcher)  # fmt: skip
    watch.attach(server)
    try:
        running = asyncio.ensure_future(server.run())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, running.cancel)
        again = Reload(settings, origin_of_settings(), lambda new: limits_of(new, plan))
        loop.add_signal_handler(signal.SIGHUP, again, server)
        if handout is not None:
            print(f"{'emulator':8} {handout}", file=sys.stderr)
        watch.announce()
        _announce(settings, plan, trunk, socket.address, keys, admission, answerer)
        with contextlib.suppress(asyncio.CancelledError):  # told to stop once more on the way out
            await running
    finally:
        await asyncio.to_thread(scheduler.stop)
        await socket.close()
        if settings.json is not None:
            write_results(settings.json, "serve", settings, _results(server))


def _recorder(settings: ServeSettings, keys: KeyPair | None, admission: Admission) -> Recorder | None:
    if settings.record is None:
        return None
    limit = parse_size(settings.record_limit)
    recorder = Recorder(
        settings.record, keys, limit, lambda party: admission.allowed(party.encode()), 2 * settings.max_sessions
    )
    print(f"{'recorded':8} what crosses, in {settings.record}, up to {as_size(limit)}", file=sys.stderr)
    return recorder


def _announce(
    settings: ServeSettings, plan: Plan, trunk: Trunk, address: str, keys: KeyPair | None, admission: Admission,
    answerer: Answerer,
) -> None:  # fmt: skip
    """What is served, for the person who started it; then one line on stdout for scripts."""
    names = ", ".join(admission.names()) if isinstance(admission, AllowList) else "anybody on this machine"
    held = sum(p.nbytes for p in trunk.base.parameters())
    for label, text in (
        ("model", f"{settings.model} ({plan.model_type}, {parameter_count(trunk.base):,} trunk parameters, "
                  f"{as_size(held)} in {str(trunk.dtype).removeprefix('torch.')} on {trunk.device})"),
        ("cut", f"layers {plan.trunk_layers.start} to {plan.trunk_layers.stop - 1} of {plan.layers} here; "
                f"{plan.bottom} below and {plan.top} above with the parties"),
        ("trunk", plan.trunk),
        ("address", address + ("" if keys else "  (not encrypted: loopback only)")),
        ("key", fingerprint(keys.public) if keys else "none"),
        ("parties", names or "none yet; admit some with `splitfl keys allow`"),
        ("memory", f"{as_size(answerer.budget.limit)} for steps ({as_size(answerer.costs.graph)} a token) and caches "
                   f"({as_size(answerer.costs.cache)} a token); {settings.memory} by default"),
        ("compute", f"{settings.workers} worker(s), {settings.threads or torch.get_num_threads()} thread(s) each"),
    ):  # fmt: skip
        print(f"{label:8} {text}", file=sys.stderr)
    sys.stderr.flush()
    print(f"ready {address} {fingerprint(keys.public) if keys else 'insecure'}", flush=True)


def _results(server: Server) -> list[Result]:
    c = server.counters
    figures = {
        "sessions": (c.sessions, "sessions"),
        "forwards": (c.forwards, "requests"),
        "backwards": (c.backwards, "requests"),
        "tokens": (c.tokens, "tokens"),
        "emulator handed out": (c.piece_bytes, "bytes"),
        "refusals": (sum(c.refusals.values()), "messages"),
        "bytes sent": (server.socket.bytes_sent, "bytes"),
        "bytes received": (server.socket.bytes_received, "bytes"),
        "peak memory": (peak_rss_bytes(), "bytes"),
    }
    return [Result(case="serve", metric=name, value=value, unit=unit) for name, (value, unit) in figures.items()]
