"""A copy of a model whose weights are not the same: what a stage must never serve with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from stage_worker.weights import weight_files

CHANGED_BYTES = 64
"""At the end of the last tensor of the first file."""


def write_other_weights(directory: Path, copy: Path) -> Path:
    """``copy``: hard links where possible, and one weight file in which some numbers differ."""
    copy.mkdir(parents=True, exist_ok=True)
    changed = weight_files(directory)[0].name
    for file in directory.iterdir():
        if not file.is_file():
            continue
        target = copy / file.name
        target.unlink(missing_ok=True)
        if file.name == changed:
            shutil.copyfile(file, target)
        else:
            _link(file, target)
    with (copy / changed).open("r+b") as stream:
        stream.seek(-CHANGED_BYTES, os.SEEK_END)
        found = stream.read(CHANGED_BYTES)
        stream.seek(-CHANGED_BYTES, os.SEEK_END)
        stream.write(bytes(byte ^ 1 for byte in found))
    return copy


def _link(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:  # another file system
        shutil.copyfile(file, target)
