"""One request's story, told by everybody who had part in it, in the order of time.

``story`` makes lines of the evidence, ``write_bundle`` a zip of JSON files to attach to a bug
report.
"""

from __future__ import annotations

import datetime as dt
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.log_reader import LogLine
from services.request_evidence import CHUNK, Evidence, involved
from services.trace_view import TraceSpan, walk
from stagemesh import __version__

_BUNDLE = ("generation", "events", "mesh", "diagnostics", "trace", "tokens", "digests")


@dataclass(frozen=True, slots=True)
class Moment:
    """One line of the story. ``at_ns``: nanoseconds since 1970."""

    at_ns: int
    who: str
    what: str


def moments(found: Evidence) -> list[Moment]:
    """The story in time order."""
    told = [
        Moment(one["time_unix_ns"], one["worker"] or "mesh", _of_event(one))
        for one in _without_the_middle(found.events)
    ]
    if found.generation:
        created = found.generation["created_at_unix_ns"]
        told.append(
            Moment(created, "edge", f"received, {found.generation['prompt_tokens']} prompt tokens")
        )
    for _, span in walk(found.spans):
        who = str(span.facts.get("mesh.worker", "")) or "coordinator"
        told.append(Moment(span.start_ns, who, _of_span(span)))
    if not any(one["type"] == CHUNK for one in found.events):
        told += _of_tokens(found.tokens)
    told += [
        Moment(one.at_ns, _of_file(one), f"log: {one.said}") for one in found.logs if one.at_ns
    ]
    return sorted(told, key=lambda one: one.at_ns)


def _of_file(line: LogLine) -> str:
    return line.file.removesuffix(".log")


def _without_the_middle(events: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of the tokens that one epoch gave without anything happening between, the first and last."""
    for index, one in enumerate(events):
        near = [events[at] for at in (index - 1, index + 1) if 0 <= at < len(events)]
        same = [other for other in near if other["type"] == CHUNK and _epoch(other) == _epoch(one)]
        if one["type"] != CHUNK or len(same) < 2:
            yield one


def _epoch(event: Mapping[str, Any]) -> str:
    return str(event["attributes"].get("epoch", ""))


def _of_event(event: Mapping[str, Any]) -> str:
    facts = " ".join(f"{key}={value}" for key, value in event["attributes"].items())
    return f"[{event['topic']}] {event['type']} {facts}".rstrip()


def _of_span(span: TraceSpan) -> str:
    shown = {
        key.removeprefix("mesh."): value
        for key, value in span.facts.items()
        if key.startswith("mesh.") and key not in {"mesh.request.id", "mesh.worker"}
    }
    facts = " ".join(f"{key}={_short(value)}" for key, value in sorted(shown.items()))
    state = " FAILED" if span.failed else ""
    return f"{span.name}{state}, {span.seconds * 1000:.1f} ms {facts}".rstrip()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _of_tokens(tokens: Sequence[Mapping[str, Any]]) -> Iterator[Moment]:
    """First and last token of every epoch."""
    spoken = [one for one in tokens if one["count"]]
    for index, one in enumerate(spoken):
        first = not index or spoken[index - 1]["epoch"] != one["epoch"]
        last = index + 1 == len(spoken) or spoken[index + 1]["epoch"] != one["epoch"]
        if first or last:
            which = "first" if first else "last"
            position = one["position"] if first else one["position"] + one["count"] - 1
            said = f"{which} token of epoch {one['epoch']}: position {position}"
            yield Moment(one["accepted_at_unix_ns"], " ".join(one["sources"]), said)


def story(found: Evidence) -> list[str]:
    """Lines for people."""
    lines = [f"request {found.request_id}", *_heading(found), ""]
    told = moments(found)
    zero = told[0].at_ns if told else 0
    for one in told:
        clock = dt.datetime.fromtimestamp(one.at_ns / 1e9, dt.UTC).strftime("%H:%M:%S.%f")[:-3]
        seconds = (one.at_ns - zero) / 1e9
        lines.append(f"{clock} {seconds:+9.3f} s  {one.who:<14} {one.what}")
    lines += ["", *_hops(found), *_boundaries(found), *_failures(found), *_environment(found)]
    undated = [one for one in found.logs if not one.at_ns]
    if undated:
        lines += ["", "log lines without a time:"]
        lines += [f"  {one.file}:{one.line}: {one.text}" for one in undated]
    lines += [f"not available: {what}: {why}" for what, why in found.missing.items()]
    return lines


def logs_json(found: Evidence) -> list[dict[str, Any]]:
    """Log lines as programs read them."""
    return [
        {"file": one.file, "line": one.line, "time_unix_ns": one.at_ns, "text": one.text}
        for one in found.logs
    ]


def _heading(found: Evidence) -> Iterator[str]:
    one = found.generation
    if not one:
        return
    finish = one["finish"] or {}
    ended = finish.get("finish_reason", "not ended")
    yield f"  {one['state']} ({ended}){', ' + one['error_reason'] if one['error_reason'] else ''}"
    yield (
        f"  {one['prompt_tokens']} prompt tokens, {one['completion_tokens']} answered, "
        f"{one['verified_through']} verified"
    )
    yield f"  route {' → '.join(one['route'])}, epoch {one['epoch']}, trace {one['trace_id']}"
    if one["chain"]:
        yield f"  digest chain ends with {one['chain']}"
    timings = finish.get("timings", {})
    if timings:
        yield "  " + ", ".join(f"{name} {value:.4g}" for name, value in timings.items())
    checks = finish.get("checks", {})
    if checks:
        yield "  checks: " + ", ".join(f"{name} {count}" for name, count in sorted(checks.items()))


def _hops(found: Evidence) -> Iterator[str]:
    """Frames, bytes and time of every stage, over the whole request."""
    sums: dict[str, dict[str, float]] = {}
    for _, span in walk(found.spans):
        if span.name.startswith("stage."):
            who = str(span.facts.get("mesh.worker", "?"))
            place = sums.setdefault(who, {})
            for key in (
                "step.count",
                "bytes_in",
                "bytes_out",
                "compute_s",
                "queue_s",
                "transfer_s",
            ):
                place[key] = place.get(key, 0.0) + span.number(f"mesh.{key}")
    if sums:
        yield "frames per hop:"
    for who, one in sums.items():
        yield (
            f"  {who:<14} {one['step.count']:.0f} frames, {one['bytes_in']:.0f} B in, "
            f"{one['bytes_out']:.0f} B out, compute {one['compute_s'] * 1000:.1f} ms, "
            f"queue {one['queue_s'] * 1000:.1f} ms, transfer {one['transfer_s'] * 1000:.1f} ms"
        )


def _boundaries(found: Evidence) -> Iterator[str]:
    if found.digests:
        yield "activations that crossed a boundary, as the stage before it marked them:"
    for one in found.digests:
        yield (
            f"  epoch {one['epoch']}, behind stage {one['boundary']}: {one['tokens']} tokens from "
            f"position {one['position']}, crc32c {one['crc32c']}"
        )


def _failures(found: Evidence) -> Iterator[str]:
    """Class of each failure, whom it concerned, what was done."""
    records = found.generation.get("recoveries", ())
    yield "recoveries:" if records else "recoveries: none"
    for one in records:
        before = " → ".join(one.get("fromRoute", ())) or "?"
        after = " → ".join(one.get("toRoute", ()))
        yield (
            f"  {one.get('cause')}: {one.get('action')}, worker {one.get('worker') or 'unknown'}, "
            f"{before} to {after}, kept {one.get('kept', 0)}, "
            f"computed again {one.get('replayed', 0)}, {one.get('seconds', 0.0):.3f} s"
        )
    workers, epochs = involved(found.generation, ())
    for barrier in found.diagnostics.get("barriers", ()):
        if str(barrier.get("epoch", "")) in epochs:
            absent = ", ".join(barrier.get("absent", ())) or "nobody"
            yield (
                f"barrier {barrier['name']} of epoch {barrier['epoch']}: {barrier['state']}, "
                f"absent {absent} {barrier.get('detail', '')}".rstrip()
            )
    for name in sorted(workers):
        refused = {
            key: count
            for key, count in found.diagnostics.get("workers", {}).get(name, {}).items()
            if key.startswith(("frames_rejected", "rows_failed", "frames_fenced", "links_reopened"))
        }
        if refused:
            yield f"guards of {name} since it started: " + ", ".join(
                f"{key} {count}" for key, count in refused.items()
            )


def _environment(found: Evidence) -> Iterator[str]:
    facts = found.mesh.get("environment", {})
    yield "environment: " + ", ".join(f"{key} {value}" for key, value in sorted(facts.items()))
    versions = {"coordinator": found.mesh.get("coordinator", {}).get("version", "?")}
    yield "versions: " + ", ".join(
        f"{key} {value}" for key, value in {**versions, "diagnose": __version__}.items()
    )
    settings = found.mesh.get("settings", {})
    if settings:
        yield "settings: " + ", ".join(f"{key} {value}" for key, value in settings.items())


def write_bundle(found: Evidence, path: Path) -> None:
    """A zip: one JSON file for each part, ``story.txt``, and what wrote it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _BUNDLE:
            archive.writestr(f"{name}.json", json.dumps(getattr(found, name), indent=1))
        archive.writestr("logs.json", json.dumps(logs_json(found), indent=1))
        archive.writestr("story.txt", "\n".join(story(found)) + "\n")
        facts = {"version": __version__, "request_id": found.request_id, "missing": found.missing}
        archive.writestr("bundle.json", json.dumps(facts, indent=1))
