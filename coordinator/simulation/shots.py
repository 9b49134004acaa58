"""Faults of processes, paths, control streams and clients: each waits for its phase, then fires."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from coordinator.echo import EchoStage
from coordinator.events import CancelRequested
from coordinator.simulation.archive import HAND_BACK_S
from coordinator.simulation.context import COORDINATOR_NAME
from coordinator.simulation.endpoint import NOT_A_NUMBER
from coordinator.simulation.network import Blocked
from coordinator.simulation.plan import VOCAB_SIZE, WIRE_FAULTS, Shot
from coordinator.simulation.worker import SimWorker
from stagemesh.checksum import chain_next, crc32c
from stagemesh.errors import StageUnreachable
from stagemesh.frame import StepFrame
from stagemesh.tensor import Tensor

if TYPE_CHECKING:
    from coordinator.simulation.world import World

OTHER_WEIGHTS = "cd" * 32


class Shots:
    """Fires what has waited for its moment; ``World`` asks after every event of the machine."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: list[list[object]] = [
            [shot, shot.skip] for shot in world.plan.shots if shot.fault not in WIRE_FAULTS
        ]
        self._fire: dict[str, Callable[[Shot], None]] = {
            "kill": lambda shot: self._kill(shot, 0.2 + shot.size),
            "kill_for_good": lambda shot: self._kill(shot, None),
            "kill_full": self._kill_full,
            "kill_two": self._kill_two,
            "stop": lambda shot: self._stop(shot, 0.1 + shot.size),
            "stop_long": lambda shot: self._stop(shot, 2.0 + 3.0 * shot.size),
            "restart_empty": lambda shot: self._kill(shot, 0.0),
            "restart_other_weights": self._other_weights,
            "weights_swapped": self._weights_swapped,
            "cache_lost": self._cache_lost,
            "cache_short": self._cache_short,
            "compute_crash": lambda shot: self._target(shot).crash(),
            "slow": self._slow,
            "lie_mark": lambda shot: self._target(shot).runner.lies.append(lie_mark),
            "lie_token": self._lie_token,
            "lie_nan": lambda shot: self._target(shot).runner.lies.append(lie_nan),
            "lie_compute": self._miscompute,
            "half_open": self._half_open,
            "partition": self._partition,
            "one_way_lost": lambda shot: self._one_way(shot, Blocked.LOST),
            "one_way_held": lambda shot: self._one_way(shot, Blocked.HELD),
            "swizzle": self._swizzle,
            "control_reset": self._control_reset,
            "control_delay": self._control_delay,
            "coordinator_stop": self._coordinator_stop,
            "coordinator_kill": self._coordinator_kill,
            "journal_full": self._journal_full,
            "journal_lost": self._journal_lost,
            "cancel": self._cancel,
        }

    def look(self) -> None:
        """Fire every shot whose moment has come."""
        if not self.pending:
            return
        for entry in list(self.pending):
            shot: Shot = entry[0]  # type: ignore[assignment]
            if shot.phase not in self.world.phases_of(shot.victim):
                continue
            if entry[1]:
                entry[1] -= 1  # type: ignore[operator]
                continue
            self.pending.remove(entry)
            self.world.count(shot.fault, shot.phase)
            self._later(0.0, lambda shot=shot: self._fire_now(shot))  # type: ignore[misc]

    def _fire_now(self, shot: Shot) -> None:
        """Behind the event in which its moment came, unless everything was repaired meanwhile."""
        if not self.world.healed:
            self._fire[shot.fault](shot)

    # Targets

    def _target(self, shot: Shot, *, last: bool = False) -> SimWorker:
        """A stage of the victim's route, or any worker."""
        world = self.world
        names = world.route_of(shot.victim) or tuple(world.workers)
        name = names[-1] if last else names[int(shot.place * len(names))]
        return world.workers[name]

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self.world.context.time.after(seconds, action)

    # Processes

    def _kill(self, shot: Shot, restart_s: float | None) -> None:
        worker = self._target(shot)
        self._end(worker, restart_s)

    def _end(self, worker: SimWorker, restart_s: float | None) -> None:
        worker.process.kill()
        if restart_s is not None:
            self._later(restart_s, lambda: self.world.restart(worker))

    def _kill_full(self, shot: Shot) -> None:
        full = [one for one in self.world.workers.values() if one.info.is_full]
        self._end(full[int(shot.place * len(full))] if full else self._target(shot), 1.0)

    def _kill_two(self, shot: Shot) -> None:
        first = self._target(shot)
        others = [one for one in self.world.workers.values() if one is not first]
        self._end(first, 0.5 + shot.size)
        if others:
            self._end(others[int(shot.size * len(others))], 1.0)

    def _stop(self, shot: Shot, seconds: float) -> None:
        process = self._target(shot).process
        process.stop()
        self._later(seconds, process.resume)

    def _other_weights(self, shot: Shot) -> None:
        worker = self._target(shot)
        worker.process.kill()
        self._later(0.1, lambda: self.world.restart(worker, fingerprint=OTHER_WEIGHTS))

    def _weights_swapped(self, shot: Shot) -> None:
        """Its weights are others than it registered with; then its connection breaks, so that it is
        asked to join a route again."""
        self._target(shot).hosted = OTHER_WEIGHTS
        self._later(0.05, lambda: self._control_reset(shot))

    def _cache_lost(self, shot: Shot) -> None:
        worker = self._target(shot)
        if worker.runner.stage is not None:
            worker.runner.stage.caches.clear()
            self.world.context.watch.forgot(worker)

    def _cache_short(self, shot: Shot) -> None:
        worker = self._target(shot)
        if worker.runner.stage is None:
            return
        for cache in worker.runner.stage.caches.values():
            length = max(0, cache.length - 1)
            for entries in (*cache.layers, cache.token_ids):
                del entries[length:]
        self.world.context.watch.forgot(worker, shorter=True)

    def _slow(self, shot: Shot) -> None:
        worker = self._target(shot)
        worker.runner.slowness = 4.0 + 16.0 * shot.size

        def recover() -> None:
            worker.runner.slowness = 1.0

        self._later(0.5, recover)

    def _lie_token(self, shot: Shot) -> None:
        lies = (lie_token, lie_token, lie_unsealed, lie_label)
        self._target(shot, last=True).runner.lies.append(lies[int(shot.size * len(lies))])

    def _miscompute(self, shot: Shot) -> None:
        """A stage computes something wrong and seals it honestly; the reference does not lie."""
        worker = self._target(shot)
        if worker.info.is_full:
            return
        worker.runner.lies.append(lie_compute)
        for client in self.world.clients:
            client.misled, client.must_succeed = True, False

    def _coordinator_stop(self, shot: Shot) -> None:
        process = self.world.coordinator.process
        process.stop()
        self._later(0.2 + 2.5 * shot.size, process.resume)

    def _coordinator_kill(self, shot: Shot, *, lose_file: bool = False) -> None:
        """Now, or somewhere on the way of what was just accepted to the disk and back."""
        world = self.world
        after_s = 0.0 if shot.size < 0.3 else shot.place * (world.plan.commit_s + 2 * HAND_BACK_S)

        def kill() -> None:
            if not world.healed:
                world.kill_coordinator(0.02 + 0.8 * shot.size, lose_file=lose_file)

        self._later(after_s, kill)

    def _journal_full(self, shot: Shot) -> None:
        """Nothing can be written for a while."""
        disk = self.world.disk
        disk.full = True

        def recover() -> None:
            disk.full = False

        self._later(0.05 + 0.5 * shot.size, recover)

    def _journal_lost(self, shot: Shot) -> None:
        """The coordinator dies, and its file with it."""
        self._coordinator_kill(shot, lose_file=True)

    # Paths

    def _partition(self, shot: Shot) -> None:
        name, peer = self._pair(shot)
        how = Blocked.LOST if shot.size < 0.5 else Blocked.HELD
        for one, other in ((name, peer), (peer, name)):
            self._block(one, other, how, 0.3 + 3.0 * shot.size)

    def _one_way(self, shot: Shot, how: str) -> None:
        name, peer = self._pair(shot)
        if shot.size < 0.5:
            name, peer = peer, name
        self._block(name, peer, how, 0.3 + 3.0 * shot.size)

    def _pair(self, shot: Shot) -> tuple[str, str]:
        """Two ends of one hop of the victim's route."""
        names = self.world.route_of(shot.victim) or tuple(self.world.workers)[:1]
        ends = (COORDINATOR_NAME, *names, COORDINATOR_NAME)
        at = int(shot.place * (len(ends) - 1))
        return ends[at], ends[at + 1]

    def _block(self, sender: str, receiver: str, how: str, seconds: float) -> None:
        network = self.world.context.network
        network.block(sender, receiver, how)
        self._later(seconds, lambda: network.unblock(sender, receiver))

    def _swizzle(self, shot: Shot) -> None:
        """Clog links one by one, and open them in another order."""
        prng = self.world.prng
        names = [COORDINATOR_NAME, *self.world.workers]
        paths = [(one, other) for one in names for other in names if one != other]
        chosen = prng.shuffled(paths)[: prng.between(2, max(2, len(paths) // 2))]
        for index, (one, other) in enumerate(chosen):
            seconds = 0.1 + prng.uniform(0.0, 1.5)
            self._later(0.03 * index, lambda p=(one, other, seconds): self._clog(*p))  # type: ignore[misc]

    def _clog(self, sender: str, receiver: str, seconds: float) -> None:
        if not self.world.healed:
            self._block(sender, receiver, Blocked.HELD, seconds)

    def _half_open(self, shot: Shot) -> None:
        """One end of a connection is gone, and the other was not told."""
        name, peer = self._pair(shot)
        for connection in list(self.world.context.network.connections):
            ends = {connection.client.name, connection.server.name}
            if ends == {name, peer} and not connection.reliable:
                tell = "server" if shot.size < 0.5 else "client"
                connection.cut(StageUnreachable("connection reset", address=peer), tell=tell)

    def _control_reset(self, shot: Shot) -> None:
        control = self._target(shot).control
        if control.connection is not None:
            control.connection.cut(StageUnreachable("connection reset"))

    def _control_delay(self, shot: Shot) -> None:
        name, network = self._target(shot).name, self.world.context.network
        if shot.size < 0.5:
            path = (name, COORDINATOR_NAME)
        else:
            path = (COORDINATOR_NAME, name)
        network.slow[path] = 0.02 + 0.2 * shot.size
        self._later(1.0, lambda: network.slow.pop(path, None))  # type: ignore[arg-type]

    # Clients

    def _cancel(self, shot: Shot) -> None:
        client = self.world.clients[shot.victim]
        client.cancelled = True
        self.world.coordinator.feed(CancelRequested(client.key))


def lie_mark(stage: EchoStage, frame: StepFrame) -> StepFrame:
    """The stage says its cache is one longer than it is."""
    row = frame.rows[0]
    if not row.marks:
        return frame
    last = row.marks[-1]
    marks = (*row.marks[:-1], replace(last, cache_length=last.cache_length + 1))
    return replace(frame, rows=(replace(row, marks=marks), *frame.rows[1:]))


def lie_token(stage: EchoStage, frame: StepFrame) -> StepFrame:
    """The stage puts another token in the place of the one it drew."""
    row = frame.rows[0]
    if row.token is None:
        return frame
    token = replace(row.token, token_id=(row.token.token_id + 1) % VOCAB_SIZE).sealed()
    return replace(frame, rows=(replace(row, token=token), *frame.rows[1:]))


def lie_unsealed(stage: EchoStage, frame: StepFrame) -> StepFrame:
    """The token changes in the stage's own memory, between being drawn and being framed."""
    row = frame.rows[0]
    if row.token is None:
        return frame
    token = replace(row.token, token_id=(row.token.token_id + 1) % VOCAB_SIZE)
    return replace(frame, rows=(replace(row, token=token), *frame.rows[1:]))


def lie_label(stage: EchoStage, frame: StepFrame) -> StepFrame:
    """The token says it is of another request than the row it stands in."""
    row = frame.rows[0]
    if row.token is None:
        return frame
    token = replace(row.token, request=row.request[::-1]).sealed()
    return replace(frame, rows=(replace(row, token=token), *frame.rows[1:]))


def lie_compute(stage: EchoStage, frame: StepFrame) -> StepFrame:
    """The stage computes another value, or draws another token, and accounts for it honestly."""
    row = frame.rows[0]
    if not row.marks:
        return frame
    if frame.tensor is not None:
        data = bytes(frame.tensor.payload)
        changed = bytes([data[0] ^ 1]) + data[1:]
        tensor = Tensor(frame.tensor.dtype, frame.tensor.shape, changed)
        mark = replace(row.marks[-1], output_crc32c=crc32c(changed[: 8 * row.token_count]))
        rows = (replace(row, marks=(*row.marks[:-1], mark)), *frame.rows[1:])
        return replace(frame, rows=rows, tensor=tensor)
    cache = stage.caches.get(row.request)
    if row.token is None or cache is None:
        return frame
    token_id = (row.token.token_id + 1) % VOCAB_SIZE
    cache.chain = chain_next(cache.chain_before, row.end_position, token_id)
    token = replace(row.token, token_id=token_id, chain=cache.chain).sealed()
    return replace(frame, rows=(replace(row, token=token), *frame.rows[1:]))


def lie_nan(stage: EchoStage, frame: StepFrame) -> StepFrame:
    """The stage computes a value that is not a number."""
    tensor = frame.tensor
    if tensor is None or not frame.rows[0].marks:
        return frame
    data = NOT_A_NUMBER.to_bytes(8, "little") + bytes(tensor.payload)[8:]
    return replace(frame, tensor=Tensor(tensor.dtype, tensor.shape, data))
