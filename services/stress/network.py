"""What a stress run needs of whatever connects its processes. ``wires`` is proxies on loopback,
``machines`` is IP packets between network namespaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from services.credentials import TlsFiles
from services.fault_connection import Direction
from services.local_mesh import ProcessSpec
from services.stress.plan import FaultName
from services.stress.verdict import Tally


class Network(Protocol):
    """Belongs to one event loop."""

    pipeline: tuple[str, ...]
    """The stages' names, in order."""
    workers: tuple[str, ...]
    """And the full worker."""
    coordinator: str
    """Where the coordinator listens."""
    faults: frozenset[FaultName]
    """What can be made to happen on it."""
    is_remote: bool
    """Nobody can listen here in the processes' stead."""

    @property
    def clients(self) -> str:
        """What clients dial."""
        ...

    async def start(self) -> None:
        """Be there. Raises MeshError kinds if that cannot be."""
        ...

    async def stop(self) -> None:
        """Leave nothing behind."""
        ...

    def rewired(self, specs: Sequence[ProcessSpec]) -> tuple[ProcessSpec, ...]:
        """The same processes, put where this network has them."""
        ...

    def tls(self, role: str) -> TlsFiles | None:
        """What a client of this role dials with."""
        ...

    def hold(self, worker: str, *ways: Direction) -> None:
        """Carry nothing more to (forward) or of (back) this worker."""
        ...

    def release(self, worker: str) -> None:
        """Carry everything again."""
        ...

    def held(self, worker: str) -> int:
        """Bytes that were not carried so far."""
        ...

    def heal(self) -> None:
        """No more faults."""
        ...

    def counts(self) -> Mapping[str, int]:
        """What became of what it carried, for the report."""
        ...

    def judge(self, tally: Tally) -> None:
        """S: what this network is there for has happened."""
        ...
