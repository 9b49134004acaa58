"""What one hop may hold, how often it may repeat itself, and how long it may be silent."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class HopLimits:
    """Bounds of one hop. ``inflight_*``: unacknowledged on the wire, or kept out of turn at the
    receiver. ``ledger_*``: that, and what waits to be sent; past it ``offer`` refuses."""

    inflight_frames_max: int = 32
    inflight_bytes_max: int = 64 * 1024 * 1024
    ledger_frames_max: int = 256
    ledger_bytes_max: int = 256 * 1024 * 1024
    retransmit_wait_s_initial: float = 0.4
    """Timer before any round trip was measured."""
    retransmit_wait_s_min: float = 0.1
    """Above what a busy event loop may take to answer."""
    retransmit_wait_s_max: float = 2.0
    nack_wait_s_initial: float = 0.004
    nack_wait_s_max: float = 0.25
    copies_max: int = 8
    """Copies of one frame on one connection."""
    silence_s_max: float = 5.0
    """Unacknowledged frames and no sign of life for this long: unreachable."""
    retransmit_budget_ratio: float = 0.1
    """Retransmissions nacks may cause, per frame sent."""
    retransmit_budget_burst: float = 10.0
    """Retransmissions saved up at most; also the budget to begin with."""
    hold_off_s: float = 0.5
    """How long a receiver that repeats its last acknowledgement is taken to be busy."""
    bytes_per_s_min: float = 8 * 1024 * 1024
    """Slowest link we wait for: the timer allows this long for what is in flight."""

    def __post_init__(self) -> None:
        if self.ledger_frames_max < self.inflight_frames_max or self.copies_max < 1:
            raise InvalidConfiguration("hop limits contradict each other", setting="hop_limits")
