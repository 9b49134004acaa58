"""The manifest of a model directory: what every tensor is, and what its bytes hash to.

Workers must agree on weights before a route opens, and a damaged file must be noticed before it
computes anything. So each stored tensor has a SHA-256 over exactly the bytes in the file, and the
model has a *fingerprint* over its canonical configuration, all tensor records sorted by name, and
its tokenizer files. Where a tensor lies (which shard, which offset) is left out, so a resharded
copy has the same fingerprint.

Only safetensors are read, never pickle. Headers are parsed here, by the format's own rules and with
limits, before any other library sees the file. Hashing a model takes a while, so records are kept
in the cache folder, per file, keyed by path, size and modification time in nanoseconds.

This module needs no mlx: a coordinator may compute fingerprints too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stagemesh.errors import ModelDamaged, ModelNotFound, ModelRefused

HEADER_BYTES_MAX = 16 * 1024 * 1024
"""A header of 16 MiB names some 100,000 tensors; anything longer is damage or an attack on
memory."""
HASH_CHUNK_BYTES = 4 * 1024 * 1024
"""Read size while hashing: large enough for the disk, small enough for the processor's cache."""
MANIFEST_VERSION = 1

Progress = Callable[[str, int, int], None]
"""``progress(what, done_bytes, total_bytes)``."""

_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4,
}  # fmt: skip

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)
_VOLATILE_CONFIG = frozenset({"_name_or_path", "transformers_version"})
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One stored tensor. ``offset`` and ``size`` are bytes in ``file``; ``digest`` is hex
    SHA-256."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every tensor of a model, by name, and the fingerprint over all of it (hex SHA-256)."""

    tensors: Mapping[str, TensorRecord]
    fingerprint: str

    @property
    def size(self) -> int:
        """Bytes of all stored tensors."""
        return sum(record.size for record in self.tensors.values())


def home_directory() -> Path:
    """The cache folder: ``STAGEMESH_HOME``, or ``~/.cache/stagemesh``."""
    chosen = os.environ.get("STAGEMESH_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "stagemesh"


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` as it is stored. Raises ModelNotFound, ModelDamaged."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"{directory} holds no config.json: not a model directory")
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelDamaged("config.json has no model_type", file=path.name)
    return config


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The model's safetensors files in name order, checked against its index if it has one.

    Raises ModelNotFound when there are none, ModelDamaged for a missing shard or an index that
    points outside the folder, ModelRefused when only pickled weights exist.
    """
    files = tuple(sorted(directory.glob("model*.safetensors")))
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        _check_index(directory, index)
    if files:
        return files
    if any(path.suffix in _PICKLE_SUFFIXES for path in directory.iterdir()):
        raise ModelRefused("only pickled weights found; convert the model to safetensors first")
    raise ModelNotFound(f"{directory} holds no model*.safetensors")


def _check_index(directory: Path, index: Path) -> None:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelDamaged("the index has no weight_map", file=index.name)
    root = directory.resolve()
    for name in sorted({str(value) for value in weight_map.values()}):
        # A plain file name cannot leave the folder; a snapshot's links into a blob store are fine.
        if Path(name).name != name or name in {"", ".", ".."}:
            raise ModelDamaged("the index points outside the model folder", file=name)
        if not (root / name).is_file():
            raise ModelDamaged("a shard named by the index is missing", file=name)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Tensors of one safetensors file: name → (dtype, shape, offset in file, size), bytes.

    Raises ModelDamaged, naming file and tensor, for anything the format does not allow.
    """
    total = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ModelDamaged("file is shorter than a safetensors header", file=path.name)
        (length,) = struct.unpack("<Q", prefix)
        if length > HEADER_BYTES_MAX:
            raise ModelDamaged(
                "header over header_bytes_max", file=path.name, size=length, limit=HEADER_BYTES_MAX
            )
        raw = stream.read(length)
    if len(raw) < length:
        raise ModelDamaged("file ends inside its header", file=path.name)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelDamaged("header is not JSON", file=path.name) from error
    if not isinstance(header, dict):
        raise ModelDamaged("header is not an object", file=path.name)
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    _check_extent(path, entries, start, total)
    return entries


def _entry(path: Path, name: str, value: Any, start: int) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        bits = _ITEM_BITS[dtype]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelDamaged("header entry is malformed", file=path.name, tensor=name) from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ModelDamaged("header entry is malformed", file=path.name, tensor=name)
    if end - begin != math.prod(shape) * bits // 8:
        raise ModelDamaged("shape and length disagree", file=path.name, tensor=name)
    return dtype, shape, start + begin, end - begin


def _check_extent(
    path: Path, entries: Mapping[str, tuple[str, tuple[int, ...], int, int]], start: int, total: int
) -> None:
    reached = start
    for name, (_, _, offset, size) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if offset != reached:
            raise ModelDamaged("tensors overlap or leave a gap", file=path.name, tensor=name)
        reached = offset + size
        if reached > total:
            raise ModelDamaged("file ends inside a tensor", file=path.name, tensor=name)
    if reached != total:
        raise ModelDamaged("bytes behind the last tensor", file=path.name)


def manifest(
    directory: Path, *, home: Path | None = None, progress: Progress | None = None
) -> Manifest:
    """Every tensor's record and the fingerprint of the model in ``directory``.

    Hashes what the cache folder does not know yet. Raises ModelNotFound, ModelDamaged,
    ModelRefused.
    """
    config = read_config(directory)
    tensors: dict[str, TensorRecord] = {}
    for path in weight_files(directory):
        for record in _file_records(path, home or home_directory(), progress):
            if record.name in tensors:
                raise ModelDamaged("a tensor is stored twice", tensor=record.name)
            tensors[record.name] = record
    return Manifest(tensors, _fingerprint(directory, config, tensors.values()))


def _fingerprint(
    directory: Path, config: Mapping[str, Any], records: Iterable[TensorRecord]
) -> str:
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    document = {
        "version": MANIFEST_VERSION,
        "config": kept,
        "tensors": sorted([r.name, r.dtype, list(r.shape), r.digest] for r in records),
        "tokenizer": {
            name: hash_file(directory / name)
            for name in _TOKENIZER_FILES
            if (directory / name).is_file()
        },
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def span_fingerprint(records: Iterable[TensorRecord]) -> str:
    """Hex SHA-256 over the records of the tensors a span holds, in name order."""
    return digest_of((record.name, record.digest) for record in records)


def digest_of(named_digests: Iterable[tuple[str, str]]) -> str:
    """Hex SHA-256 over (name, digest) pairs in name order."""
    lines = sorted(f"{name} {digest}\n" for name, digest in named_digests)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def verify(directory: Path, records: Iterable[TensorRecord]) -> None:
    """Hash the stored bytes of ``records`` again. Raises ModelDamaged naming the tensor."""
    for record in records:
        path = directory / record.file
        if _hash_range(path, record.offset, record.size) != record.digest:
            raise ModelDamaged(
                "stored bytes do not match the manifest", tensor=record.name, file=record.file
            )


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a whole file."""
    return _hash_range(path, 0, path.stat().st_size)


def _hash_range(path: Path, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while size > 0:
            block = stream.read(min(size, HASH_CHUNK_BYTES))
            if not block:
                raise ModelDamaged("file ends inside a tensor", file=path.name)
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _file_records(path: Path, home: Path, progress: Progress | None) -> tuple[TensorRecord, ...]:
    real = path.resolve()
    status = real.stat()
    key = {
        "version": MANIFEST_VERSION,
        "path": str(real),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    place = home / "manifests" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    known = _recall(place, key, path.name)
    if known is not None:
        return known
    records = _hash_records(path, progress)
    write_json(place, {"key": key, "tensors": [asdict(record) for record in records]})
    return records


def _hash_records(path: Path, progress: Progress | None) -> tuple[TensorRecord, ...]:
    header = read_header(path)
    total = sum(size for _, _, _, size in header.values())
    done = 0
    records = []
    for name, (dtype, shape, offset, size) in header.items():
        digest = _hash_range(path, offset, size)
        records.append(TensorRecord(name, dtype, shape, path.name, offset, size, digest))
        done += size
        if progress is not None:
            progress(f"hashing {path.name}", done, total)
    return tuple(records)


def _recall(place: Path, key: Mapping[str, Any], file_name: str) -> tuple[TensorRecord, ...] | None:
    """Cached records for exactly this file, or None. A cache is only ever a saving, never an
    error."""
    try:
        stored = json.loads(place.read_bytes())
        if stored["key"] != key:
            return None
        return tuple(
            TensorRecord(**{**entry, "shape": tuple(entry["shape"]), "file": file_name})
            for entry in stored["tensors"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_json(place: Path, document: Any) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(document, stream)
        os.replace(temporary, place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelDamaged("not readable as JSON", file=path.name) from error
    if not isinstance(value, dict):
        raise ModelDamaged("not a JSON object", file=path.name)
    return value
