"""Every process of a mesh on a machine of its own, and bad links between them.

    coordinator 10.77.0.1 ─┐                       each machine: a network namespace with a TUN
    stage-0     10.77.0.2 ─┤                       device; real TCP, real IP packets
    stage-1     10.77.0.3 ─┼─ switch ─ 10.77.0.9   the last one is ours: clients run in this process
    full-worker 10.77.0.4 ─┘

Where the kernel has netem, netem delays, loses, corrupts and reorders on every device; where it has
not, the switch does the same. Forging a packet so that its checksum fits is the switch's work
anyway: no kernel does that. What a machine says is also said on its way back, so a round trip meets
everything twice.

The mesh runs as it would between hosts: mutual TLS with certificates of ``stagemesh certs init``,
or, if that is asked for, plain text with ``--insecure``. Then nothing is forged on the way to and
from clients: what a client asks for has no checksum of its own, and without TLS nobody could tell
that another question arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from services import certs
from services.credentials import TlsFiles
from services.fault_connection import Direction
from services.local_mesh import COORDINATOR, FULL_WORKER, ProcessSpec
from services.stress import namespaces
from services.stress.injector import WITHOUT_PROXIES
from services.stress.namespaces import Namespace, Visit
from services.stress.packets import Fate, LinkQuality
from services.stress.switch import OVERTAKING, Switch
from services.stress.verdict import Tally

PORT = 7070
SUBNET = "10.77.0."
CLIENTS = "clients"
CHECKSUM_ERRORS = "refused_by_tcp"
NETEM = "netem"
HAS_TO_HAPPEN = (Fate.LOST, Fate.CORRUPTED, Fate.FORGED)
PACKETS_LEAST = 20_000
"""Fewer need not have met the rarest of it."""


class Machines:
    """A ``Network`` between hosts. Belongs to one event loop, in the thread that starts gRPC."""

    faults = WITHOUT_PROXIES
    is_remote = True

    def __init__(
        self, stages: int, seed: int, certificates: Path | None, quality: LinkQuality | None = None
    ) -> None:
        self.pipeline = tuple(f"stage-{index}" for index in range(stages))
        self.workers = (*self.pipeline, FULL_WORKER)
        self.coordinator = self.clients = f"{SUBNET}1:{PORT}"
        self._certificates = certificates
        self._quality = quality or LinkQuality()
        spared = frozenset() if certificates is not None else frozenset({CLIENTS})
        self._switch = Switch(self._quality, seed, spared)
        self._machines: dict[str, Namespace] = {}
        self._visit: Visit | None = None
        self._by_netem = False

    # -- the network -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the machines and go inside ours. Raises NamespacesRefused."""
        try:
            for number, name in enumerate((COORDINATOR, *self.workers, CLIENTS), 1):
                self._machines[name] = namespaces.make(f"{SUBNET}{number}")
            self._by_netem = await self._disturbed_by_netem()
            if self._by_netem:
                self._switch.quality = LinkQuality(0.0, 0.0, 0.0, self._quality.forged, 0.0)
            for name, machine in self._machines.items():
                self._switch.attach(name, machine)
            if self._certificates is not None:
                certs.init(self._certificates, hosts=[one.address for one in self._hosts])
            self._visit = Visit(self._machines[CLIENTS])
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Go home; nothing of it is left once the processes inside have ended."""
        if self._visit is not None:
            self._visit.leave()
            self._visit = None
        self._switch.close()
        for machine in self._machines.values():
            machine.close()
        self._machines.clear()

    @property
    def _hosts(self) -> list[Namespace]:
        return [machine for name, machine in self._machines.items() if name != CLIENTS]

    async def _disturbed_by_netem(self) -> bool:
        """On every device, or on none: a kernel has it or has it not."""
        for machine in self._machines.values():
            command = netem_command(self._quality)
            status, _said = await namespaces.run_inside(machine, *command)
            if status != 0:
                return False
        return True

    def rewired(self, specs: Sequence[ProcessSpec]) -> tuple[ProcessSpec, ...]:
        """The same processes, each on its machine. The last flag of a name counts."""
        return tuple(self._rewired(spec) for spec in specs)

    def _rewired(self, spec: ProcessSpec) -> ProcessSpec:
        machine = self._machines[spec.name]
        more: tuple[str, ...] = ("--listen", f"{machine.address}:{PORT}")
        more += ("--advertise", f"{machine.address}:{PORT}")
        if spec.name != COORDINATOR:
            more += ("--coordinator", self.coordinator)
        if self._certificates is None:
            more += ("--insecure",)
        return replace(
            spec, program=machine.inside(*spec.program), arguments=(*spec.arguments, *more)
        )

    def tls(self, role: str) -> TlsFiles | None:
        """What a client of this role dials with."""
        if self._certificates is None:
            return None
        return TlsFiles.in_directory(self._certificates, role)

    # -- faults ------------------------------------------------------------------------------------

    def hold(self, worker: str, *ways: Direction) -> None:
        """Lose every packet to (forward) or of (back) this worker's machine."""
        self._switch.hold(worker, *ways)

    def release(self, worker: str) -> None:
        """Carry what it sends again."""
        self._switch.release(worker)

    def held(self, worker: str) -> int:
        """Bytes lost that way so far."""
        return self._switch.held(worker)

    def heal(self) -> None:
        """No machine is cut off any more. The links stay as bad as they are."""
        for name in self.workers:
            self._switch.release(name)

    # -- what came of it ---------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Packets by fate; what TCP refused, as the kernels of all machines say."""
        found = {name: self._switch.counts[name] for name in (*_fates(), OVERTAKING)}
        found[CHECKSUM_ERRORS] = sum(map(checksum_errors, self._machines.values()))
        return {**found, NETEM: int(self._by_netem)}

    def judge(self, tally: Tally) -> None:
        """S: links that were never bad prove nothing."""
        counts = self.counts()
        wanted = [Fate.FORGED] if self._by_netem else [*HAS_TO_HAPPEN]
        missing = [fate.value for fate in wanted if not counts[fate.value]]
        if counts[Fate.WHOLE.value] >= PACKETS_LEAST and missing:
            tally.found("S", f"no packet was {', '.join(missing)}")
        if not counts[Fate.WHOLE.value]:
            tally.found("S", "no packet was carried")
        if counts[Fate.CORRUPTED.value] and not counts[CHECKSUM_ERRORS]:
            tally.found("S", "packets were corrupted, and no TCP noticed")


def _fates() -> list[str]:
    return [fate.value for fate in Fate]


def netem_command(quality: LinkQuality) -> tuple[str, ...]:
    """What makes a kernel's own device as bad as ``quality``."""
    return (
        *("tc", "qdisc", "add", "dev", namespaces.DEVICE.decode(), "root", "netem"),
        *("delay", f"{quality.delay_s * 1000.0:g}ms"),
        *("loss", f"{quality.lost:.3%}"),
        *("corrupt", f"{quality.corrupted:.3%}"),
        *("reorder", f"{quality.overtaking:.3%}"),
    )


def checksum_errors(machine: Namespace) -> int:
    """Segments that this machine's TCP refused for their checksum."""
    text = namespaces.read_inside(machine, "/proc/thread-self/net/snmp")
    names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
    return int(dict(zip(names, values, strict=True))["InCsumErrors"])
