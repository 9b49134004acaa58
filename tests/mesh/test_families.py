"""Families of models, cut into one to five stages: token for token what mlx-lm generates.

Every frame between the stages is sealed, encoded, decoded and verified; requests are answered
alone, in company and after a prompt of several chunks. The reference is mlx-lm's own generation
loop over the uncut model.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from stage_worker import tiny_models
from stage_worker.hosting import SpanModel
from stage_worker.loading import DTypePolicy
from stage_worker.partition import balance
from stage_worker.reference import Reference
from stagemesh.sampling import SamplingSpec
from stagemesh.topology import Span
from tests.mesh.chain import Chain, Question

LAYERS = 6
CHUNK = 8
SAMPLED = SamplingSpec(temperature=0.875, top_p=0.9375, seed=21)
LENGTHS = (3, 19)
"""Prompts within one chunk, and over three; the windows of the tiny models hold eight."""
COUNT = 7

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "mixtral",
    "gpt2",
    "mamba",
    "jamba",
    "lfm2",
    "nemotron_h",
    "gemma3_text",
    "cohere2",
)
EXPERTS = {"mixtral", "jamba"}
"""Mixtures of experts: mlx multiplies gathered matrices in f32 only on a CPU, cut or uncut."""
NARROW = [
    (family, kind)
    for family in FAMILIES
    for kind in ("f16", "bf16", "4bit")
    if kind == "4bit" or family not in EXPERTS
]
DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}


def _packs(_path: str, module: Any) -> bool:
    """As mlx-lm chooses: what can be packed and is wide enough for a group."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


@functools.lru_cache(maxsize=2)
def model_of(family: str, kind: str) -> tuple[Any, dict[str, Any]]:
    """A tiny random model in an element type, or packed to four bits."""
    config = tiny_models.tiny_config(family, layers=LAYERS)
    model = tiny_models.build(config, seed=3)
    into(model, kind)
    return model, config


def into(model: Any, kind: str) -> None:
    """Another element type for all weights, or four bits for those that can be packed."""
    if kind == "4bit":
        nn.quantize(model, group_size=32, bits=4, class_predicate=_packs)
    else:
        wanted = DTYPES[kind]
        model.update(
            tree_map(
                lambda x: x.astype(wanted) if mx.issubdtype(x.dtype, mx.floating) else x,
                model.parameters(),
            )
        )
    mx.eval(model.parameters())


@functools.lru_cache(maxsize=2)
def expected_of(family: str, kind: str) -> tuple[tuple[Question, ...], list[list[int]]]:
    """The questions, and what mlx-lm answers to each by itself."""
    model, _config = model_of(family, kind)
    vocabulary = tiny_models.VOCABULARY_SIZE
    questions = tuple(
        Question(tuple((29 * i + 7 * length) % vocabulary for i in range(length)), COUNT, spec)
        for length in LENGTHS
        for spec in (SamplingSpec(), SAMPLED)
    )
    reference = Reference(model)
    return questions, [
        reference.free_run(one.prompt, one.count, one.spec, chunk=CHUNK).token_ids
        for one in questions
    ]


def chain_of(family: str, kind: str, stages: int, policy: DTypePolicy) -> Chain:
    model, config = model_of(family, kind)
    count = len(model.layers)
    spans: tuple[Span | None, ...] = balance([1.0] * count, stages) if stages > 1 else (None,)
    hosted = [SpanModel.from_model(model, config, span, dtype=policy) for span in spans]
    return Chain.of(hosted, chunk=CHUNK)


def assert_answered(chain: Chain, family: str, kind: str) -> None:
    """Alone and in company, and in company side by side where the model can be."""
    questions, expected = expected_of(family, kind)
    assert answers(chain, questions, together=False) == expected
    assert not any(chain.rows_batched)
    assert answers(chain, questions, together=True) == expected
    can = ["batch" in stage.capabilities for stage in chain.stages]
    assert [rows > 0 for rows in chain.rows_batched] == can


def answers(chain: Chain, questions: tuple[Question, ...], *, together: bool) -> list[list[int]]:
    groups = [questions] if together else [(one,) for one in questions]
    return [
        [chunk.token_id for chunk in one] for group in groups for one in chain.answer(list(group))
    ]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_f32_answers_as_mlx_lm_does_on_any_number_of_stages(
    family: str, stages: int
) -> None:
    assert_answered(chain_of(family, "f32", stages, DTypePolicy.STORED), family, "f32")


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("family", "kind"), NARROW)
def test_a_family_in_a_narrow_type_answers_as_mlx_lm_does_on_any_number_of_stages(
    family: str, kind: str, stages: int
) -> None:
    assert_answered(chain_of(family, kind, stages, DTypePolicy.STORED), family, kind)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU multiplies them")
@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("family", sorted(EXPERTS))
def test_experts_in_a_narrow_type_are_refused_on_a_cpu_by_mlx_itself(
    family: str, kind: str
) -> None:
    """Should this fail, mlx has learnt it, and they belong into NARROW."""
    model, _config = model_of(family, kind)
    with pytest.raises(RuntimeError, match="float32"):
        mx.eval(model(mx.array([[1, 2, 3]])))


def test_packed_weights_that_are_unpacked_at_load_answer_as_mlx_lm_does_with_unpacked_ones() -> (
    None
):
    from stage_worker.reference import unpacked

    model, _config = model_of("llama", "4bit")
    chain = chain_of("llama", "4bit", 3, DTypePolicy.F32)
    questions, _ = expected_of("llama", "4bit")
    reference = Reference(unpacked(model, "f32"))
    model_of.cache_clear()  # it was unpacked in place
    expected_of.cache_clear()
    expected = [reference.free_run(q.prompt, q.count, q.spec).token_ids for q in questions]
    assert answers(chain, questions, together=True) == expected
