"""Instructions as lines a person can read; what scenarios compare and what a story of a run
consists of.

Every line is decided by the instruction alone, so that equal runs have equal transcripts.
"""

from __future__ import annotations

from coordinator import instructions as do
from stagemesh.frame import StepFrame


def describe(instruction: do.Instruction) -> str:
    """One line for a transcript; "" for what would only repeat another line."""
    match instruction:
        case do.PublishEvent():
            return _describe_event(instruction)
        case do.SendStep(frame=frame):
            return _describe_step(frame)
        case do.AcceptTokens() | do.FinishRequest() | do.FailRequest():
            return _describe_result(instruction)
        case do.AdvanceVerified():
            return f"verified {request_name(instruction.request)} {instruction.verified_through}"
        case do.CorrectTokens():
            return f"withdraw {request_name(instruction.request)} from {instruction.from_index}"
        case _:
            return _describe_command(instruction)


def _describe_event(event: do.PublishEvent) -> str:
    if event.type == "ChunkGenerated":
        return ""
    facts = " ".join(f"{name}={value}" for name, value in event.attributes.items() if value)
    about = request_name(event.request) if event.request else ""
    parts = (f"{event.topic}/{event.type}", about, event.worker, facts)
    return " ".join(part for part in parts if part)


def _describe_step(frame: StepFrame) -> str:
    rows = " ".join(
        f"{request_name(row.request)}@{row.first_position}+{row.token_count}"
        + ("*" if row.samples else "")
        for row in frame.rows
    )
    return f"step {frame.step} epoch={frame.epoch} {frame.kind.name.lower()} {rows}"


def _describe_result(instruction: do.AcceptTokens | do.FinishRequest | do.FailRequest) -> str:
    match instruction:
        case do.AcceptTokens():
            ids = ",".join(str(chunk.token_id) for chunk in instruction.chunks)
            return f"accept {request_name(instruction.request)} [{instruction.first_index}] {ids}"
        case do.FinishRequest():
            count = instruction.summary.completion_tokens
            return f"finish {request_name(instruction.request)} {instruction.reason} tokens={count}"
        case do.FailRequest():
            error = instruction.error
            return f"fail {request_name(instruction.request)} {error.reason}: {error.message}"


def _describe_command(instruction: do.Instruction) -> str:
    match instruction:
        case do.OpenRoute(route=route):
            return f"open {route}"
        case do.FenceEpoch():
            return f"fence epoch={instruction.epoch} at {' '.join(instruction.workers)}"
        case do.ReinitialiseWorker():
            return f"reinitialise {instruction.worker}: {instruction.reason}"
        case do.DrainWorker():
            return f"let {instruction.worker} go"
        case do.MeetWorker(admitted=False):
            return f"turn away {instruction.worker.name}: {instruction.reason}"
        case _:
            return ""


def request_name(request: bytes) -> str:
    """``r7`` for request number 7; probes are ``probe``."""
    return "probe" if request[:5] == b"probe" else f"r{int.from_bytes(request, 'big')}"
