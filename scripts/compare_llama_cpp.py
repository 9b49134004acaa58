"""Measures llama.cpp beside stagemesh on this machine; its programs have to be there already.

    cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_RPC=ON -DLLAMA_CURL=OFF
    cmake --build build --target llama-server ggml-rpc-server
    python scripts/compare_llama_cpp.py --llama-server build/bin/llama-server \\
        --rpc-server build/bin/ggml-rpc-server > llama.json
    stagemesh bench --from … llama.json --write docs/benchmarks.md

Without ``--gguf`` the file that the default model is made of is fetched. With it, ``--model`` says
what our side serves (default: the same file).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from services import settings as settings_module  # noqa: E402 - the path comes first
from services.bench import report  # noqa: E402
from services.bench.llama_cpp import Programs, compare  # noqa: E402
from services.bench.sides import Sizes  # noqa: E402
from services.cli_common import note, print_json  # noqa: E402
from stage_worker.model_source import DEFAULT_SOURCE, fetch_smollm2_gguf  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rpc-server", type=Path, metavar="FILE", help="for the split side")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the weights for llama.cpp")
    parser.add_argument("--model", metavar="MODEL", help="the same weights for our side")
    parser.add_argument("--label", help="name of this comparison on the page")
    parser.add_argument("--note", action="append", default=[], help="a remark for the page")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    options = parser.parse_args()
    sizes = Sizes.quick() if options.quick else Sizes(turns=options.rounds)
    with tempfile.TemporaryDirectory(prefix="stagemesh-llama-") as folder:
        gguf = options.gguf or fetch_smollm2_gguf(Path(folder), lambda *_progress: None)
        model = options.model or (str(gguf) if options.gguf else DEFAULT_SOURCE)
        settings = settings_module.load(flags={"model": model, "stages": 2})
        programs = Programs(options.llama_server, options.rpc_server)
        facts = report.base_environment()
        run = asyncio.run(compare(settings, programs, gguf, Path(folder), sizes, note))
    run["environment"] = facts | run["environment"]
    run["side_by_side"][0]["notes"] += [note for note in options.note if note]
    if options.label:
        run["side_by_side"][0]["label"] = options.label
    print_json(run | {"suite": "llama.cpp", "quick": options.quick})
    return 0


if __name__ == "__main__":
    sys.exit(main())
