"""Who may call what: one table, denied by default.

Every RPC of the mesh has a row, and a test walks the protos to see that it has. A method without a
row is refused for everybody; so is a role that is not in the row. Without TLS nobody can be told
from anybody: such a server listens on loopback only, or its operator said ``insecure``, and the
table then admits all.
"""

from __future__ import annotations

from services.credentials import Identity, Role
from stagemesh.errors import AccessDenied

_WORKERS = frozenset({Role.STAGE, Role.FULL})
_USERS = frozenset({Role.CLIENT, Role.ADMIN})
_ADMIN = frozenset({Role.ADMIN})
_HOPS = _WORKERS | {Role.COORDINATOR}
_EVERY_ROLE = frozenset(Role) - {Role.PLAINTEXT}

ACCESS: dict[str, frozenset[Role]] = {
    "/stagemesh.v1.GenerationService/Generate": _USERS,
    "/stagemesh.v1.GenerationService/ResumeGeneration": _USERS,
    "/stagemesh.v1.GenerationService/CancelGeneration": _USERS,
    "/stagemesh.v1.GenerationService/ListModels": _USERS,
    "/stagemesh.v1.GenerationService/Tokenize": _USERS,
    "/stagemesh.v1.StageService/Exchange": _HOPS,
    "/stagemesh.v1.WorkerService/Connect": _WORKERS,
    "/stagemesh.v1.AdminService/GetMesh": _ADMIN,
    "/stagemesh.v1.AdminService/ListGenerations": _ADMIN,
    "/stagemesh.v1.AdminService/GetGeneration": _ADMIN,
    "/stagemesh.v1.AdminService/DrainWorker": _ADMIN,
    "/stagemesh.v1.AdminService/GetDiagnostics": _ADMIN,
    "/stagemesh.v1.AdminService/GetTrace": _ADMIN,
    "/stagemesh.v1.EventService/Publish": _WORKERS | _ADMIN,
    "/stagemesh.v1.EventService/Subscribe": _ADMIN,
    "/grpc.health.v1.Health/Check": _EVERY_ROLE,
    "/grpc.health.v1.Health/Watch": _EVERY_ROLE,
    "/grpc.health.v1.Health/List": _EVERY_ROLE,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _EVERY_ROLE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _EVERY_ROLE,
}
"""Full method name to the roles that may call it."""


def check_access(method: str, identity: Identity) -> None:
    """Raise AccessDenied unless ``identity`` may call ``method`` (``/package.Service/Method``)."""
    allowed = ACCESS.get(method)
    if allowed is None:
        raise AccessDenied("no rule admits this method", method=method)
    if identity.role is Role.PLAINTEXT:
        return
    if identity.role not in allowed:
        raise AccessDenied("this role may not make this call", method=method, role=identity)
