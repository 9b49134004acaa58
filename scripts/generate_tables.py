"""Writes the tables and diagrams of docs/protocol.md from the code's own; ``--check`` compares.

A generated piece stands between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from coordinator import states  # noqa: E402 - the path comes first
from coordinator.barrier import TRANSITIONS  # noqa: E402
from stagemesh.guards import FAMILIES, GUARDS  # noqa: E402

PAGE = ROOT / "docs" / "protocol.md"
PIECE = re.compile(r"(<!-- table ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def guards() -> str:
    """Every counter and its meaning."""
    lines = ["| counter | counts |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in GUARDS.items()]
    lines += [f"| `{prefix}…` | {meaning} |" for prefix, meaning in FAMILIES.items()]
    return "\n".join(lines)


def pieces() -> dict[str, str]:
    """Every generated piece by name."""
    return {
        "route": states.table_of(states.ROUTE_MOVES),
        "route-diagram": states.diagram_of(states.ROUTE_MOVES),
        "worker": states.table_of(states.WORKER_MOVES),
        "worker-diagram": states.diagram_of(states.WORKER_MOVES),
        "request": states.table_of(states.REQUEST_MOVES),
        "request-diagram": states.diagram_of(states.REQUEST_MOVES),
        "barrier": states.barrier_table(TRANSITIONS),
        "barrier-diagram": states.barrier_diagram(TRANSITIONS),
        "guards": guards(),
    }


def rendered(page: str) -> str:
    """The page with every piece as it is now. Raises KeyError for a piece that does not exist."""
    made = pieces()
    return PIECE.sub(lambda found: f"{found[1]}{made[found[2]]}\n{found[4]}", page)


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    fresh = rendered(page)
    if "--check" in sys.argv[1:]:
        if fresh != page:
            print("docs/protocol.md: tables differ from the code; run scripts/generate_tables.py")
        return int(fresh != page)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
