"""What protoc writes for a service refuses every call until somebody overrides it; here all do."""

from pathlib import Path

import pytest

from services.admin_service import AdminService
from services.event_service import EventService
from services.generation_service import GenerationService
from services.stage_service import StageServicer, add_stage_servicer
from services.worker_service import WorkerService
from stagemesh.v1 import (
    admin_service_pb2,
    event_service_pb2,
    generation_service_pb2,
    stage_service_pb2,
    worker_service_pb2,
)

ROOT = Path(__file__).resolve().parents[2]
SERVED = {
    admin_service_pb2: AdminService,
    event_service_pb2: EventService,
    generation_service_pb2: GenerationService,
    stage_service_pb2: StageServicer,
    worker_service_pb2: WorkerService,
}


def services_of(module):
    return module.DESCRIPTOR.services_by_name.values()


def test_no_service_is_without_a_class():
    named = {path.stem for path in (ROOT / "protos").rglob("*.proto")}
    assert {f"{name}_pb2" for name in named if name.endswith("_service")} == {
        module.__name__.rsplit(".", 1)[-1] for module in SERVED
    }


@pytest.mark.parametrize("module", SERVED, ids=lambda module: module.__name__)
def test_every_rpc_is_the_products_own_and_none_is_what_protoc_wrote(module):
    for service in services_of(module):
        for method in service.methods:
            assert method.name in vars(SERVED[module]), f"{service.full_name}.{method.name}"


def test_the_stages_own_handlers_are_all_that_its_service_has():
    """It is registered by hand, for bytes in and out."""

    class Registry:
        def add_generic_rpc_handlers(self, handlers):
            pass

        def add_registered_method_handlers(self, service, handlers):
            self.registered = (service, set(handlers))

    registry = Registry()
    add_stage_servicer(StageServicer(on_fault=lambda _fault: None), registry)
    (service,) = services_of(stage_service_pb2)
    assert registry.registered == (service.full_name, {one.name for one in service.methods})
