"""The mesh's CA and role certificates: what is in them, how they lie on disk, what they open."""

from __future__ import annotations

import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from services import certs
from services.credentials import Identity, Role, TlsFiles, identity_from_names, identity_of
from stagemesh.errors import AccessDenied, InvalidConfiguration


def leaf(directory: Path, role: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / f"{role}.pem").read_bytes())


def test_every_role_gets_one_certificate_with_exactly_one_spiffe_uri(tmp_path: Path) -> None:
    issued = certs.init(tmp_path / "pki", hosts=("stage-0.example", "10.1.2.3"))
    assert issued.roles == ("coordinator", "stage", "full", "admin", "client")
    for role in issued.roles:
        names = leaf(issued.directory, role).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
        assert uris == [f"spiffe://mesh/{role}"]
        assert "stage-0.example" in names.value.get_values_for_type(x509.DNSName)


def test_keys_and_their_directory_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    directory = certs.init(tmp_path / "pki").directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for file in directory.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_certificates_expire_after_the_asked_lifetime_and_the_ca_may_sign_leaves_only(
    tmp_path: Path,
) -> None:
    now = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    issued = certs.init(tmp_path, lifetime_days=2, now=now)
    assert leaf(issued.directory, "stage").not_valid_after_utc == now + dt.timedelta(days=2)
    ca = leaf(issued.directory, "ca")
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)


def test_client_certificates_cannot_pose_as_servers(tmp_path: Path) -> None:
    directory = certs.init(tmp_path).directory
    for role, serves in (("client", False), ("admin", False), ("stage", True)):
        usage = leaf(directory, role).extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        assert (ExtendedKeyUsageOID.SERVER_AUTH in usage.value) is serves


def test_a_second_init_renews_the_leaves_under_the_same_ca(tmp_path: Path) -> None:
    first = certs.init(tmp_path)
    ca, stage = leaf(tmp_path, "ca"), leaf(tmp_path, "stage")
    second = certs.init(tmp_path)
    assert (first.new_authority, second.new_authority) == (True, False)
    assert leaf(tmp_path, "ca") == ca
    assert leaf(tmp_path, "stage").serial_number != stage.serial_number
    leaf(tmp_path, "stage").verify_directly_issued_by(ca)


def test_a_damaged_ca_is_an_error_and_not_replaced(tmp_path: Path) -> None:
    certs.init(tmp_path)
    (tmp_path / "ca.key").write_bytes(b"not a key")
    with pytest.raises(InvalidConfiguration, match="cannot be read"):
        certs.init(tmp_path)
    assert (tmp_path / "ca.key").read_bytes() == b"not a key"


def test_a_host_that_is_no_host_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="not a host name"):
        certs.init(tmp_path, hosts=("bücher",))


def test_a_lifetime_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="days"):
        certs.init(tmp_path, lifetime_days=0)


def test_a_missing_tls_file_is_named(tmp_path: Path) -> None:
    certs.init(tmp_path)
    (tmp_path / "stage.key").unlink()
    with pytest.raises(InvalidConfiguration, match=r"stage\.key"):
        TlsFiles.in_directory(tmp_path, "stage").channel_credentials()


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("client.pem", "stage.key", "stage.key is not the key of client.pem"),
        ("client.pem", "ca.pem", "ca.pem is no PEM private key"),
        ("client.key", "client.key", "client.key is no PEM certificate"),
    ],
)
def test_files_that_do_not_belong_together_are_named(
    tmp_path: Path, certificate: str, key: str, said: str
) -> None:
    certs.init(tmp_path)
    files = TlsFiles(tmp_path / "ca.pem", tmp_path / certificate, tmp_path / key)
    with pytest.raises(InvalidConfiguration, match=said):
        files.checked()
    with pytest.raises(InvalidConfiguration, match=said):
        files.server_credentials()


def test_an_expired_certificate_says_so_and_what_renews_it(tmp_path: Path) -> None:
    long_ago = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    certs.init(tmp_path, now=long_ago)
    with pytest.raises(InvalidConfiguration, match=r"client.pem expired on 2020-01-31 .*init"):
        TlsFiles.in_directory(tmp_path, "client").checked()
    certs.init(tmp_path)
    TlsFiles.in_directory(tmp_path, "client").checked()


def test_an_identity_is_the_one_mesh_uri_among_the_names() -> None:
    names = ["localhost", "spiffe://mesh/stage/stage-1", "127.0.0.1"]
    assert identity_from_names(names) == Identity(Role.STAGE, "stage-1")


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["spiffe://other/stage"],
        ["spiffe://mesh/stage", "spiffe://mesh/admin"],
        ["spiffe://mesh/root"],
        ["spiffe://mesh/plaintext"],
    ],
)
def test_no_identity_or_two_or_an_unknown_one_is_denied(names: list[str]) -> None:
    with pytest.raises(AccessDenied):
        identity_from_names(names)


def test_a_plaintext_peer_has_the_plaintext_role_even_if_it_claims_names() -> None:
    claimed = {"x509_subject_alternative_name": [b"spiffe://mesh/admin"]}
    assert identity_of(claimed).role is Role.PLAINTEXT
