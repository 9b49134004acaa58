"""What `pip install stagemesh` puts on a machine: four rooms, their types, one command, no
tests.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel_names(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """Names in a wheel built from a clean copy of the tracked sources, and its entry points."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    copy = (
        "import shutil, sys; root, target = sys.argv[1:3];"
        "ignore = shutil.ignore_patterns('__pycache__');"
        "[shutil.copytree(f'{root}/{n}', f'{target}/{n}', ignore=ignore) for n in"
        " ('stagemesh', 'coordinator', 'stage_worker', 'services', 'tests')];"
        "[shutil.copy(f'{root}/{n}', target) for n in ('pyproject.toml', 'README.md', 'LICENSE')]"
    )
    subprocess.run([sys.executable, "-c", copy, str(root), str(source)], check=True, timeout=60)
    build = (
        "import sys; from setuptools import build_meta;print(build_meta.build_wheel(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        return names, archive.read(entry_points).decode()


def test_the_wheel_has_exactly_four_rooms(wheel_names):
    names, _ = wheel_names
    top = {name.split("/")[0] for name in names}
    rooms = {name for name in top if not name.endswith(".dist-info")}
    assert rooms == {"stagemesh", "coordinator", "stage_worker", "services"}


def test_the_wheel_carries_types_and_the_generated_code(wheel_names):
    names, _ = wheel_names
    assert "stagemesh/py.typed" in names
    assert "stagemesh/v1/frame_pb2.pyi" in names
    assert "stagemesh/v1/generation_service_pb2_grpc.py" in names


def test_the_wheel_carries_its_licence_and_no_tests(wheel_names):
    names, _ = wheel_names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test_" in name or "conftest" in name]


def test_there_is_one_command(wheel_names):
    _, entry_points = wheel_names
    assert entry_points.split() == ["[console_scripts]", "stagemesh", "=", "services.cli:main"]
