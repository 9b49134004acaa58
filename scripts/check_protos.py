"""buf's opinion of ``protos/``: lint (STANDARD and COMMENTS), format, and breaking changes.

Breaking changes are looked for against the newest release tag; before the first release, against
the last commit but the present one. The googleapis files that our protos import are copied from the
installed googleapis-common-protos, because buf wants every import as a file and the network is not
needed for that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.generate_protos import third_party  # noqa: E402 (the path comes first)


def buf() -> str:
    """The buf program next to this Python, or on the PATH."""
    found = shutil.which(
        "buf", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath])
    )
    if found is None:
        raise SystemExit("buf is not installed; run: make setup-dev")
    return found


def workspace(protos: Path, folder: Path) -> Path:
    """A buf workspace in ``folder`` with these protos and the third-party ones they import."""
    shutil.copytree(protos, folder / "protos")
    shutil.copytree(
        third_party() / "google" / "rpc",
        folder / "third_party" / "google" / "rpc",
        ignore=lambda _, names: [name for name in names if not name.endswith(".proto")],
    )
    shutil.copy(ROOT / "buf.yaml", folder / "buf.yaml")
    return folder


def baseline(folder: Path) -> str | None:
    """Extracts the protos to compare with below ``folder``; their revision, or None if there are
    none.
    """
    tag = _git("describe", "--tags", "--match", "v*", "--abbrev=0", "HEAD^")
    candidates = [tag.decode().strip()] if tag else []
    changed = _git("status", "--porcelain", "--", "protos")
    candidates += ["HEAD"] if changed else ["HEAD^", "HEAD"]
    for revision in candidates:
        archive = _git("archive", "--format=tar", revision, "protos")
        if archive:
            with tarfile.open(fileobj=BytesIO(archive)) as contents:
                contents.extractall(folder, filter="data")
            return revision
    return None


def _git(*arguments: str) -> bytes | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 and done.stdout else None


def _run(title: str, folder: Path, *arguments: str) -> bool:
    done = subprocess.run([buf(), *arguments], cwd=folder, check=False)
    print(f"buf {title}: {'ok' if done.returncode == 0 else 'FAILED'}")
    return done.returncode == 0


def main() -> int:
    """Entry point; 0 if buf has nothing to say."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        now = workspace(ROOT / "protos", folder / "now")
        good = [
            _run("lint", now, "lint"),
            _run("format", now, "format", "-d", "--exit-code", "protos"),
        ]
        revision = baseline(folder / "git")
        if revision is None:
            print("buf breaking: nothing to compare with yet")
        else:
            before = workspace(folder / "git" / "protos", folder / "before")
            good.append(
                _run(f"breaking against {revision}", now, "breaking", "--against", str(before))
            )
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
