"""Forms the steps of one route.

Iteration-level: between any two steps a request may join, leave or be cancelled. A route of n
stages computes without a bubble when n steps are in flight, so that is the limit; a request is in
at most one decode step at a time because its next token is not known before. Decoding requests are
therefore spread evenly over the steps in flight, or over more steps where that would be more rows
than pay (see ``step_size``). A prompt is sent in chunks one behind the other without waiting, which
keeps every stage busy. While others decode, chunks have places of their own beside theirs: one to
each round of the decode steps, so that no stage computes two chunks in a row, and so small that it
takes about half as long as a round (as measured on this route). Where that pays, the rows that
decode go in one step fewer, and the chunk comes in its place (see ``prompt_place``). That courtesy
ends where several wait for their prompts and not eight decode for each: small chunks beside nearly
empty decode steps would keep all of them waiting, so then it is a *rush*: prompts go at full speed
and keep the stages busy, and whoever decodes does so in one step, which costs hardly more than half
of the rows would.

On a full worker's route there are also shadows (see ``shadow``). They get what live requests leave
over, but at least one step behind each ``live_steps_per_score``, so that neither starves; a shadow
whose request waits to go on here is live work. One that nobody asked for (an audit) gives its room
to a request that has none.

What was formed is kept in ``StepBook`` until it comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from coordinator.prompt_place import Crowd, PromptPlace, chunk_tokens
from coordinator.session import Session
from coordinator.settings import MeshPolicy
from coordinator.shadow import Shadow
from coordinator.step_book import SentRow, StepBook
from coordinator.step_size import StepSize
from coordinator.step_times import StepTimes
from stagemesh.checksum import history_digest
from stagemesh.frame import ROWS_MAX, FrameKind, StepFrame, StepRow
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.topology import Route

DECODING_PER_WAITING = 8
"""So many decode for each that waits, or more, while several wait for their prompts; else their
prompts come first."""


class RouteScheduler:
    """See the module. The owner calls ``admit``/``remove``, ``form`` after every change, and
    ``steps.settle`` for every frame that returns."""

    def __init__(self, route: Route, policy: MeshPolicy) -> None:
        self.route = route
        self.policy = policy
        self.sessions: dict[bytes, Session] = {}
        self.times = StepTimes(policy.step_expected_s)
        self.reserved_tokens = 0
        self.places = policy.microbatches_in_flight or route.stage_count
        self.kv_budget_tokens = _kv_budget(route)
        can_batch = all("batch" in worker.capabilities for worker in route.workers)
        self.size = StepSize(policy.rows_per_step_max if can_batch else 1)
        self.steps = StepBook(route, self.times, self.size)
        self._ready: set[bytes] = set()
        self._decoding: deque[Session] = deque()
        self._prefilling: deque[Session] = deque()
        self._rewinding: deque[Session] = deque()
        self._closing: list[bytes] = []
        self._probes: deque[tuple[tuple[int, ...], tuple[int, ...]]] = deque()
        self.shadows: dict[bytes, Shadow] = {}
        self._live_since_score = 0
        self._decodes_since_chunk = 0
        self._place = PromptPlace(self.places, self.times)

    @property
    def kv_free_tokens(self) -> int | None:
        """Cache positions not promised to anybody; None where workers state no budget."""
        if self.kv_budget_tokens is None:
            return None
        return self.kv_budget_tokens - self.reserved_tokens

    def fits(self, session: Session) -> bool:
        """Whether the caches have room for this request now (or hold it already), audits aside."""
        in_the_way = sum(shadow.reserve_tokens for shadow in self._audits_beside(session))
        return self.has_room(self._wanted(session) - in_the_way)

    def audits_in_the_way(self, session: Session) -> list[Shadow]:
        """Audits that have to end before this request fits."""
        freed, found = 0, []
        for shadow in self._audits_beside(session):
            if self.has_room(self._wanted(session) - freed):
                break
            freed += shadow.reserve_tokens
            found.append(shadow)
        return found

    def _wanted(self, session: Session) -> int:
        shadow = self.shadows.get(session.request)
        return session.reserve_tokens - (shadow.reserve_tokens if shadow is not None else 0)

    def _audits_beside(self, session: Session) -> Iterator[Shadow]:
        return (
            shadow
            for shadow in self.shadows.values()
            if shadow.session is not session and not shadow.is_asked and not shadow.is_urgent
        )

    def has_room(self, tokens: int) -> bool:
        """Whether so many more positions can be promised."""
        free = self.kv_free_tokens
        return free is None or tokens <= free

    @property
    def load(self) -> int:
        """Requests that are computed here, for themselves or as shadows."""
        return len(self.sessions) + len(self.shadows)

    @property
    def is_needed(self) -> bool:
        """Whether a client waits for something here: its tokens, or that they are verified."""
        return bool(self.sessions) or any(shadow.is_asked for shadow in self.shadows.values())

    def admit(self, session: Session, now: float) -> None:
        """Serve this request from its next step on."""
        self.sessions[session.request] = session
        self.reserved_tokens += session.reserve_tokens
        session.attach(self.route.epoch, self.route.names, now)
        self.ready(session)

    def remove(self, session: Session) -> None:
        """Serve it no longer; its caches are freed by the next step."""
        if self.sessions.pop(session.request, None) is None:
            return
        shadow = self.shadows.get(session.request)
        if shadow is None:
            self.reserved_tokens -= session.reserve_tokens
        else:  # behind which it was to go on: the cache is the shadow's again
            shadow.taking_over, shadow.reserve_tokens = False, session.reserve_tokens
        self._ready.discard(session.request)
        if session.opened:
            self._closing.append(session.request)

    # Shadows

    def add_shadow(self, shadow: Shadow) -> None:
        """Feed it whenever there is something to feed."""
        self.shadows[shadow.request] = shadow
        self.reserved_tokens += shadow.reserve_tokens

    def drop_shadow(self, shadow: Shadow) -> None:
        """Feed it no longer, and free its cache."""
        if self.shadows.pop(shadow.request, None) is None:
            return
        self.reserved_tokens -= shadow.reserve_tokens
        if shadow.fed:
            self._closing.append(shadow.request)

    def admit_behind(self, session: Session, shadow: Shadow, now: float) -> None:
        """The request goes on here once its shadow has scored everything (``hand_over``)."""
        self.sessions[session.request] = session
        self.reserved_tokens += session.reserve_tokens - shadow.reserve_tokens
        shadow.reserve_tokens = 0
        session.attach(self.route.epoch, self.route.names, now)

    def hand_over(self, session: Session, shadow: Shadow) -> None:
        """The shadow's cache becomes the request's own: all but the last known token is in it, and
        what it may hold beyond is trimmed away. Where caches cannot be trimmed, it starts over."""
        self.shadows.pop(shadow.request, None)
        held = session.stream.next_position - 1
        if shadow.fed > held and "trim" not in self.route.workers[0].capabilities:
            self._closing.append(session.request)
            session.restart()
            self.ready(session)
            return
        session.resume_at(min(held, shadow.fed))
        if shadow.fed > held:
            self._rewinding.append(session)
        else:
            self.ready(session)

    def restart(self, session: Session) -> None:
        """Free its caches and feed it again from the beginning, on this route."""
        if session.opened:
            self._closing.append(session.request)
        session.restart()
        self.ready(session)

    def rewind(self, session: Session) -> None:
        """Trim its caches to what is confirmed; the owner calls ``ready`` when that is answered."""
        session.rewind()
        self._ready.discard(session.request)
        self._rewinding.append(session)

    def ready(self, session: Session) -> None:
        """It has tokens to feed and no step of its own in the way."""
        if session.request in self._ready or session.pending == 0:
            return
        self._ready.add(session.request)
        (self._decoding if session.decodes_next else self._prefilling).append(session)

    def probe(self, prompt: tuple[int, ...], boundaries: tuple[int, ...] = ()) -> None:
        """Ask what the route would say behind ``prompt``, and what leaves these layers on the
        way."""
        self._probes.append((prompt, boundaries))

    def form(self, now: float) -> Iterator[StepFrame]:
        """Every step that may be sent now, in order."""
        while self._closing:
            yield self._close(now)
        while self._rewinding:
            session = self._rewinding.popleft()
            if session.epoch == self.route.epoch and session.request in self.sessions:
                yield self._rewind(session, now)
        while (frame := self._next_frame(now)) is not None:
            yield frame

    def _next_frame(self, now: float) -> StepFrame | None:
        self._settle_place()
        # Chunks of prompts stand beside the places, whoever came first.
        beside = min(self.steps.prefills_in_flight, self.places)
        if self.steps.in_flight - beside >= self.places:
            return self._prefill(now) if self._may_prefill() else None
        if self._probes:
            return self._probe(*self._probes.popleft(), now)
        shadow = self._due_shadow() if self.shadows else None
        if shadow is not None and (
            shadow.is_urgent or self._live_since_score >= self.policy.live_steps_per_score
        ):
            return self._score(shadow, now)
        live = self._live_frame(now)
        if live is not None:
            self._live_since_score += 1
            return live
        return self._score(shadow, now) if shadow is not None else None

    def _due_shadow(self) -> Shadow | None:
        """Urgent ones first, then those that were asked for, then the one that waited longest."""
        due = [s for s in self.shadows.values() if s.is_due(self.policy.shadow_chunk_tokens)]
        return min(due, key=lambda s: (not s.is_urgent, not s.is_asked), default=None)

    def _score(self, shadow: Shadow, now: float) -> StepFrame:
        self._live_since_score = 0
        policy = self.policy
        kind, row = shadow.next_row(
            chunk=policy.shadow_chunk_tokens, prefill_chunk=policy.prefill_chunk_tokens_shared
        )
        self.shadows[shadow.request] = self.shadows.pop(shadow.request)  # behind the others
        return self.steps.send(kind, (SentRow(row, None, shadow.attempt, shadow=shadow),), now)

    def _live_frame(self, now: float) -> StepFrame | None:
        waits = self.steps.decodes_in_flight >= self._decode_places
        if not waits and self._peek(self._decoding, decoding=True) is not None:
            return self._decode(now)
        return self._prefill(now) if self._may_prefill() else None

    def _may_prefill(self) -> bool:
        if self._peek(self._prefilling, decoding=False) is None:
            return False
        follows = self._place.is_given and self.steps.decodes_in_flight > 0
        if self.steps.prefills_in_flight == 0 and not follows:
            return True  # in a place beside the others if need be
        if self.steps.prefills_in_flight >= self.places:
            return False
        return not self._is_shared() or self._decodes_since_chunk >= self._steps_per_round

    @property
    def _decoding_count(self) -> int:
        """Requests that do not wait for their prompts."""
        return len(self.sessions) - self._waiting_count

    @property
    def _waiting_count(self) -> int:
        """Requests that do. Who has left may still stand in line, and who was rewound twice."""
        line = (one for one in self._prefilling if self._is_wanted(one) and not one.decodes_next)
        return len({one.request for one in line})

    def _is_wanted(self, session: Session) -> bool:
        """Whether it still has something to feed on this route."""
        return session.request in self._ready and session.epoch == self.route.epoch

    @property
    def _steps_per_round(self) -> int:
        """Decode steps in which everybody who decodes gets a token."""
        decoding = max(1, self._decoding_count)
        in_flight = min(self._decode_places, decoding)
        return max(in_flight, -(-decoding // self.size.rows))

    @property
    def _decode_places(self) -> int:
        """Most decode steps in flight."""
        if self._is_rush():
            return 1
        return self.places - self._place.is_given

    def _settle_place(self) -> None:
        """Whether the prompt that is first in line gets the place of a decode step."""
        if self._peek(self._prefilling, decoding=False) is None or not self._is_shared():
            self._place.take_back()
        elif self._place.is_open:
            decoding = (one for one in self.sessions.values() if one.opened and one.pending <= 1)
            crowd = Crowd(
                self._decoding_count,
                held_tokens=sum(one.stream.next_position for one in decoding),
                rows_max=self.size.rows,
                prompt_rounds=self._prefilling[0].pending / self._chunk_tokens(),
            )
            self._place.offer(crowd)
            if self._place.is_given:
                self._decodes_since_chunk = 0  # the first chunk comes behind the larger steps

    def _is_shared(self) -> bool:
        """Whether others decode whom a prompt must not hold up."""
        waiting = self._waiting_count
        enough = 1 if waiting < 2 else DECODING_PER_WAITING * waiting
        return self._decoding_count >= enough

    def _is_rush(self) -> bool:
        """Whether prompts come first: several wait for theirs, and few decode."""
        return bool(self._prefilling) and not self._is_shared()

    def _peek(self, line: deque[Session], *, decoding: bool) -> Session | None:
        """The first session in line that really has something of this kind to feed."""
        while line:
            session = line[0]
            wanted = self._is_wanted(session)
            if wanted and session.decodes_next is decoding:
                return session
            line.popleft()
            if wanted:
                (self._decoding if session.decodes_next else self._prefilling).append(session)
        return None

    def _prefill(self, now: float) -> StepFrame:
        session = self._prefilling[0]
        limit = self._chunk_tokens()
        if session.pending - limit == 1:
            # Left alone, the last token would be a decode row, and all caches copied for one step.
            limit = max(1, limit - 1)
        sent = self._row(session, limit)
        self._decodes_since_chunk = 0
        if session.pending == 0:
            self._prefilling.popleft()
            self._ready.discard(session.request)
        return self.steps.send(FrameKind.PREFILL, (sent,), now)

    def _chunk_tokens(self) -> int:
        """How much of a prompt goes into one step."""
        policy = self.policy
        if not self._is_shared():
            return policy.prefill_chunk_tokens
        steps = self.places if self._place.is_given else self._steps_per_round
        return chunk_tokens(self.times, steps, policy.prefill_chunk_tokens_shared)

    def _decode(self, now: float) -> StepFrame:
        # Who waits for a prompt has no place in a step yet, and changing places copies caches.
        share = max(1, -(-self._decoding_count // self._steps_per_round))
        rows: list[SentRow] = []
        while len(rows) < share:
            session = self._peek(self._decoding, decoding=True)
            if session is None:
                break
            self._decoding.popleft()
            self._ready.discard(session.request)
            rows.append(self._row(session, 1))
        self._decodes_since_chunk += 1
        return self.steps.send(FrameKind.DECODE, tuple(rows), now)

    def _row(self, session: Session, limit: int) -> SentRow:
        row = session.next_row(self.steps.next_step, limit)
        return SentRow(row, session, session.attempt)

    def _close(self, now: float) -> StepFrame:
        requests = list(dict.fromkeys(self._closing))
        rows = tuple(SentRow(StepRow(request, 0, ()), None, 0) for request in requests[:ROWS_MAX])
        self._closing = requests[ROWS_MAX:]
        return self.steps.send(FrameKind.CLOSE, rows, now)

    def _rewind(self, session: Session, now: float) -> StepFrame:
        row = StepRow(session.request, session.stream.confirmed, ())
        return self.steps.send(FrameKind.REWIND, (SentRow(row, session, session.attempt),), now)

    def _probe(self, prompt: tuple[int, ...], boundaries: tuple[int, ...], now: float) -> StepFrame:
        epoch, step = self.route.epoch, self.steps.next_step
        request = b"probe" + epoch.to_bytes(7, "big") + step.to_bytes(4, "big")
        opening = RowOpening(SamplingSpec(logprobs=1), len(prompt), bytes(16), len(prompt))
        row = StepRow(request, 0, prompt, samples=True, opening=opening, boundaries=boundaries)
        sent = SentRow(row, None, 0, history_digest(prompt))
        return self.steps.send(FrameKind.PROBE, (sent,), now)

    def check(self) -> list[str]:
        """Broken invariants, in words."""
        reserved = sum(session.reserve_tokens for session in self.sessions.values())
        reserved += sum(shadow.reserve_tokens for shadow in self.shadows.values())
        alone = [s for s in self.shadows.values() if s.request not in self.sessions]
        ended = [s for s in self.sessions.values() if s.has_ended]
        rules = (
            ("in flight within places", 0 <= self.steps.in_flight <= 2 * self.places),
            ("reserved tokens add up", reserved == self.reserved_tokens),
            ("every shadow's cache is reserved", all(s.reserve_tokens for s in alone)),
            ("no ended session is served", not ended),
            ("only what is served is ready", self._ready <= self.sessions.keys()),
        )
        broken = [rule for rule, holds in rules if not holds]
        return [f"route epoch={self.route.epoch}: {rule}" for rule in self.steps.check() + broken]


def _kv_budget(route: Route) -> int | None:
    """Cache positions of the smallest worker; a worker that states none (0) does not limit."""
    stated = [worker.kv_budget_tokens for worker in route.workers if worker.kv_budget_tokens > 0]
    return min(stated, default=None)
