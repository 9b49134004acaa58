"""Text to token ids, and the facts about a model that an edge needs, without mlx and without
network.

Encoding follows mlx-lm: raw text gets the tokenizer's own special tokens unless it begins with the
beginning-of-sequence token; a conversation is rendered by the model's chat template and then
encoded without further special tokens. An answer ends at any id named by config.json,
generation_config.json (which wins over it) or the tokenizer. Code that came with a model is never
run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.detokenizer import Detokenizer, TokenTable, token_table
from stagemesh.errors import InvalidRequest, ModelDamaged, ModelNotFound, ModelRefused

IDENTITY_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What ``model_identity`` covers; the weights have a fingerprint of their own."""
CONTEXT_TOKENS_DEFAULT = 2048
"""Context assumed for a model whose config names none."""
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "model_max_length",
    "n_ctx",
    "seq_length",
)
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What requests are checked against. ``context_length`` counts prompt plus answer, tokens."""

    name: str
    directory: Path
    model_type: str
    context_length: int
    vocab_size: int
    layer_count: int
    eos_token_ids: frozenset[int]
    tokenizer: Tokenizer


class Tokenizer:
    """The tokenizer of one model directory."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @functools.cached_property
    def _table(self) -> TokenTable:
        return token_table(self._inner)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-sequence id."""
        found = self._inner.eos_token_id
        return None if found is None else int(found)

    @property
    def size(self) -> int:
        """Ids the tokenizer knows; a model's vocabulary may be padded beyond it."""
        return len(self._inner)

    @property
    def has_chat_template(self) -> bool:
        """The model can be asked with chat messages."""
        return self._inner.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Raw text as mlx-lm would feed it to a model."""
        start = self._inner.bos_token
        special = start is None or not text.startswith(start)
        return [int(token) for token in self._inner.encode(text, add_special_tokens=special)]

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, cue: bool = True) -> str:
        """The conversation as text; ``cue`` starts the assistant's turn. Raises InvalidRequest."""
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template; send text", field="chat")
        try:
            rendered = self._inner.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=cue, tokenize=False
            )
        except Exception as error:  # a template is a program that came with the model
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error}", field="chat"
            ) from error
        return str(rendered)

    def encode_rendered(self, text: str) -> list[int]:
        """A rendered conversation as token ids: the template has put in every special token."""
        return [int(token) for token in self._inner.encode(text, add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """All of ``token_ids`` at once, special tokens included."""
        return str(
            self._inner.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental detokenizer, for one answer."""
        return self._table.detokenizer()


def model_identity(model: ServedModel) -> str:
    """SHA-256 (hex) over the files that decide what token ids mean: equal text for equal ids."""
    digest = hashlib.sha256(f"{model.name} {model.vocab_size} {model.layer_count}".encode())
    for name in IDENTITY_FILES:
        file = model.directory / name
        content = file.read_bytes() if file.is_file() else b""
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def load_served_model(directory: Path, name: str) -> ServedModel:
    """Read what an edge must know of a model. Raises ModelNotFound, ModelDamaged, ModelRefused."""
    config = _read(directory / "config.json")
    generation = _read(directory / "generation_config.json", optional=True)
    text_config = config.get("text_config")
    inner: Mapping[str, Any] = text_config if isinstance(text_config, Mapping) else {}
    tokenizer = load_tokenizer(directory)
    ends = _token_ids(generation.get("eos_token_id") or _first(config, inner, ("eos_token_id",)))
    if tokenizer.eos_token_id is not None:
        ends |= {tokenizer.eos_token_id}
    return ServedModel(
        name=name,
        directory=directory,
        model_type=str(config.get("model_type", "")),
        context_length=int(_first(config, inner, _CONTEXT_KEYS) or CONTEXT_TOKENS_DEFAULT),
        vocab_size=int(_first(config, inner, ("vocab_size",)) or tokenizer.size),
        layer_count=int(_first(config, inner, _LAYER_KEYS) or 0),
        eos_token_ids=frozenset(ends),
        tokenizer=tokenizer,
    )


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in a model directory. Raises ModelRefused when it cannot be used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # On import it says that there is no torch, on loading that it knows no such model type. Neither
    # matters to a tokenizer.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    try:
        inner = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelRefused(f"{directory.name} has no usable tokenizer: {first_line}") from error
    return Tokenizer(inner)


def _read(path: Path, *, optional: bool = False) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise ModelNotFound(f"{path.parent.name} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelDamaged(f"{path.name} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ModelDamaged(f"{path.name} is not a JSON object")
    return document


def _first(config: Mapping[str, Any], inner: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        for place in (config, inner):
            if place.get(key) is not None:
                return place[key]
    return None


def _token_ids(value: Any) -> set[int]:
    if isinstance(value, int):
        return {value}
    return {int(one) for one in value} if isinstance(value, list) else set()
