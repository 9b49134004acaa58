"""A device member whose norms, which every member holds whole, are its own; for tests."""

from __future__ import annotations

import sys
from typing import Any

from mlx.utils import tree_map_with_path

from services.run_device_member import PipeCodec
from stage_worker.device_member import DeviceMember, join, serve


class TwoMindedMember(DeviceMember):
    def _load(self, command: dict[str, Any]) -> Any:
        loaded = super()._load(command)
        model = self.stage.model._model
        if self.meeting.group.rank() == 1:
            model.update(
                tree_map_with_path(
                    lambda path, array: array * 1.01 if "norm" in path else array,
                    model.parameters(),
                )
            )
        return loaded


if __name__ == "__main__":
    sys.exit(serve(TwoMindedMember(join(int(sys.argv[1]), float(sys.argv[2])), PipeCodec())))
