"""Every guard of the mesh by the name of its counter, and the counters themselves.

A guard that no test has seen fire is decoration: guards mask each other, so a test that merely
passes says nothing about the second guard in line. Every guard therefore counts what it stops under
a name from ``GUARDS``, and the test-suite can ask ``Counters.witness`` which names have ever been
counted.

Names are ``noun_verb`` or ``noun_verb.reason``; reasons of frames are the constants of the error
tree in lower case, those of tokens the corruption classes. Names are bounded: never a request or a
worker in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

CORRUPTIONS = (
    "encoding",
    "ordering",
    "duplication",
    "loss",
    "transfer",
    "numeric",
    "semantic_suspicion",
)
"""Values of ``coordinator.token_validator.Corruption``."""

FRAME_REJECTIONS = (
    "frame_too_large",
    "frame_malformed",
    "checksum_mismatch",
    "fingerprint_mismatch",
    "sequence_gap",
    "epoch_not_open",
    "hop_mismatch",
    "token_rejected",
    "non_finite_activation",
)
"""Why a hop's receiver or a stage refuses a frame (``reason`` of the error, lower case)."""

BARRIER_BREAKS = ("expired", "refused", "departed", "disagreed", "contradicted", "abandoned")
"""Values of ``coordinator.barrier.Trigger`` that break a rendezvous."""

ARRIVAL_REFUSALS = ("stranger", "wrong_epoch", "wrong_generation", "unknown", "late")
"""Why an arrival at a barrier is refused."""

ROW_FAILURES = (
    "position_mismatch",
    "cache_lost",
    "cache_exhausted",
    "non_finite",
    "out_of_envelope",
    "corrupted",
    "compute_failed",
    "invalid",
)
"""Values of ``stagemesh.frame.RowStatus`` but OK, lower case."""

_PLAIN = {
    "frames_checked": "frames that went through every check of a hop",
    "frames_retransmitted": "frames sent again from a ledger",
    "frames_fenced": "frames of an older epoch, dropped",
    "duplicates_answered": "frames seen before, answered again without computing",
    "tokens_checked": "token chunks that went through every check",
    "tokens_fenced": "token chunks of an older epoch, dropped",
    "marks_checked": "stage marks compared with the coordinator's own account",
    "scores_checked": "tokens scored by a reference",
    "shadow_mismatches": "scored tokens the reference would not have chosen within tolerance",
    "shadows_lost": "shadow caches that a full worker lost or refused",
    "verifications_degraded": "requests that no full worker could verify for a while",
    "barriers_formed": "rendezvous begun",
    "barriers_completed": "rendezvous at which everybody arrived in time",
    "barriers_repeated": "arrivals repeated and answered as before",
    "checkpoints_completed": "positions at which every stage's account agreed",
    "workers_suspected": "workers past their adaptive deadline",
    "workers_failed": "workers given up",
    "observer_stalled": "times the detector's own process stood still and the clock was corrected",
    "events_published": "events that got an offset",
    "events_duplicate": "events published again, answered with their first offset",
    "events_refused": "events over a limit",
    "events_evicted": "events dropped from the retention",
    "event_gaps": "gap records given to consumers that were too slow",
    "frames_held": "true frames ahead of their turn, kept until the hole before them was filled",
    "acks_ignored": "acknowledgements of another epoch or of a step never sent",
    "nacks_ignored": "nacks that answered no copy sent, or came while one was being answered",
    "retransmits_deferred": "nacks left to the timer because the retransmission budget was spent",
    "frames_misencoded": "frames that did not survive their own encoding, found before sending",
    "links_reopened": "connections of a hop that broke and were made again",
    "window_waits": "sends that waited for a full window",
    "frames_mislabelled": "returned steps with other rows than were sent",
    "frames_unexpected": "returned steps that are not the oldest outstanding one",
    "requests_refused": "requests refused because a queue or budget was full",
    "requests_conflicting": "request ids taken by a different request",
    "workers_refused": "workers turned away when they registered",
    "workers_failed_total": "workers given up by the coordinator for any reason",
    "reports_ignored": "reports of a process that was replaced or is not connected",
    "arrivals_ignored": "arrivals at a barrier of a route that is not opening",
    "probes_disagreed": "probe answers that differ from the reference route's",
    "device_groups_broken": "groups of devices ended because members were late, lost or differed",
    "routes_stalled": "routes closed because no step came back although every worker reports",
    "quarantines": "workers put into quarantine",
}

GUARDS: Mapping[str, str] = {
    **_PLAIN,
    **{f"frames_rejected.{reason}": f"frames refused: {reason}" for reason in FRAME_REJECTIONS},
    **{f"tokens_rejected.{kind}": f"token chunks refused: {kind}" for kind in CORRUPTIONS},
    **{f"rows_failed.{status}": f"rows a stage gave up: {status}" for status in ROW_FAILURES},
    **{f"barriers_broken.{reason}": f"rendezvous broken: {reason}" for reason in BARRIER_BREAKS},
    **{f"arrivals_refused.{why}": f"arrivals refused: {why}" for why in ARRIVAL_REFUSALS},
}
"""Name of the counter → what one count of it means."""

FAMILIES: Mapping[str, str] = {
    "barrier_wait_us.": "microseconds from forming a rendezvous to its end, by how it ended",
    "hop_faults.": "faults reported by hops, by the reason of the error tree, or `other`",
    "text_signals.": "answers whose text looked odd (never a verdict), by signal",
    "validation_us.": "microseconds of CPU time spent on checking (shadow: of computing), by tier",
}
"""Prefix → meaning, of counters that repeat what a guard elsewhere has found and counted, or that
advise, or that are durations."""


class Counters(dict[str, int]):
    """Counts by name; a name never counted reads 0. One instance per component, merged for
    reports."""

    __slots__ = ()

    witness: ClassVar[set[str] | None] = None
    """When a test-suite puts a set here, every name counted anywhere is added to it."""

    def __missing__(self, name: str) -> int:
        return 0

    def count(self, name: str, by: int = 1) -> None:
        """Add ``by`` to ``name``."""
        self[name] = self.get(name, 0) + by
        if Counters.witness is not None:
            Counters.witness.add(name)

    def merged(self, others: Iterable[Mapping[str, int]]) -> Counters:
        """A new instance with the sums of this one and ``others``."""
        total = Counters(self)
        for other in others:
            for name, value in other.items():
                total[name] = total.get(name, 0) + value
        return total

    def unregistered(self) -> frozenset[str]:
        """Names counted here that neither ``GUARDS`` nor ``FAMILIES`` know."""
        prefixes = tuple(FAMILIES)
        return frozenset(n for n in self if n not in GUARDS and not n.startswith(prefixes))


def unseen(witnessed: Iterable[str]) -> frozenset[str]:
    """Guards that were not witnessed."""
    return frozenset(GUARDS) - frozenset(witnessed)
