"""A span computes what the unsplit model computes there, holds its own tensors, or says why not."""

import json

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from stage_worker import tiny_models
from stage_worker.boundary import modules_of, parameters
from stage_worker.hosting import SpanModel
from stage_worker.loading import DTypePolicy
from stage_worker.model_source import resolve
from stagemesh.errors import InvalidConfiguration, ModelRefused
from stagemesh.topology import Span

STEPS = ([5, 6, 7, 8, 9], [10, 11, 12], [13], [14])
HALVES = (Span(0, 3), Span(3, 6))
THIRDS = (Span(0, 1), Span(1, 4), Span(4, 6))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def llama():
    config = tiny_models.tiny_config("llama")
    return tiny_models.build(config), config


def tied(model_type="llama", **fields):
    config = {**tiny_models.tiny_config(model_type), **fields}
    return tiny_models.build(config), config


def run(stages, steps=STEPS, **options):
    """Logits of each step of one request over ``stages``."""
    caches = [stage.make_cache() for stage in stages]
    outputs = []
    for ids in steps:
        hidden = None
        for stage, cache in zip(stages, caches, strict=True):
            last = options if stage.is_last else {}
            hidden = stage.forward(mx.array([ids], mx.int32), hidden, cache, **last)
        outputs.append(hidden)
    return outputs


def reference(model, steps=STEPS):
    cache = make_prompt_cache(model)
    return [model(mx.array([ids], mx.int32), cache=cache) for ids in steps]


def same(left, right):
    return all(mx.array_equal(a, b).item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("spans", [(None,), HALVES, THIRDS, (Span(0, 5), Span(5, 6))])
def test_any_split_gives_bit_identical_logits_over_two_chunks_and_decode(llama, spans):
    stages = [SpanModel.from_model(*llama, span) for span in spans]
    assert same(run(stages), reference(llama[0]))


def test_tied_embeddings_are_kept_by_the_first_and_the_last_stage_only():
    model, config = tied(tie_word_embeddings=True)
    stages = [SpanModel.from_model(model, config, span) for span in THIRDS]
    held = [any("embed_tokens" in path for path, _ in parameters(s._model)) for s in stages]
    assert held == [True, False, True]
    assert same(run(stages), reference(model))


def test_a_span_without_full_attention_counts_positions_for_the_masks_it_lacks():
    kinds = ["sliding_attention"] * 3 + ["full_attention"] * 3
    model, config = tied(layer_types=kinds, sliding_window=4)
    stages = [SpanModel.from_model(model, config, span) for span in HALVES]
    assert stages[0].owned_slots == (0, 1, 2, 3)
    assert stages[1].owned_slots == (0, 3, 4, 5)
    assert same(run(stages), reference(model))


def test_an_in_memory_model_is_left_as_it_was(llama):
    model, config = llama
    before = [type(module) for module in modules_of(model)]
    SpanModel.from_model(model, config, Span(2, 4))
    assert [type(module) for module in modules_of(model)] == before
    assert same(reference(model), reference(model))


def test_only_the_span_is_held_and_a_middle_stage_holds_no_edge(llama):
    whole = SpanModel.from_model(*llama)
    middle = SpanModel.from_model(*llama, Span(2, 4))
    paths = {path for path, _ in parameters(middle._model)}
    assert all(path.startswith(("model.layers.2.", "model.layers.3.")) for path in paths)
    assert middle.nbytes < whole.nbytes / 2.9


def test_the_stages_together_hold_the_model_once(llama):
    whole = SpanModel.from_model(*llama)
    assert sum(SpanModel.from_model(*llama, span).nbytes for span in THIRDS) == whole.nbytes


def test_logits_of_the_last_positions_equal_the_tail_of_all_logits(llama):
    stages = [SpanModel.from_model(*llama, span) for span in HALVES]
    every, tail = run(stages), run(stages, logits_last=1)
    assert [output.shape[1] for output in tail] == [1] * len(STEPS)
    for full, last in zip(every, tail, strict=True):
        assert mx.allclose(full[:, -1:], last, atol=1e-5).item()


def test_logits_can_be_taken_at_one_position_per_row(llama):
    whole = SpanModel.from_model(*llama)
    tokens = mx.array([[5, 6, 7], [8, 9, 10]], mx.int32)
    every = whole.forward(tokens, None, whole.make_cache())
    picked = whole.forward(tokens, None, whole.make_cache(), logits_at=mx.array([0, 2]))
    assert picked.shape == (2, 1, whole.vocab_size)
    assert mx.allclose(picked[0, 0], every[0, 0], atol=1e-5).item()
    assert mx.allclose(picked[1, 0], every[1, 2], atol=1e-5).item()


def test_requests_do_not_see_each_other(llama):
    stages = [SpanModel.from_model(*llama, span) for span in HALVES]
    alone = run(stages)
    caches = {name: [stage.make_cache() for stage in stages] for name in "ab"}
    mixed = {"a": [], "b": []}
    for ids in STEPS:
        for name, shift in (("a", 0), ("b", 40)):
            hidden = None
            for stage, cache in zip(stages, caches[name], strict=True):
                tokens = mx.array([[i + shift for i in ids]], mx.int32)
                hidden = stage.forward(tokens, hidden, cache)
            mixed[name].append(hidden)
    assert same(mixed["a"], alone)
    assert not same(mixed["b"], alone)


def test_cache_length_counts_and_trimming_rewinds_to_the_same_numbers(llama):
    stages = [SpanModel.from_model(*llama, span) for span in HALVES]
    caches = [stage.make_cache() for stage in stages]

    def step(ids):
        hidden = None
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage.forward(mx.array([ids], mx.int32), hidden, cache)
        return hidden

    step([1, 2, 3])
    first = step([4])
    assert [s.cache_length(c) for s, c in zip(stages, caches, strict=True)] == [4, 4]
    assert [s.trim(c, 1) for s, c in zip(stages, caches, strict=True)] == [1, 1]
    assert [s.cache_length(c) for s, c in zip(stages, caches, strict=True)] == [3, 3]
    assert same([step([4])], [first])


def test_recurrent_state_counts_no_positions_and_cannot_be_trimmed():
    config = tiny_models.tiny_config("mamba2")
    stage = SpanModel.from_model(tiny_models.build(config), config, Span(0, 3))
    cache = stage.make_cache()
    stage.forward(mx.array([[1, 2, 3]], mx.int32), None, cache)
    assert stage.cache_length(cache) is None
    assert not stage.trimmable
    assert stage.trim(cache, 1) == 0


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma3n", "not .batch, tokens, hidden."),
        ("gemma4_text", "returns a tuple"),
        ("iquestloopcoder", "runs 0 times"),
        ("talkie", "changes the activation between layers"),
        ("afm7", "fails without the other layers"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason_and_served_whole(model_type, reason):
    config = tiny_models.tiny_config(model_type)
    model = tiny_models.build(config)
    with pytest.raises(ModelRefused, match=reason):
        SpanModel.from_model(model, config, Span(4, 6))
    whole = SpanModel.from_model(model, config)
    assert same(run([whole]), reference(model))
    tail = run([whole], logits_last=1)
    assert [output.shape[1] for output in tail] == [1] * len(STEPS)


def test_the_probe_refuses_a_model_that_sends_more_than_the_activation_over_the_cut(llama):
    """A layer that reads the token embedding beside its input, as some models' later layers do."""
    model, config = tied()
    backbone = model.model

    class Backbone(type(backbone)):
        def __call__(self, inputs, cache=None, input_embeddings=None):
            leak = self.embed_tokens(inputs)
            hidden = leak
            for layer, entry in zip(self.layers, cache, strict=True):
                hidden = layer(hidden, leak, entry)
            return self.norm(hidden)

    class Layer(type(backbone.layers[0])):
        def __call__(self, x, leak, cache):
            return super().__call__(x, "causal" if x.shape[1] > 1 else None, cache) + 0.1 * leak

    backbone.__class__ = Backbone
    for layer in backbone.layers:
        layer.__class__ = Layer
    SpanModel.from_model(model, config)
    with pytest.raises(ModelRefused, match="not finite"):
        SpanModel.from_model(model, config, Span(3, 6))


def test_a_span_beyond_the_model_is_refused(llama):
    with pytest.raises(InvalidConfiguration, match="exceeds the model's 6 layers"):
        SpanModel.from_model(*llama, Span(4, 7))


def test_a_directory_loads_lazily_by_span_with_equal_model_fingerprints(home):
    directory = resolve("tiny:layers=6,seed=3", home=home).directory
    stages = [SpanModel.load(directory, span, home=home) for span in THIRDS]
    whole = SpanModel.load(directory, home=home, verify=True)
    assert {stage.fingerprint for stage in stages} == {whole.fingerprint}
    assert len({stage.span_fingerprint for stage in stages} | {whole.span_fingerprint}) == 4
    assert same(run(stages), run([whole]))


def test_packed_weights_stay_packed_when_stored_and_are_unpacked_for_the_cpu(home):
    from mlx_lm.utils import quantize_model, save_config

    config = tiny_models.tiny_config("llama")
    model = tiny_models.build(config)
    quantized, config = quantize_model(model, config, group_size=32, bits=4)
    directory = home / "packed"
    directory.mkdir()
    weights = dict(parameters(quantized))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    save_config(config, directory / "config.json")
    expected = reference(quantized)
    for policy, packed in ((DTypePolicy.STORED, True), (DTypePolicy.F32, False)):
        stages = [SpanModel.load(directory, s, dtype=policy, home=home) for s in HALVES]
        held = {path for stage in stages for path, _ in parameters(stage._model)}
        assert any(path.endswith("scales") for path in held) is packed
        for ours, theirs in zip(run(stages), expected, strict=True):
            assert mx.allclose(ours, theirs, atol=1e-4).item()


def test_what_would_outgrow_memory_unpacked_stays_as_it_is_stored(home, monkeypatch):
    directory = home / "half"
    directory.mkdir()
    config = tiny_models.tiny_config("llama")
    model = tiny_models.build(config)
    halves = {path: array.astype(mx.float16) for path, array in parameters(model)}
    mx.save_safetensors(str(directory / "model.safetensors"), halves)
    (directory / "config.json").write_text(json.dumps(config))
    assert SpanModel.load(directory, home=home).dtype == mx.float32
    monkeypatch.setattr("stage_worker.hosting.memory_budget_bytes", lambda: 1000)
    assert SpanModel.load(directory, home=home).dtype == mx.float16


@pytest.mark.parametrize("dtype", [DTypePolicy.F16, DTypePolicy.BF16])
def test_half_precision_crosses_the_cut_without_a_change(llama, dtype):
    whole = SpanModel.from_model(*llama, dtype=dtype)
    stages = [SpanModel.from_model(*llama, span, dtype=dtype) for span in THIRDS]
    assert {str(stage.dtype) for stage in stages} == {f"mlx.core.{dtype.value}"}
    assert same(run(stages), run([whole]))
