"""A stage worker whose stage computes wrongly once a request is long enough, with every mark and
checksum in order. Run as a script with the arguments of ``stagemesh stage-worker``; the variable
``LIES_FROM_POSITION`` says from where on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from services import cli, span_host
from stage_worker.hosting import SpanModel
from stage_worker.stage import Stage

LIES_FROM_POSITION = int(os.environ["LIES_FROM_POSITION"])


class LyingStage(Stage):
    """Mirrors every activation of a long request along its last axis."""

    def __init__(self, model: SpanModel, **options: Any) -> None:
        super().__init__(model, **options)
        honest = model.forward

        def forward(tokens: Any, hidden: Any, cache: Any, **more: Any) -> Any:
            output = honest(tokens, hidden, cache, **more)
            held = model.cache_length(cache) or 0
            return output[..., ::-1] if held > LIES_FROM_POSITION else output

        model.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    vars(span_host)["Stage"] = LyingStage
    sys.exit(cli.main(["stage-worker", *sys.argv[1:]]))
