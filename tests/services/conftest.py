"""A mesh without MLX for the edge's tests: the real driver over stages of integer hash chains."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator import instructions as do
from coordinator.core import Mesh
from coordinator.driver import MeshDriver
from coordinator.echo import VOCAB_SIZE, EchoStage
from coordinator.events import BarrierArrived, FrameReturned, LinkOpened, WorkerRegistered
from coordinator.memory_worker import worker_info
from coordinator.settings import MeshPolicy
from services.admin_service import AdminService
from services.answer_book import AnswerBook
from services.client import MeshClient
from services.generation_service import GenerationService
from services.interceptors import ServerInterceptor
from services.journal import Journal
from services.journal_store import JournalStore
from services.request_reader import EdgeLimits
from services.tokenizer import ServedModel, load_served_model
from services.worker_codec import worker_to_proto
from stagemesh.frame import StepFrame
from stagemesh.topology import COORDINATOR_HOP
from stagemesh.v1 import admin_service_pb2_grpc, generation_service_pb2_grpc

CONTEXT_LENGTH = 512
WORDS = ("▶", "😀", "你好", "é", "the", "stop", "END", "one", "two", "\n\n", "e\u0301", "→")


def byte_stand_ins() -> dict[int, str]:
    """GPT-2's printable character for each byte, built independently of the product."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {byte: chr(byte) for byte in kept}, 0
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + extra)
            extra += 1
    return table


def write_model(directory: Path, *, vocab_size: int = VOCAB_SIZE) -> Path:
    """A model directory without weights: byte tokens, words, halves of characters, a template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    table = byte_stand_ins()
    pieces = ["".join(table[byte] for byte in word.encode()) for word in WORDS]
    pieces += [piece[:2] for piece in pieces if len(piece) > 3]
    vocabulary = {table[byte]: byte for byte in range(256)}
    index = 0
    while len(vocabulary) < vocab_size - 1:
        if index < len(pieces):
            piece = pieces[index]
        else:
            piece = f"w{index}"
        vocabulary.setdefault(piece, len(vocabulary))
        index += 1
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|end|>",
                "chat_template": template,
            }
        )
    )
    (directory / "config.json").write_text(
        json.dumps(
            {
                "model_type": "echo",
                "vocab_size": vocab_size,
                "max_position_embeddings": CONTEXT_LENGTH,
                "num_hidden_layers": 6,
                "eos_token_id": vocab_size - 1,
            }
        )
    )
    return directory


@pytest.fixture(scope="session")
def echo_model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A served model whose tokens are bytes, words and halves of characters."""
    return load_served_model(write_model(tmp_path_factory.mktemp("echo")), "echo")


class EchoPorts:
    """WorkerControl, RouteLinks and EventPublisher over stages in memory, on the event loop.

    ``pause`` holds every frame back; ``steps`` counts the steps that the last stage computed.
    """

    def __init__(self, fingerprint: str = "") -> None:
        self.driver: MeshDriver | None = None
        self.stages: dict[str, EchoStage] = {}
        self.infos = {
            name: worker_info(name, span, fingerprint=fingerprint or "ab" * 32)
            for name, span in (("stage-0", "0-3"), ("stage-1", "3-6"), ("full-worker", "0-6"))
        }
        self.routes: dict[int, tuple[Any, ...]] = {}
        self.fenced: list[tuple[str, int]] = []
        self.published: list[do.PublishEvent] = []
        self.steps = 0
        self.delay_s = 0.0
        self._held: list[StepFrame] | None = None

    def start(self) -> None:
        """Every worker registers."""
        for info in self.infos.values():
            self._later(lambda info=info: self._driver.feed(WorkerRegistered(info)))

    def pause(self) -> None:
        """From now on frames wait."""
        self._held = []

    def go_on(self) -> None:
        """Frames move again."""
        held, self._held = self._held or [], None
        for frame in held:
            self._forward(frame)

    def kv_tokens(self) -> int:
        """Cached positions on all stages."""
        return sum(stage.kv_tokens for stage in self.stages.values())

    @property
    def _driver(self) -> MeshDriver:
        assert self.driver is not None
        return self.driver

    def _later(self, action: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(self.delay_s, action)

    # WorkerControl

    def open_route(self, instruction: do.OpenRoute) -> None:
        route = instruction.route
        self.routes[route.epoch] = route.workers
        for index, info in enumerate(route.workers):
            self.stages[info.name] = EchoStage(info, route.epoch, index, route.stage_count)
            facts = {
                "fingerprint": info.fingerprint,
                "dtype": info.dtype,
                "layer_count": str(info.layer_count),
                "span": str(info.span),
            }
            arrived = BarrierArrived(
                info.name, "open-route", route.epoch, instruction.generation, facts
            )
            self._later(lambda arrived=arrived: self._driver.feed(arrived))

    def fence(self, workers: Any, epoch: int) -> None:
        self.fenced += [(name, epoch) for name in workers]
        for name in workers:
            stage = self.stages.get(name)
            if stage is not None and stage.epoch <= epoch:
                del self.stages[name]

    def drain(self, order: do.DrainWorker) -> None: ...

    def reinitialise(self, worker: str, reason: str, command_id: str) -> None: ...

    def announce_barrier(self, outcome: do.AnnounceBarrier) -> None: ...

    def meet(self, verdict: do.MeetWorker) -> None: ...

    # RouteLinks

    def open(self, route: Any) -> None:
        self._later(lambda: self._driver.feed(LinkOpened(route.epoch)))

    def send(self, frame: StepFrame) -> None:
        self._forward(frame.sealed())

    def close(self, epoch: int) -> None: ...

    def _forward(self, frame: StepFrame) -> None:
        if self._held is not None:
            self._held.append(frame)
        elif frame.hop_to == COORDINATOR_HOP:
            self.steps += 1
            self._later(lambda: self._driver.feed(FrameReturned(frame)))
        else:
            self._later(lambda: self._computed(frame))

    def _computed(self, frame: StepFrame) -> None:
        workers = self.routes[frame.epoch]
        stage = self.stages.get(workers[frame.hop_to].name)
        if stage is not None and stage.epoch == frame.epoch:
            self._forward(stage.step(frame).sealed())

    # EventPublisher

    def publish(self, event: do.PublishEvent) -> None:
        self.published.append(event)


@pytest.fixture
def echo_ports() -> type[EchoPorts]:
    """Stages in memory, for a driver of whoever asks."""
    return EchoPorts


@dataclass
class Edge:
    """A coordinator's edge on loopback, over stages in memory."""

    address: str
    ports: EchoPorts
    driver: MeshDriver
    model: ServedModel
    book: AnswerBook
    client: MeshClient
    server: grpc.aio.Server
    journal: Journal | None = None


@contextlib.asynccontextmanager
async def edge(
    model: ServedModel,
    *,
    policy: MeshPolicy | None = None,
    limits: EdgeLimits | None = None,
    answers_kept_max: int = 100,
    address: str = "127.0.0.1:0",
    store: JournalStore | None = None,
    fingerprint: str = "",
) -> AsyncIterator[Edge]:
    """Serve GenerationService and AdminService over a MeshDriver until the block is left.

    With a ``store`` there is a journal, and what it holds unfinished is gone on with.
    """
    ports = EchoPorts(fingerprint)
    mesh = Mesh(policy or MeshPolicy(vocab_size=VOCAB_SIZE, context_tokens_max=CONTEXT_LENGTH))
    journal = None
    if store is not None:
        journal = Journal(
            store,
            feed=lambda event: driver.feed(event),
            fingerprint=lambda: mesh.state.model.label if mesh.state.model else "",
        )
        journal.start()
    driver = MeshDriver(mesh, control=ports, links=ports, events=ports, journal=journal)
    ports.driver = driver
    book = AnswerBook(ended_max=answers_kept_max)
    service = GenerationService(
        driver=driver, model=model, book=book, limits=limits or EdgeLimits(), stored=journal
    )
    for stored in store.unfinished() if store is not None else ():
        service.revive(stored)
    server = grpc.aio.server(interceptors=[ServerInterceptor()], options=[("grpc.so_reuseport", 0)])
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
        AdminService(driver=driver, book=book, describe=worker_to_proto, traces=_no_traces),
        server,
    )
    port = server.add_insecure_port(address)
    await server.start()
    ports.start()
    client = MeshClient(f"127.0.0.1:{port}")
    try:
        while not driver.snapshot().ready:
            await asyncio.sleep(0)
        yield Edge(f"127.0.0.1:{port}", ports, driver, model, book, client, server, journal)
    finally:
        await client.close()
        driver.close()
        await server.stop(None)
        if journal is not None:
            await journal.close()


def _no_traces(request_id: str) -> bytes:
    from stagemesh.errors import RequestUnknown

    raise RequestUnknown("no trace of this request", request_id=request_id)


@pytest.fixture
def serve(echo_model: ServedModel) -> Callable[..., Any]:
    """``async with serve(**options) as edge``."""

    def start(**options: Any) -> Any:
        return edge(options.pop("model", echo_model), **options)

    return start
