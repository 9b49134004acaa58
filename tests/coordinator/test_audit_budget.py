"""Audits are held against a budget."""

import random

from coordinator.audit_budget import CREDIT_S_MAX, AuditBudget


def test_auditing_takes_its_share_of_compute_and_no_more():
    rng = random.Random(7)
    budget = AuditBudget(0.02)
    audits = 0
    for _ in range(20_000):
        budget.earn(0.05)
        if budget.draws(rng.random(), piece_s=0.05, audit_s=0.01):
            budget.spend(0.01)
            audits += 1
    assert 0.015 < budget.used <= 0.02
    assert audits > 1000


def test_nothing_is_audited_that_nobody_has_paid_for():
    budget = AuditBudget(0.02)
    assert budget.used == 0.0
    assert not budget.draws(0.0, piece_s=1.0, audit_s=0.1)
    assert budget.draws(0.999, piece_s=1.0, audit_s=0.0)
    budget.earn(10.0)
    assert budget.draws(0.1, piece_s=1.0, audit_s=0.1)
    assert not budget.draws(0.9, piece_s=1.0, audit_s=0.1)


def test_what_is_saved_up_is_bounded():
    budget = AuditBudget(0.02)
    budget.earn(1e6)
    assert budget.draws(0.0, piece_s=1e6, audit_s=CREDIT_S_MAX)
    assert not budget.draws(0.0, piece_s=1e6, audit_s=CREDIT_S_MAX + 0.1)
