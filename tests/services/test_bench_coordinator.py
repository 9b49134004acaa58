"""What the clients of suite ``coordinator`` make of the bytes that came."""

import asyncio
import gc

import pytest

from services.bench import coordinator_suite as suite
from stagemesh.errors import MeshError
from stagemesh.v1 import generation_service_pb2 as pb

MS = 1_000_000


def stream(*, begins_ms=0, positions=range(4, 14), late_ms=2):
    """A token each 10 ms, every one so late."""
    arrivals = []
    for index, position in enumerate(positions):
        at = (begins_ms + 10 * index) * MS
        response = pb.GenerateResponse()
        response.tokens.add(position=position, sampled_at_unix_ns=at)
        arrivals.append((at + late_ms * MS, response.SerializeToString()))
    return suite.Stream(arrivals)


def test_each_token_is_timed_from_its_sampling():
    assert stream().timed(10) == [((10 * n + 2) * MS, pytest.approx(0.002)) for n in range(10)]


@pytest.mark.parametrize("positions", [[4, 5, 7], [4, 5, 5], [5, 6, 7]])
def test_a_token_that_is_not_due_ends_the_benchmark(positions):
    with pytest.raises(MeshError, match="was due"):
        stream(positions=positions).timed(3)


def test_an_answer_that_is_too_short_ends_the_benchmark():
    with pytest.raises(MeshError, match="10 of 11 tokens"):
        stream().timed(11)


def test_only_what_came_while_all_streams_decoded_is_counted():
    early, late = stream(late_ms=1), stream(begins_ms=30, late_ms=3)
    # From the late one's fifth token (73 ms) until the early one's last (91): one of the early
    # one's (81) and two of the late one's (73, 83).
    found = suite._while_all_decode([early, late], 10)
    assert sorted(found) == pytest.approx([0.001, 0.003, 0.003])


def test_streams_that_never_decode_together_end_the_benchmark():
    with pytest.raises(MeshError, match="had ended before all others"):
        suite._while_all_decode([stream(), stream(begins_ms=500)], 10)


class Looked:
    """A call whose responses say whether cycles are looked for while it is read."""

    def __init__(self, error=None):
        self.seen = []
        self.error = error

    def call(self, index):
        return lambda *_request, **_options: self.responses()

    async def responses(self):
        self.seen.append(gc.isenabled())
        if self.error is not None:
            raise self.error
        yield b""


@pytest.mark.parametrize("error", [None, ZeroDivisionError()])
def test_no_cycles_are_looked_for_while_clients_read_and_they_are_again_afterwards(error):
    mesh = Looked(error)
    read = suite._all(mesh, streams=2, tokens=1)
    if error is None:
        asyncio.run(read)
    else:
        with pytest.raises(ZeroDivisionError):
            asyncio.run(read)
    assert set(mesh.seen) == {False}
    assert gc.isenabled()
