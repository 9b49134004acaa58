"""A device member that also does what the checked collectives forbid, for tests."""

from __future__ import annotations

import os
import sys
from typing import Any

import mlx.core as mx

from stage_worker.device_member import DeviceMember, join, serve


class UnrulyMember(DeviceMember):
    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        match command:
            case {"do": "raw", "count": count}:
                result = mx.distributed.all_sum(mx.ones(count), group=self.meeting.group)
                mx.eval(result)
                return {"values": result.tolist()}
            case {"do": "ahead", "values": values}:
                mx.eval(mx.distributed.all_sum(mx.ones(8), group=self.meeting.group))
                return super().handle({"do": "all_sum", "values": values, "tag": "x"})
            case {"do": "die"}:
                os._exit(3)
            case {"do": "nothing"}:
                return {"did": "nothing"}
            case {"do": "again"}:
                again = {"do": "all_sum", "values": [1.0], "tag": "again"}
                try:
                    super().handle({**command, "do": "barrier"})
                except Exception:
                    return super().handle(again)
        return super().handle(command)


if __name__ == "__main__":
    sys.exit(serve(UnrulyMember(join(int(sys.argv[1]), float(sys.argv[2])))))
