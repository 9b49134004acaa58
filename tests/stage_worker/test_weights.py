"""The manifest sees every byte, forgets nothing it hashed, and names what is damaged."""

import json
import os
import shutil
import struct

import mlx.core as mx
import pytest

from stage_worker import weights
from stage_worker.hosting import SpanModel
from stage_worker.model_source import resolve
from stagemesh.errors import ModelDamaged, ModelNotFound, ModelRefused
from stagemesh.topology import Span


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    home = tmp_path_factory.mktemp("pristine")
    return resolve("tiny:layers=4,seed=1", home=home).directory


@pytest.fixture
def directory(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def flip(path, offset):
    """Invert one byte without touching size or modification time."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def header_with(entries, payload=b""):
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + payload


def test_every_tensor_has_a_digest_of_its_stored_bytes(directory, home):
    manifest = weights.manifest(directory, home=home)
    arrays = mx.load(str(directory / "model.safetensors"))
    assert set(manifest.tensors) == set(arrays)
    record = manifest.tensors["model.norm.weight"]
    assert (record.dtype, record.shape, record.size) == ("F32", (64,), 256)
    assert manifest.size == sum(array.nbytes for array in arrays.values())


def test_a_resharded_copy_has_the_same_fingerprint(directory, home):
    before = weights.manifest(directory, home=home).fingerprint
    arrays = mx.load(str(directory / "model.safetensors"))
    mx.eval(list(arrays.values()))
    names = sorted(arrays)
    for part, chosen in enumerate((names[:7], names[7:])):
        mx.save_safetensors(
            str(directory / f"model-{part}.safetensors"), {name: arrays[name] for name in chosen}
        )
    (directory / "model.safetensors").unlink()
    assert weights.manifest(directory, home=home).fingerprint == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_any_change_to_config_tokenizer_or_weights_changes_the_fingerprint(directory, home, name):
    before = weights.manifest(directory, home=home).fingerprint
    path = directory / name
    if name == "model.safetensors":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
    elif name == "config.json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 7.0}))
    else:
        path.write_text(path.read_text() + " ")
    assert weights.manifest(directory, home=home).fingerprint != before


def test_hashing_happens_once_per_file(directory, home):
    seen = []
    weights.manifest(directory, home=home, progress=lambda *args: seen.append(args))
    assert seen
    assert seen[-1][1] == seen[-1][2]
    again = []
    weights.manifest(directory, home=home, progress=lambda *args: again.append(args))
    assert again == []


def test_a_spoilt_cache_is_only_a_cache(directory, home):
    before = weights.manifest(directory, home=home)
    for path in (home / "manifests").iterdir():
        path.write_text("{")
    assert weights.manifest(directory, home=home) == before


def test_verification_finds_a_flipped_byte_behind_an_unchanged_date_and_names_the_tensor(
    directory, home
):
    record = weights.manifest(directory, home=home).tensors["model.layers.1.mlp.up_proj.weight"]
    flip(directory / record.file, record.offset + 10)
    with pytest.raises(ModelDamaged, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        SpanModel.load(directory, Span(0, 2), home=home, verify=True)


def test_damage_outside_the_span_is_another_stages_business(directory, home):
    record = weights.manifest(directory, home=home).tensors["model.layers.3.mlp.up_proj.weight"]
    flip(directory / record.file, record.offset + 10)
    SpanModel.load(directory, Span(0, 2), home=home, verify=True)


def test_a_truncated_file_is_damaged(directory, home):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelDamaged, match="ends inside a tensor"):
        weights.manifest(directory, home=home)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "shorter than a safetensors header"),
        (struct.pack("<Q", weights.HEADER_BYTES_MAX + 1), "header_bytes_max"),
        (struct.pack("<Q", 100) + b"{}", "ends inside its header"),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (struct.pack("<Q", 2) + b"{x", "not JSON"),
        (header_with({"a": {}}), "malformed"),
        (header_with({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}), "malformed"),
        (header_with({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "malformed"),
        (header_with({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "disagree"),
        (
            header_with({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
            "overlap or leave a gap",
        ),
        (
            header_with({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8)),
            "behind the last tensor",
        ),
    ],
)
def test_a_header_the_format_does_not_allow_is_damaged(directory, home, content, complaint):
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelDamaged, match=complaint):
        weights.manifest(directory, home=home)


@pytest.mark.parametrize(
    ("shard", "complaint"),
    [
        ("../outside.safetensors", "outside"),
        ("/outside.safetensors", "outside"),
        ("model-9.safetensors", "missing"),
    ],
)
def test_an_index_that_points_elsewhere_is_damaged(directory, home, shard, complaint):
    index = {"weight_map": {"model.norm.weight": shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelDamaged, match=complaint):
        SpanModel.load(directory, home=home)


def test_a_missing_tensor_is_damage(directory, home):
    arrays = dict(mx.load(str(directory / "model.safetensors")))
    del arrays["model.norm.weight"]
    mx.eval(list(arrays.values()))
    mx.save_safetensors(str(directory / "model.safetensors"), arrays)
    with pytest.raises(ModelDamaged, match="incomplete"):
        SpanModel.load(directory, home=home)


def test_pickled_weights_are_refused(directory, home):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelRefused, match="pickled"):
        weights.manifest(directory, home=home)


def test_a_model_that_brings_its_own_code_is_refused(directory, home):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_file": "model.py"}))
    with pytest.raises(ModelRefused, match="its own code"):
        SpanModel.load(directory, home=home)


def test_an_unknown_model_type_is_refused(directory, home):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "unheard_of"}))
    with pytest.raises(ModelRefused, match="unheard_of"):
        SpanModel.load(directory, home=home)


def test_a_folder_without_a_configuration_is_no_model(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        weights.manifest(tmp_path)


def test_a_configuration_that_is_not_json_is_damaged(directory, home):
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelDamaged, match=r"config\.json"):
        weights.manifest(directory, home=home)
