"""Every setting of every process, from four sources, validated once.

`MeshSettings` must be equal in every process of a mesh: `fingerprint` lets two processes find out
that they are not. `ProcessSettings` may differ: addresses, credentials, limits, logging. Sources,
weakest first: defaults, one TOML file (``--config`` or ``STAGEMESH_CONFIG``) with the tables
``[mesh]`` and ``[process]``, the environment (``STAGEMESH_`` + the name in capitals), command-line
flags. Nothing is guessed: a key that no setting has, or a value that cannot be parsed, is
InvalidConfiguration naming it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.settings import SHADOW_TOLERANCE_FAST, FallbackPolicy
from services import setting_values as parsing
from stagemesh import PROTOCOL_VERSION
from stagemesh.errors import InvalidConfiguration
from stagemesh.frame import ROWS_MAX
from stagemesh.topology import Span

if TYPE_CHECKING:
    from services.credentials import TlsFiles

ENVIRONMENT_PREFIX = "STAGEMESH_"
RESERVED_ENVIRONMENT = frozenset({"CONFIG", "HOME"})
"""Names behind the prefix that are no settings; nor are names that start with ``INTERNAL_``."""
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
        64, parsing.whole(1, ROWS_MAX), "requests decoded in one step; fewer come in smaller bursts"
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


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an effective value came from: ``"default"``, a file, a variable or a flag."""

    setting: str
    value: object
    source: str


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


@dataclass(frozen=True, slots=True)
class Settings:
    """Both halves, and the origin of every value in declaration order."""

    mesh: MeshSettings = field(default_factory=MeshSettings)
    process: ProcessSettings = field(default_factory=ProcessSettings)
    origins: tuple[Origin, ...] = ()

    def told(self) -> dict[str, str]:
        """What an operator, or a bug report, is shown of a mesh: name → value as text.

        Neither addresses nor paths nor names are among them."""
        halves = (self.mesh, self.process)
        return {
            name: _shown(getattr(half, name))
            for half in halves
            for name in TOLD
            if hasattr(half, name)
        }

    def as_rows(self) -> list[dict[str, str]]:
        """Rows ``setting, value, source`` for printing."""
        return [
            {"setting": one.setting, "value": _shown(one.value), "source": one.source}
            for one in self.origins
        ]


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    if value is None:
        return "all"
    return str(value).lower() if isinstance(value, bool) else str(value)


_HALVES: dict[str, type[Any]] = {"mesh": MeshSettings, "process": ProcessSettings}
_FIELDS: dict[str, tuple[str, dataclasses.Field[Any]]] = {
    one.name: (half, one) for half, kind in _HALVES.items() for one in dataclasses.fields(kind)
}


def parse_value(name: str, value: object) -> Any:
    """``value`` (TOML value or text) as setting ``name`` wants it. Raises InvalidConfiguration."""
    return _FIELDS[name][1].metadata["parse"](name, value)


def load(
    *,
    config: str | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Settings:
    """The effective settings. ``flags`` maps names to values; None means not given.

    ``defaults`` replaces defaults where a command has another usual value.

    Raises InvalidConfiguration for an unknown key, an unparsable value, an unreadable file or
    settings that contradict each other; ``metadata['setting']`` names the key.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Origin] = {
        name: Origin(name, one.default, "default") for name, (_, one) in _FIELDS.items()
    }
    for name, value in (defaults or {}).items():
        values[name] = Origin(name, parse_value(name, value), "default")
    path = config or environment.get(ENVIRONMENT_PREFIX + "CONFIG", "")
    for name, value, source in (
        *(_from_file(path) if path else ()),
        *_from_environment(environment),
        *_from_flags(flags or {}),
    ):
        try:
            values[name] = Origin(name, parse_value(name, value), source)
        except InvalidConfiguration as error:
            raise InvalidConfiguration(f"{error.message} ({source})", setting=name) from None
    _check_together(values)
    halves = {
        half: kind(**{one.name: values[one.name].value for one in dataclasses.fields(kind)})
        for half, kind in _HALVES.items()
    }
    return Settings(halves["mesh"], halves["process"], tuple(values.values()))


def _from_file(path: str) -> list[tuple[str, object, str]]:
    try:
        document = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfiguration(
            f"cannot read {path}: {error.strerror}", setting="config"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(f"{path} is not TOML: {error}", setting="config") from None
    found: list[tuple[str, object, str]] = []
    for table, content in document.items():
        kind = _HALVES.get(table)
        if kind is None or not isinstance(content, dict):
            raise _unknown(table, _HALVES, f"{path} has the tables [mesh] and [process];")
        known = [one.name for one in dataclasses.fields(kind)]
        for key, value in content.items():
            if key not in known:
                raise _unknown(key, known, f"{path} [{table}]:")
            found.append((key, value, f"{path} [{table}]"))
    return found


def _from_environment(environment: Mapping[str, str]) -> list[tuple[str, object, str]]:
    found: list[tuple[str, object, str]] = []
    for variable in sorted(environment):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        bare = variable.removeprefix(ENVIRONMENT_PREFIX)
        if bare in RESERVED_ENVIRONMENT or bare.startswith("INTERNAL_"):
            continue
        if bare.lower() not in _FIELDS or bare != bare.upper():
            raise _unknown(bare.lower(), _FIELDS, f"environment variable {variable}:")
        found.append((bare.lower(), environment[variable], variable))
    return found


def _from_flags(flags: Mapping[str, object]) -> list[tuple[str, object, str]]:
    return [
        (name, value, "--" + name.replace("_", "-"))
        for name, value in flags.items()
        if value is not None
    ]


def _unknown(key: str, known: Mapping[str, object] | Sequence[str], where: str) -> Exception:
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InvalidConfiguration(f"{where} unknown setting {key!r}{hint}", setting=key)


def _check_together(values: Mapping[str, Origin]) -> None:
    """Rules over more than one setting."""
    chosen = {name: values[name].value for name in ("tls_ca", "tls_cert", "tls_key")}
    given = [name for name, value in chosen.items() if value]
    if given and len(given) < len(chosen):
        missing = next(name for name, value in chosen.items() if not value)
        raise InvalidConfiguration(
            f"{missing} is missing: TLS needs tls_ca, tls_cert and tls_key together",
            setting=missing,
        )
    levels = VERIFICATION_LEVELS.index
    if levels(str(values["verification"].value)) > levels(str(values["verification_max"].value)):
        raise InvalidConfiguration(
            "verification asks for more than verification_max allows", setting="verification"
        )
    if values["delivery"].value == "verified" and values["verification_max"].value != "shadow":
        raise InvalidConfiguration(
            "delivery: verified needs verification_max: shadow", setting="delivery"
        )


def add_flags(parser: argparse._ActionsContainer, names: Sequence[str]) -> None:
    """Give ``parser`` a flag for each of these settings. Values stay text until `load`."""
    for name in names:
        one = _FIELDS[name][1]
        flag = "--" + name.replace("_", "-")
        text = str(one.metadata["help"]).replace("%", "%%")
        if isinstance(one.default, bool):
            parser.add_argument(
                flag, dest=name, help=text, action=argparse.BooleanOptionalAction, default=None
            )
        else:
            shown = _shown(one.default) or "empty"
            parser.add_argument(
                flag,
                dest=name,
                default=None,
                metavar=one.metadata["parse"].shape,
                help=f"{text} [{shown}]",
            )


def flags_of(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings that were given on the command line, ready for `load`."""
    return {name: value for name, value in vars(arguments).items() if name in _FIELDS}


def arguments_for(mesh: MeshSettings, **process: object) -> list[str]:
    """Command-line flags that give a child process ``mesh`` and these settings of its own."""
    found: list[str] = []
    chosen = {one.name: getattr(mesh, one.name) for one in dataclasses.fields(mesh)} | process
    for name, value in chosen.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            found += [flag, _shown(value)]
    return found


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
