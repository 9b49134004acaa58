"""From a GenerateRequest to a validated GenerationRequested, or a typed error that names the field.

Everything a client may get wrong is found here, before the mesh is asked for anything: nothing
invalid is ever admitted, queued or sent to a stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.events import Delivery, Verification
from services.tokenizer import ServedModel
from stagemesh.errors import ContextExceeded, InvalidRequest, ModelUnknown
from stagemesh.sampling import SamplingSpec
from stagemesh.v1 import generation_service_pb2 as pb

STOP_STRINGS_MAX = 16
STOP_CHARACTERS_MAX = 256
"""Of one stop string; this much text may have to be held back."""
STOP_TOKEN_IDS_MAX = 256
MESSAGES_MAX = 4096
"""Of one conversation."""
CHARACTERS_PER_TOKEN_MAX = 256
"""No vocabulary has longer tokens: text beyond context times this is refused untokenized."""

_LEVELS = {
    pb.VERIFICATION_LEVEL_TRANSPORT: Verification.TRANSPORT,
    pb.VERIFICATION_LEVEL_NUMERIC: Verification.NUMERIC,
    pb.VERIFICATION_LEVEL_SHADOW: Verification.SHADOW,
}
_DELIVERIES = {
    pb.DELIVERY_MODE_IMMEDIATE: Delivery.IMMEDIATE,
    pb.DELIVERY_MODE_VERIFIED: Delivery.VERIFIED,
}


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What the mesh's operator allows. ``prompt_tokens_max`` 0: what the context holds.
    ``verification`` and ``delivery``: of a request that does not say; one that asks for less than
    shadow verification is always delivered at once.
    ``resume_grace_s``: how long a generation without a reader waits for one before it is cancelled.
    """

    answer_tokens_default: int = 256
    prompt_tokens_max: int = 0
    request_s_max: float = 3600.0
    verification: Verification = Verification.NUMERIC
    verification_max: Verification = Verification.SHADOW
    delivery: Delivery = Delivery.IMMEDIATE
    resume_grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt after the chat template, and how it has to be encoded."""

    text: str
    is_chat: bool


@dataclass(frozen=True, slots=True)
class Parameters:
    """Everything of a valid request but its prompt."""

    sampling: SamplingSpec
    max_tokens: int
    stops: tuple[str, ...]
    stop_token_ids: frozenset[int]
    verification: Verification
    delivery: Delivery

    @property
    def attributes(self) -> dict[str, float | int]:
        """What a trace may say of them: numbers, never text."""
        sampling = self.sampling
        return {
            "gen_ai.request.max_tokens": self.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.seed": sampling.seed,
        }


def digest_of(request: pb.GenerateRequest) -> bytes:
    """What identifies a repeat of the same call: every field but the id and the wish to detach."""
    copy = pb.GenerateRequest()
    copy.CopyFrom(request)
    copy.ClearField("request_id")
    copy.ClearField("detach")
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).digest()


def check_model(name: str, model: ServedModel) -> None:
    """Raise ModelUnknown unless ``name`` is empty or the model's."""
    if name and name != model.name:
        raise ModelUnknown(
            f"this mesh serves {model.name!r}", requested=name[:64], available=model.name
        )


def render(request: pb.GenerateRequest | pb.TokenizeRequest, model: ServedModel) -> Rendered:
    """The text of a ``text`` or ``chat`` prompt. Raises InvalidRequest, ContextExceeded."""
    if request.WhichOneof("prompt") == "text":
        text = request.text
    else:
        messages = request.chat.messages
        if not messages:
            raise InvalidRequest("a conversation needs at least one message", field="chat.messages")
        if len(messages) > MESSAGES_MAX:
            raise InvalidRequest(
                f"more than {MESSAGES_MAX} messages", field="chat.messages", value=len(messages)
            )
        for index, message in enumerate(messages):
            if not message.role:
                raise InvalidRequest("a message has no role", field=f"chat.messages[{index}].role")
        text = model.tokenizer.render_chat(
            [{"role": message.role, "content": message.content} for message in messages],
            cue=not request.chat.without_generation_prompt,
        )
    if not text:
        raise InvalidRequest("the prompt is empty", field="prompt")
    if len(text) > model.context_length * CHARACTERS_PER_TOKEN_MAX:
        raise ContextExceeded(
            "the prompt cannot fit the model's context",
            characters=len(text),
            context_length=model.context_length,
        )
    return Rendered(text, request.WhichOneof("prompt") == "chat")


def encode(rendered: Rendered, model: ServedModel) -> list[int]:
    """Its token ids. May take a while for long texts: call it off the event loop then."""
    if rendered.is_chat:
        return model.tokenizer.encode_rendered(rendered.text)
    return model.tokenizer.encode(rendered.text)


def check_prompt(prompt: Sequence[int], model: ServedModel, limits: EdgeLimits) -> tuple[int, ...]:
    """Raise InvalidRequest or ContextExceeded unless the mesh can continue ``prompt``."""
    if not prompt:
        raise InvalidRequest("the prompt is empty", field="prompt")
    longest = model.context_length - 1  # at least one token of answer
    if limits.prompt_tokens_max:
        longest = min(longest, limits.prompt_tokens_max)
    if len(prompt) > longest:
        raise ContextExceeded(
            f"the prompt has {len(prompt)} tokens and at most {longest} fit",
            prompt_tokens=len(prompt),
            prompt_tokens_max=longest,
            context_length=model.context_length,
        )
    for index, token_id in enumerate(prompt):
        if token_id >= model.vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary of {model.vocab_size}",
                field=f"tokens.token_ids[{index}]",
                value=token_id,
            )
    return tuple(prompt)


def read_parameters(
    request: pb.GenerateRequest, model: ServedModel, limits: EdgeLimits
) -> Parameters:
    """Everything but the prompt. Raises InvalidRequest naming the field."""
    sampling = _sampling(request)
    sampling.check(vocab_size=model.vocab_size)
    delivery = _delivery(request, limits)
    verification = _verification(request, delivery, limits)
    if delivery is Delivery.VERIFIED and verification is not Verification.SHADOW:
        raise InvalidRequest(
            "deliver: verified needs verify: shadow", field="deliver", value=request.deliver
        )
    ends = frozenset() if request.ignore_eos else model.eos_token_ids
    return Parameters(
        sampling=sampling,
        max_tokens=request.max_tokens or limits.answer_tokens_default,
        stops=_stops(request),
        stop_token_ids=ends | _stop_token_ids(request, model),
        verification=verification,
        delivery=delivery,
    )


def _sampling(request: pb.GenerateRequest) -> SamplingSpec:
    default = SamplingSpec()

    def chosen(field: str, otherwise: float) -> float:
        return float(getattr(request, field)) if request.HasField(field) else otherwise

    context = default.repetition_context
    if request.HasField("repetition_context"):
        context = request.repetition_context
    return SamplingSpec(
        temperature=request.temperature,
        top_p=chosen("top_p", default.top_p),
        min_p=request.min_p,
        top_k=request.top_k,
        repetition_penalty=chosen("repetition_penalty", default.repetition_penalty),
        repetition_context=context,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=tuple((one.token_id, one.bias) for one in request.logit_bias),
        seed=request.seed,
        logprobs=request.logprobs,
    )


def _delivery(request: pb.GenerateRequest, limits: EdgeLimits) -> Delivery:
    if request.deliver == pb.DELIVERY_MODE_UNSPECIFIED:
        is_less = request.verify in (
            pb.VERIFICATION_LEVEL_TRANSPORT,
            pb.VERIFICATION_LEVEL_NUMERIC,
        )
        return Delivery.IMMEDIATE if is_less else limits.delivery
    delivery = _DELIVERIES.get(request.deliver)
    if delivery is None:
        raise InvalidRequest("unknown delivery mode", field="deliver", value=request.deliver)
    return delivery


def _verification(
    request: pb.GenerateRequest, delivery: Delivery, limits: EdgeLimits
) -> Verification:
    if request.verify == pb.VERIFICATION_LEVEL_UNSPECIFIED:
        return limits.verification_max if delivery is Delivery.VERIFIED else limits.verification
    level = _LEVELS.get(request.verify)
    if level is None:
        raise InvalidRequest("unknown verification level", field="verify", value=request.verify)
    if level > limits.verification_max:
        raise InvalidRequest(
            f"this mesh verifies at most at level {limits.verification_max.name.lower()}",
            field="verify",
            value=level.name.lower(),
        )
    return level


def _stops(request: pb.GenerateRequest) -> tuple[str, ...]:
    if len(request.stop) > STOP_STRINGS_MAX:
        raise InvalidRequest(
            f"more than {STOP_STRINGS_MAX} stop strings", field="stop", value=len(request.stop)
        )
    for index, stop in enumerate(request.stop):
        if not 0 < len(stop) <= STOP_CHARACTERS_MAX:
            raise InvalidRequest(
                f"a stop string has 1 to {STOP_CHARACTERS_MAX} characters",
                field=f"stop[{index}]",
                value=len(stop),
            )
    return tuple(request.stop)


def _stop_token_ids(request: pb.GenerateRequest, model: ServedModel) -> frozenset[int]:
    ids = request.stop_token_ids
    if len(ids) > STOP_TOKEN_IDS_MAX:
        raise InvalidRequest(
            f"more than {STOP_TOKEN_IDS_MAX} stop tokens", field="stop_token_ids", value=len(ids)
        )
    for index, token_id in enumerate(ids):
        if token_id >= model.vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary of {model.vocab_size}",
                field=f"stop_token_ids[{index}]",
                value=token_id,
            )
    return frozenset(ids)
