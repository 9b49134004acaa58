"""The access table: every RPC has a row, and every role is admitted exactly where its row says."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
from google.protobuf.descriptor import FileDescriptor

import stagemesh.v1
from services.access import ACCESS, check_access
from services.credentials import Identity, Role
from stagemesh.errors import AccessDenied


def proto_methods() -> list[str]:
    found = []
    for module in pkgutil.iter_modules(stagemesh.v1.__path__):
        if module.name.endswith("_pb2"):
            loaded = importlib.import_module(f"stagemesh.v1.{module.name}")
            descriptor: FileDescriptor = loaded.DESCRIPTOR
            for service in descriptor.services_by_name.values():
                found += [f"/{service.full_name}/{method.name}" for method in service.methods]
    return found


def test_every_method_of_every_proto_has_a_row() -> None:
    methods = proto_methods()
    assert len(methods) > 10
    assert [method for method in methods if method not in ACCESS] == []


def test_no_row_names_a_method_that_does_not_exist() -> None:
    ours = {method for method in ACCESS if method.startswith("/stagemesh.")}
    assert ours == set(proto_methods())


def test_a_method_without_a_row_is_refused_for_everybody() -> None:
    for role in Role:
        with pytest.raises(AccessDenied, match="no rule"):
            check_access("/stagemesh.v1.AdminService/InjectFault", Identity(role))


@pytest.mark.parametrize("method", sorted(ACCESS))
@pytest.mark.parametrize("role", [role for role in Role if role is not Role.PLAINTEXT])
def test_a_role_passes_exactly_where_its_row_says(method: str, role: Role) -> None:
    if role in ACCESS[method]:
        check_access(method, Identity(role))
    else:
        with pytest.raises(AccessDenied):
            check_access(method, Identity(role))


@pytest.mark.parametrize(
    ("method", "role"),
    [
        ("/stagemesh.v1.AdminService/DrainWorker", Role.CLIENT),
        ("/stagemesh.v1.AdminService/DrainWorker", Role.STAGE),
        ("/stagemesh.v1.WorkerService/Connect", Role.CLIENT),
        ("/stagemesh.v1.StageService/Exchange", Role.CLIENT),
        ("/stagemesh.v1.StageService/Exchange", Role.ADMIN),
        ("/stagemesh.v1.GenerationService/Generate", Role.STAGE),
    ],
)
def test_the_calls_that_matter_are_closed_to_the_wrong_role(method: str, role: Role) -> None:
    with pytest.raises(AccessDenied):
        check_access(method, Identity(role))
