"""The frame-level fault proxy under the name that tests know it by."""

from services.fault_proxy import (
    PAYLOAD_KINDS,
    Fault,
    FaultKind,
    FrameProxy,
    ScriptedFaults,
    SeededFaults,
)

__all__ = [
    "PAYLOAD_KINDS",
    "Fault",
    "FaultKind",
    "FrameProxy",
    "ScriptedFaults",
    "SeededFaults",
]
