"""Families whose caches are of other kinds (a sliding window, a recurrent state, experts) between
real workers over real gRPC, with one fault on the wire: token for token what mlx-lm generates."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlx_lm.utils import load_model

from services.fault_proxy import Fault, FaultKind, ScriptedFaults
from services.tokenizer import load_tokenizer
from stage_worker.tiny_models import write_tiny_model
from tests.mesh.own_loop_mesh import own_loop_mesh
from tests.mesh.reference import greedy

COUNT = 24
PROMPT = "a prompt that is longer than the window of a tiny model"
STRUCK = 7
"""The step of the answer that meets the fault; the first is its prefill."""


@dataclass(frozen=True)
class Case:
    """A family, the fault it meets on a hop, the event that shows it, and what has to be done."""

    family: str
    hop: str
    fault: Fault
    event: str
    fact: tuple[str, str]
    recoveries: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.family}-{self.fault.kind.value}-{self.hop}"


CASES = (
    Case(
        "gemma2",
        "middle",
        Fault(FaultKind.PAYLOAD_BIT),
        "HopFault",
        ("reason", "CHECKSUM_MISMATCH"),
    ),
    Case(
        "mamba",
        "last",
        Fault(FaultKind.ROW_BIT, resealed=True),
        "TokenRejected",
        ("status", "REJECTED"),
        (("TOKEN_REJECTED", "replay"),),
    ),
    Case(
        "mixtral",
        "middle",
        Fault(FaultKind.RESET),
        "HopFault",
        ("reason", "STAGE_UNREACHABLE"),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_family_over_grpc_answers_as_mlx_lm_does_whatever_befalls_the_wire(
    case: Case, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path, case.family, layers=4)
    model, _ = load_model(tmp_path)
    expected = greedy(model, load_tokenizer(tmp_path).encode(PROMPT), COUNT)
    async with own_loop_mesh(tmp_path) as mesh:
        quiet, _ = await mesh.generate(COUNT, text=PROMPT)
        assert quiet == expected
        await mesh.settled()
        proxy, step, since = mesh.proxies[case.hop], mesh.next_step + STRUCK, len(mesh.published)
        proxy.plan = ScriptedFaults({step: [case.fault]})
        tokens, finish = await asyncio.wait_for(mesh.generate(COUNT, text=PROMPT), 60)
        assert [fired.step for fired in proxy.fired] == [step]
        assert tokens == expected
        name, value = case.fact
        shown = [e.attributes[name] for e in mesh.published[since:] if e.type == case.event]
        assert value in shown
        assert tuple((one.cause, one.action) for one in finish.recoveries) == case.recoveries
