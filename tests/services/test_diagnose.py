"""One request's story: everybody's part in it, in time order, and no text unless asked."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import struct
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.client import MeshClient
from services.fault_proxy import Fault, FaultKind, ScriptedFaults
from services.log_reader import LogLine
from services.request_evidence import Evidence, boundary_digests, gather, involved
from services.request_story import moments, story, write_bundle
from services.trace_view import TraceSpan
from stage_worker.tiny_models import write_tiny_model
from stagemesh import __version__
from stagemesh.checksum import crc32c
from stagemesh.errors import RequestUnknown
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import token_pb2
from tests.mesh.own_loop_mesh import OwnLoopMesh, own_loop_mesh

REQUEST = str(uuid.UUID(int=77))
PROMPT = "secret words of a prompt"
COUNT = 8


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Evidence, Evidence]]:
    """What is known of a request whose fifth step came back wrong: without text, and with."""
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, "llama", layers=4)
    logs = tmp_path_factory.mktemp("logs")

    async def scenario() -> tuple[Evidence, Evidence]:
        async with contextlib.AsyncExitStack() as stack:
            mesh: OwnLoopMesh = await stack.enter_async_context(own_loop_mesh(directory))
            await mesh.settled()
            step = mesh.next_step + 4
            wrong = Fault(FaultKind.ROW_BIT, resealed=True)
            mesh.proxies["last"].plan = ScriptedFaults({step: [wrong]})
            await mesh.generate(COUNT, text=PROMPT, request_id=REQUEST)
            rejected = next(one for one in mesh.published if one.type == "TokenRejected")
            assert uuid.UUID(bytes=rejected.request) == uuid.UUID(REQUEST)
            moment = dt.datetime.now().astimezone() + dt.timedelta(seconds=1)
            late = {"time": moment.isoformat(timespec="milliseconds"), "level": "warning",
                    "message": "was late", "request_id": REQUEST}  # fmt: skip
            (logs / "stage-0.log").write_text(f"nothing\n{json.dumps(late)}\n")
            address = mesh.coordinator.server.address
            client = await stack.enter_async_context(MeshClient(address))
            with pytest.raises(RequestUnknown):
                await gather(client, str(uuid.UUID(int=78)))
            bare = await gather(client, REQUEST, logs=logs)
            return bare, await gather(client, REQUEST, with_text=True)

    with asyncio.Runner() as runner:
        yield runner.run(scenario())


def test_the_story_has_everybodys_part_in_time_order(told: tuple[Evidence, Evidence]) -> None:
    found = told[0]
    whole = "\n".join(story(found))
    for part in (
        "GenerationStarted",
        "TokenRejected",
        "RecoveryFinished",
        "GenerationFinished",
        "prefill, ",
        "barrier open-route",
        "recoveries:",
        "environment:",
        "digest chain ends with",
    ):
        assert part in whole, part
    for worker in ("stage-0", "stage-1"):
        assert f"{worker} " in whole
    times = [one.at_ns for one in moments(found)]
    assert times == sorted(times)
    assert found.generation["state"] == "finished"
    assert found.generation["recoveries"][0]["action"] in whole


def test_hops_say_how_many_frames_passed() -> None:
    def span(worker: str, name: str, frames: int) -> TraceSpan:
        facts = {"mesh.worker": worker, "mesh.step.count": frames, "mesh.bytes_out": 10 * frames}
        return TraceSpan(b"", b"", name, 1, 2, failed=False, facts=facts, service="s")

    spans = [span("stage-0", "stage.prefill", 2), span("stage-0", "stage.decode", 60)]
    lines = story(Evidence("id", spans=[*spans, span("stage-1", "stage.decode", 60)]))
    hops = [line.split() for line in lines if " frames, " in line]
    assert [(one[0], one[1]) for one in hops] == [("stage-0", "62"), ("stage-1", "60")]
    assert "620" in hops[0]


def test_a_bundle_has_every_part_and_no_text(
    told: tuple[Evidence, Evidence], tmp_path: Path
) -> None:
    bare, with_text = told
    text = "".join(one["text"] for one in with_text.tokens)
    token_ids = [token for one in with_text.tokens for token in one["token_ids"]]
    assert len(token_ids) == COUNT
    assert text
    write_bundle(bare, tmp_path / "bare.zip")
    with zipfile.ZipFile(tmp_path / "bare.zip") as archive:
        names = set(archive.namelist())
        content = {name: archive.read(name).decode() for name in names}
    assert names == {
        "bundle.json", "generation.json", "events.json", "mesh.json", "diagnostics.json",
        "trace.json", "tokens.json", "digests.json", "logs.json", "story.txt",
    }  # fmt: skip
    everything = "".join(content.values())
    assert PROMPT not in everything
    assert text not in everything
    assert json.dumps(text)[1:-1] not in everything
    chains = [chain for one in with_text.tokens for chain in one["chains"]]
    marks = [crc for one in with_text.tokens for of in one["boundary_crc32c"] for crc in of[:-1]]
    assert len(chains) == len(marks) == COUNT
    told_one_by_one = [digest for digest in (*chains[:-1], *marks) if digest in everything]
    assert not told_one_by_one
    assert chains[-1] in everything
    tokens = json.loads(content["tokens.json"])
    assert [set(one) for one in tokens] == [{
        "position", "epoch", "accepted_at_unix_ns", "verified_through", "count", "sources",
    }] * len(tokens)  # fmt: skip
    assert sum(one["count"] for one in tokens) == COUNT
    assert not [one for one in bare.events if one["type"] == "ChunkGenerated" and (
        {"chain", "checksum"} & one["attributes"].keys()
    )], "digests of single tokens could be tried against a vocabulary"  # fmt: skip
    assert json.loads(content["bundle.json"])["request_id"] == REQUEST
    write_bundle(with_text, tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "text.zip") as archive:
        kept = json.loads(archive.read("tokens.json"))
    assert "".join(one["text"] for one in kept) == text


def test_the_checksums_of_every_boundary_are_part_of_it(told: tuple[Evidence, Evidence]) -> None:
    bare, with_text = told
    marks = [int(of[0], 16) for one in with_text.tokens for of in one["boundary_crc32c"]]
    whole = f"{crc32c(struct.pack(f'<{COUNT}I', *marks)):08x}"
    assert len(set(marks)) == COUNT
    assert bare.digests == [
        {
            "epoch": bare.generation["epoch"],
            "boundary": 0,
            "position": 0,
            "tokens": COUNT,
            "crc32c": whole,
        }
    ]
    assert any(
        f"behind stage 0: 8 tokens from position 0, crc32c {whole}" in x for x in story(bare)
    )


def test_every_epoch_has_digests_of_its_own_and_a_full_worker_has_none() -> None:
    def response(position: int, epoch: int, marks: list[int]) -> pb.GenerateResponse:
        stages = [token_pb2.StageMark(output_crc32c=mark) for mark in marks]
        token = token_pb2.TokenChunk(epoch=epoch, marks=stages)
        return pb.GenerateResponse(position=position, epoch=epoch, tokens=[token])

    answer = [response(0, 7, [5, 6, 0]), response(1, 7, [8, 9, 0]), response(2, 9, [0])]
    found = boundary_digests(answer)
    assert [(one["epoch"], one["boundary"], one["tokens"]) for one in found] == [
        (7, 0, 2),
        (7, 1, 2),
    ]
    assert found[0]["crc32c"] != found[1]["crc32c"]
    changed = boundary_digests([answer[0], response(1, 7, [8, 10, 0])])
    assert changed[0]["crc32c"] == found[0]["crc32c"]
    assert changed[1]["crc32c"] != found[1]["crc32c"]


def test_log_lines_that_name_the_request_stand_among_the_rest_in_time_order(
    told: tuple[Evidence, Evidence],
) -> None:
    found = told[0]
    (line,) = found.logs
    assert (line.file, line.line) == ("stage-0.log", 2)
    told_lines = [one.what for one in moments(found)]
    place = told_lines.index("log: warning was late")
    finished = next(i for i, one in enumerate(told_lines) if "GenerationFinished" in one)
    assert place > finished, "it was written behind the answer"
    early = replace(line, at_ns=found.generation["created_at_unix_ns"] + 1)
    earlier = [one.what for one in moments(replace(found, logs=[early]))]
    assert earlier.index("log: warning was late") < next(
        i for i, one in enumerate(earlier) if "GenerationFinished" in one
    )


def test_timings_versions_and_settings_are_told() -> None:
    timings = {"queue_s": 0.25, "time_to_first_token_s": 0.5, "total_s": 1.5}
    generation = {
        "state": "finished", "error_reason": "", "prompt_tokens": 3, "completion_tokens": 2,
        "verified_through": 0, "route": ["a"], "epoch": 7, "trace_id": "", "chain": "",
        "created_at_unix_ns": 1, "finish": {"finish_reason": "stop", "timings": timings},
    }  # fmt: skip
    mesh = {
        "coordinator": {"version": "1.2.3"},
        "environment": {"python": "3.13"},
        "settings": {"stages": "3", "fallback": "forbid"},
    }
    lines = story(Evidence("id", generation=generation, mesh=mesh))
    assert "  queue_s 0.25, time_to_first_token_s 0.5, total_s 1.5" in lines
    assert f"versions: coordinator 1.2.3, diagnose {__version__}" in lines
    assert "environment: python 3.13" in lines
    assert "settings: stages 3, fallback forbid" in lines


def test_workers_and_epochs_of_a_request_include_those_it_left() -> None:
    generation = {
        "route": ["full"],
        "epoch": 9,
        "recoveries": [{"fromRoute": ["a", "b"], "toRoute": ["full"], "epoch": 9}],
    }
    events = [{"worker": "", "attributes": {"route": "a b", "epoch": "8"}}]
    assert involved(generation, events) == ({"a", "b", "full"}, {"8", "9"})


def test_a_story_of_little_is_still_told() -> None:
    assert story(Evidence("id", missing={"trace": "gone"}))[-1] == "not available: trace: gone"


def test_a_log_line_that_says_no_time_is_told_as_such() -> None:
    lines = story(Evidence("id", logs=[LogLine("a.log", 3, 0, "id was late")]))
    assert lines[-1] == "  a.log:3: id was late"
