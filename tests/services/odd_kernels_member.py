"""A device member on whose kernels weights read fastest in an order of its own; for tests."""

from __future__ import annotations

import os
import sys

from services.run_device_member import PipeCodec
from stage_worker import tiling
from stage_worker.device_member import join_and_serve

if __name__ == "__main__":
    if os.environ["MLX_RANK"] == "1":
        tiling.best = lambda: tiling.Arrangement.TURNED
    sys.exit(join_and_serve(int(sys.argv[1]), float(sys.argv[2]), PipeCodec()))
