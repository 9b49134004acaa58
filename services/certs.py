"""``stagemesh certs init``: a mesh's own CA, and one certificate per role.

Every certificate carries its role as a URI (``spiffe://mesh/<role>``), the TLS name peers of that
role are dialled by, the loopback names, and whatever host names the operator adds. Keys are P-256,
written with mode 0600 into a directory with mode 0700, and never leave it. The CA's key signs
nothing but leaf certificates (path length 0); keep it off the hosts of the mesh.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.channel import COORDINATOR_TLS_NAME, WORKER_TLS_NAME
from services.credentials import TRUST_DOMAIN, Role
from stagemesh.errors import InvalidConfiguration

CA_LIFETIME_DAYS = 3650
LEAF_LIFETIME_DAYS = 30
"""What a stolen key is worth, against how often somebody has to renew by hand; whoever renews by a
timer gives a day. ``certs init`` again renews every role under the same CA; servers
pick the new files up at the next handshake, and open connections stay.
"""
CLOCK_SKEW = dt.timedelta(minutes=5)
"""Certificates are valid from this long before they were made."""

_TLS_NAMES = {
    Role.COORDINATOR: COORDINATOR_TLS_NAME,
    Role.STAGE: WORKER_TLS_NAME,
    Role.FULL: WORKER_TLS_NAME,
}
ROLES = (Role.COORDINATOR, Role.STAGE, Role.FULL, Role.ADMIN, Role.CLIENT)


@dataclass(frozen=True, slots=True)
class IssuedCertificates:
    """What ``init`` wrote: the directory, the roles, until when, and whether the CA is new."""

    directory: Path
    roles: tuple[str, ...]
    expires: dt.datetime
    new_authority: bool


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def init(
    directory: Path,
    *,
    hosts: Sequence[str] = (),
    lifetime_days: float = LEAF_LIFETIME_DAYS,
    now: dt.datetime | None = None,
) -> IssuedCertificates:
    """Make (or renew, if ``directory`` already holds a CA) the certificates of a mesh.

    ``hosts`` are further DNS names or IP addresses to put into every certificate. Raises
    InvalidConfiguration if the directory cannot be written or its CA cannot be read.
    """
    if not 0 < lifetime_days <= CA_LIFETIME_DAYS:
        raise InvalidConfiguration(
            f"certificates last above 0 and at most {CA_LIFETIME_DAYS} days", setting="days"
        )
    moment = now or dt.datetime.now(dt.UTC)
    expires = moment + dt.timedelta(days=lifetime_days)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        renewed = (directory / "ca.key").exists()
        authority = _load_authority(directory) if renewed else _make_authority(directory, moment)
        for role in ROLES:
            _issue(directory, authority, role, hosts, moment, expires)
    except OSError as error:
        raise InvalidConfiguration(
            f"cannot write certificates to {directory}: {error.strerror}", setting="directory"
        ) from error
    return IssuedCertificates(
        directory, tuple(role.value for role in ROLES), expires, new_authority=not renewed
    )


def _write_private(path: Path, content: bytes) -> None:
    """Write with mode 0600 from the start, and replace the old file in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    partial.replace(path)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _make_authority(directory: Path, now: dt.datetime) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("stagemesh mesh CA")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=CA_LIFETIME_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_private(directory / "ca.key", _key_pem(key))
    _write_private(directory / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
    return _Authority(certificate, key)


def _load_authority(directory: Path) -> _Authority:
    try:
        certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidConfiguration(
            f"the CA in {directory} cannot be read", setting="directory"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidConfiguration("the CA's key is not an elliptic-curve key", setting="directory")
    if key.public_key() != certificate.public_key():
        raise InvalidConfiguration("the CA's key and certificate differ", setting="directory")
    return _Authority(certificate, key)


def _alternative_names(role: Role, hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(TRUST_DOMAIN + role.value),
        x509.DNSName(_TLS_NAMES.get(role, f"{role.value}.stagemesh")),
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            try:
                names.append(x509.DNSName(host))
            except ValueError as error:
                raise InvalidConfiguration(
                    "not a host name or address", setting="host", value=host
                ) from error
    return x509.SubjectAlternativeName(names)


def _issue(
    directory: Path,
    authority: _Authority,
    role: Role,
    hosts: Sequence[str],
    now: dt.datetime,
    expires: dt.datetime,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role in _TLS_NAMES:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(f"stagemesh {role.value}"))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(_alternative_names(role, hosts), critical=False)
        .add_extension(issuer_id, critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    _write_private(directory / f"{role.value}.key", _key_pem(key))
    _write_private(
        directory / f"{role.value}.pem", certificate.public_bytes(serialization.Encoding.PEM)
    )
