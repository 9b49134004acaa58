"""Every setting of every process, from four sources, validated once.

What can be set is declared in ``setting_fields``. Sources, weakest first: defaults, one TOML file
(``--config`` or ``STAGEMESH_CONFIG``) with the tables ``[mesh]`` and ``[process]``, the environment
(``STAGEMESH_`` + the name in capitals), command-line flags. Nothing is guessed: a key that no
setting has, or a value that cannot be parsed, is InvalidConfiguration naming it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.setting_fields import (
    FIELDS,
    HALVES,
    TOLD,
    VERIFICATION_LEVELS,
    MeshSettings,
    ProcessSettings,
    parse_value,
)
from services.setting_values import shown
from stagemesh.errors import InvalidConfiguration

ENVIRONMENT_PREFIX = "STAGEMESH_"
RESERVED_ENVIRONMENT = frozenset({"CONFIG", "HOME"})
"""Names behind the prefix that are no settings; nor are names that start with ``INTERNAL_``."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an effective value came from: ``"default"``, a file, a variable or a flag."""

    setting: str
    value: object
    source: str


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
            name: shown(getattr(half, name))
            for half in halves
            for name in TOLD
            if hasattr(half, name)
        }

    def as_rows(self) -> list[dict[str, str]]:
        """Rows ``setting, value, source`` for printing."""
        return [
            {"setting": one.setting, "value": shown(one.value), "source": one.source}
            for one in self.origins
        ]


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
        name: Origin(name, one.default, "default") for name, (_, one) in FIELDS.items()
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
        for half, kind in HALVES.items()
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
        kind = HALVES.get(table)
        if kind is None or not isinstance(content, dict):
            raise _unknown(table, HALVES, f"{path} has the tables [mesh] and [process];")
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
        if bare.lower() not in FIELDS or bare != bare.upper():
            raise _unknown(bare.lower(), FIELDS, f"environment variable {variable}:")
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
        one = FIELDS[name][1]
        flag = "--" + name.replace("_", "-")
        text = str(one.metadata["help"]).replace("%", "%%")
        if isinstance(one.default, bool):
            parser.add_argument(
                flag, dest=name, help=text, action=argparse.BooleanOptionalAction, default=None
            )
        else:
            usual = shown(one.default) or "empty"
            parser.add_argument(
                flag,
                dest=name,
                default=None,
                metavar=one.metadata["parse"].shape,
                help=f"{text} [{usual}]",
            )


def flags_of(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings that were given on the command line, ready for `load`."""
    return {name: value for name, value in vars(arguments).items() if name in FIELDS}


def arguments_for(mesh: MeshSettings, **process: object) -> list[str]:
    """Command-line flags that give a child process ``mesh`` and these settings of its own."""
    found: list[str] = []
    chosen = {one.name: getattr(mesh, one.name) for one in dataclasses.fields(mesh)} | process
    for name, value in chosen.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            found += [flag, shown(value)]
    return found
