"""The tree of errors: unique reasons, canonical codes, and instances that survive being rebuilt."""

from __future__ import annotations

import pytest

from stagemesh import errors
from stagemesh.errors import MeshError, Overloaded, TokenRejected, by_reason

CODES = {
    "INTERNAL", "DATA_LOSS", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "FAILED_PRECONDITION",
    "ALREADY_EXISTS", "ABORTED", "UNAVAILABLE", "NOT_FOUND", "DEADLINE_EXCEEDED", "CANCELLED",
    "PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED", "OUT_OF_RANGE",
}  # fmt: skip
KINDS = sorted(by_reason().values(), key=lambda kind: kind.__name__)


def descendants(kind: type[MeshError]) -> set[type[MeshError]]:
    return {kind}.union(*(descendants(child) for child in kind.__subclasses__()))


def test_every_error_has_a_reason_of_its_own():
    own = {kind for kind in descendants(MeshError) if kind.__module__ == errors.__name__}
    assert set(KINDS) >= own
    assert len({kind.reason for kind in own}) == len(own)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_can_be_rebuilt_from_its_reason_and_metadata(kind):
    error = by_reason()[kind.reason]("it broke", hop="0→1", worker="s1", nothing=None)
    assert type(error) is kind
    assert error.code in CODES
    assert error.reason == error.reason.upper()
    assert error.metadata == {"hop": "0→1", "worker": "s1"}
    assert str(error) == "it broke [hop=0→1 worker=s1]"


def test_every_error_is_named_in_the_tree_of_the_module():
    for kind in KINDS:
        if kind.__module__ == errors.__name__:
            assert kind.__name__ in errors.__doc__


def test_an_error_without_metadata_prints_its_message_alone():
    assert str(MeshError("plain")) == "plain"


def test_overload_says_when_to_come_back():
    assert Overloaded("full", retry_after_s=2.5).retry_after_s == 2.5


def test_a_rejected_token_carries_its_findings():
    assert TokenRejected("no", findings=("a", "b")).findings == ("a", "b")
    assert TokenRejected("no").findings == ()
