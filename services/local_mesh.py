"""What processes a local mesh consists of, and how the model's layers are shared out among them.

A layer costs as many units as it has parameters: a decode step reads every weight once, at one
width. The head (final norm and vocabulary projection, or the tied embedding that serves as one) is
charged to the last stage, at a discount: one large product costs less than as many parameters in a
layer's many small steps, and a prompt needs it for one position only.
"""

from __future__ import annotations

import math
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from services.credentials import TlsFiles
from services.setting_fields import COORDINATOR_ONLY, PORT_DEFAULT, MeshSettings, ProcessSettings
from services.settings import arguments_for
from stage_worker.partition import balance, check_cover
from stage_worker.weights import read_config, read_header, weight_files
from stagemesh.errors import InvalidConfiguration, ModelRefused
from stagemesh.topology import Span

COORDINATOR = "coordinator"
FULL_WORKER = "full-worker"
METRICS_PORT_VARIABLE = "OTEL_EXPORTER_PROMETHEUS_PORT"
METRICS_PORT_DEFAULT = 9464
AUDITOR_NICENESS = 5
"""A full worker beside its pipeline audits with what the stages leave over, and has a third of
their weight where they leave nothing. Less, and it could starve on a machine that others use too.
"""
HEAD_SHARE = 0.4
"""What a parameter of the head costs, where one of a layer costs 1. Measured on a CPU (SmolLM2,
float32): about 0.8 for one row, 0.4 for sixteen, nothing for a prompt's other positions."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|output|embed_out)\.")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|tok_embeddings|word_embeddings|embeddings?)\."
)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: the subcommand and flags it is started with."""

    name: str
    arguments: tuple[str, ...]
    span: Span | None = None
    program: tuple[str, ...] = (sys.executable, "-m", "services")
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that this process alone has, or has otherwise."""

    @property
    def command(self) -> tuple[str, ...]:
        """The whole command line."""
        return (*self.program, *self.arguments)


@dataclass(frozen=True, slots=True)
class Costs:
    """Estimated cost of every layer and of the head, parameters."""

    layers: tuple[float, ...]
    head: float


def layer_costs(directory: Path) -> Costs:
    """Costs by parameters. Raises ModelError kinds for an unreadable directory."""
    config = read_config(directory)
    layers: dict[int, float] = {}
    head = embedding = 0.0
    for file in weight_files(directory):
        for name, (dtype, shape, _offset, _size) in read_header(file).items():
            if name.endswith((".scales", ".biases")):
                continue  # of a packed weight, which is counted itself
            packed = 32 / _quantized_bits(config, name) if dtype == "U32" else 1.0
            count = math.prod(shape) * packed
            match = _LAYER.search(name)
            if match is not None:
                layers[int(match[1])] = layers.get(int(match[1]), 0.0) + count
            elif _HEAD.search(name):
                head += count
            elif _EMBEDDING.search(name):
                embedding += count
    total = _layer_count(config, layers)
    return Costs(tuple(layers.get(index, 0.0) for index in range(total)), head or embedding)


def _quantized_bits(config: Mapping[str, Any], tensor: str) -> int:
    """Bits per parameter of a packed weight: its module's own, else the model's."""
    found = config.get("quantization") or config.get("quantization_config")
    if not isinstance(found, dict):
        return 32
    own = found.get(tensor.rpartition(".")[0])
    bits = own.get("bits") if isinstance(own, dict) else found.get("bits")
    return bits if isinstance(bits, int) and 1 <= bits <= 32 else 32


def _layer_count(config: Mapping[str, Any], layers: Mapping[int, float]) -> int:
    inner = config.get("text_config")
    places = (config, inner if isinstance(inner, dict) else {})
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        for place in places:
            if isinstance(place.get(key), int):
                return int(place[key])
    if not layers:
        raise ModelRefused("the model's configuration does not say how many layers it has")
    return max(layers) + 1


def plan_spans(directory: Path, mesh: MeshSettings) -> tuple[Span, ...]:
    """The spans that were asked for, checked, or balanced ones. Raises InvalidConfiguration."""
    costs = layer_costs(directory)
    if mesh.spans:
        check_cover(mesh.spans, len(costs.layers))
        return mesh.spans
    return balance(costs.layers, mesh.stages, head_cost=HEAD_SHARE * costs.head)


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(address: str) -> bool:
    """Whether this process could listen on ``HOST:PORT`` now."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), int(port)))
        except OSError:
            return False
    return True


def choose_address(wanted: str) -> str:
    """``wanted`` (``HOST:PORT``) if it is free; empty takes the default port, or else any free one.

    Raises InvalidConfiguration when an explicitly wanted port is in use.
    """
    if not wanted:
        usual = f"127.0.0.1:{PORT_DEFAULT}"
        return usual if is_free(usual) else f"127.0.0.1:{free_port()}"
    host, _, port = wanted.rpartition(":")
    if port == "0":
        return f"{host}:{free_port()}"
    if not is_free(wanted):
        raise InvalidConfiguration(
            f"{wanted} is in use; stop what listens there or choose another --listen",
            setting="listen",
        )
    return wanted


def dialled(address: str) -> str:
    """Where to reach what listens on ``address``: a wildcard means every interface, so loopback."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in {"0.0.0.0", "[::]", "*"} else address  # noqa: S104


def plan_processes(
    mesh: MeshSettings,
    process: ProcessSettings,
    spans: tuple[Span, ...],
    *,
    address: str,
    full_worker: bool,
    pipe: int,
    cores: int,
    certs: Path | None = None,
) -> tuple[ProcessSpec, ...]:
    """Coordinator, one stage worker per span, and the full worker.

    Stages that share cores compute at the same time, so each gets its part of them. ``certs`` is a
    directory as ``stagemesh certs init`` makes it; without it the mesh speaks plain text.
    """
    shared: dict[str, object] = {
        "log_level": process.log_level,
        # Their output goes into files whose end may be shown to people.
        "log_format": "text" if process.log_format == "auto" else process.log_format,
        "parent_pipe": pipe,
        "insecure": process.insecure,
        "drain_s": process.drain_s,
        "message_bytes_max": process.message_bytes_max,
    }
    coordinator: dict[str, object] = {
        **{name: getattr(process, name) for name in COORDINATOR_ONLY},
        **_tls(certs, COORDINATOR),
        "listen": address,
        "advertise": dialled(address),
        "admin_listen": "",
    }
    flags = arguments_for(mesh, **shared, **coordinator)
    found = [ProcessSpec(COORDINATOR, (COORDINATOR, *flags))]
    workers: list[tuple[str, Span | None]] = [
        (f"stage-{index}", span) for index, span in enumerate(spans)
    ]
    if full_worker:
        workers.append((FULL_WORKER, None))
    for name, span in workers:
        own: dict[str, object] = {
            **_tls(certs, "stage" if span else "full"),
            "name": name,
            "span": span,
            "coordinator": dialled(address),
            "threads": process.threads or max(1, cores // max(1, len(spans))),
            "threads_max": process.threads or cores,
            "niceness": process.niceness if span else max(process.niceness, AUDITOR_NICENESS),
            # The full worker stays whole: it is what the stages are compared with.
            "tensor_parallel": process.tensor_parallel if span else 1,
            "collective_s_max": process.collective_s_max,
            "listen": "127.0.0.1:0",
        }
        flags = arguments_for(mesh, **shared, **own)
        found.append(ProcessSpec(name, ("stage-worker", *flags), span))
    return tuple(found)


def with_metrics_ports(
    specs: tuple[ProcessSpec, ...], environment: Mapping[str, str]
) -> tuple[ProcessSpec, ...]:
    """Processes of one machine cannot all serve metrics on one port: the first (the coordinator)
    has the one that was asked for, the others the ports behind it, in order."""
    exporters = environment.get("OTEL_METRICS_EXPORTER", "").split(",")
    first = environment.get(METRICS_PORT_VARIABLE, "") or str(METRICS_PORT_DEFAULT)
    if "prometheus" not in {name.strip() for name in exporters} or not first.isdecimal():
        return specs
    return tuple(
        replace(spec, environment=(*spec.environment, (METRICS_PORT_VARIABLE, str(port))))
        for port, spec in enumerate(specs, int(first))
    )


def _tls(certs: Path | None, role: str) -> dict[str, object]:
    """A role's TLS settings. Without certificates they are empty on purpose: what the environment
    names belongs to one role only."""
    if certs is None:
        return {"tls_ca": "", "tls_cert": "", "tls_key": ""}
    files = TlsFiles.in_directory(certs, role)
    return {
        "tls_ca": str(files.ca),
        "tls_cert": str(files.certificate),
        "tls_key": str(files.key),
    }
