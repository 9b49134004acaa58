"""From settings to what a process is made of; shared by both composition roots."""

from __future__ import annotations

import gc
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from services.server import ServerOptions
from services.setting_fields import ProcessSettings

COLLECT_OBJECTS = 500
"""New container objects before the collector looks at them. Every token kept makes a handful, and
looking takes about a microsecond each, because they have left the processor's caches: this is a
pause of half a millisecond, and 50,000 would be one of 50, felt by every stream."""
COLLECT_OLDER = (2_000, 100)
"""Looks at new objects before older ones are looked at again."""


def calm_collector() -> None:
    """Look for reference cycles rarely; call once everything is loaded.

    A coordinator keeps what it has sent, so a collector at its defaults walks a growing heap again
    and again: a sixth of the CPU time at full load, in pauses that every stream feels. Hardly
    anything here is cyclic; what is and survives the first look stays for some 100,000 tokens.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_OBJECTS, *COLLECT_OLDER)


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
