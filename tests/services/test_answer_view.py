"""An answer on the command line: what its JSON lines say of each token."""

from __future__ import annotations

import dataclasses

from services.answer import Piece
from services.answer_codec import piece_to_proto
from services.answer_view import response_json
from tests.services.journal_helpers import chunk, key


def test_a_line_has_the_alternatives_of_each_token_that_were_asked_for():
    first = dataclasses.replace(chunk(key(1), 0), alternatives=((4, -2.5), (7, -3.0)))
    second = dataclasses.replace(chunk(key(1), 1), alternatives=())
    line = response_json(piece_to_proto("r", Piece(0, (first, second))))
    assert line["logprobs"] == [-0.25, -0.25]
    assert line["alternatives"] == [
        [{"token_id": 4, "logprob": -2.5}, {"token_id": 7, "logprob": -3.0}],
        [],
    ]
    assert "alternatives" not in response_json(piece_to_proto("r", Piece(1, (second,))))
