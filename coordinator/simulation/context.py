"""What everything in one simulated mesh shares."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.simulation.network import Network
from coordinator.simulation.prng import Prng
from coordinator.simulation.virtual import VirtualTime
from coordinator.simulation.watch import Watch
from stagemesh.transport import HopLimits

COORDINATOR_NAME = "coordinator"
HOP_ADDRESS = "coordinator:hop"
CONTROL_ADDRESS = "coordinator:control"


@dataclass(slots=True)
class Context:
    """``step_s`` and ``token_s``: virtual time that a step costs a stage, beside its tokens."""

    time: VirtualTime
    network: Network
    watch: Watch
    limits: HopLimits
    prng: Prng
    step_s: float = 0.004
    token_s: float = 0.0003
    hop_address: str = HOP_ADDRESS
