"""Which component is to blame, by bisecting the route with what its stages said of themselves.

Every delivered token carries a mark of each stage it went through: the length of its cache, the
digest of all token ids it has consumed, and the CRC32C of the activation it handed on. The
reference knows what each must be. So the search is a walk, in order of time and then of stages, to
the first mark that is not as it must be: all before it were right, so that stage had the right
input and made something wrong of it.

A stage that is right at the first token and wrong later has lost or spoilt what it keeps between
steps (cache, position); one that is wrong from the start computes something else (weights, order,
element type, constants). When every boundary holds and the log-probabilities do not, it is the last
stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.validation.evidence import (
    FULL_WORKER,
    Culprit,
    Expectation,
    Observation,
    StagePlace,
)
from stagemesh.checksum import history_digest
from stagemesh.topology import Span

_COMPUTES = "its output differs from the first token on: weights, layer order, dtype or constants"
_KEEPS = "its output differs only once its cache is in use: a stale, lost or misplaced entry"
_HEAD = "every boundary holds, but not its logits: final layers, norm, head or sampling"


def marks_hold(seen: Observation, index: int) -> bool:
    """Whether every stage's cache length and history digest are right at answer ``index``."""
    return _wrong_mark(seen, index) is None


def digests_hold(seen: Observation, expected: Expectation, index: int) -> bool:
    """Whether every recorded boundary of answer ``index`` has a digest that it may have."""
    return _wrong_boundary(seen, expected, index) is None


def find_culprit(
    seen: Observation,
    expected: Expectation,
    holding: Sequence[bool],
    *,
    digests_decide: bool,
) -> Culprit:
    """Who made a failed run fail. ``holding[i]``: the answer index i passed its own checks."""
    if seen.failure is not None:
        failure = seen.failure
        stage = _stage_of(seen, failure.worker)
        return _blame(
            seen, "error", stage, len(seen.tokens), f"{failure.reason}: {failure.message}"
        )
    if seen.prompt != expected.prompt:
        cause = "the coordinator and the reference cut the prompt into different tokens"
        return _outside("tokenizer", "coordinator", "prompt", 0, cause)
    for index in range(min(len(seen.tokens), len(expected.judgements))):
        wrong = _wrong_mark(seen, index)
        if wrong is not None:
            stage, kind, cause = wrong
            return _blame(seen, kind, stage, index, cause)
        boundary = _wrong_boundary(seen, expected, index) if digests_decide else None
        if boundary is not None:
            kind, cause = ("state", _KEEPS) if index else ("compute", _COMPUTES)
            return _blame(seen, kind, boundary, index, cause)
        if not holding[index]:
            return _behind_the_boundaries(seen, expected, index, digests_decide)
    if all(holding) and len(seen.tokens) != seen.wanted:
        cause = f"{len(seen.tokens)} tokens came, {seen.wanted} were asked for"
        return _outside("delivery", "coordinator", "answer", len(seen.tokens), cause)
    if all(holding) and seen.text != expected.delivered_text:
        cause = "the tokens hold and the text made of them does not"
        return _outside("delivery", "detokenizer", "text", 0, cause)
    cause = "differences are spread over the answer; run with --deterministic to bisect the route"
    return _outside("unknown", "", "", 0, cause)


def _wrong_mark(seen: Observation, index: int) -> tuple[int, str, str] | None:
    """(stage, kind, cause) of the first stage that lost count of what it consumed."""
    token = seen.tokens[index]
    expected_history = history_digest((*seen.prompt, *seen.token_ids[:index]))
    for stage, mark in enumerate(token.marks):
        if mark.cache_length != token.position:
            cause = f"its cache holds {mark.cache_length} positions of {token.position}"
            return stage, "cache_length", cause
        if mark.history_digest != expected_history:
            return stage, "history", "it consumed other tokens than were sent"
    return None


def _wrong_boundary(seen: Observation, expected: Expectation, index: int) -> int | None:
    """The first boundary whose digest is not one it may have; None when all hold or are unknown.

    Behind a change of route the first row is a replay, cut where nobody recorded it.
    """
    token, digests = seen.tokens[index], expected.judgements[index].digests
    if len(token.marks) != len(digests) + 1:
        return None
    if index and token.epoch != seen.tokens[index - 1].epoch:
        return None
    for boundary, allowed in enumerate(digests):
        if allowed and token.marks[boundary].output_crc32c not in allowed:
            return boundary
    return None


def _behind_the_boundaries(
    seen: Observation, expected: Expectation, index: int, digests_decide: bool
) -> Culprit:
    token = seen.tokens[index]
    recorded = len(token.marks) == len(expected.judgements[index].digests) + 1
    if len(token.marks) == 1:
        kind = "state" if index else "compute"
        return _blame(seen, kind, 0, index, _HEAD if index == 0 else _KEEPS)
    if digests_decide and recorded:
        return _blame(seen, "logits", len(token.marks) - 1, index, _HEAD)
    cause = "the boundaries were not recorded here; run with --deterministic to bisect the route"
    return _outside("unknown", "", "", index, cause)


def _stage_of(seen: Observation, worker: str) -> int:
    names = [place.worker for place in seen.stages]
    return names.index(worker) if worker in names else -1


def _blame(seen: Observation, kind: str, stage: int, index: int, cause: str) -> Culprit:
    if stage < 0:
        return _outside(kind, seen.failure.worker if seen.failure else "", "", index, cause)
    places = _places(seen, index)
    place = places[min(stage, len(places) - 1)]
    if stage + 1 < len(places):
        boundary = f"{place.worker}→{places[stage + 1].worker} (layer {place.span.last})"
    else:
        boundary = f"logits of {place.worker}"
    return Culprit(kind, stage, place.worker, str(place.span), boundary, index, cause)


def _places(seen: Observation, index: int) -> tuple[StagePlace, ...]:
    """The stages that made answer ``index``: the route under test, or the full worker alone."""
    if index < len(seen.tokens) and len(seen.tokens[index].marks) == 1 and len(seen.stages) > 1:
        return (StagePlace(FULL_WORKER, Span(0, seen.stages[-1].span.last)),)
    return seen.stages


def _outside(kind: str, component: str, boundary: str, index: int, cause: str) -> Culprit:
    return Culprit(kind, -1, component, "", boundary, index, cause, certain=kind != "unknown")
