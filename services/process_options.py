"""From settings to what a process is made of; shared by both composition roots."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from services.server import ServerOptions
from services.setting_fields import ProcessSettings


def server_options_of(process: ProcessSettings, address: str = "") -> ServerOptions:
    """Where and how to listen; ``address`` replaces the main one."""
    return ServerOptions(
        address or process.listen,
        process.tls,
        process.insecure,
        message_bytes_max=process.message_bytes_max,
    )


def environment_of(facts: Mapping[str, object]) -> dict[str, str]:
    """Facts about this process for people, as text."""
    return {"python": platform.python_version()} | {key: str(value) for key, value in facts.items()}


def write_ready_file(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)
