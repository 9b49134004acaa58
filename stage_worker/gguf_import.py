"""A GGUF file as an mlx-lm model directory: config, safetensors, tokenizer, chat template.

Packed Q4_0, Q4_1 and Q8_0 tensors stay packed: mlx reads them as its own affine format in groups of
32, and nothing is rounded. Their scales and biases, half precision in the file, are widened to
float32, which is exact, so that mlx-lm computes the imported model in float32 like its norms. Other
quantizations (the K-quants) arrive unpacked from mlx's reader and are stored as they arrive.

GGUF keeps the query and key projections of llama models with their rows interleaved for its own
kind of rotary embedding; they are put back in order here (rows are whole in every packed format),
so that ``rope_traditional`` stays false. The tokenizer is byte-level BPE rebuilt from the stored
tokens and merges; other tokenizer models are refused rather than approximated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.errors import ModelDamaged, ModelNotFound, ModelRefused

GROUP_SIZE = 32
"""Elements that share a scale in Q4_0, Q4_1 and Q8_0."""
_GGUF_MAGIC = b"GGUF"

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EDGE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|scales|biases|bias)")
_EDGE = re.compile(r"([a-z_]+)\.(weight|scales|biases|bias)")

_INTERLEAVED = frozenset({"llama"})
"""Architectures whose query and key rows are stored interleaved."""
_ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})

_CONTROL, _USER_DEFINED = 3, 4
"""GGUF token types that are matched whole before any pre-tokenizing."""

_GPT2_SPLIT = None
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before byte-level BPE: digits one by one, and by which pattern."""

    single_digits: bool = False
    split: str | None = _GPT2_SPLIT


_PRE_TOKENIZERS = {
    "default": PreTokenizer(),
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": PreTokenizer(split=_LLAMA3_SPLIT),
    "llama3": PreTokenizer(split=_LLAMA3_SPLIT),
    "qwen2": PreTokenizer(split=_QWEN2_SPLIT),
}


def import_gguf(path: Path, directory: Path) -> None:
    """Write the model in ``path`` to ``directory`` (which must exist) as an mlx-lm model.

    Raises ModelNotFound, ModelDamaged (not a readable GGUF file) and ModelRefused (an architecture
    or tokenizer that is not supported).
    """
    arrays, metadata = _read(path)
    architecture = _text(metadata, "general.architecture")
    if architecture not in _ARCHITECTURES:
        supported = ", ".join(sorted(_ARCHITECTURES))
        raise ModelRefused(f"GGUF architecture {architecture!r} is not supported ({supported} are)")
    if any(name.startswith("rope_freqs") for name in arrays):
        raise ModelRefused("GGUF files with per-frequency rope scaling are not supported")
    config = _config(architecture, metadata, arrays)
    weights = _weights(architecture, config, arrays)
    config["quantization"] = _quantization(weights)
    if not config["quantization"]:
        del config["quantization"]
    _write_tokenizer(directory, metadata)
    _write(directory / "config.json", config)
    _save(directory / "model.safetensors", weights)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import mlx.core as mx

    if not path.is_file():
        raise ModelNotFound(f"no such file: {path.name}")
    with path.open("rb") as stream:
        if stream.read(4) != _GGUF_MAGIC:
            raise ModelDamaged("not a GGUF file", file=path.name)
    try:
        arrays, metadata = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ModelDamaged(f"the GGUF file cannot be read: {error}", file=path.name) from error
    return dict(arrays), dict(metadata)  # type: ignore[arg-type]


def _text(metadata: Mapping[str, Any], key: str) -> str:
    value = metadata.get(key)
    if not isinstance(value, str):
        raise ModelDamaged(f"the GGUF file has no {key}")
    return value


def _number(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = metadata.get(key, default)
    if value is None:
        raise ModelDamaged(f"the GGUF file has no {key}")
    item: Callable[[], Any] | None = getattr(value, "item", None)
    return float(item() if item is not None else value)


def _config(
    architecture: str, metadata: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, Any]:
    def count(key: str, default: float | None = None) -> int:
        return int(_number(metadata, f"{architecture}.{key}", default))

    heads = count("attention.head_count")
    hidden = count("embedding_length")
    config: dict[str, Any] = {
        "model_type": architecture,
        "hidden_size": hidden,
        "num_hidden_layers": count("block_count"),
        "intermediate_size": count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": count("attention.key_length", hidden // heads),
        "rms_norm_eps": round(
            _number(metadata, f"{architecture}.attention.layer_norm_rms_epsilon"), 12
        ),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": count("context_length"),
        "rope_theta": _number(metadata, f"{architecture}.rope.freq_base", 10000.0),
        "rope_traditional": False,
        "tie_word_embeddings": "output.weight" not in arrays,
        "attention_bias": "blk.0.attn_q.bias" in arrays,
        "torch_dtype": "float32",
    }
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in metadata:
            config[f"{name}_token_id"] = int(_number(metadata, key))
    if (
        f"{architecture}.rope.scaling.type" in metadata
        and _text(metadata, f"{architecture}.rope.scaling.type") != "none"
    ):
        raise ModelRefused("GGUF files with rope scaling are not supported")
    return config


def _weights(
    architecture: str, config: Mapping[str, Any], arrays: dict[str, Any]
) -> dict[str, Any]:
    import mlx.core as mx

    weights: dict[str, Any] = {}
    for name in sorted(arrays):
        array = arrays.pop(name)
        module, suffix = _renamed(name)
        if architecture in _INTERLEAVED and module.endswith(("q_proj", "k_proj")):
            kind = "attention" if module.endswith("q_proj") else "key_value"
            array = _deinterleaved(array, int(config[f"num_{kind}_heads"]))
        if suffix in {"scales", "biases"}:
            array = array.astype(mx.float32)
        weights[f"{module}.{suffix}"] = array
    return weights


def _renamed(name: str) -> tuple[str, str]:
    block = _BLOCK.fullmatch(name)
    if block is not None and block[2] in _BLOCK_NAMES:
        return f"model.layers.{block[1]}.{_BLOCK_NAMES[block[2]]}", block[3]
    edge = _EDGE.fullmatch(name)
    if edge is not None and edge[1] in _EDGE_NAMES:
        return _EDGE_NAMES[edge[1]], edge[2]
    raise ModelRefused(f"the GGUF file holds a tensor this importer does not know: {name}")


def _deinterleaved(array: Any, heads: int) -> Any:
    """Rows (0, 1, 2, 3, …) of each head back to (0, 2, 4, …, 1, 3, 5, …). ``array`` is [rows,
    …]."""
    rows, *rest = array.shape
    paired = array.reshape(heads, rows // heads // 2, 2, *rest)
    return paired.swapaxes(1, 2).reshape(rows, *rest)


def _quantization(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's quantization table: the commonest width, and each exception by module."""
    bits: dict[str, int] = {}
    for name, scales in weights.items():
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            columns = scales.shape[-1] * GROUP_SIZE
            bits[module] = weights[f"{module}.weight"].shape[-1] * 32 // columns
    if not bits:
        return {}
    widths = list(bits.values())
    common = max(set(widths), key=widths.count)
    table: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": common}
    for module, width in sorted(bits.items()):
        if width != common:
            table[module] = {"group_size": GROUP_SIZE, "bits": width}
    return table


def _write_tokenizer(directory: Path, metadata: Mapping[str, Any]) -> None:
    model = _text(metadata, "tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelRefused(
            f"GGUF tokenizer {model}/{pre} is not supported; use the model's Hugging Face directory"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = _token_types(metadata, len(tokens))
    write_byte_level_tokenizer(
        directory,
        tokens=tokens,
        merges=[_pair(merge) for merge in metadata["tokenizer.ggml.merges"]],
        special=[token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL],
        whole=[token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED],
        pre_tokenizer=_PRE_TOKENIZERS[pre],
        settings=_tokenizer_settings(metadata, tokens),
    )


def _token_types(metadata: Mapping[str, Any], count: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    return [1] * count if types is None else [int(kind) for kind in types.tolist()]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _tokenizer_settings(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for role, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("pad_token", "padding_token_id"),
        ("unk_token", "unknown_token_id"),
    ):
        if f"tokenizer.ggml.{key}" in metadata:
            settings[role] = tokens[int(_number(metadata, f"tokenizer.ggml.{key}"))]
    settings["add_bos_token"] = bool(_number(metadata, "tokenizer.ggml.add_bos_token", 0))
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = _text(metadata, "tokenizer.chat_template")
    return settings


def write_byte_level_tokenizer(
    directory: Path,
    *,
    tokens: list[str],
    merges: list[tuple[str, str]],
    special: list[str],
    whole: list[str],
    pre_tokenizer: PreTokenizer,
    settings: Mapping[str, Any],
) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of a byte-level BPE tokenizer.

    ``tokens[i]`` has id i; ``special`` are control tokens, ``whole`` are matched whole without
    being control tokens; ``settings`` go into the configuration as they are.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    steps: list[Any] = []
    if pre_tokenizer.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre_tokenizer.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre_tokenizer.split), "isolated"))
    steps.append(
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_tokenizer.split is None)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **settings,
    }
    _write(directory / "tokenizer_config.json", config)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save(path: Path, weights: dict[str, Any]) -> None:
    import mlx.core as mx

    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
