"""What can be set: each setting's name, default, parser and help, and who takes it.

`MeshSettings` must be equal in every process of a mesh: `fingerprint` lets two processes find out
that they are not. `ProcessSettings` may differ: addresses, credentials, limits, logging. A field is
all there is to a setting: its flag, its variable, its place in a file and its line of help are made
from it (``settings``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.settings import SHADOW_TOLERANCE_FAST, FallbackPolicy
from services import setting_values as parsing
from stagemesh import PROTOCOL_VERSION
from stagemesh.frame import ROWS_MAX
from stagemesh.topology import Span

if TYPE_CHECKING:
    from services.credentials import TlsFiles

DTYPES = {"auto": "auto", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""The settings' words for element types, and the loader's."""
VERIFICATION_LEVELS = ("transport", "numeric", "shadow")
DELIVERY_MODES = ("immediate", "verified")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("auto", "text", "json")
JOURNAL_AUTO, JOURNAL_NONE = "auto", "none"
"""Words that ``journal`` takes in the place of a path."""
PORT_DEFAULT = 50051
"""Where a coordinator listens unless told otherwise, and where the other commands look for it."""


def _setting(default: Any, parse: parsing.Parser[Any], text: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": text})


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """What every process of one mesh must agree on."""

    model: str = _setting(
        "smollm2", parsing.text, "model: smollm2, a .gguf file, a model directory, a hub id or tiny"
    )
    stages: int = _setting(
        2, parsing.whole(1, 256), "stages to split the model over, balanced by cost"
    )
    spans: tuple[Span, ...] = _setting(
        (), parsing.spans, "layers of each stage, such as 0-12,12-30"
    )
    dtype: str = _setting(
        "auto", parsing.choice(*DTYPES), "element type of weights and activations"
    )
    deterministic: bool = _setting(
        False, parsing.flag, "keep the bit-exact matrix library (slower on a CPU)"
    )
    verification: str = _setting(
        "numeric", parsing.choice(*VERIFICATION_LEVELS), "checks of a request that asks for none"
    )
    verification_max: str = _setting(
        "shadow", parsing.choice(*VERIFICATION_LEVELS), "most checks that a request may ask for"
    )
    delivery: str = _setting(
        "immediate",
        parsing.choice(*DELIVERY_MODES),
        "when a request that does not say gets its tokens: at once, or when verified",
    )
    kv_budget_tokens: int = _setting(
        65_536, parsing.whole(64, 2**31), "cached positions a worker has memory for"
    )

    def fingerprint(self) -> str:
        """SHA-256 (hex) over every field and the protocol version: equal all over a mesh."""
        facts = {one.name: str(getattr(self, one.name)) for one in dataclasses.fields(self)}
        facts["spans"] = ",".join(str(span) for span in self.spans)
        facts["protocol_version"] = str(PROTOCOL_VERSION)
        facts["checksum"] = "crc32c"
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """What may differ from process to process."""

    name: str = _setting("", parsing.text, "this worker's name; empty is made from its span")
    span: Span | None = _setting(  # noqa: RUF009 (it returns a field)
        None, parsing.span_or_all, "layers this worker hosts, such as 0-12; all is a full worker"
    )
    listen: str = _setting(
        "127.0.0.1:0", parsing.address, "address to listen on; port 0 takes a free one"
    )
    admin_listen: str = _setting(
        "", parsing.address, "separate address for admin and channelz; empty is the same as listen"
    )
    advertise: str = _setting("", parsing.address, "address others dial; empty is where it listens")
    coordinator: str = _setting(
        f"127.0.0.1:{PORT_DEFAULT}", parsing.address, "the coordinator's address, for workers"
    )
    tls_ca: str = _setting("", parsing.path, "PEM file of the mesh's certificate authority")
    tls_cert: str = _setting("", parsing.path, "PEM file of this process's certificate")
    tls_key: str = _setting("", parsing.path, "PEM file of this process's private key")
    insecure: bool = _setting(
        False, parsing.flag, "allow plain text on addresses that are not loopback"
    )
    log_level: str = _setting("info", parsing.choice(*LOG_LEVELS), "least severe log line to print")
    log_format: str = _setting("auto", parsing.choice(*LOG_FORMATS), "how log lines look")
    threads: int = _setting(0, parsing.whole(0, 1024), "compute threads; 0 divides the cores")
    threads_max: int = _setting(
        0, parsing.whole(0, 1024), "compute threads while others here wait; 0 is the same number"
    )
    niceness: int = _setting(
        0, parsing.whole(0, 19), "how much this process yields to others on its machine"
    )
    tensor_parallel: int = _setting(
        1, parsing.whole(1, 64), "processes that share each of this worker's layers"
    )
    collective_s_max: float = _setting(
        10.0, parsing.seconds(0.1, 3600.0), "longest wait of such processes for one another"
    )
    requests_max: int = _setting(
        32, parsing.whole(1, 100_000), "requests computed at the same time"
    )
    queue_max: int = _setting(
        256, parsing.whole(1, 1_000_000), "requests that may wait for admission"
    )
    prompt_tokens_max: int = _setting(
        0, parsing.whole(0, 2**31), "longest prompt, tokens; 0 is what the model's context holds"
    )
    answer_tokens_default: int = _setting(
        256, parsing.whole(1, 2**31), "max_tokens of a request that gives none"
    )
    request_s_max: float = _setting(
        3600.0, parsing.seconds(0.1, 7 * 86_400.0), "deadline of a request that brings none"
    )
    shadow_chunk_tokens: int = _setting(
        16, parsing.whole(1, 4096), "accepted tokens that the full worker verifies at once"
    )
    shadow_tolerance: float = _setting(
        SHADOW_TOLERANCE_FAST,
        parsing.number(0.0, 100.0, "logits"),
        "logits by which a token may miss the full worker's choice, unless all is bit-exact",
    )
    audit_budget: float = _setting(
        0.02, parsing.number(0.0, 1.0, "the compute"), "share of compute for unasked verification"
    )
    verification_wait_s_max: float = _setting(
        30.0, parsing.seconds(0.1, 3600.0), "longest wait of an answer to be verified"
    )
    drain_s: float = _setting(
        30.0, parsing.seconds(0.0, 3600.0), "time to finish work when stopping"
    )
    message_bytes_max: int = _setting(
        64 << 20, parsing.whole(1 << 20, (1 << 31) - 1), "largest gRPC message taken, bytes"
    )
    answers_kept_max: int = _setting(
        1000, parsing.whole(1, 1_000_000), "ended generations kept for resuming and inspection"
    )
    prefill_chunk_tokens: int = _setting(
        128, parsing.whole(1, 2**20), "prompt tokens computed at once; more delays who is decoding"
    )
    step_rows_max: int = _setting(
        64,
        parsing.whole(1, ROWS_MAX),
        "most requests decoded in one step; fewer where a fast route gains nothing by more",
    )
    fallback: str = _setting(
        "prefer_spare",
        parsing.choice(*(one.value for one in FallbackPolicy)),
        "where a request goes whose route is lost; forbid never takes the full worker",
    )
    route_wait_s_max: float = _setting(
        30.0, parsing.seconds(0.1, 3600.0), "longest wait of a request for any route at all"
    )
    failed_worker_s_max: float = _setting(
        30.0, parsing.seconds(0.01, 3600.0), "longest time a worker that keeps failing is kept out"
    )
    journal: str = _setting(
        "auto", parsing.path, "file that accepted tokens are kept in; none keeps none"
    )
    journal_sync: str = _setting(
        "normal", parsing.choice("normal", "full"), "full also waits for the disk at each commit"
    )
    journal_generations_max: int = _setting(
        10_000, parsing.whole(1, 10_000_000), "ended generations the journal keeps"
    )
    journal_bytes_max: int = _setting(
        256 << 20, parsing.whole(1 << 16, 1 << 40), "what the journal keeps, bytes"
    )
    journal_s_max: float = _setting(
        7 * 86_400.0, parsing.seconds(1.0, 3650 * 86_400.0), "how long the journal keeps an answer"
    )
    resume_grace_s: float = _setting(
        10.0, parsing.seconds(0.0, 86_400.0), "time a client that went away has to come back"
    )
    ready_file: str = _setting("", parsing.path, "file written once this process can work")
    parent_pipe: int = _setting(
        -1, parsing.whole(-1, 2**20), "descriptor that closes when the parent dies; -1 is none"
    )

    @property
    def tls(self) -> TlsFiles | None:
        """The TLS files, or None for plain text."""
        from services.credentials import TlsFiles

        if not self.tls_ca:
            return None
        return TlsFiles(Path(self.tls_ca), Path(self.tls_cert), Path(self.tls_key))


HALVES: dict[str, type[Any]] = {"mesh": MeshSettings, "process": ProcessSettings}
FIELDS: dict[str, tuple[str, dataclasses.Field[Any]]] = {
    one.name: (half, one) for half, kind in HALVES.items() for one in dataclasses.fields(kind)
}

MESH_NAMES = tuple(one.name for one in dataclasses.fields(MeshSettings))
PROCESS_NAMES = tuple(one.name for one in dataclasses.fields(ProcessSettings))
WORKER_ONLY = (
    "name",
    "span",
    "coordinator",
    "threads",
    "threads_max",
    "niceness",
    "tensor_parallel",
    "collective_s_max",
)
COORDINATOR_ONLY = (
    "admin_listen",
    "requests_max",
    "queue_max",
    "prompt_tokens_max",
    "answer_tokens_default",
    "request_s_max",
    "shadow_chunk_tokens",
    "shadow_tolerance",
    "audit_budget",
    "verification_wait_s_max",
    "answers_kept_max",
    "journal",
    "journal_sync",
    "journal_generations_max",
    "journal_bytes_max",
    "journal_s_max",
    "resume_grace_s",
    "prefill_chunk_tokens",
    "step_rows_max",
    "fallback",
    "route_wait_s_max",
    "failed_worker_s_max",
)
"""Process settings that only one kind of process takes; all others are for both."""
TOLD = (
    "stages",
    "spans",
    "dtype",
    "deterministic",
    "verification",
    "verification_max",
    "kv_budget_tokens",
    "requests_max",
    "queue_max",
    "prompt_tokens_max",
    "answer_tokens_default",
    "request_s_max",
    "prefill_chunk_tokens",
    "step_rows_max",
    "fallback",
    "route_wait_s_max",
    "failed_worker_s_max",
    "shadow_chunk_tokens",
    "shadow_tolerance",
    "audit_budget",
    "verification_wait_s_max",
    "resume_grace_s",
    "drain_s",
    "message_bytes_max",
    "answers_kept_max",
    "journal_sync",
    "journal_generations_max",
    "journal_bytes_max",
    "journal_s_max",
)
"""Settings of a coordinator that explain what it did."""


def parse_value(name: str, value: object) -> Any:
    """``value`` (TOML value or text) as setting ``name`` wants it. Raises InvalidConfiguration."""
    return FIELDS[name][1].metadata["parse"](name, value)
