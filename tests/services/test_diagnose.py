"""One request's story: everybody's part in it, in time order, and no text unless asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.client import MeshClient
from services.fault_proxy import Fault, FaultKind, ScriptedFaults
from services.request_evidence import Evidence, gather, involved, read_logs
from services.request_story import moments, story, write_bundle
from services.trace_view import TraceSpan
from stage_worker.tiny_models import write_tiny_model
from stagemesh.errors import RequestUnknown
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
    (logs / "stage-0.log").write_text(f"nothing\nrequest={REQUEST} was late\n")

    async def scenario() -> tuple[Evidence, Evidence]:
        async with contextlib.AsyncExitStack() as stack:
            mesh: OwnLoopMesh = await stack.enter_async_context(own_loop_mesh(directory))
            await mesh.settled()
            step = mesh.next_step + 4
            wrong = Fault(FaultKind.ROW_BIT, resealed=True)
            mesh.proxies["last"].plan = ScriptedFaults({step: [wrong]})
            await mesh.generate(COUNT, text=PROMPT, request_id=REQUEST)
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
        "trace.json", "tokens.json", "logs.json", "story.txt",
    }  # fmt: skip
    everything = "".join(content.values())
    assert PROMPT not in everything
    tokens = json.loads(content["tokens.json"])
    assert all("text" not in one and "token_ids" not in one for one in tokens)
    assert sum(one["count"] for one in tokens) == COUNT
    assert not [one for one in bare.events if one["type"] == "ChunkGenerated" and (
        {"chain", "checksum"} & one["attributes"].keys()
    )], "digests of single tokens could be tried against a vocabulary"  # fmt: skip
    assert json.loads(content["bundle.json"])["request_id"] == REQUEST


def test_log_lines_that_name_the_request_are_part_of_it(told: tuple[Evidence, Evidence]) -> None:
    assert told[0].logs == [
        {"file": "stage-0.log", "line": 2, "text": f"request={REQUEST} was late"}
    ]
    assert any("was late" in line for line in story(told[0]))


def test_only_lines_that_name_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("x trace=ff\ny\n")
    (tmp_path / "b.txt").write_text("trace=ff")
    assert [one["file"] for one in read_logs(tmp_path, {"ff"})] == ["a.log"]


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
