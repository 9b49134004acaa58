"""What a stage worker hosts: a span of a model, computed in this process or divided over several.

Loading belongs to the compute thread; what the stage then is, for the coordinator and for the
choice of threads, follows from it here. How many positions the worker promises is found at its
first load and stands as long as it lives: the coordinator has been told.
"""

from __future__ import annotations

import logging
import os
import time

from services.device_stage import DeviceStage, SpanFacts
from services.setting_fields import DTYPES
from services.worker_codec import check_name
from services.worker_options import WorkerOptions
from stage_worker import blas, machine
from stage_worker.core_use import CoreUse
from stage_worker.hosting import SpanModel
from stage_worker.kv_cache import bytes_per_position
from stage_worker.stage import Stage
from stage_worker.tiling import Arrangement
from stage_worker.warm_up import compiles_late, warm_up
from stagemesh.topology import EXACT, WorkerInfo

Hosted = Stage | DeviceStage

_WORDS = {name: word for word, name in DTYPES.items()}

_log = logging.getLogger(__name__)


class SpanHost:
    """See the module. One for a worker's whole life, however often it loads."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._promised_tokens = 0
        """Cached positions; 0: nothing has been loaded."""

    def load(self) -> Hosted:
        """On the compute thread: load the span, check every byte against its manifest, probe it,
        and have it compute each kind of step once where that compiles kernels."""
        options = self._options
        if options.devices is not None:
            divided = DeviceStage(
                options.model,
                options.span,
                options.devices,
                name=options.name,
                dtype=options.dtype,
                kv_budget_tokens=options.kv_budget_tokens,
            )
            self._promise(divided.model.kv_bytes_per_position)
            return divided
        model = SpanModel.load(options.model, options.span, dtype=options.dtype, verify=True)
        model.probe()
        self._promise(bytes_per_position(model))
        stage = Stage(
            model,
            name=options.name,
            kv_budget_tokens=self._promised_tokens,
            clock_ns=time.time_ns,
        )
        if compiles_late() if options.warms_up is None else options.warms_up:
            warm_up(model, kv_budget_tokens=self._promised_tokens)
        return stage

    def _promise(self, bytes_each: int) -> None:
        """What was configured, or less if this machine has no memory for it, at ``bytes_each`` per
        cached position."""
        if self._promised_tokens:
            return
        wanted, fitting = self._options.kv_budget_tokens, machine.kv_tokens_that_fit(bytes_each)
        if fitting < wanted:
            _log.warning("memory for %d cached positions of the %d allowed", fitting, wanted)
        self._promised_tokens = min(wanted, fitting)

    def core_use(self, stage: Hosted) -> CoreUse | None:
        """Threads to be chosen for each step; None where there is nothing to choose."""
        options = self._options
        if not isinstance(stage, Stage) or options.threads_max <= options.threads:
            return None
        if stage.model.arrangement is Arrangement.TILES:
            return None  # products with a tile are too small to be shared out
        return CoreUse(options.threads, options.threads_max, blas.set_threads)

    def info_of(self, stage: Hosted, *, address: str, instance: str) -> WorkerInfo:
        """The worker with this stage, as it registers."""
        model = stage.model
        # Sums over devices are rounded in another order than one process would.
        exact = self._options.devices is None and blas.describe().deterministic
        return WorkerInfo(
            name=check_name(self._options.name),
            address=address,
            span=model.span,
            layer_count=model.layer_count,
            fingerprint=model.fingerprint,
            span_fingerprint=model.span_fingerprint,
            dtype=_dtype_word(model),
            pid=os.getpid(),
            instance=instance,
            kv_budget_tokens=self._promised_tokens,
            memory_bytes=model.nbytes,
            capabilities=stage.capabilities | ({EXACT} if exact else frozenset()),
        )


def _dtype_word(model: SpanModel | SpanFacts) -> str:
    """``f32`` for ``mlx.core.float32``."""
    name = str(model.dtype).rpartition(".")[2]
    return _WORDS.get(name, name)
