"""Real processes, one of which computes wrongly and plausibly: caught, corrected, named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import generation_service_pb2_grpc as rpc
from stagemesh.v1 import token_pb2

TOKENS = 48
PROMPT = tuple(range(5, 21))
LIES_FROM = 40
"""Cached positions; behind the probes, inside the answer."""


class Seen:
    """What a client made of a stream: its answer, and everything it was ever shown."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ever: list[int] = []
        self.text = ""
        self.statuses: list[int] = []
        self.corrections: list[pb.Correction] = []
        self.watermarks: list[int] = []
        self.behind_watermark = True
        self.finish = pb.Finish()

    def take(self, response: pb.GenerateResponse) -> None:
        if response.HasField("correction"):
            self.corrections.append(response.correction)
            del self.tokens[response.correction.from_position :]
            del self.statuses[response.correction.from_position :]
            self.text = self.text[: response.correction.from_character]
        for token in response.tokens:
            self.tokens.append(token.token_id)
            self.ever.append(token.token_id)
            self.statuses.append(token.status)
        self.text += response.text
        self.watermarks.append(response.verified_through)
        self.behind_watermark &= len(self.tokens) <= response.verified_through
        if response.HasField("finish"):
            self.finish = response.finish


def ask(mesh: Any, **fields: Any) -> Seen:
    request = pb.GenerateRequest(
        tokens=pb.TokenPrompt(token_ids=PROMPT),
        max_tokens=TOKENS,
        ignore_eos=True,
        temperature=0.9,
        seed=5,
        **fields,
    )
    seen = Seen()

    async def work(channel: grpc.aio.Channel) -> None:
        stream: AsyncIterator[pb.GenerateResponse] = rpc.GenerationServiceStub(channel).Generate(
            request
        )
        async for response in stream:
            seen.take(response)

    mesh.call(work, role="client")
    return seen


@contextmanager
def mesh_with_liar(mesh: Any, spans: dict[str, str]) -> Iterator[Any]:
    """These stages, of which the one called liar lies, and a full worker. No audits: only what asks
    is checked."""
    flags = (*mesh.flags, "--audit-budget", "0", "--shadow-chunk-tokens", "8")
    mesh.start("coordinator", "coordinator", *flags, "--listen", mesh.address)
    for name, span in spans.items():
        if name != "liar":
            mesh.worker(name, span)
    mesh.worker("full", "all")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIES_FROM_POSITION": str(LIES_FROM)}
    with (mesh.directory / "liar.log").open("ab") as log:
        mesh.processes["liar"] = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("lying_worker.py")),
                *mesh.flags,
                *("--coordinator", mesh.address, "--name", "liar", "--span", spans["liar"]),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )
    try:
        mesh.wait_for_routes(list(spans), ["full"])
        yield mesh
    finally:
        mesh.stop()


@pytest.fixture(scope="module")
def lying_mesh(make_mesh: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An honest first stage, a lying last one."""
    mesh = make_mesh(tmp_path_factory.mktemp("lying"))
    with mesh_with_liar(mesh, {"stage-0": "0-2", "liar": "2-4"}):
        yield mesh


@pytest.mark.parametrize("place", [0, 1], ids=["first", "middle"])
def test_of_three_stages_the_one_that_lies_is_named(
    make_mesh: Any, tmp_path: Path, place: int
) -> None:
    """By the first boundary at which pipeline and full worker differ: the stages behind it compute
    right things from wrong ones, and differ there as well."""
    names = ["stage-0", "stage-1", "stage-2"]
    names[place] = "liar"
    mesh = make_mesh(tmp_path, "--model", "tiny:layers=6")
    with mesh_with_liar(mesh, dict(zip(names, ("0-2", "2-4", "4-6"), strict=True))):
        seen = ask(mesh, verify=pb.VERIFICATION_LEVEL_SHADOW)
        assert [one.reason for one in seen.corrections] == ["SHADOW_MISMATCH"]
        assert seen.watermarks[-1] == len(seen.tokens) == TOKENS
        (recovery,) = seen.finish.recoveries
        assert (recovery.cause, list(recovery.to_route)) == ("SHADOW_MISMATCH", ["full"])
        assert list(recovery.from_route) == names
        assert recovery.worker == "liar"
        (mismatch,) = seen.corrections
        assert mismatch.from_position >= LIES_FROM - len(PROMPT)
        mesh.kill("liar")
        mesh.wait_for_routes(["full"])
        assert seen.tokens == ask(mesh).tokens


def test_a_lying_process_is_caught_and_every_answer_ends_as_the_full_workers(
    lying_mesh: Any,
) -> None:
    mesh = lying_mesh
    unchecked = ask(mesh, verify=pb.VERIFICATION_LEVEL_NUMERIC)
    assert len(unchecked.tokens) == TOKENS
    assert list(unchecked.finish.route) == ["stage-0", "liar"], unchecked.finish

    corrected = ask(mesh, verify=pb.VERIFICATION_LEVEL_SHADOW)
    (correction,) = corrected.corrections
    assert correction.reason == "SHADOW_MISMATCH"
    assert correction.from_position >= LIES_FROM - len(PROMPT)
    assert corrected.tokens != unchecked.tokens
    assert corrected.ever[: len(unchecked.tokens)] != corrected.tokens
    (recovery,) = corrected.finish.recoveries
    found = (recovery.cause, recovery.action, recovery.worker, list(recovery.to_route))
    assert found == ("SHADOW_MISMATCH", "reroute", "liar", ["full"])
    assert recovery.replayed <= 9
    assert corrected.watermarks[-1] == TOKENS
    assert token_pb2.VALIDATION_STATUS_CORRECTED in corrected.statuses

    held = ask(mesh, verify=pb.VERIFICATION_LEVEL_SHADOW, deliver=pb.DELIVERY_MODE_VERIFIED)
    assert not held.corrections
    assert held.behind_watermark
    assert held.ever == held.tokens == corrected.tokens

    mesh.kill("liar")
    mesh.wait_for_routes(["full"])
    alone = ask(mesh)
    assert list(alone.finish.route) == ["full"]
    assert alone.tokens == corrected.tokens
    assert alone.text == corrected.text == held.text
