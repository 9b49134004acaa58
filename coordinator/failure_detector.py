"""Who is healthy, by progress: a worker is judged only by the work it owes and what it says of it.

A worker *owes* a key (a step) from the moment it holds the work until the work is settled. Three
things can be seen from here, and they mean different things:

* **silent**: it owes something and not even a report arrives. A stopped process, a dead network.
  Reports of a working stage come many times a second, so silence is decided quickly (under two
  seconds).
* **slow**: it reports, but the work takes longer than such work took before. The deadline adapts
  per worker and phase as TCP's retransmission timer does (RFC 6298: smoothed mean plus four times
  the smoothed deviation). Slow is suspect, never failed: an overloaded machine is no reason to lose
  a cache.
* **stuck**: it reports, owes, and has made no progress at all for a generous while. A hung
  computation behind a report loop that stays green.

A worker that owes nothing is judged by its idle reports alone, so that a stopped spare is not
chosen.

Work is timed on the worker's *own* clock: what its reports say it spent ready to run but without a
core is taken off. A machine that others keep busy makes a worker's work long, not late; one that
hangs waits for no core, so its clock goes on. Silence is timed on everybody's clock: a report needs
next to no core.

The detector lives in a process that may stand still itself, and then every worker looks silent at
once. So it runs on its own clock: whenever two calls are further apart than ``observe_every_s``
allows, the excess is taken out of everybody's account. The caller must therefore look in (any call)
at least every ``observe_every_s`` while something is owed; ``next_deadline`` says so.

FAILED is final until ``watch`` is called for the worker again (it registered anew or was
reinitialised)."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from stagemesh.guards import Counters
from stagemesh.smoothed import Smoothed
from stagemesh.topology import WorkerName

DEVIATIONS = 4.0
"""RFC 6298 K: how many over the mean are still in time, of work as of reports."""
WAIT_S_MIN = 0.005
"""Shortest wait ``next_deadline`` asks for; a shorter one could round to no wait at all."""


class Health(enum.Enum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """Past a deadline: not to be chosen for new work."""
    FAILED = "failed"
    """Given up: fence it and move its work."""


class Cause(enum.Enum):
    """Why a verdict is not HEALTHY."""

    NONE = "none"
    SILENT = "silent"
    SLOW = "slow"
    STUCK = "stuck"
    STARVED = "starved"
    """It reports that it has nothing to do although it should hold work. Never FAILED by itself:
    the work is stuck at another stage, or on the hop into this one."""
    IDLE_SILENT = "idle_silent"


@dataclass(frozen=True, slots=True)
class DetectorPolicy:
    """Limits in seconds. The defaults fail a stopped process within 2 s of its last sign."""

    report_interval_s: float = 0.25
    """How often a worker is asked to report when nothing happens
    (``Registered.report_interval_ms``)."""
    token_deadline_s: float = 1.0
    """Floor of every adaptive deadline: silence or overdue work below it is never suspect."""
    silence_failed_ratio: float = 1.75
    """A silent worker fails at this multiple of the silence that makes it suspect."""
    silence_ceiling_s: float = 4.0
    """Longest silence that is merely suspect, however irregular its reports used to be."""
    first_deadline_s: float = 5.0
    """Deadline for a phase of which nothing is known and nothing was expected."""
    deadline_ceiling_s: float = 60.0
    """Longest adaptive deadline."""
    expected_ratio: float = 4.0
    """Work may take this multiple of what the caller expected before it is overdue."""
    stuck_ratio: float = 10.0
    """Reporting without progress fails at this multiple of the adaptive deadline …"""
    stuck_floor_s: float = 15.0
    """… but not before this …"""
    stuck_ceiling_s: float = 180.0
    """… and not later than this."""
    idle_suspect_s: float = 3.0
    """Silence of a worker that owes nothing."""
    idle_failed_s: float = 10.0
    observe_every_s: float = 0.25
    """The caller looks in at least this often while something is owed; more is its own stall."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``since``: when the worker entered this state, on the caller's clock; ``evidence``: one
    sentence."""

    worker: WorkerName
    health: Health
    cause: Cause
    evidence: str
    since: float

    @property
    def failed(self) -> bool:
        return self.health is Health.FAILED

    def __str__(self) -> str:
        return f"{self.worker} {self.health.value}: {self.evidence}"


@dataclass(slots=True)
class _Debt:
    """``since``: on the detector's clock; ``begun``: on the worker's own."""

    since: float
    begun: float
    phase: str
    expected_s: float
    work: int


@dataclass(slots=True)
class _Account:
    """What is known of one worker. ``heard`` is on the detector's clock, ``progressed`` on the
    worker's own, which is ``excused`` seconds behind."""

    heard: float
    progressed: float
    excused: float = 0.0
    idle: bool = False
    debts: dict[Hashable, _Debt] = field(default_factory=dict)
    durations: dict[str, Smoothed] = field(default_factory=dict)
    report_gap: Smoothed = field(default_factory=Smoothed)
    final: Verdict | None = None
    shown: Verdict | None = None

    @property
    def last_sign(self) -> float:
        """Silence counts from the last report, or from when it began to owe if that is later."""
        debt = next(iter(self.debts.values()), None)
        return self.heard if debt is None else max(self.heard, debt.since)


class FailureDetector:
    """Verdicts on workers. Every method takes ``now``, seconds on one monotonic clock."""

    def __init__(
        self, policy: DetectorPolicy | None = None, *, counters: Counters | None = None
    ) -> None:
        self.policy = policy or DetectorPolicy()
        self.counters = Counters() if counters is None else counters
        self._accounts: dict[WorkerName, _Account] = {}
        self._observed: float | None = None
        self._stalled = 0.0
        self._owing = 0

    # What happens

    def watch(self, worker: WorkerName, now: float) -> None:
        """A worker registered, or came back from reinitialisation: a clean account."""
        clock = self._clock(now)
        self.forget(worker)
        self._accounts[worker] = _Account(heard=clock, progressed=clock)

    def forget(self, worker: WorkerName) -> None:
        """A worker left; nothing is expected of it."""
        account = self._accounts.pop(worker, None)
        if account is not None:
            self._owing -= len(account.debts)

    def owe(
        self,
        worker: WorkerName,
        key: Hashable,
        now: float,
        expected_s: float = 0.0,
        *,
        phase: str = "decode",
        work: int = 1,
    ) -> None:
        """``worker`` holds the work ``key`` from now on. Repeating it changes nothing.

        ``expected_s``: the caller's own estimate (0 = none). ``phase``: durations are learnt per
        phase; ``work``: its size in units in which the phase's duration is proportional (tokens of
        a prefill)."""
        account = self._account(worker, now)
        if key not in account.debts:
            clock = self._clock(now)
            begun = clock - account.excused
            if not account.debts:
                account.progressed = max(account.progressed, begun)
            account.idle = False
            account.debts[key] = _Debt(clock, begun, phase, expected_s, max(1, work))
            self._owing += 1

    def settle(self, worker: WorkerName, key: Hashable, now: float) -> None:
        """The work is done (or no longer wanted): its duration is learnt, and it counts as
        progress."""
        account = self._account(worker, now)
        debt = account.debts.pop(key, None)
        if debt is None:
            return
        self._owing -= 1
        account.heard = self._clock(now)
        own = account.heard - account.excused
        begun = max(debt.begun, account.progressed)
        account.progressed = own
        took = account.durations.setdefault(debt.phase, Smoothed())
        took.add(max(own - begun, 0.0) / debt.work)

    def cancel(self, worker: WorkerName, key: Hashable, now: float) -> None:
        """The work is no longer wanted; nothing is learnt from it."""
        if self._account(worker, now).debts.pop(key, None) is not None:
            self._owing -= 1

    def release(self, worker: WorkerName, now: float) -> None:
        """The worker owes nothing any more (its route is fenced)."""
        account = self._account(worker, now)
        self._owing -= len(account.debts)
        account.debts.clear()

    def progress(self, worker: WorkerName, now: float, *, starved_s: float = 0.0) -> None:
        """Evidence that its work advanced, short of settling a key."""
        self.alive(worker, now, starved_s=starved_s)
        account = self._accounts[worker]
        account.progressed = account.heard - account.excused

    def alive(
        self, worker: WorkerName, now: float, *, idle: bool = False, starved_s: float = 0.0
    ) -> None:
        """A report without progress. ``idle``: the worker says it holds nothing and computes
        nothing; ``starved_s``: since its last report it wanted a core in vain for so long. No
        worker can excuse more time than has passed."""
        account = self._account(worker, now)
        clock = self._clock(now)
        account.excused += min(max(starved_s, 0.0), clock - account.heard)
        if account.debts:
            account.report_gap.add(clock - account.heard)
        account.heard = clock
        account.idle = idle

    # What follows

    def verdict(self, worker: WorkerName, now: float) -> Verdict:
        """The state of one worker with its evidence. Unknown workers are FAILED."""
        clock = self._clock(now)
        account = self._accounts.get(worker)
        if account is None:
            return Verdict(worker, Health.FAILED, Cause.SILENT, "not registered", now)
        if account.final is not None:
            return account.final
        health, cause, evidence = self._judge(account, clock)
        shown = account.shown
        since = shown.since if shown and shown.health is health and shown.cause is cause else now
        verdict = Verdict(worker, health, cause, evidence, since)
        if health is not Health.HEALTHY and (shown is None or shown.health is not health):
            self.counters.count(f"workers_{'failed' if health is Health.FAILED else 'suspected'}")
        account.shown = verdict
        if health is Health.FAILED:
            account.final = verdict
        return verdict

    def verdicts(self, now: float) -> list[Verdict]:
        """Every watched worker's verdict."""
        return [self.verdict(worker, now) for worker in self._accounts]

    def blame(self, route: Iterable[WorkerName], now: float) -> Verdict | None:
        """Whom to hold responsible when a route stands still: the worst verdict, silence before
        slowness, the earliest stage first. None if all are healthy."""
        rank = {Health.FAILED: 0, Health.SUSPECT: 1}
        by_cause = {Cause.SILENT: 0, Cause.IDLE_SILENT: 1, Cause.STUCK: 2, Cause.STARVED: 3}
        found = [v for v in (self.verdict(w, now) for w in route) if v.health in rank]
        if not found:
            return None
        return min(found, key=lambda v: (rank[v.health], by_cause.get(v.cause, 4)))

    def next_deadline(self, now: float) -> float | None:
        """When to look in again at the latest; None if nothing can change without an event."""
        if not self._accounts:
            return None
        if not self._owing:
            return now + self.policy.idle_suspect_s / 2
        clock = self._clock(now)
        wait = self.policy.observe_every_s
        for account in self._accounts.values():
            if account.debts and account.final is None:
                fails_at = account.last_sign + self._silence_failed_s(account)
                wait = min(wait, max(fails_at - clock, WAIT_S_MIN))
        return now + wait

    def deadline_s(self, worker: WorkerName, phase: str, *, work: int = 1) -> float:
        """The adaptive deadline for work of this phase and size, seconds."""
        account = self._accounts.get(worker)
        took = account.durations.get(phase) if account else None
        return self._deadline_s(took, 0.0, work)

    def owed(self, worker: WorkerName) -> int:
        """How many keys a worker owes."""
        account = self._accounts.get(worker)
        return len(account.debts) if account else 0

    @property
    def stalled_s(self) -> float:
        """How long the caller itself stood still, in all."""
        return self._stalled

    # How

    def _account(self, worker: WorkerName, now: float) -> _Account:
        account = self._accounts.get(worker)
        if account is None:
            clock = self._clock(now)
            account = self._accounts[worker] = _Account(heard=clock, progressed=clock)
        return account

    def _clock(self, now: float) -> float:
        """``now`` without the time in which nobody looked although something was owed."""
        if self._observed is None:
            self._observed = now
        allowed = self.policy.observe_every_s if self._owing else self.policy.idle_suspect_s
        excess = now - self._observed - 2 * allowed
        if excess > 0:
            self._stalled += excess
            self.counters.count("observer_stalled")
        self._observed = max(self._observed, now)
        return now - self._stalled

    def _judge(self, account: _Account, clock: float) -> tuple[Health, Cause, str]:
        if not account.debts:
            return self._judge_idle(clock - account.heard)
        silent = clock - account.last_sign
        limit = self._silence_s(account)
        if silent >= self._silence_failed_s(account):
            said = (
                f"owes {len(account.debts)} and was silent for {silent:.3f} s (limit {limit:.3f} s)"
            )
            return Health.FAILED, Cause.SILENT, said
        debt = next(iter(account.debts.values()))
        deadline = self._deadline_s(account.durations.get(debt.phase), debt.expected_s, debt.work)
        waited = max(clock - account.excused - max(debt.begun, account.progressed), 0.0)
        stuck = self._stuck_s(deadline)
        said = (
            f"{debt.phase} without progress for {waited:.3f} s (deadline {deadline:.3f} s), "
            f"last report {silent:.3f} s ago"
        )
        if account.excused:
            said += f", {account.excused:.3f} s without a core not counted so far"
        if waited >= stuck and not account.idle:
            return Health.FAILED, Cause.STUCK, said
        if silent >= limit:
            said = f"silent for {silent:.3f} s (limit {limit:.3f} s)"
            return Health.SUSPECT, Cause.SILENT, said
        if waited >= deadline:
            return Health.SUSPECT, Cause.STARVED if account.idle else Cause.SLOW, said
        return Health.HEALTHY, Cause.NONE, "in time"

    def _judge_idle(self, silent: float) -> tuple[Health, Cause, str]:
        if silent >= self.policy.idle_failed_s:
            return Health.FAILED, Cause.IDLE_SILENT, f"idle and silent for {silent:.3f} s"
        if silent >= self.policy.idle_suspect_s:
            return Health.SUSPECT, Cause.IDLE_SILENT, f"idle and silent for {silent:.3f} s"
        return Health.HEALTHY, Cause.NONE, "owes nothing"

    def _silence_s(self, account: _Account) -> float:
        """Silence that makes a worker suspect: learnt from its own reports, within floor and
        ceiling."""
        learnt = account.report_gap.bound_s(DEVIATIONS)
        floor = max(self.policy.token_deadline_s, 2 * self.policy.report_interval_s)
        return min(max(learnt, floor), self.policy.silence_ceiling_s)

    def _silence_failed_s(self, account: _Account) -> float:
        return self._silence_s(account) * self.policy.silence_failed_ratio

    def _deadline_s(self, took: Smoothed | None, expected_s: float, work: int) -> float:
        """``took``: such work so far, per unit."""
        policy = self.policy
        if took is not None:
            learnt = took.bound_s(DEVIATIONS) * work
        else:
            learnt = 0.0 if expected_s else policy.first_deadline_s
        wanted = max(learnt, policy.expected_ratio * expected_s, policy.token_deadline_s)
        return min(wanted, policy.deadline_ceiling_s)

    def _stuck_s(self, deadline: float) -> float:
        policy = self.policy
        return min(max(policy.stuck_ratio * deadline, policy.stuck_floor_s), policy.stuck_ceiling_s)
