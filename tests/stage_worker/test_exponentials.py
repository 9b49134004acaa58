"""Exponentials made of fast operations say what mlx's own say, and only where they are wanted."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations, base
from mlx_lm.models.cache import make_prompt_cache

from stage_worker import exponentials, tiny_models
from stage_worker.exponentials import Exponentials, exp2
from stage_worker.hosting import SpanModel
from stagemesh.topology import Span

MODELS = ("llama", "qwen2", "gemma2", "mixtral", "phi3", "deepseek_v2", "gpt_oss", "olmo2")
IDS = [3, 9, 4, 1, 5, 6, 2, 8, 7, 3, 1]


@pytest.fixture
def fast():
    """For however few numbers."""
    made = Exponentials()
    made.scores_min = made.gates_min = 0
    return made


@pytest.fixture
def paying(monkeypatch):
    """As in a process with a fast BLAS on x86-64, and for however few numbers."""
    monkeypatch.setattr(exponentials, "pays", lambda: True)
    monkeypatch.setattr(exponentials, "SCORES_MIN", 0)
    monkeypatch.setattr(exponentials, "GATES_MIN", 0)


def drawn(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def test_a_power_of_two_is_right_to_the_last_bits():
    t = np.concatenate([np.linspace(-126, 127.9, 200_001), np.arange(-126.0, 128)])
    found = np.array(exp2(mx.array(t, mx.float32)), np.float64)
    exact = np.exp2(np.float32(t).astype(np.float64))
    assert np.abs(found / exact - 1).max() < 2.5e-7
    assert np.array(exp2(mx.arange(-126.0, 128.0))).tolist() == [2.0**n for n in range(-126, 128)]


@pytest.mark.parametrize("odd", [math.nan, -math.nan, math.inf])
def test_what_is_no_number_stays_none(fast, odd):
    """Or the check of a stage's output would not see it."""
    queries, keys, values = drawn(1, 2, 3, 8), drawn(1, 1, 5, 8, seed=1), drawn(1, 1, 5, 8, seed=2)
    broken = mx.where(mx.arange(8) == 4, odd, queries)
    for arrays in (
        (broken, keys, values),
        (queries, keys * odd, values),
        (queries, keys, values * odd),
    ):
        found = fast.attend(*arrays, None, 0.3, "causal")
        theirs = base.scaled_dot_product_attention(*arrays, None, 0.3, "causal")
        assert not mx.isfinite(theirs).any().item()
        assert not mx.isfinite(found).any().item()
    assert mx.isnan(fast.swiglu(mx.full((4,), math.nan), mx.ones((4,)))).all().item()


MASKS = {
    "none": None,
    "causal": "causal",
    "bool": mx.arange(7)[None] <= mx.arange(2, 7)[:, None],
    "window": (mx.arange(7)[None] <= mx.arange(2, 7)[:, None])
    & (mx.arange(7)[None] > mx.arange(5)[:, None]),
    "padding": (mx.arange(7) >= mx.array([0, 3])[:, None])[:, None, None],
    "added": mx.where(mx.arange(7)[None] <= mx.arange(2, 7)[:, None], 0.0, -math.inf),
    "heads": drawn(1, 6, 5, 7, seed=9),
}


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("name", MASKS)
def test_attention_is_what_it_was(fast, name, groups):
    queries = drawn(2, 5, 6, 8).transpose(0, 2, 1, 3)
    keys, values = drawn(2, groups, 7, 8, seed=1), drawn(2, groups, 7, 4, seed=2)
    theirs = base.scaled_dot_product_attention(queries, keys, values, None, 0.5, MASKS[name])
    found = fast.attend(queries, keys, values, None, 0.5, MASKS[name])
    assert found.shape == theirs.shape
    assert mx.allclose(found, theirs, rtol=1e-5, atol=1e-6).item()
    again = fast.attend(queries, keys, values, None, 0.5, MASKS[name])
    assert mx.array_equal(found, again).item(), "the kept mask is another"


def test_a_kept_mask_is_not_used_for_another(fast):
    queries, keys = drawn(1, 2, 3, 8), drawn(1, 2, 5, 8, seed=1)
    first, second = mx.arange(5)[None] < 2, mx.arange(5)[None] >= 2
    for mask in (first, second, "causal", None):
        found = fast.attend(queries, keys, keys, None, 0.5, mask)
        theirs = base.scaled_dot_product_attention(queries, keys, keys, None, 0.5, mask)
        assert mx.allclose(found, theirs, rtol=1e-5, atol=1e-6).item()
    longer = drawn(1, 2, 9, 8, seed=3)
    found = fast.attend(queries, longer, longer, None, 0.5, "causal")
    theirs = base.scaled_dot_product_attention(queries, longer, longer, None, 0.5, "causal")
    assert mx.allclose(found, theirs, rtol=1e-5, atol=1e-6).item()


def test_a_gate_is_what_it_was(fast):
    gate, x = drawn(5, 300) * 40, drawn(5, 300, seed=1)
    assert mx.allclose(fast.swiglu(gate, x), activations.swiglu(gate, x), rtol=1e-5).item()


class _Quantized:
    bits, group_size = 8, 32


def test_what_it_is_not_made_for_goes_to_mlx_lm(fast, monkeypatch):
    asked = []
    monkeypatch.setattr(base, "scaled_dot_product_attention", lambda *_a, **_o: asked.append(1))
    monkeypatch.setattr(activations, "swiglu", lambda *_a: asked.append(1))
    x = drawn(1, 2, 3, 8)
    half = x.astype(mx.float16)
    fast.attend(x, x, x, None, 1.0, None, sinks=mx.zeros((2,)))
    fast.attend(half, half, half, None, 1.0, None)
    fast.attend(x, (x, x, x), (x, x, x), _Quantized(), 1.0, None)
    fast.swiglu(half, half)
    fast.scores_min, fast.gates_min = 19, 49
    fast.attend(x, x, x, None, 1.0, None)  # 18 scores
    fast.swiglu(x, x)  # 48 gates
    assert len(asked) == 6
    fast.scores_min, fast.gates_min = 18, 48
    fast.attend(x, x, x, None, 1.0, None)
    fast.swiglu(x, x)
    assert len(asked) == 6


@pytest.mark.parametrize("model_type", MODELS)
def test_a_split_model_says_what_the_whole_one_says(paying, model_type):
    config = tiny_models.tiny_config(model_type)
    model = tiny_models.build(config)
    cache = make_prompt_cache(model)
    whole = [model(mx.array([IDS[:6]]), cache=cache), model(mx.array([IDS[6:]]), cache=cache)]
    mx.eval(whole)
    layers = len(SpanModel.from_model(model, config).layers)
    stages = [
        SpanModel.from_model(model, config, span)
        for span in (Span(0, layers // 2), Span(layers // 2, layers))
    ]
    caches = [stage.make_cache() for stage in stages]
    for ids, theirs in zip((IDS[:6], IDS[6:]), whole, strict=True):
        hidden = None
        for stage, kept in zip(stages, caches, strict=True):
            hidden = stage.forward(mx.array([ids]), hidden, kept)
        assert mx.allclose(hidden, theirs, rtol=1e-3, atol=1e-4).item()
    writes_its_own = model_type == "gemma2"
    assert any(map(_is_hastened, stages)) is not writes_its_own


def _is_hastened(stage):
    modules = [module for layer in stage.layers for module in layer.modules()]
    return any(_globals(module).get("scaled_dot_product_attention") for module in modules)


def _globals(module):
    """Which functions a module's methods find in place of mlx-lm's."""
    call = type(module).__call__
    kept = getattr(call, "__globals__", {})
    name = "scaled_dot_product_attention"
    own = kept.get(name)
    return {name: own} if own not in (None, base.scaled_dot_product_attention) else {}


def test_another_model_of_the_process_is_left_alone(paying):
    config = tiny_models.tiny_config("llama")
    model = tiny_models.build(config)
    hosted = SpanModel.from_model(model, config)
    assert _is_hastened(hosted)
    assert not any(map(_globals, model.modules()))
    other = SpanModel.from_model(model, config)
    assert type(hosted.layers[0].self_attn) is not type(other.layers[0].self_attn)


def test_a_model_that_answers_otherwise_is_put_back(paying, monkeypatch, caplog):
    monkeypatch.setattr(exponentials, "_POLYNOMIAL", (1.0, 0.5, 0.3))
    config = tiny_models.tiny_config("llama")
    hosted = SpanModel.from_model(tiny_models.build(config), config)
    assert "outputs differ" in caplog.text
    assert not _is_hastened(hosted)


def test_a_model_whose_forward_fails_is_put_back(paying, monkeypatch, caplog):
    def fails(self, *_args, **_options):
        raise ValueError("not like this")

    monkeypatch.setattr(Exponentials, "attend", fails)
    config = tiny_models.tiny_config("llama")
    hosted = SpanModel.from_model(tiny_models.build(config), config)
    assert "not like this" in caplog.text
    assert not _is_hastened(hosted)


def test_it_must_pay_and_results_need_not_be_bit_identical(monkeypatch):
    monkeypatch.setattr(exponentials.trials, "costs", lambda ways: dict.fromkeys(ways, 1.0))
    exponentials.pays.cache_clear()
    assert exponentials.blas.describe().deterministic
    assert not exponentials.pays()
    report = exponentials.blas.BlasReport("OpenBLAS", "0.3.34", 1, deterministic=False)
    monkeypatch.setattr(exponentials.blas, "describe", lambda: report)
    exponentials.pays.cache_clear()
    assert not exponentials.pays(), "as fast as mlx's own is not faster"
    halved = {"mlx": 1.0, "here": 0.5}
    monkeypatch.setattr(
        exponentials.trials, "costs", lambda ways: {one: halved[one] for one in ways}
    )
    exponentials.pays.cache_clear()
    assert exponentials.pays()
    exponentials.pays.cache_clear()
