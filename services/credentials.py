"""TLS files on disk to gRPC credentials, and a peer's certificate to its role.

Mutual TLS is all or nothing: a server with TLS requires a certificate of the mesh's own CA from
every client. A role is named by exactly one URI in the certificate, ``spiffe://mesh/<role>`` or
``spiffe://mesh/<role>/<subject>``; the subject, when there is one, pins a worker's name or a
tenant's.

Servers read their files again for every new handshake when they have changed, so that certificates
can be rotated without dropping a connection; channels read them when they are opened.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from stagemesh.errors import AccessDenied, InvalidConfiguration

TRUST_DOMAIN = "spiffe://mesh/"
"""Prefix of every identity of a mesh."""


class Role(enum.Enum):
    """Who may be at the other end."""

    COORDINATOR = "coordinator"
    STAGE = "stage"
    FULL = "full"
    ADMIN = "admin"
    CLIENT = "client"
    PLAINTEXT = "plaintext"
    """No TLS: loopback, or an operator who said ``insecure``. Nobody can be told from anybody."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A role, and the subject its certificate is pinned to (empty: any)."""

    role: Role
    subject: str = ""

    def __str__(self) -> str:
        return f"{self.role.value}/{self.subject}" if self.subject else self.role.value


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files: the mesh's CA, this process's certificate chain, and its private key."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def in_directory(cls, directory: Path, role: str) -> TlsFiles:
        """The files as ``stagemesh certs init`` lays them out."""
        return cls(directory / "ca.pem", directory / f"{role}.pem", directory / f"{role}.key")

    def read(self) -> tuple[bytes, bytes, bytes]:
        """(CA, certificate, key). Raises InvalidConfiguration naming the file that cannot be
        read.
        """
        contents = []
        for path in (self.ca, self.certificate, self.key):
            try:
                contents.append(path.read_bytes())
            except OSError as error:
                raise InvalidConfiguration(
                    f"cannot read TLS file {path.name}: {error.strerror}",
                    setting="tls",
                    file=path,
                ) from error
        return contents[0], contents[1], contents[2]

    def checked(self) -> tuple[bytes, bytes, bytes]:
        """The same, and InvalidConfiguration also for files that cannot be used now: gRPC would
        only say that no connection came about.
        """
        ca, certificate, key = self.read()
        try:
            shown = x509.load_pem_x509_certificate(certificate)
        except ValueError:
            raise self._unusable(self.certificate, "is no PEM certificate") from None
        try:
            own = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError):
            raise self._unusable(self.key, "is no PEM private key without a password") from None
        if own.public_key() != shown.public_key():
            raise self._unusable(self.key, f"is not the key of {self.certificate.name}")
        if shown.not_valid_after_utc < dt.datetime.now(dt.UTC):
            expired = f"expired on {shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            raise self._unusable(
                self.certificate, f"{expired}; `stagemesh certs init` again renews it"
            )
        return ca, certificate, key

    @staticmethod
    def _unusable(path: Path, why: str) -> InvalidConfiguration:
        return InvalidConfiguration(f"TLS file {path.name} {why}", setting="tls", file=path)

    def modified(self) -> tuple[int, ...]:
        """Modification times in nanoseconds; changes when any file does. Raises OSError."""
        return tuple(path.stat().st_mtime_ns for path in (self.ca, self.certificate, self.key))

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client. Raises InvalidConfiguration."""
        ca, certificate, key = self.read()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server that demands a client certificate. Raises
        InvalidConfiguration.
        """
        ca, certificate, key = self.checked()
        initial = grpc.ssl_server_certificate_configuration([(key, certificate)], ca)
        seen = self.modified()

        def fetch() -> Any:  # None means: nothing has changed.
            nonlocal seen
            try:
                now = self.modified()
                if now == seen:
                    return None
                fresh_ca, fresh_certificate, fresh_key = self.checked()
            except (OSError, InvalidConfiguration):
                return (
                    None  # Half-way through a rotation: keep what works until the files are back.
                )
            seen = now
            return grpc.ssl_server_certificate_configuration(
                [(fresh_key, fresh_certificate)], fresh_ca
            )

        return grpc.dynamic_ssl_server_credentials(
            initial, fetch, require_client_authentication=True
        )


def identity_from_names(names: Iterable[str]) -> Identity:
    """The one identity among a certificate's alternative names. Raises AccessDenied otherwise."""
    found = [name[len(TRUST_DOMAIN) :] for name in names if name.startswith(TRUST_DOMAIN)]
    if len(found) != 1:
        raise AccessDenied("certificate names no mesh role, or more than one", roles=len(found))
    role, _, subject = found[0].partition("/")
    known = {item.value: item for item in Role if item is not Role.PLAINTEXT}
    if role not in known:
        raise AccessDenied("certificate names a role this mesh does not know", role=role)
    return Identity(known[role], subject)


def identity_of(auth_context: Mapping[str, Iterable[bytes]]) -> Identity:
    """Who is at the other end of a call, from gRPC's authentication context. Raises
    AccessDenied.
    """
    if b"ssl" not in list(auth_context.get("transport_security_type", ())):
        return Identity(Role.PLAINTEXT)
    names = auth_context.get("x509_subject_alternative_name", ())
    return identity_from_names(name.decode("utf-8", "replace") for name in names)
