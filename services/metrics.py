"""What is measured: instruments by OpenTelemetry's conventions, with bounded labels.

OpenTelemetry's API only; ``telemetry.py`` decides where numbers go. Names of the GenAI and RPC
conventions where one exists, ``mesh.*`` otherwise; units are UCUM, what is counted
in braces. A label is a constant of the
error tree, a phase, a stage index or a worker's name, and never a request; what is outside a known
set (or beyond WORKERS_LABELLED_MAX) counts as ``_OTHER``, so that no peer can make the set of time
series grow.

    gen_ai.server.request.duration         s      a generation, received to ended
    gen_ai.server.time_to_first_token      s      received to first accepted token
    gen_ai.server.time_per_output_token    s      between accepted tokens
    gen_ai.client.token.usage              token  prompt and answer lengths
    rpc.server.call.duration               s      every call but the mesh's own long streams
    mesh.request.queue.duration            s      submitted to first step
    mesh.step.duration                     s      a step's way round the whole route
    mesh.step.rows                         row    requests in one step
    mesh.stage.compute.duration            s      per stage: on the compute thread
    mesh.stage.queue.duration              s      per stage: accepted to compute thread
    mesh.stage.transfer.duration           s      per stage: handing a result to the next
    mesh.stage.time                        s      per stage: compute, queue, transfer, wait
    mesh.hop.io                            By     frames sent and received, by place and stage
    mesh.validation.time                   s      spent on checking, by worker and tier
    mesh.watermark.lag                     token  accepted and not verified yet, largest and sum
    mesh.recoveries                        recovery by cause and action
    mesh.guard.events                      event  what every guard counted, by worker
    mesh.barrier.wait                      s      rendezvous, forming to ended, by how they ended
    mesh.kv.tokens, mesh.kv.limit          token  cached positions per worker
    mesh.requests                          request  running, queued
    mesh.telemetry.dropped                 span   spans lost because a buffer was full
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import TypeVar

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation
from opentelemetry.util.types import AttributeValue

from stagemesh.errors import by_reason

OTHER = "_OTHER"
WORKERS_LABELLED_MAX = 128
GUARDS_LABELLED_MAX = 256
READ_S_MAX = 1.0
"""An exporter waits this long for numbers that the event loop owns."""
SECONDS_FAST = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    5,
)
SECONDS_TOKEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    2.5,
)
SECONDS_REQUEST = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
SECONDS_RPC = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Read = TypeVar("Read")
Label = Callable[[str], dict[str, str]]
ACTIVITIES = ("compute", "queue", "transfer", "wait")
"""What a stage's time goes into. Queue and transfer overlap with compute; wait is the time between
steps in which the stage had nothing to compute."""
TIERS = frozenset({"integrity", "numeric", "shadow"})
VALIDATION_PREFIX = "validation_us."
BARRIER_PREFIX = "barrier_wait_us."
"""Counters that are durations: microseconds by tier, and by how a barrier ended."""
ENDS = frozenset({"complete", "broken"})
ACTIONS = frozenset({"retransmit", "rewind", "replay", "reroute", "fail"})


class BoundedLabels:
    """The first ``limit`` values seen are labels; all later ones are ``_OTHER``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, value: str) -> str:
        with self._lock:
            if value in self._known:
                return value
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(value)
            return value


class MeshMetrics:
    """Every instrument of a process. Recording never blocks."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._reasons = frozenset(by_reason())
        self._workers = BoundedLabels(WORKERS_LABELLED_MAX)
        self._guards = BoundedLabels(GUARDS_LABELLED_MAX)

        def seconds(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return meter.create_histogram(
                name, unit="s", description=about, explicit_bucket_boundaries_advisory=buckets
            )

        self.request = seconds(
            "gen_ai.server.request.duration", "received to ended", SECONDS_REQUEST
        )
        self.time_to_first_token = seconds(
            "gen_ai.server.time_to_first_token", "received to first token", SECONDS_REQUEST
        )
        self.time_per_output_token = seconds(
            "gen_ai.server.time_per_output_token", "between tokens", SECONDS_TOKEN
        )
        self.queue = seconds("mesh.request.queue.duration", "waiting for a step", SECONDS_REQUEST)
        self.step = seconds("mesh.step.duration", "a step's way round the route", SECONDS_TOKEN)
        self.stage_compute = seconds("mesh.stage.compute.duration", "computing", SECONDS_TOKEN)
        self.stage_queue = seconds("mesh.stage.queue.duration", "waiting to compute", SECONDS_FAST)
        self.stage_transfer = seconds("mesh.stage.transfer.duration", "handing on", SECONDS_FAST)
        self._stage_time = meter.create_counter(
            "mesh.stage.time", unit="s", description="where a stage's time went"
        )
        self._rpc = seconds("rpc.server.call.duration", "a call, start to end", SECONDS_RPC)
        self.tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="prompt and answer lengths",
            explicit_bucket_boundaries_advisory=TOKENS,
        )
        self.batch = meter.create_histogram(
            "mesh.step.rows",
            unit="{row}",
            description="requests in one step",
            explicit_bucket_boundaries_advisory=ROWS,
        )
        self.hop_bytes = meter.create_counter("mesh.hop.io", unit="By", description="frames moved")
        self._recoveries = meter.create_counter(
            "mesh.recoveries", unit="{recovery}", description="by cause and action"
        )
        self.dropped = meter.create_counter(
            "mesh.telemetry.dropped", unit="{span}", description="lost to a full buffer"
        )

    def known_reason(self, reason: str) -> str:
        """A constant of the error tree, or ``_OTHER``."""
        return reason if reason in self._reasons else OTHER

    def recovered(self, cause: str, action: str) -> None:
        """A recovery took place."""
        self._recoveries.add(
            1,
            {
                "mesh.recovery.cause": self.known_reason(cause),
                "mesh.recovery.action": action if action in ACTIONS else OTHER,
            },
        )

    def stage_spent(self, place: Mapping[str, AttributeValue], **seconds: float) -> None:
        """Add to a stage's time, by activity. ``place`` are labels that say which stage."""
        for activity in ACTIVITIES:
            labels = {**place, "mesh.stage.activity": activity}
            self._stage_time.add(max(0.0, seconds.get(activity, 0.0)), labels)

    def rpc_ended(self, method: str, code: str, seconds: float) -> None:
        """A call to a method that is served here ended."""
        labels = {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code}
        self._rpc.record(max(0.0, seconds), labels)

    # -- numbers that others keep and this reads ----------------------------------------------

    def observe_guards(self, read: Callable[[], Mapping[str, Mapping[str, int]]]) -> None:
        """``read`` gives each worker's counters by name ("coordinator" for its own)."""

        def rows() -> Iterator[Observation]:
            sums: Counter[tuple[str, str]] = Counter()
            for worker, counters in read().items():
                for name, value in counters.items():
                    if not name.startswith((VALIDATION_PREFIX, BARRIER_PREFIX)):
                        sums[self._workers(worker), self._guards(name)] += value
            for (worker, name), value in sums.items():
                yield Observation(value, {"mesh.worker": worker, "mesh.guard": name})

        def times(prefix: str, label: Label, known: frozenset[str]) -> Iterator[Observation]:
            sums: Counter[tuple[str, str]] = Counter()
            for worker, counters in read().items():
                for name, value in counters.items():
                    what = name.removeprefix(prefix)
                    if name.startswith(prefix) and what in known:
                        sums[self._workers(worker), what] += value
            for (worker, what), value in sums.items():
                yield Observation(value / 1e6, {"mesh.worker": worker, **label(what)})

        checks = functools.partial(times, VALIDATION_PREFIX, _tier, TIERS)
        waits = functools.partial(times, BARRIER_PREFIX, _barrier_state, ENDS)
        self._meter.create_observable_counter(
            "mesh.guard.events",
            [_safely(rows)],
            unit="{event}",
            description="what every guard counted",
        )
        self._meter.create_observable_counter(
            "mesh.validation.time", [_safely(checks)], unit="s", description="spent on checking"
        )
        self._meter.create_observable_counter(
            "mesh.barrier.wait", [_safely(waits)], unit="s", description="forming to ended"
        )

    def observe_kv(self, read: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """``read`` gives cached positions in use, and the most there may be, per worker."""

        def rows(place: int) -> Iterator[Observation]:
            sums: Counter[str] = Counter()
            for worker, numbers in read().items():
                sums[self._workers(worker)] += numbers[place]
            for worker, value in sums.items():
                yield Observation(value, {"mesh.worker": worker})

        for place, name in enumerate(("mesh.kv.tokens", "mesh.kv.limit")):
            callback = _safely(functools.partial(rows, place))
            self._meter.create_observable_gauge(name, [callback], unit="{token}")

    def observe_requests(self, read: Callable[[], Mapping[str, int]]) -> None:
        """``read`` gives the number of requests by state: running, queued."""

        def rows() -> Iterator[Observation]:
            for state, value in read().items():
                if state in {"running", "queued"}:
                    yield Observation(value, {"mesh.request.state": state})

        self._meter.create_observable_up_down_counter(
            "mesh.requests", [_safely(rows)], unit="{request}"
        )

    def observe_lag(self, read: Callable[[], Iterable[int]]) -> None:
        """``read`` gives, of each answer that is being verified, the tokens still unverified."""

        def rows() -> Iterator[Observation]:
            lags = list(read())
            yield Observation(max(lags, default=0), {"mesh.lag": "largest"})
            yield Observation(sum(lags), {"mesh.lag": "sum"})

        self._meter.create_observable_gauge("mesh.watermark.lag", [_safely(rows)], unit="{token}")


def elapsed(started: float, ended: float) -> float:
    """Seconds, never negative: readings of one clock may be passed on out of order, and a clock may
    step back by a tick between two cores."""
    return max(0.0, ended - started)


def on_loop(
    loop: asyncio.AbstractEventLoop, read: Callable[[], Read], timeout_s: float = READ_S_MAX
) -> Callable[[], Read]:
    """``read`` as exporters may call it from their threads: it runs on the loop that owns the data.

    Raises RuntimeError if the loop has ended, TimeoutError if it does not get to it in time.
    """

    def call() -> Read:
        answer: Future[Read] = Future()

        def run() -> None:
            try:
                answer.set_result(read())
            except Exception as error:  # noqa: BLE001 - told to whoever asked
                answer.set_exception(error)

        loop.call_soon_threadsafe(run)
        return answer.result(timeout_s)

    return call


def _tier(name: str) -> dict[str, str]:
    return {"mesh.validation.tier": name}


def _barrier_state(name: str) -> dict[str, str]:
    return {"mesh.barrier.state": name}


def _safely(
    rows: Callable[[], Iterable[Observation]],
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    """A callback that sees a consistent snapshot, or nothing while what it reads is changing."""

    def read(_: CallbackOptions) -> Iterable[Observation]:
        try:
            return list(rows())
        except (RuntimeError, TimeoutError):
            return []  # the process is ending, or busy: the next reading is near

    return read
