"""The judge: holds a history against what one undisturbed process says, by invariants. Pure.

I1   the tokens are mlx-lm's, each once, in order
I2   positions have no gap and no repeat within one stream; exactly one terminal message; a second
     reading gives the same
I3   what arrived damaged or late was refused (its counters moved), and changed nothing (I1)
I4   epochs of one request never go back
I5   each position was applied once: any second application would change the tokens behind it (I1),
     and the count billed is the count delivered (I8)
I6   after the last fault everything goes on without a long silence, and ends well
I7   no cache, request or process is left over; memory does not climb
I8   tokens billed = tokens delivered = tokens asked for
I9   every recovery names its cause and routes; the spans of a request form one tree, in which each
     recovery links to the work that it interrupted
I10  no barrier stands longer than it may; a complete one lacks nobody
I11  recoveries and repeats stay within their budgets
S    every single fault of the schedule fired, and the mesh was seen to answer it the way it should
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise

from services.stress.history import Answer, End, Mark
from services.stress.workload import Question

FRUITLESS_MAX = 8
"""Recoveries in a row of one request without a new token; the mesh's own limit, after which it
would have failed."""
RETRANSMITS_SHARE_MAX = 0.10
"""Frames sent again, as a share of all, beyond what faults on frames and connections explain."""
RETRANSMITS_PER_FAULT = 256
"""A broken connection sends its whole window again; so many frames one fault may cost."""
RSS_RISE_MIB_MAX = 48.0
RSS_RISE_SHARE_MAX = 0.15
"""A process may rise by the larger of the two from its second quarter of life to its last."""
HANDLES_RISE_MAX = 48
"""So many more descriptors or threads may be open at the end: connections that are being replaced
overlap."""
SHOWN_MAX = 3
"""Faults of one kind that are named."""
QUARTERS = 4
RSS_SAMPLES_MIN = 120
"""Fewer readings say nothing about a slope: allocators and caches are still filling."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One invariant that did not hold."""

    invariant: str
    detail: str
    request_id: str = ""

    def __str__(self) -> str:
        where = f" request {self.request_id}" if self.request_id else ""
        return f"{self.invariant}{where}: {self.detail}"


@dataclass(slots=True)
class Tally:
    """Tokens by what became of them, and everything that did not hold."""

    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    hung: int = 0
    violations: list[Violation] = field(default_factory=list)

    def found(self, invariant: str, detail: str, request_id: str = "") -> None:
        """Note a violation."""
        self.violations.append(Violation(invariant, detail, request_id))


@dataclass(frozen=True, slots=True)
class Remains:
    """The mesh once everything has ended. ``in_flight``: steps on routes and at workers;
    ``on_routes``: requests that a route still counts as its own. ``spans_broken``: requests whose
    spans form no tree, with why. ``barriers``: what is wrong with them."""

    kv_tokens: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 0
    running: int = 0
    queued: int = 0
    on_routes: int = 0
    spans_broken: Mapping[str, str] = field(default_factory=dict)
    barriers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Life:
    """What one process held while it lived, in time order: resident memory (MiB), open descriptors
    and threads."""

    process: str
    pid: int
    readings: tuple[float, ...]
    descriptors: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()


def judge(
    answers: Sequence[Answer],
    expected: Mapping[int, Sequence[int]],
    questions: Mapping[int, Question],
) -> Tally:
    """I1, I2, I4, I5, I8, I9 (recoveries) and I11 (recoveries) over every answer."""
    tally = Tally()
    for answer in answers:
        _tokens(answer, expected[answer.question], tally)
        _positions(answer, tally)
        _ends(answer, questions[answer.question], tally)
        _epochs(answer, tally)
    return tally


def _tokens(answer: Answer, expected: Sequence[int], tally: Tally) -> None:
    got = answer.tokens
    wrong = [
        at for at, (ours, theirs) in enumerate(zip(got, expected, strict=False)) if ours != theirs
    ]
    tally.wrong += len(wrong)
    if wrong:
        at = wrong[0]
        tally.found(
            "I1",
            f"{len(wrong)} wrong tokens; the first at position {at}: {got[at]}, not {expected[at]}",
            answer.request_id,
        )
    if len(got) > len(expected):
        tally.duplicated += len(got) - len(expected)
        tally.found("I1", f"{len(got)} tokens, not {len(expected)}", answer.request_id)
    if len(got) < len(expected) and answer.ends:
        tally.lost += len(expected) - len(got)
        tally.found("I1", f"{len(got)} tokens of {len(expected)} arrived", answer.request_id)
    if answer.again is not None and list(answer.again) != got:
        tally.found("I2", "a second reading gave other tokens", answer.request_id)


def _positions(answer: Answer, tally: Tally) -> None:
    """Within one stream every message goes on where the one before ended."""
    stream, wanted = -1, 0
    for line in answer.lines:
        if line.stream != stream:
            stream, wanted = line.stream, answer.attached[line.stream]
        if line.withdrawn_from >= 0:
            wanted = min(wanted, line.withdrawn_from)
        if line.token_ids and line.position != wanted:
            kind = "repeats" if line.position < wanted else "skips"
            tally.duplicated += max(0, wanted - line.position)
            tally.lost += max(0, line.position - wanted)
            tally.found(
                "I2",
                f"stream {stream} {kind}: position {line.position} behind {wanted}",
                answer.request_id,
            )
        wanted = max(wanted, line.position + len(line.token_ids))


def _ends(answer: Answer, question: Question, tally: Tally) -> None:
    if answer.error:
        tally.found("I6", f"failed: {answer.error} {answer.detail}", answer.request_id)
        return
    if not answer.ends:
        tally.hung += 1
        held = len(answer.tokens)
        tally.found("I6", f"no end in time, {held} tokens in", answer.request_id)
        return
    if len(answer.ends) > 1:
        tally.found("I2", f"{len(answer.ends)} terminal messages", answer.request_id)
    end, delivered = answer.ends[0], len(answer.tokens)
    if end.reason != "length":
        tally.found("I1", f"ended with {end.reason!r}", answer.request_id)
    if not end.completion_tokens == delivered == question.count:
        tally.found(
            "I8",
            f"billed {end.completion_tokens}, delivered {delivered}, asked for {question.count}",
            answer.request_id,
        )
    if any(line.at > end.at and line.token_ids for line in answer.lines):
        tally.found("I2", "tokens behind the terminal message", answer.request_id)
    _repairs(answer, end, tally)


def _repairs(answer: Answer, end: End, tally: Tally) -> None:
    for one in end.repairs:
        # Where a request stood under an earlier coordinator is not journalled.
        whence = one.from_route or one.cause == "COORDINATOR_RESTARTED"
        if not (one.cause and one.action and one.to_route and whence):
            tally.found("I9", f"a recovery without cause or route: {one}", answer.request_id)
        if one.kept > end.completion_tokens:
            tally.found("I9", f"a recovery kept {one.kept} tokens of too few", answer.request_id)
    # Behind a coordinator's end the budgets begin anew.
    lives = accumulate(one.cause == "COORDINATOR_RESTARTED" for one in end.repairs)
    places = zip(lives, (one.kept for one in end.repairs), strict=True)
    in_vain = max((len(list(found)) for _, found in groupby(places)), default=0)
    if in_vain > FRUITLESS_MAX:
        tally.found("I11", f"{in_vain} recoveries in a row without a token", answer.request_id)


def _epochs(answer: Answer, tally: Tally) -> None:
    """A route that was left never writes again. Numbers may fall: the full worker's route is often
    older than the pipeline's. What a second stream repeats was written before."""
    held, epochs = 0, list[int]()
    for line in answer.lines:
        if line.withdrawn_from >= 0:
            held = min(held, line.withdrawn_from)
        behind = line.position + len(line.token_ids)
        if behind > held and line.epoch and line.epoch not in epochs[-1:]:
            if line.epoch in epochs:
                tally.found(
                    "I4", f"epoch {line.epoch} wrote again behind {epochs[-1]}", answer.request_id
                )
            epochs.append(line.epoch)
        held = max(held, behind)


# -- the run as a whole ----------------------------------------------------------------------------


def judge_faults(marks: Sequence[Mark], planned: Mapping[int, str], tally: Tally) -> None:
    """S: every single fault that was ``planned`` (by number) fired, and the mesh was seen to answer
    it. One that did not, or that nobody noticed, proves nothing, however many others did."""
    by_number = {mark.number: mark for mark in marks}
    idle: dict[str, list[str]] = defaultdict(list)
    ignored: dict[str, list[str]] = defaultdict(list)
    for number, fault in sorted(planned.items()):
        mark = by_number.get(number)
        if mark is None:
            idle[fault].append(f"#{number} was not reached")
        elif not mark.fired:
            idle[fault].append(f"#{number} ({mark.place}): {mark.evidence}")
        elif not mark.path:
            ignored[fault].append(f"#{number} ({mark.place}): {mark.evidence}")
    counts = Counter(planned.values())
    for fault, count in counts.items():
        if which := idle[fault]:
            tally.found("S", f"{fault}: {len(which)} of {count} never fired: {_some(which)}")
        if which := ignored[fault]:
            text = f"{fault}: {len(which)} of {count} fired, and no recovery path was seen"
            tally.found("S", f"{text}: {_some(which)}")


def _some(which: Sequence[str]) -> str:
    more = len(which) - SHOWN_MAX
    return "; ".join(which[:SHOWN_MAX]) + (f"; and {more} more" if more > 0 else "")


def patience_until(answers: Iterable[Answer], since: float, silent_s_max: float) -> float:
    """When to give up on answers that have not ended: the last of them is silent for too long."""
    waiting = (answer.heard_at for answer in answers if answer.ended_at is None)
    return max([since, *waiting]) + silent_s_max


def judge_silence(
    answers: Iterable[Answer], since: float, silent_s_max: float, tally: Tally
) -> None:
    """I6: once nothing breaks any more, no client waits this long for its next token."""
    for answer in answers:
        if not answer.ends:
            continue  # that it never ended was said
        heard = [answer.asked_at, *(line.at for line in answer.lines)]
        longest = max((after - max(before, since) for before, after in pairwise(heard)), default=0)
        if longest > silent_s_max:
            tally.found("I6", f"silent for {longest:.0f} s", answer.request_id)


def judge_remains(remains: Remains, tally: Tally) -> None:
    """I7, I9 (spans) and I10 on what is left."""
    for worker, count in remains.kv_tokens.items():
        if count:
            tally.found("I7", f"{worker} still caches {count} positions")
    for what in ("in_flight", "running", "queued", "on_routes"):
        if count := getattr(remains, what):
            tally.found("I7", f"{count} {what.replace('_', ' ')} after the end")
    for request_id, why in remains.spans_broken.items():
        tally.found("I9", why, request_id)
    for why in remains.barriers:
        tally.found("I10", why)


def early_and_late(readings: Sequence[float]) -> tuple[float, float]:
    """Medians of the second and of the last quarter of a life; its ends, if it was a short one."""
    if len(readings) < QUARTERS:
        return readings[0], readings[-1]
    early, late = _quarters(readings)
    return early[len(early) // 2], late[len(late) // 2]


def rise(readings: Sequence[float]) -> float:
    """By how much a life's last quarter is above its second, floor and ceiling alike.

    What a worker holds goes up and down with its requests, so the quarters' medians may differ by
    chance; what is never given back lifts the lowest readings as much as the highest. Tenths at
    either end are left out."""
    early, late = _quarters(readings)
    tenths = (len(early) // 10, len(late) // 10)
    floor = late[tenths[1]] - early[tenths[0]]
    ceiling = late[-1 - tenths[1]] - early[-1 - tenths[0]]
    return min(floor, ceiling)


def _quarters(readings: Sequence[float]) -> tuple[list[float], list[float]]:
    """The second and the last, each sorted."""
    quarter = len(readings) // QUARTERS
    return sorted(readings[quarter : 2 * quarter]), sorted(readings[-quarter:])


def judge_lives(lives: Iterable[Life], tally: Tally) -> None:
    """I7: what a process held that lived long enough to say."""
    for life in lives:
        if len(life.readings) < RSS_SAMPLES_MIN:
            continue
        who = f"{life.process} (pid {life.pid})"
        before, after = early_and_late(life.readings)
        if rise(life.readings) > max(RSS_RISE_MIB_MAX, RSS_RISE_SHARE_MAX * before):
            tally.found("I7", f"{who} grew from {before:.0f} to {after:.0f} MiB")
        for what, counts in (("descriptors", life.descriptors), ("threads", life.threads)):
            before, after = early_and_late(counts) if counts else (0, 0)
            if after - before > HANDLES_RISE_MAX:
                tally.found("I7", f"{who} holds {after:.0f} {what}, {before:.0f} before")


def judge_retries(counters: Mapping[str, int], fired: int, tally: Tally) -> None:
    """I11: frames sent again are explained by the faults, and a small share of all."""
    again, checked = counters.get("frames_retransmitted", 0), counters.get("frames_checked", 0)
    allowed = RETRANSMITS_SHARE_MAX * checked + RETRANSMITS_PER_FAULT * fired
    if again > allowed:
        tally.found("I11", f"{again} frames were sent again, {checked} were taken")
