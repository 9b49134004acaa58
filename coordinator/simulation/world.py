"""One simulation: a plan is built, run, healed, and judged.

    build → faults and requests → heal → every request ends → a new request is answered → rest

The run ends at the first violation. ``simulate(seed)`` is a pure function: the same seed gives the
same ``Outcome``, digest included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.events import CancelRequested, DrainRequested, GenerationRequested, StopMatched
from coordinator.memory_worker import worker_info
from coordinator.mesh_state import WorkerState
from coordinator.route import RoutePhase
from coordinator.simulation.archive import Disk
from coordinator.simulation.clients import Client
from coordinator.simulation.context import Context
from coordinator.simulation.network import Network
from coordinator.simulation.plan import LAYERS, Plan, draw_plan
from coordinator.simulation.prng import Prng
from coordinator.simulation.rest import judge_economy, leftovers
from coordinator.simulation.shell import Coordinator
from coordinator.simulation.shots import Shots
from coordinator.simulation.trouble import MessageTrouble
from coordinator.simulation.virtual import VirtualTime
from coordinator.simulation.watch import Violation, Watch
from coordinator.simulation.worker import SimWorker
from stagemesh import parts as parts_module
from stagemesh.guards import Counters
from stagemesh.sampling import SamplingSpec
from stagemesh.topology import WorkerName

ENDS_S_MAX = 60.0
"""After faults have stopped, every request ends within this (virtual) time."""
SETTLE_S = 0.5
"""What was repaired has this long to register."""
ANSWER_S_MAX = 40.0
"""And a new one is answered within this."""
REST_S = 1.0
REST_S_MAX = 15.0
"""Then everything comes to rest, looked at every ``REST_S``."""
EVENTS_MAX = 400_000
COMES_BACK_S = (0.05, 4.0)
"""When a client that wants the rest of an answer comes back for it."""
FINGERPRINT = "ab" * 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one seed came to. ``cells``: "fault×phase" → how often it fired."""

    seed: int
    digest: str
    violations: tuple[Violation, ...]
    faults: int
    events: int
    steps: int
    tokens: int
    cells: dict[str, int]
    counters: dict[str, int]
    published: dict[str, int]
    virtual_s: float
    failed: tuple[str, ...] = ()
    """Reasons of requests that ended with an error, and stayed so."""
    resumed: int = 0
    """How often a client came back for an answer that had failed behind its first token."""


@dataclass(slots=True)
class Tally:
    """Faults that fired."""

    faults: int = 0
    cells: dict[str, int] = field(default_factory=dict)
    moments: Counters = field(default_factory=Counters)
    """What kills of the coordinator interrupted."""


class World:
    """See the module."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.prng = Prng(plan.seed ^ 0x5EED).fork()
        self.tally = Tally()
        time = VirtualTime()
        watch = Watch(now=lambda: time.now)
        network = Network(time)
        self.context = Context(time, network, watch, plan.limits, self.prng.fork(), plan.step_s)
        self.trouble = MessageTrouble(plan, time, self.prng.fork(), self.count)
        network.trouble = self.trouble
        self.disk = Disk()
        self.past: list[Coordinator] = []
        """Coordinators that were killed."""
        self.coordinator = self._start_coordinator()
        self.workers: dict[str, SimWorker] = {}
        self.gone: list[SimWorker] = []
        self.clients: list[Client] = []
        self.healed = False
        self._instances = 0
        self._patience = Prng(plan.seed ^ 0xBACC)
        self._healed_at = 0.0
        self._join_all()
        self.shots = Shots(self)
        for ask in plan.asks:
            client = self._client(ask.demand, ask.arrives_at)
            client.cancel_after, client.stop_at = ask.cancel_after, ask.stop_at
            client.resumes, client.on_failure = ask.resumes, self._failed
            budgets = (plan.kv_budget_tokens, plan.full_kv_budget_tokens)
            fits = all(client.reserve <= tokens for tokens in budgets if tokens)
            verifiable = not client.holds or (plan.gentle and plan.full_workers > 0)
            client.must_succeed = plan.must_succeed and fits and verifiable
        if plan.drain_at is not None:
            time.after(plan.drain_at, self._drain_one)

    # Building

    def _join_all(self) -> None:
        plan = self.plan
        spans = [f"{a}-{b}" for a, b in zip(plan.cuts, plan.cuts[1:], strict=False)]
        names = [(f"s{index}", span) for index, span in enumerate(spans)]
        names += [(f"spare{index}", spans[index]) for index in plan.spares]
        names += [(f"full{number}", f"0-{LAYERS}") for number in range(plan.full_workers)]
        for name, span in names:
            when = self.prng.uniform(0.0, 0.02)
            self.context.time.after(when, lambda n=name, s=span: self._join(n, s))  # type: ignore[misc]

    def _join(self, name: str, span: str, *, fingerprint: str = FINGERPRINT) -> None:
        self._instances += 1
        info = worker_info(
            name,
            span,
            layer_count=LAYERS,
            fingerprint=fingerprint,
            instance=str(self._instances),
            batch=self.plan.batch,
            kv_budget_tokens=self._kv_budget(span),
        )
        before = self.workers.get(name)
        if before is not None:
            self.gone.append(before)
        self.workers[name] = SimWorker(self.context, replace(info, address=f"{name}:hop"))

    def _kv_budget(self, span: str) -> int:
        plan = self.plan
        return plan.full_kv_budget_tokens if span == f"0-{LAYERS}" else plan.kv_budget_tokens

    def restart(self, worker: SimWorker, *, fingerprint: str = FINGERPRINT) -> None:
        """A new process under the same name, if it is not there already."""
        if self.workers[worker.name] is worker and not worker.process.alive:
            self._join(worker.name, str(worker.info.span), fingerprint=fingerprint)

    def _start_coordinator(self) -> Coordinator:
        started = Coordinator(self.context, self.plan.policy, self.disk, self.plan.commit_s)
        started.behind_event = self._event_handled
        return started

    def kill_coordinator(self, restart_s: float, *, lose_file: bool = False) -> None:
        """kill -9; another one starts later, and every client asks it for the rest."""
        killed, watch = self.coordinator, self.context.watch
        if not killed.process.alive:
            return
        for moment in killed.journal.moments:
            self.tally.moments.count(f"coordinator_killed.{moment}")
        killed.process.kill()
        if lose_file:
            self.disk.lose()
        kept = self.disk.kept
        for client in self.clients:
            if client.submitted and client.end is None and not (client.misled or self.disk.lost):
                ours = kept[client.key].tokens() if client.key in kept else []
                seen = client.tokens[len(client.demand.accepted) :]
                if seen and client.tokens != ours[: len(client.tokens)]:
                    watch.violate("I14", f"{client.name} was shown tokens that are not kept")
        ended = {key for key, one in kept.items() if one.ended}
        watch.coordinator_died(ended, {key for key in ended if kept[key].failure is not None})
        self.context.time.after(restart_s, self.restart_coordinator)

    def restart_coordinator(self) -> None:
        """The next process, if none is there."""
        if self.coordinator.process.alive:
            return
        self.past.append(self.coordinator)
        self.coordinator = self._start_coordinator()
        for client in self.clients:
            if client.submitted and client.end is None:
                self._ask(client)

    def _client(self, demand: GenerationRequested, arrives_at: float) -> Client:
        client = Client(demand, arrives_at, LAYERS, self.context.watch)
        client.on_token = self._token_received
        self.clients.append(client)
        self.context.time.at(arrives_at, lambda: self._submit(client))
        return client

    def _submit(self, client: Client) -> None:
        client.submitted = True
        self._ask(client)

    def _ask(self, client: Client) -> None:
        """Of the coordinator there is; one that is dead is asked again when there is another."""
        coordinator = self.coordinator
        coordinator.process.do(lambda: coordinator.serve(client))

    def _failed(self, client: Client) -> None:
        """A client that comes back for the rest does so after a while."""
        client.returning = True
        wait_s = self._patience.uniform(*COMES_BACK_S)
        self.context.time.after(wait_s, lambda: self._come_back(client))

    def _come_back(self, client: Client) -> None:
        client.come_back()
        whole_s = self.context.time.now - self._healed_at if self.healed else 0.0
        model = self.coordinator.mesh.state.model
        ours = model is None or model.fingerprint == FINGERPRINT
        client.must_find_route = whole_s > SETTLE_S and ours
        self._submit(client)

    def _token_received(self, client: Client) -> None:
        """A client that goes away, or an edge that found a stop string, says so a moment later."""
        count, time = len(client.tokens), self.context.time
        if client.cancel_after is not None and count > client.cancel_after:
            client.cancelled, client.cancel_after = True, None
            time.after(0.001, lambda: self.coordinator.feed(CancelRequested(client.key)))
        elif client.stop_at is not None and count >= client.stop_at:
            client.stop_kept, client.stop_at, client.stopped = count - 1, None, True
            matched = StopMatched(client.key, client.stop_kept, "stop")
            time.after(0.0005, lambda: self.coordinator.feed(matched))

    def _drain_one(self) -> None:
        names = list(self.workers)
        name = names[int(self.plan.drain_place * len(names))]
        self.coordinator.feed(DrainRequested(WorkerName(name), 1.0))

    # Looking

    def count(self, fault: str, phase: str) -> None:
        """A fault has fired."""
        self.tally.faults += 1
        cell = f"{fault}×{phase}"
        self.tally.cells[cell] = self.tally.cells.get(cell, 0) + 1

    def _event_handled(self) -> None:
        if self.healed:
            return
        state = self.coordinator.mesh.state
        if self.plan.drain_at is not None:
            records = state.workers.values()
            self.trouble.draining = any(r.state is WorkerState.DRAINING for r in records)
        self.shots.look()

    def phases_of(self, number: int) -> tuple[str, ...]:
        """Where the request is, as the coordinator knows it. A prompt of one chunk is in two phases
        at once."""
        if self.trouble.draining:
            return ("drain",)
        state = self.coordinator.mesh.state
        session = state.sessions.get(self.clients[number].key)
        if session is None or not session.epoch:
            opening = any(live.phase is not RoutePhase.OPEN for live in state.routes.values())
            return ("handshake",) if opening or session is not None else ()
        stream = session.stream
        if session.accepted_count:
            last = session.accepted_count >= session.max_tokens - 1
            return ("last_token",) if last else ("mid_decode",)
        all_sent = stream.consumed >= stream.next_position
        if not stream.confirmed:
            return ("first_prefill", "first_token") if all_sent else ("first_prefill",)
        return ("first_token",) if all_sent else ("later_prefill",)

    def route_of(self, number: int) -> tuple[str, ...]:
        """Workers of the request's route; empty if it has none."""
        session = self.coordinator.mesh.state.sessions.get(self.clients[number].key)
        return tuple(session.route) if session is not None else ()

    # Running

    def run(self) -> None:
        """See the module."""
        watch, time = self.context.watch, self.context.time
        self._until(lambda: self._troubles_are_over() or bool(watch.violations), self.plan.heal_at)
        self._heal()
        ended = self._until(self._all_ended, time.now + ENDS_S_MAX)
        if not ended and not watch.violations:
            hanging = ", ".join(c.name for c in self.clients if c.end is None)
            watch.violate("I6", f"{hanging} did not end within {ENDS_S_MAX:.0f} s")
        if not watch.violations:
            self._ask_once_more()
        if not watch.violations:
            self._come_to_rest()

    def _come_to_rest(self) -> None:
        """Nothing may be left in the end; what is only on its way is given time."""
        watch, time = self.context.watch, self.context.time
        end = time.now + REST_S_MAX
        while not watch.violations:
            self._until(lambda: False, time.now + REST_S)
            left = leftovers(self)
            if not left or watch.violations:
                break
            if time.now >= end:
                watch.violate("I7", "; ".join(left[:6]))
        judge_economy(self)

    def _until(self, condition: object, end: float) -> bool:
        watch = self.context.watch

        def done() -> bool:
            return bool(watch.violations) or condition()  # type: ignore[operator]

        reached = self.context.time.run_until(done, end, events_max=EVENTS_MAX)
        if self.context.time.events >= EVENTS_MAX:
            watch.violate("I6", f"more than {EVENTS_MAX} events: it goes round in circles")
        return reached

    def _troubles_are_over(self) -> bool:
        if self.shots.pending or self.trouble.pending:
            return False
        return self.context.time.now > self.plan.noise.ends and self._all_ended()

    def _all_ended(self) -> bool:
        return all(client.end is not None and not client.returning for client in self.clients)

    def _heal(self) -> None:
        """Everything that was broken is repaired; nothing more befalls."""
        self.healed, self._healed_at = True, self.context.time.now
        model = self.coordinator.mesh.state.model
        if model is not None and model.fingerprint != FINGERPRINT:
            # The last worker was away when one with other weights came: the mesh now serves those,
            # and turns the old ones away until nothing runs any more.
            for client in self.clients:
                client.must_succeed = False
        self.trouble.stop()
        self.trouble.draining = False
        self.shots.pending.clear()
        network = self.context.network
        network.heal()
        self.disk.full = False
        self.coordinator.process.resume()
        self.restart_coordinator()
        for worker in list(self.workers.values()):
            worker.process.resume()
            worker.runner.slowness = 1.0
            worker.runner.lies.clear()
            if worker.hosted != FINGERPRINT or worker.info.fingerprint != FINGERPRINT:
                worker.process.kill()
        self._keep_alive()

    def _keep_alive(self) -> None:
        """What is gone, or goes now (it had been drained), is started again."""
        for worker in list(self.workers.values()):
            self.restart(worker)
        self.context.time.after(SETTLE_S / 2, self._keep_alive)

    def _ask_once_more(self) -> None:
        """The healed mesh answers a new request, whole."""
        self._until(lambda: False, self.context.time.now + SETTLE_S)
        number = len(self.clients) + 1
        demand = GenerationRequested(
            number.to_bytes(16, "big"), (5, 6, 7), SamplingSpec(), max_tokens=4
        )
        now = self.context.time.now
        client = self._client(demand, now)
        client.must_succeed = True
        if not self._until(lambda: client.end is not None, now + ANSWER_S_MAX):
            self.context.watch.violate("I6", "the healed mesh did not answer a new request")

    # Judging

    def outcome(self) -> Outcome:
        """What it came to."""
        watch = self.context.watch
        coordinators = [*self.past, self.coordinator]
        total = Counters(self.tally.moments)
        parts_of = [one.mesh.state.counters for one in coordinators]
        parts_of += [one.links.servicer.counters for one in coordinators]
        parts_of += [w.servicer.counters for w in (*self.workers.values(), *self.gone)]
        errors = [getattr(c.end, "error", None) for c in self.clients]
        return Outcome(
            seed=self.plan.seed,
            digest=watch.digest,
            violations=tuple(watch.violations),
            faults=self.tally.faults,
            events=self.context.time.events,
            steps=watch.steps_computed,
            tokens=watch.tokens,
            cells=self.tally.cells,
            counters=dict(total.merged(parts_of)),
            published=dict(sum((Counter(one.published) for one in coordinators), Counter())),
            virtual_s=self.context.time.now,
            failed=tuple(error.reason for error in errors if error is not None),
            resumed=watch.resumptions,
        )


@contextmanager
def small_parts(part_bytes: int) -> Iterator[None]:
    """Payloads travel in parts above ``part_bytes``, so that a small model's do too."""
    module: Any = parts_module
    before = module.PART_BYTES_MAX
    module.PART_BYTES_MAX = part_bytes
    try:
        yield
    finally:
        module.PART_BYTES_MAX = before


def simulate(seed: int, *, changed: AbstractContextManager[object] | None = None) -> Outcome:
    """Run one seed. ``changed``: a context in which the code under test is another (a planted
    bug)."""
    plan = draw_plan(seed)
    with small_parts(plan.part_bytes), changed or nullcontext():
        world = World(plan)
        try:
            world.run()
        except Exception as error:  # noqa: BLE001 - a seed that raises is a seed to look at
            world.context.watch.crashed("run", error)
        return world.outcome()
