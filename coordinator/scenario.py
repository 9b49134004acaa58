"""Runs a scenario file: prose, commands, and the machine's own log, in the manner of etcd's raft.

A file is a sequence of blocks. A line that begins with ``>`` is a command; the lines behind it, up
to an empty line or the next command, are what the mesh said while it was carried out. Everything
else is prose. ``run`` carries the commands out and returns the file as it should be, so that a test
compares text with text, and ``--rewrite`` accepts what changed.

    > mesh layers=6 prefill_chunk_tokens=4      a new mesh (first command)
    > join stage-0 0-3 [instance=2] [fingerprint=cd]
    > request r1 prompt=8 max=6 [temperature=0.8] [seed=1]
    > run 0.5                                   virtual seconds
    > until r1 has 3        > until r1 ends     > until routes 2
    > kill X   > stop X   > resume X   > restart X instance=2   > forget X r1   > drain X
    [timeout=30] > corrupt token         the next token that comes back is another one > hold frame
    the next frame for the coordinator is held back on its way > release frame         and arrives
    now > cancel r1 > answer r1             what the client has, compared with an undisturbed run >
    status                workers and routes

``quiet`` behind a command keeps its log out of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coordinator.echo import VOCAB_SIZE, oracle
from coordinator.events import CancelRequested, DrainRequested, FrameReturned
from coordinator.settings import MeshPolicy
from coordinator.testing import MemoryMesh, Tamper, corrupt_token
from stagemesh.errors import InvalidConfiguration
from stagemesh.frame import StepFrame
from stagemesh.sampling import SamplingSpec
from stagemesh.topology import COORDINATOR_HOP, WorkerName


class Scenario:
    """One file being carried out."""

    def __init__(self) -> None:
        self.mesh = MemoryMesh()
        self.held: list[StepFrame] = []
        self._demands: dict[int, tuple[tuple[int, ...], int, SamplingSpec]] = {}

    def run(self, text: str) -> str:
        """The file with every command's log as it is now."""
        lines: list[str] = []
        skipping = False
        for line in text.splitlines():
            if line.startswith(">"):
                skipping = True
                lines.append(line)
                lines += self.command(line[1:].strip())
            elif skipping and line.strip():
                continue
            else:
                skipping = False
                lines.append(line)
        return "\n".join(lines) + "\n"

    def command(self, command: str) -> list[str]:
        """Carry out one command; its log."""
        words = command.split()
        is_quiet = words[-1] == "quiet"
        plain = [word for word in words if "=" not in word and word != "quiet"]
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        before = len(self.mesh.transcript)
        handler: Callable[[list[str], dict[str, str]], list[str]] | None = getattr(
            self, f"do_{plain[0]}", None
        )
        if handler is None:
            raise InvalidConfiguration("no such scenario command", setting=plain[0])
        said = handler(plain[1:], settings)
        log = [] if is_quiet else self.mesh.transcript[before:]
        return [*log, *said]

    def do_mesh(self, words: list[str], settings: dict[str, str]) -> list[str]:
        layer_count = int(settings.pop("layers", "6"))
        standard = MeshPolicy()
        settings.setdefault("audit_budget", "0")  # a story is about one thing
        values = {name: type(getattr(standard, name))(text) for name, text in settings.items()}
        policy = replace(standard, vocab_size=VOCAB_SIZE, **values)
        self.mesh = MemoryMesh(policy, layer_count=layer_count)
        return []

    def do_join(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.join(words[0], words[1], **_facts(settings))
        return []

    def do_request(self, words: list[str], settings: dict[str, str]) -> list[str]:
        number = int(words[0][1:])
        prompt = tuple(range(2, 2 + int(settings.get("prompt", "8"))))
        sampling = SamplingSpec(
            temperature=float(settings.get("temperature", "0")), seed=int(settings.get("seed", "0"))
        )
        count = int(settings.get("max", "8"))
        self._demands[number] = (prompt, count, sampling)
        self.mesh.request(number, prompt, count, sampling=sampling)
        return []

    def do_run(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.run(float(words[0]))
        return []

    def do_until(self, words: list[str], settings: dict[str, str]) -> list[str]:
        mesh = self.mesh
        if words[0] == "routes":
            reached = mesh.run_until(lambda: len(mesh.open_routes()) >= int(words[1]))
        else:
            client = mesh.clients[int(words[0][1:]).to_bytes(16, "big")]
            ends = words[1] == "ends"
            wanted = 0 if ends else int(words[2])
            reached = mesh.run_until(
                lambda: bool(client.ends) if ends else len(client.tokens) >= wanted
            )
        return [] if reached else ["  it never came to that"]

    def do_kill(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.kill(words[0])
        return []

    def do_stop(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.stop(words[0])
        return []

    def do_resume(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.resume(words[0])
        return []

    def do_restart(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.restart(words[0], **_facts(settings))
        return []

    def do_forget(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.forget(words[0], int(words[1][1:]))
        return []

    def do_drain(self, words: list[str], settings: dict[str, str]) -> list[str]:
        timeout_s = float(settings.get("timeout", "30"))
        self.mesh.feed(DrainRequested(WorkerName(words[0]), timeout_s))
        return []

    def do_cancel(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.feed(CancelRequested(int(words[0][1:]).to_bytes(16, "big")))
        return []

    def do_corrupt(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.tampers.append(_once(_has_token, corrupt_token))
        return []

    def do_hold(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.tampers.append(_once(_has_token, self._hold))
        return []

    def do_release(self, words: list[str], settings: dict[str, str]) -> list[str]:
        self.mesh.feed(FrameReturned(self.held.pop(0)))
        return []

    def do_answer(self, words: list[str], settings: dict[str, str]) -> list[str]:
        number = int(words[0][1:])
        prompt, count, sampling = self._demands[number]
        client = self.mesh.clients[number.to_bytes(16, "big")]
        wanted = oracle(prompt, count, layer_count=self.mesh.layer_count, sampling=sampling)
        got = client.tokens
        verdict = "as undisturbed" if got == wanted[: len(got)] else f"WRONG, expected {wanted}"
        return [f"  {len(got)} of {count} tokens, {verdict}; terminal frames: {len(client.ends)}"]

    def do_status(self, words: list[str], settings: dict[str, str]) -> list[str]:
        snapshot = self.mesh.mesh.snapshot(self.mesh.now)
        workers = [
            f"  {view.info.name} {view.state}" + (f" ({view.evidence})" if view.evidence else "")
            for view in snapshot.workers
        ]
        routes = [
            f"  epoch={view.epoch} {view.phase} {'→'.join(view.workers)} requests={view.requests}"
            for view in snapshot.routes
        ]
        return [*workers, *routes]

    def _hold(self, frame: StepFrame) -> None:
        self.held.append(frame)


def _facts(settings: dict[str, str]) -> dict[str, str]:
    facts = dict(settings)
    if "fingerprint" in facts:
        facts["fingerprint"] *= 32
    return facts


def _has_token(frame: StepFrame) -> bool:
    return frame.hop_to == COORDINATOR_HOP and any(row.token for row in frame.rows)


def _once(
    condition: Callable[[StepFrame], bool], change: Callable[[StepFrame], StepFrame | None]
) -> Tamper:
    """A tamper that changes the first frame that meets the condition, and then no more."""
    done: list[StepFrame] = []

    def tamper(frame: StepFrame) -> StepFrame | None:
        if done or not condition(frame):
            return frame
        done.append(frame)
        return change(frame)

    return tamper
