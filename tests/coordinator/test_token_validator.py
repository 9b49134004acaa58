"""What came back is what was asked for, or it is named: what, where, by whom."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from coordinator.token_validator import Corruption, ExpectedRow, TokenValidator, rejection
from stagemesh.checksum import chain_next, chain_start, history_digest
from stagemesh.errors import TokenRejected
from stagemesh.frame import RowStatus, StepRow
from stagemesh.guards import CORRUPTIONS
from stagemesh.token import StageMark, TokenChunk, ValidationStatus
from stagemesh.topology import WorkerName

REQUEST = bytes(range(16))
OTHER = bytes(range(1, 17))
PROMPT = tuple(range(100, 110))
STAGES = (WorkerName("s0"), WorkerName("s1"), WorkerName("s2"))
VOCAB = 50_000
END = len(PROMPT)
DIGEST = history_digest(PROMPT)
CHAIN = chain_start(REQUEST, PROMPT)
EXPECTED = ExpectedRow(REQUEST, 4, 9, 0, END, DIGEST, True, CHAIN, STAGES)
GOOD_MARKS = tuple(StageMark(END, DIGEST, crc) for crc in (11, 12, 0))


def token(**changes) -> TokenChunk:
    token_id = changes.get("token_id", 7)
    fields = {
        "request": REQUEST,
        "position": END,
        "token_id": token_id,
        "epoch": 4,
        "step": 9,
        "logprob": -0.25,
        "margin": 1.5,
        "sampled_at_unix_ns": 1,
        "source": "s2",
        "chain": chain_next(CHAIN, END, token_id),
        **changes,
    }
    return TokenChunk(**fields).sealed()


def row(chunk: TokenChunk | None = None, **changes) -> StepRow:
    base = StepRow(REQUEST, 0, PROMPT, samples=True, marks=GOOD_MARKS, token=chunk or token())
    return replace(base, **changes)


def findings(bad: StepRow, expected: ExpectedRow = EXPECTED):
    return TokenValidator(VOCAB).check_row(bad, expected)


def test_a_row_as_it_must_be_has_no_findings():
    assert findings(row()) == ()
    assert findings(row(token(marks=GOOD_MARKS))) == ()


def test_alternatives_within_the_vocabulary_are_fine():
    assert findings(row(token(alternatives=((5, -1.0), (49_999, -2.0))))) == ()


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (row(replace(token(), token_id=8)), Corruption.TRANSFER),
        (row(replace(token(), checksum=1)), Corruption.TRANSFER),
        (row(token(request=OTHER)), Corruption.TRANSFER),
        (row(token(source="s1")), Corruption.TRANSFER),
        (row(token(status=ValidationStatus.VALID)), Corruption.TRANSFER),
        (row(token(marks=GOOD_MARKS[:2])), Corruption.TRANSFER),
        (row(token(epoch=3)), Corruption.ORDERING),
        (row(token(step=8)), Corruption.ORDERING),
        (row(token(position=END - 1)), Corruption.DUPLICATION),
        (row(token(position=END + 1)), Corruption.LOSS),
        (row(token(chain=CHAIN)), Corruption.ORDERING),
        (row(token(token_id=VOCAB)), Corruption.ENCODING),
        (row(token(alternatives=((VOCAB, -1.0),))), Corruption.ENCODING),
        (row(replace(token(), request=b"short")), Corruption.ENCODING),
        (row(replace(token(), token_id=-1)), Corruption.ENCODING),
        (row(replace(token(), source="\ud800")), Corruption.ENCODING),
        (row(replace(token(), source="s" * 300)), Corruption.ENCODING),
        (row(token(margin=math.nan)), Corruption.NUMERIC),
        (row(token(margin=math.inf)), Corruption.NUMERIC),
        (row(token(logprob=-math.inf)), Corruption.NUMERIC),
        (row(token(margin=-1.0)), Corruption.NUMERIC),
        (row(token(logprob=2.0)), Corruption.NUMERIC),
        (row(token(alternatives=((5, math.nan),))), Corruption.NUMERIC),
    ],
)
def test_a_wrong_token_is_classified_and_laid_to_the_last_stage(bad, kind):
    found = findings(bad)
    assert found[0].corruption is kind
    assert (found[0].worker, found[0].hop_from, found[0].hop_to) == ("s2", 2, -1)
    assert found[0].request == REQUEST


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (row(request=OTHER), Corruption.TRANSFER),
        (row(first_position=1), Corruption.ORDERING),
        (row(token_ids=PROMPT[:-1]), Corruption.ORDERING),
        (row(token=None), Corruption.LOSS),
        (row(samples=False), Corruption.TRANSFER),
        (row(marks=GOOD_MARKS[:2]), Corruption.LOSS),
        (row(marks=(*GOOD_MARKS, GOOD_MARKS[0])), Corruption.DUPLICATION),
    ],
)
def test_a_wrong_row_is_classified_and_laid_to_a_stage(bad, kind):
    (found,) = findings(bad)
    assert found.corruption is kind
    assert (found.worker, found.hop_from, found.hop_to) == ("s2", 2, -1)


def test_a_token_that_nobody_asked_for_is_a_duplication():
    middle = EXPECTED._replace(samples=False)
    assert findings(row(samples=False), middle)[0].corruption is Corruption.DUPLICATION
    assert findings(row(samples=False, token=None), middle) == ()


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize(
    ("mark", "kind"),
    [
        (StageMark(END - 1, DIGEST, 0), Corruption.LOSS),
        (StageMark(END + 1, DIGEST, 0), Corruption.DUPLICATION),
        (StageMark(END, DIGEST ^ 1, 0), Corruption.ORDERING),
    ],
)
def test_the_stage_whose_account_differs_is_named(stage, mark, kind):
    marks = [*GOOD_MARKS]
    marks[stage] = mark
    found = findings(row(marks=tuple(marks)))
    assert [(f.corruption, f.worker, f.hop_from) for f in found] == [(kind, STAGES[stage], stage)]


def test_when_everything_behind_a_stage_differs_too_the_first_one_leads():
    wrong = StageMark(END, DIGEST ^ 1, 0)
    found = findings(row(marks=(GOOD_MARKS[0], wrong, wrong)))
    assert [finding.worker for finding in found] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (RowStatus.POSITION_MISMATCH, Corruption.ORDERING),
        (RowStatus.CACHE_LOST, Corruption.LOSS),
        (RowStatus.CACHE_EXHAUSTED, Corruption.LOSS),
        (RowStatus.NON_FINITE, Corruption.NUMERIC),
        (RowStatus.OUT_OF_ENVELOPE, Corruption.NUMERIC),
        (RowStatus.COMPUTE_FAILED, Corruption.LOSS),
        (RowStatus.INVALID, Corruption.ENCODING),
    ],
)
def test_a_row_that_a_stage_gave_up_names_that_stage(status, kind):
    found = findings(row().failed(status, stage=1, detail="why"))
    assert [(f.corruption, f.worker) for f in found] == [(kind, "s1")]
    assert "why" in found[0].detail


def test_every_id_of_the_vocabulary_is_legal_output():
    """Emoji, CJK, combining marks, "----", control whitespace and bytes that are not UTF-8 alone
    are all just ids."""
    validator = TokenValidator(512)
    for token_id in range(512):
        assert validator.check_row(row(token(token_id=token_id)), EXPECTED) == ()
    assert dict(validator.counters) == {"tokens_checked": 512}


def test_findings_become_one_error_that_names_hop_and_worker():
    found = findings(row(token(position=END + 1)))
    error = rejection(found)
    assert isinstance(error, TokenRejected)
    assert error.findings == found
    assert error.metadata["worker"] == "s2"
    assert error.metadata["hop"] == "2→-1"
    assert found[0].attributes()["corruption"] == "loss"
    assert str(found[0]).startswith("loss stage 2→-1 worker=s2 req=0001 pos=11")
    with pytest.raises(TokenRejected):
        TokenValidator(VOCAB).require(row(token=None), EXPECTED)
    TokenValidator(VOCAB).require(row(), EXPECTED)


def test_findings_are_counted_by_class():
    validator = TokenValidator(VOCAB)
    validator.check_row(row(token=None), EXPECTED)
    validator.check_row(row(token(margin=math.nan)), EXPECTED)
    validator.check_row(row(samples=False, token=None), EXPECTED._replace(samples=False))
    assert validator.counters["tokens_rejected.loss"] == 1
    assert validator.counters["tokens_rejected.numeric"] == 1
    assert validator.counters["marks_checked"] == 1
    assert not validator.counters.unregistered()


def test_the_classes_are_the_ones_the_counters_know():
    assert tuple(kind.value for kind in Corruption) == CORRUPTIONS
