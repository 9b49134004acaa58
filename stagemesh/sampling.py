"""How a request wants its tokens drawn.

The draw is a pure function of (seed, absolute position, logits), never of generator state, so that
a replay or a reroute after k tokens continues with the token an undisturbed run would have drawn.
The specification travels to the last stage in the first frame of a request on every route."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from stagemesh.checksum import CHAIN_BYTES
from stagemesh.errors import InvalidRequest

LOGIT_BIAS_MAX = 1024
"""Entries of ``logit_bias``; each costs 8 bytes in the opening frame."""
LOGPROBS_MAX = 20
"""Alternatives reported per token."""
LOGIT_BIAS_ABS_MAX = 1e6
"""Largest bias either way: bans or forces any token, and a sum with it stays finite in f32."""
TOP_P_MIN = 1e-9
"""Smaller values are mistakes; a millionth, rounded to the f32 it travels as, already keeps one
token only."""
REPETITION_PENALTY_MIN = 1e-3
"""A divisor; smaller ones would overflow logits."""
PENALTY_CONTEXT_TOKENS_MAX = 4096
"""How far back a repetition penalty may look."""

_FIXED = struct.Struct("<ffffIffIIQIHI")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_p", TOP_P_MIN, 1.0),
    ("min_p", 0.0, 1.0),
    ("top_k", 0, 2**31 - 1),
    ("repetition_penalty", REPETITION_PENALTY_MIN, 100.0),
    ("repetition_context", 0, PENALTY_CONTEXT_TOKENS_MAX),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("seed", 0, 2**64 - 1),
    ("logprobs", 0, LOGPROBS_MAX),
)
"""Inclusive limits of each number."""


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """Sampling parameters; ``temperature`` 0 is greedy. Validated by ``check``.

    ``repetition_penalty`` (1 = off) divides/multiplies logits of the last ``repetition_context``
    tokens, as mlx-lm does. ``frequency_penalty`` and ``presence_penalty`` (0 = off) are OpenAI's,
    over generated tokens. ``logprobs``: 0 = none; 1 = the chosen token's; n > 1 adds the n - 1 most
    likely others."""

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    repetition_context: int = 20
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int = 0

    def check(self, *, vocab_size: int) -> None:
        """Raise InvalidRequest naming the first parameter that is out of range."""
        for field, low, high in _RANGES:
            value = getattr(self, field)
            if not low <= value <= high:  # also refuses NaN
                message = f"{field} is {value}, outside {low} to {high}"
                raise InvalidRequest(message, field=field, value=value)
        if len(self.logit_bias) > LOGIT_BIAS_MAX:
            message = f"logit_bias has over {LOGIT_BIAS_MAX} entries"
            raise InvalidRequest(message, field="logit_bias", value=len(self.logit_bias))
        for token_id, bias in self.logit_bias:
            if not 0 <= token_id < vocab_size:
                message = f"logit_bias token {token_id} is not in the vocabulary"
                raise InvalidRequest(message, field="logit_bias", value=token_id)
            if not abs(bias) <= LOGIT_BIAS_ABS_MAX:  # also refuses NaN
                message = f"logit_bias {bias} is beyond {LOGIT_BIAS_ABS_MAX}"
                raise InvalidRequest(message, field="logit_bias", value=bias)


@dataclass(frozen=True, slots=True)
class RowOpening:
    """What a stage must know to start a request: rides in its first frame on a route (and only
    there).

    ``prompt_length``: tokens of the prompt proper; tokens behind it in the same prefill were
    accepted on an earlier route and count as generated. ``chain``: chain digest (16 bytes) behind
    the last token of that prefill, so that the last stage continues it. ``reserve_tokens``: cache
    positions to reserve."""

    sampling: SamplingSpec
    prompt_length: int
    chain: bytes
    reserve_tokens: int

    def pack(self) -> bytes:
        """Canonical little-endian bytes, the part of the header checksum that covers this
        opening."""
        s = self.sampling
        fixed = _FIXED.pack(
            s.temperature,
            s.top_p,
            s.min_p,
            s.repetition_penalty,
            s.repetition_context,
            s.frequency_penalty,
            s.presence_penalty,
            s.top_k,
            s.logprobs,
            s.seed,
            self.prompt_length,
            len(s.logit_bias),
            self.reserve_tokens,
        )
        bias = b"".join(struct.pack("<If", token_id, value) for token_id, value in s.logit_bias)
        if len(self.chain) != CHAIN_BYTES:
            raise InvalidRequest("chain digest must be 16 bytes", field="chain")
        return fixed + bias + self.chain
