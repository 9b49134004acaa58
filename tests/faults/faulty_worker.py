"""A stage worker with a planted fault: ``python -m tests.faults.faulty_worker FAULT COMMAND …``.

Everything but the numbers it computes is a worker's own.
"""

from __future__ import annotations

import sys
from typing import Any

from services import cli
from stage_worker.hosting import SpanModel
from tests.faults.planted import plant


def main(fault: str, arguments: list[str]) -> int:
    load = SpanModel.load

    def loaded(*args: Any, **options: Any) -> SpanModel:
        span = load(*args, **options)
        plant(fault, span)
        return span

    SpanModel.load = loaded  # type: ignore[method-assign]
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
