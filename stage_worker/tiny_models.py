"""Tiny random models of any mlx-lm type, for tests, the support sweep and demonstrations.

A configuration is made by introspection: every field of the type's ``ModelArgs`` whose name has a
known meaning gets a tiny value, and a per-type table supplies what cannot be guessed. Weights
depend only on the seed and on each parameter's path, never on a generator's state: matrices are
normal with a variance that keeps activations near one, and everything else is mlx-lm's own initial
value with noise on top, so that a norm or a bias that is skipped or doubled changes the output.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx.nn.layers.base import Module
from mlx.utils import tree_unflatten

from stage_worker.boundary import parameters
from stage_worker.gguf_import import PreTokenizer, write_byte_level_tokenizer
from stage_worker.tiny_configs import TEXT_TYPES, common_fields, type_fields
from stagemesh.errors import ModelRefused

HIDDEN_SIZE = 64
LAYER_COUNT = 6
VOCABULARY_SIZE = 320

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WORDS = ("the", "and", "ing", "er", "on", "in", "at", "to", "of", "is", "ou", "st")


def model_types() -> tuple[str, ...]:
    """Every model type of the installed mlx-lm, by module name."""
    names = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        source = Path(mlx_lm.models.__path__[0]) / f"{module.name}.py"
        if source.is_file():
            text = source.read_text(encoding="utf-8")
            if "class Model(" in text and "ModelArgs" in text:
                names.append(module.name)
    return tuple(sorted(names))


def tiny_config(
    model_type: str,
    *,
    layers: int = LAYER_COUNT,
    hidden: int = HIDDEN_SIZE,
    vocabulary: int = VOCABULARY_SIZE,
) -> dict[str, Any]:
    """A tiny configuration for ``model_type``. Raises ModelRefused for a type mlx-lm does not
    have."""
    common = common_fields(layers, hidden, vocabulary)
    nested = TEXT_TYPES.get(model_type)
    if nested is None:
        return {**_fields(model_type, common, layers), "model_type": model_type}
    text_type = nested.partition(":")[0]
    text_config = {"model_type": text_type, **_fields(nested, common, layers)}
    return {"model_type": model_type, "vocab_size": vocabulary, "text_config": text_config}


def _fields(name: str, common: dict[str, Any], layers: int) -> dict[str, Any]:
    """Fields for ``module`` or ``module:Class``: those of its signature that are known."""
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(f"mlx_lm.models.{module_name}")
        arguments = getattr(module, class_name or "ModelArgs")
    except (ImportError, AttributeError) as error:
        raise ModelRefused(f"mlx-lm has no model type {module_name!r}") from error
    known = {key: common[key] for key in inspect.signature(arguments).parameters if key in common}
    return {**known, **type_fields(name, layers)}


def build(config: dict[str, Any], *, seed: int = 0) -> Module:
    """A random model for ``config``; equal for equal configuration and seed."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    model: Module = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    model.update(
        tree_unflatten([(path, _random(path, array, seed)) for path, array in parameters(model)])
    )
    mx.eval([array for _, array in parameters(model)])
    return model


def _random(path: str, array: mx.array, seed: int) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    noise: mx.array = mx.random.normal(
        array.shape, key=mx.random.key(int.from_bytes(digest[:8], "big"))
    )
    if array.ndim >= 2 and path.endswith("weight"):
        fan_in = array.size // array.shape[0] if array.ndim == 2 else array.shape[-1]
        scale: float = fan_in**-0.5
        return (scale * noise).astype(array.dtype)
    return (array + 0.1 * noise).astype(array.dtype)


def write_tiny_model(
    directory: Path,
    model_type: str,
    *,
    layers: int = LAYER_COUNT,
    seed: int = 0,
    hidden: int = HIDDEN_SIZE,
) -> None:
    """Write a tiny random model with a working byte-level tokenizer to ``directory`` (must
    exist)."""
    tokens, merges = _vocabulary()
    config = tiny_config(model_type, layers=layers, hidden=hidden, vocabulary=len(tokens))
    model = build(config, seed=seed)
    config["eos_token_id"] = tokens.index("<|im_end|>")
    config["bos_token_id"] = tokens.index("<|endoftext|>")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = dict(parameters(model))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_byte_level_tokenizer(
        directory,
        tokens=tokens,
        merges=merges,
        special=list(_SPECIAL_TOKENS),
        whole=[],
        pre_tokenizer=PreTokenizer(),
        settings={
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "chat_template": _CHAT_TEMPLATE,
        },
    )


def _vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Control tokens, all 256 bytes in the byte-level alphabet, and a few merged words."""
    from tokenizers import pre_tokenizers

    tokens = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        for text in (word, f"\u0120{word}"):  # U+0120 stands for the space in this alphabet
            for end in range(2, len(text) + 1):
                if text[:end] not in tokens:
                    merges.append((text[: end - 1], text[end - 1]))
                    tokens.append(text[:end])
    return tokens, merges
