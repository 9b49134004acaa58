"""Which answers are audited, so that auditing takes at most a share of compute.

Credit grows with the compute that is measured and is spent by audits. An answer is drawn with the
probability that would spend the credit evenly; the random value is a parameter.
"""

from __future__ import annotations

CREDIT_S_MAX = 30.0
"""Unused audit time that is kept for later, seconds of compute."""


class AuditBudget:
    """See the module. All times in seconds."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.computed_s = 0.0
        self.audited_s = 0.0
        self._credit_s = 0.0

    def earn(self, compute_s: float) -> None:
        """Compute was done for requests."""
        self.computed_s += compute_s
        self._credit_s = min(self._credit_s + self.share * compute_s, CREDIT_S_MAX)

    def spend(self, audit_s: float) -> None:
        """An audit took this long; the credit may go below zero and is then paid back first."""
        self.audited_s += audit_s
        self._credit_s -= audit_s

    def draws(self, value: float, *, piece_s: float, audit_s: float) -> bool:
        """Whether to audit what takes ``piece_s`` and would take ``audit_s`` to audit.
        ``value``: uniform in [0, 1)."""
        if audit_s <= 0.0:
            return True
        if self._credit_s < audit_s:
            return False
        return value < self.share * piece_s / audit_s

    @property
    def used(self) -> float:
        """Audit time as a share of compute so far."""
        return self.audited_s / self.computed_s if self.computed_s else 0.0
