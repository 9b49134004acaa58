"""Another layout of the weights changes how fast products are, not what they say."""

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear

from stage_worker import tiling, tiny_models
from stage_worker.hosting import SpanModel
from stage_worker.tiling import Arrangement
from stagemesh.topology import Span

CHANGED = (Arrangement.TURNED, Arrangement.TILES)


def weight_of(outputs, inputs, seed=1):
    return mx.random.normal((outputs, inputs), key=mx.random.key(seed))


def near(left, right):
    return left.shape == right.shape and mx.allclose(left, right, rtol=1e-4, atol=1e-4).item()


@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((1536, 576), 96),  # 96 · 576 · 16 rows is small
        ((576, 1536), 32),  # a long sum needs narrow tiles
        ((4096, 4096), 32),  # never small for 16 rows: the narrowest, small for fewer
        ((64, 64), 64),
        ((199, 64), None),  # cannot be cut evenly
    ],
)
def test_tiles_are_as_wide_as_a_microbatch_lets_them_be(shape, width):
    assert tiling.width_for(*shape) == width


def test_tiles_hold_the_weight_and_give_it_back():
    weight = weight_of(192, 40)
    assert mx.array_equal(tiling.from_tiles(tiling.to_tiles(weight, 48)), weight).item()


@pytest.mark.parametrize("lead", [(1,), (3,), (1, 1), (4, 1), (2, 5), (70,)])
def test_a_product_with_tiles_is_the_product(lead):
    weight = weight_of(192, 40)
    x = mx.random.normal((*lead, 40), key=mx.random.key(2))
    assert near(tiling.product(x, tiling.to_tiles(weight, 48)), x @ weight.T)


@pytest.mark.parametrize("arrangement", CHANGED)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_says_the_same_in_every_arrangement(arrangement, bias):
    layer = Linear(40, 192, bias=bias)
    x = mx.random.normal((3, 1, 40), key=mx.random.key(3))
    before = layer(x)
    mx.eval(before)
    assert tiling.arrange([layer], lambda: layer(x), arrangement) == 1
    assert near(layer(x), before)


def test_an_embedding_in_tiles_looks_up_what_it_held_and_serves_as_the_head():
    table = Embedding(192, 40)
    ids = mx.array([[0, 47, 48, 191], [5, 5, 100, 96]])
    x = mx.random.normal((2, 40), key=mx.random.key(4))
    rows, head = table(ids), table.as_linear(x)
    mx.eval(rows, head)
    assert tiling.arrange([table], lambda: table.as_linear(x), Arrangement.TILES) == 1
    assert table.weight.ndim == 3
    assert mx.array_equal(table(ids), rows).item()
    assert near(table.as_linear(x), head)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_only_float32_is_arranged(dtype):
    layer = Linear(40, 192, bias=False)
    layer.set_dtype(dtype)
    x = mx.ones((1, 40), dtype)
    assert tiling.arrange([layer], lambda: layer(x), Arrangement.TILES) == 0
    assert type(layer) is Linear


class _Peeking(Module):
    """Multiplies with its weight by hand, as some routers do."""

    def __init__(self, score):
        super().__init__()
        self.inner, self.gate = Linear(40, 96, bias=False), Linear(96, 192, bias=False)
        self.score = score

    def __call__(self, x):
        return self.score(self.inner(x), self.gate.weight)


def _by_shape(x, gate):
    outputs, inputs = gate.shape
    return x @ gate.reshape(outputs, inputs).T


def test_a_model_that_looks_into_its_weights_is_put_back_when_its_forward_fails(caplog):
    model = _Peeking(_by_shape)
    x = mx.random.normal((1, 40), key=mx.random.key(5))
    before = model(x)
    mx.eval(before)
    assert tiling.arrange([model.inner, model.gate], lambda: model(x), Arrangement.TILES) == 0
    assert "the forward fails" in caplog.text
    assert type(model.inner) is Linear
    assert type(model.gate) is Linear
    assert mx.array_equal(model(x), before).item()


def test_a_model_that_looks_into_its_weights_is_put_back_when_it_answers_otherwise(caplog):
    model = _Peeking(lambda x, gate: x[..., :1] * gate.reshape(-1)[:50])
    x = mx.random.normal((1, 40), key=mx.random.key(6))
    before = model(x)
    mx.eval(before)
    assert tiling.arrange([model.gate], lambda: model(x), Arrangement.TILES) == 0
    assert "outputs differ" in caplog.text
    assert mx.array_equal(model(x), before).item()


@pytest.mark.parametrize(
    ("stored", "turned", "tiles", "chosen"),
    [
        (100.0, 100.0, 100.0, Arrangement.STORED),
        (100.0, 97.0, 91.0, Arrangement.STORED),
        (100.0, 85.0, 105.0, Arrangement.TURNED),
        (100.0, 85.0, 80.0, Arrangement.TURNED),
        (100.0, 70.0, 50.0, Arrangement.TILES),
        (100.0, 110.0, 80.0, Arrangement.TILES),
        (1.0, 0.9, 0.74, Arrangement.TILES),
    ],
)
def test_a_change_must_be_worth_it(stored, turned, tiles, chosen):
    times = dict(zip(Arrangement, (stored, turned, tiles), strict=True))
    assert tiling.chosen(times) is chosen


def test_with_a_deterministic_blas_weights_stay_as_they_are(monkeypatch):
    tiling.best.cache_clear()
    monkeypatch.setattr(
        tiling.trials, "costs", lambda ways: {one: float(one not in CHANGED) for one in ways}
    )
    assert tiling.blas.describe().deterministic
    assert tiling.best() is Arrangement.STORED
    tiling.best.cache_clear()


@pytest.mark.parametrize("best", Arrangement)
def test_with_any_other_what_was_cheapest_is_taken(best, monkeypatch):
    report = tiling.blas.BlasReport("OpenBLAS", "0.3.34", 1, deterministic=False)
    monkeypatch.setattr(tiling.blas, "describe", lambda: report)
    monkeypatch.setattr(
        tiling.trials, "costs", lambda ways: {one: 1.0 - 0.5 * (one is best) for one in ways}
    )
    tiling.best.cache_clear()
    assert tiling.best() is best
    tiling.best.cache_clear()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arrangement", CHANGED)
def test_every_stage_of_a_split_says_what_it_said_as_stored(monkeypatch, arrangement, tied):
    config = {**tiny_models.tiny_config("llama"), "vocab_size": 192, "tie_word_embeddings": tied}
    model = tiny_models.build(config)
    spans = (None, Span(0, 3), Span(3, 6))
    stored = [SpanModel.from_model(model, config, span) for span in spans]
    monkeypatch.setattr(tiling, "best", lambda: arrangement)
    arranged = [SpanModel.from_model(model, config, span) for span in spans]
    assert {one.arrangement for one in stored} == {Arrangement.STORED}
    assert {one.arrangement for one in arranged} == {arrangement}
    assert [one.nbytes for one in arranged] == [one.nbytes for one in stored]
    for before, after in zip(stored, arranged, strict=True):
        caches = before.make_cache(), after.make_cache()
        for ids in ([5, 6, 7, 8, 9], [10], [11]):
            tokens = mx.array([ids], mx.int32)
            hidden = None if before.is_first else mx.ones((1, len(ids), before.hidden_size))
            left = before.forward(tokens, hidden, caches[0])
            assert near(after.forward(tokens, hidden, caches[1]), left)
