"""Answers as the journal brings them back: tokens, text, stop-string state and end, rebuilt from
what was kept by the same code that made them. What the edge alone knows of a request travels with
it to the journal (``edge_context``), and comes back from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.events import Event
from services.answer import Answer
from services.answer_book import Record
from services.journal_codec import demand_of, instructions_of
from services.journal_rows import StoredGeneration
from services.request_reader import Parameters
from services.tokenizer import ServedModel
from stagemesh.guards import Counters
from stagemesh.v1 import journal_pb2


@dataclass(frozen=True, slots=True)
class Restored:
    """``events``: what the mesh has to hear of once it knows the request."""

    record: Record
    events: tuple[Event, ...]


def restore(
    stored: StoredGeneration,
    model: ServedModel,
    *,
    feed: Callable[[Event], None],
    now: float,
    wall_clock_ns: Callable[[], int],
    counters: Counters,
) -> Restored:
    """The answer so far, ready to go on, and what the edge knew of its request. From any thread.

    Raises JournalError.
    """
    opening = stored.opening
    answer = Answer(
        stored.request,
        make_detokenizer=model.tokenizer.detokenizer,
        stops=tuple(opening.edge.stop),
        silent=frozenset(opening.stop_token_ids),
        feed=feed,
        wall_clock_ns=wall_clock_ns,
        counters=counters,
    )
    events = answer.restore(instructions_of(stored))
    record = Record(
        answer=answer,
        parameters=opening.edge.parameters,
        prompt_tokens=len(opening.prompt),
        created_at_unix_ns=opening.edge.created_at_unix_ns,
        detach=opening.edge.detach,
        tokenize_s=opening.edge.tokenize_s,
        trace_id=opening.edge.trace_id,
    )
    if record.failure is not None:
        record.demand = demand_of(stored, now=now, wall_ns=wall_clock_ns())
    return Restored(record, tuple(events))


def edge_context(record: Record, parameters: Parameters) -> bytes:
    """What the edge has to know again after a restart: a serialized ``JournalEdge``."""
    return journal_pb2.JournalEdge(
        stop=parameters.stops,
        parameters=record.parameters,
        detach=record.detach,
        created_at_unix_ns=record.created_at_unix_ns,
        tokenize_s=record.tokenize_s,
        trace_id=record.trace_id,
    ).SerializeToString()
