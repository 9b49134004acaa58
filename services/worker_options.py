"""What makes one stage worker another than the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.credentials import TlsFiles
from services.device_stage import DeviceOptions
from services.server import ServerOptions
from services.setting_fields import DTYPES
from stage_worker.loading import DTypePolicy
from stagemesh.topology import Span


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What one worker is. ``span`` None: every layer. ``advertise``: address others dial, if
    another."""

    name: str
    model: Path
    span: Span | None
    coordinator: str
    server: ServerOptions
    advertise: str = ""
    dtype: DTypePolicy = DTypePolicy.AUTO
    kv_budget_tokens: int = 65_536
    threads: int = 1
    """Of this worker's matrix products; ``threads_max`` while others on the machine wait for it."""
    threads_max: int = 1
    drain_s: float = 30.0
    devices: DeviceOptions | None = None
    """Divide each layer over processes of their own; None computes in this one."""
    warms_up: bool | None = None
    """Compute each kind of step once before serving. None: where the device compiles kernels at
    their first use, which a CPU does not."""

    @property
    def tls(self) -> TlsFiles | None:
        return self.server.tls


def dtype_policy(word: str) -> DTypePolicy:
    """The policy a setting names: auto, f32, f16, bf16."""
    return DTypePolicy(DTYPES[word])
