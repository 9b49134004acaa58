"""What is known of one answer: what the mesh delivered, and what the reference makes of it.

Both sides speak of the same context. The reference is *teacher-forced*: at answer index i it has
consumed the prompt and the tokens that the mesh delivered before i, whether it would have chosen
them or not. So one flip that a rounding error explains does not spoil everything behind it, and
every number can be compared at every index.

*Boundaries* lie between stages; boundary b is what stage b hands to stage b + 1. The last stage has
none: what it hands on is the token, seen through its log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagemesh.token import StageMark
from stagemesh.topology import Span

FULL_WORKER = "full-worker"


@dataclass(frozen=True, slots=True)
class StagePlace:
    """One stage of the route under test: the worker's name and the layers it hosts."""

    worker: str
    span: Span


@dataclass(frozen=True, slots=True)
class Delivered:
    """One token as a client received it.

    ``position`` is absolute (the first answer token has the prompt's length). ``logprobs`` are
    (token id, log-probability) as reported, the token's own first. ``marks`` are in stage order.
    """

    token_id: int
    position: int
    epoch: int
    logprobs: tuple[tuple[int, float], ...]
    marks: tuple[StageMark, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that ended in an error: its reason constant, its text, the worker it names."""

    reason: str
    message: str
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """One answer of the mesh. ``wanted`` is how many tokens were asked for."""

    prompt: tuple[int, ...]
    wanted: int
    tokens: tuple[Delivered, ...]
    text: str
    stages: tuple[StagePlace, ...]
    failure: Failure | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The delivered tokens alone."""
        return tuple(token.token_id for token in self.tokens)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The reference at one answer index.

    ``token_id``: what it would choose. ``margin``: by how much, best score minus second best (a
    score is the logit when greedy, else the tempered logit plus noise). ``gap``: how far the
    delivered token's score is from the best. ``rank``: 1 when it is the best. ``logits``: of the
    delivered token and of its own. ``logprobs``: of the ids the mesh reported, in that order.
    ``digests[b]``: every CRC32C that boundary b may have here; one per way the prompt may have been
    cut at the first token, a single one later, none where it was not recorded.
    """

    token_id: int
    margin: float
    gap: float
    rank: int
    logits: tuple[float, float]
    logprobs: tuple[float, ...]
    digests: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Expectation:
    """The reference's side of one answer.

    ``token_ids`` and ``text`` are its own free run; ``judgements`` are teacher-forced on what the
    mesh delivered, and ``delivered_text`` is the reference's decoding of just that. ``prompt`` is
    the prompt as the reference's own tokenizer cut it.
    """

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    delivered_text: str
    judgements: tuple[Judgement, ...]


MEAN_KL_MAX = 1e-3
"""Nats, where models compute in float32."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """When two numbers count as equal. ``tau`` 0 is *exact mode*: every bit. Otherwise *margin
    mode*: ``tau`` is twice the 99.99 % quantile of the difference of log-probabilities between the
    two sides while both are well; ``temperature`` translates it into the scores of a sampled run.
    ``mean_kl_max``: how far distributions may be apart, averaged over an answer, in nats.
    """

    tau: float = 0.0
    mean_kl_max: float = MEAN_KL_MAX

    @property
    def exact(self) -> bool:
        """Every bit counts."""
        return self.tau == 0.0

    def covers_gap(self, gap: float, temperature: float) -> bool:
        """Whether a difference within ``tau`` could have turned a score around."""
        scale = 1.0 / temperature if 0.0 < temperature < 1.0 else 1.0
        return gap <= self.tau * scale


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first index at which the mesh delivered what the reference would not have chosen."""

    position: int
    ours: int
    reference: int
    logit_ours: float
    logit_reference: float
    margin: float
    gap: float
    rank: int
    explained: bool


@dataclass(frozen=True, slots=True)
class Culprit:
    """Where it went wrong. ``stage`` -1: not a stage. ``boundary`` names the first that differs.

    ``kind``: ``compute`` (from the first token on), ``state`` (only once a cache was in use),
    ``logits`` (every boundary holds, the head's output does not), ``cache_length``, ``history``,
    ``error``, ``tokenizer``, ``delivery``, ``unknown``. ``certain`` is False when the evidence fits
    another cause as well.
    """

    kind: str
    stage: int
    worker: str
    layers: str
    boundary: str
    position: int
    cause: str
    certain: bool = True


@dataclass(frozen=True, slots=True)
class RunScore:
    """One run's verdict. See ``scoring`` for what each number means."""

    ok: bool
    score: float
    tokens: int
    agreement: float
    common_prefix: int
    first_divergence: Divergence | None
    max_abs_dlogit: float
    mean_abs_dlogit: float
    mean_kl: float
    text_agrees: bool
    cache_lengths_agree: bool
    boundaries_compared: int
    problems: tuple[str, ...] = ()
    culprit: Culprit | None = None
    differences: tuple[float, ...] = field(default=(), repr=False)
    """Every |difference of log-probability|, for calibration."""
