"""The other side of every comparison: a child process with bare mlx-lm, asked over its pipes.

Its environment preloads the same BLAS as our workers have, with ``threads`` threads. It keeps its
model between questions and computes nothing while it is not asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from services.setting_fields import DTYPES
from stage_worker import blas
from stagemesh.errors import StageError

LINE_BYTES_MAX = 1 << 24
ANSWER_S_MAX = 600.0
"""The longest single measurement, loading included; beyond it the child hangs."""
END_S_MAX = 10.0


class BaselineFailed(StageError):
    """The process with bare mlx-lm ended, or did not answer in time."""

    reason = "BASELINE_FAILED"


class BaselineProcess:
    """An asynchronous context manager around the child. ``environment`` is what it says it runs
    on."""

    def __init__(
        self, directory: Path, *, threads: int, dtype: str = "auto", deterministic: bool = False
    ) -> None:
        self.environment: dict[str, Any] = {}
        self.pid = 0
        self._arguments = (str(directory), DTYPES[dtype])
        preload = blas.preload_environment(threads, deterministic=deterministic)
        self._environment = {**os.environ, **preload}
        if deterministic:
            self._environment.pop("LD_PRELOAD", None)
        self._process: asyncio.subprocess.Process | None = None
        self._asked = 0

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "stage_worker.baseline",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=self._environment,
            limit=LINE_BYTES_MAX,
        )
        self.pid = self._process.pid
        try:
            self.environment = await self._answer()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end()

    async def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """Carry out one command. Raises BaselineFailed."""
        if self._process is None or self._process.stdin is None:
            raise BaselineFailed("the process with bare mlx-lm is not running")
        self._asked += 1
        command = {"do": what, "id": self._asked, **fields}
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        while (answer := await self._answer()).pop("id") != self._asked:
            pass  # of a question that was given up
        return answer

    async def _answer(self) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdout is None:
            raise BaselineFailed("the process with bare mlx-lm is not running")
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                line = await process.stdout.readline()
        except TimeoutError:
            raise BaselineFailed(
                f"bare mlx-lm did not answer within {ANSWER_S_MAX:.0f} s"
            ) from None
        if not line:
            raise BaselineFailed(f"bare mlx-lm ended with status {await process.wait()}")
        document: dict[str, Any] = json.loads(line)
        return document

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(END_S_MAX):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
