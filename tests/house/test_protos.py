"""The wire contract and the code made from it stay in step."""

from pathlib import Path


def test_generated_code_is_what_the_protos_say(tool, root: Path, tmp_path: Path):
    generate = tool("generate_protos")
    generate.generate(tmp_path)
    stale = generate.differences(tmp_path / generate.PACKAGE, root / generate.PACKAGE)
    assert not stale, f"run `make protos`; these differ: {stale}"


def test_a_changed_missing_or_left_over_file_is_noticed(tool, tmp_path: Path):
    generate = tool("generate_protos")
    fresh, kept = tmp_path / "fresh", tmp_path / "kept"
    for folder in (fresh, kept):
        folder.mkdir()
        (folder / "same.py").write_text("same")
    (fresh / "changed.py").write_text("new")
    (kept / "changed.py").write_text("old")
    (fresh / "missing.py").write_text("")
    (kept / "left_over.py").write_text("")
    assert generate.differences(fresh, kept) == ["changed.py", "left_over.py", "missing.py"]


def test_only_services_have_grpc_code(root: Path):
    grpc_modules = {path.name for path in (root / "stagemesh" / "v1").glob("*_pb2_grpc.py")}
    services = {path.stem for path in (root / "protos").rglob("*_service.proto")}
    assert grpc_modules == {f"{name}_pb2_grpc.py" for name in services}


def test_generated_code_runs_at_the_protobuf_floor(root: Path):
    """The generated version check names the runtime it needs; pyproject.toml promises that one."""
    text = (root / "stagemesh" / "v1" / "frame_pb2.py").read_text()
    assert "Protobuf Python Version: 6.33.5" in text


def test_buf_finds_a_removed_field_and_a_bad_name(tool, root: Path, tmp_path: Path, capfd):
    """The breaking-change and lint checks fire; whether the protos pass is `make protos-check`."""
    check = tool("check_protos")
    before = check.workspace(root / "protos", tmp_path / "before")
    after = check.workspace(root / "protos", tmp_path / "after")
    frame = after / "protos" / "stagemesh" / "v1" / "frame.proto"
    text = frame.read_text()
    assert "uint64 epoch = 4;" in text
    frame.write_text(text.replace("uint64 epoch = 4;", "uint64 Route_epoch = 44;"))
    assert not check._run("breaking", after, "breaking", "--against", str(before))
    assert not check._run("lint", after, "lint")
    assert check._run("lint", before, "lint"), capfd.readouterr().out
