"""One activation over one hop and back: sealed, encoded, decoded, verified, as a link would.

The support sweep sends every boundary of every model type through here, in its child processes,
which find it by name; so what is tried is what is served.
"""

from __future__ import annotations

from typing import Any

from services.codec import decode_request, encode_frame
from stage_worker.tensors import to_array, to_tensor
from stagemesh.errors import FrameMalformed
from stagemesh.frame import FrameKind, StepFrame, StepRow, verify
from stagemesh.tensor import Tensor

DOTTED_NAME = "services.hop_roundtrip:through_hop"
"""How a child process finds `through_hop`."""
_FINGERPRINT = b"roundtri"
_REQUEST = bytes(16)


def through_hop(activation: Any) -> Any:
    """``activation`` [1, tokens, hidden] (mlx array) behind a hop; the same shape and dtype.

    Raises the error of the first check that fails, FrameMalformed for one too large for a frame.
    """
    tensor = to_tensor(activation)
    tokens, hidden = tensor.shape[-2:]
    lines = Tensor(tensor.dtype, (tokens, hidden), tensor.payload)
    row = StepRow(_REQUEST, 0, tuple(range(tokens)))
    frame = StepFrame(FrameKind.PREFILL, _FINGERPRINT, 1, 1, 0, 1, (row,), lines).sealed()
    received = [decode_request(message) for message in encode_frame(frame, check=True)]
    arrived = received[0]
    if not isinstance(arrived, StepFrame) or arrived.tensor is None:
        raise FrameMalformed("the activation does not fit one frame", tokens=tokens, hidden=hidden)
    verify(arrived, fingerprint=_FINGERPRINT)
    return to_array(arrived.tensor).reshape(tensor.shape)
