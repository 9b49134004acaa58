"""Checked collectives: what members of a tensor-parallel group exchange, stated, compared, proved.

Around each collective stand two exchanges of ``mx_barrier``. Before it every member states what it
is about to do: operation, tag, epoch, dtype, shape, and how many collectives came before. Members
that disagree never enter the collective, where one would take another's bytes for its own. Behind
it every member states the CRC32C of what came out. All-reduced values are bit for bit equal on all
members, whatever the dtype; if they are not, the result is refused, because a token made from it
could not be trusted on either.

The price is two small all-reduces per collective: 0.15 ms each on free cores.

A model of mlx-lm divides itself (``shard``) and then calls ``mx.distributed`` wherever it has to.
`CheckedCollectives.governing` puts the checked collectives into that module's place for as long as
a forward takes, so that every collective of every architecture is a checked one, and one that
cannot be checked is refused. It is for a process that exists for nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from stage_worker.mx_barrier import Meeting, Operation, digest
from stagemesh.errors import FrameMalformed, ModelRefused

AXES_MAX = 4
_DTYPES = {mx.float32: 1, mx.float16: 2, mx.bfloat16: 3, mx.int32: 4, mx.uint32: 5}
"""Wire values of ``stagemesh.tensor.DType``."""
_NAMES = ("tag", "dtype", "axes", "shape", "shape", "shape", "shape")
_ALL_SUM, _ALL_GATHER = mx.distributed.all_sum, mx.distributed.all_gather
_REFUSED = ("all_max", "all_min", "recv", "recv_like", "send", "sum_scatter")
"""Collectives that no forward of a divided layer needs, and that nothing here could check."""
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_heads", "n_kv_heads")


class CheckedCollectives:
    """Collectives of one ``Meeting``. Every method raises BarrierBroken if members disagree, before
    or behind, and then refuses everything; a member that does not come in time ends the process."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting

    def all_sum(self, value: mx.array, *, tag: str) -> mx.array:
        """Sum over all members. ``tag`` names the place in the model, such as ``layer.3.mlp``."""
        return self._checked(Operation.ALL_SUM, _ALL_SUM, value, tag)

    def all_gather(self, value: mx.array, *, tag: str) -> mx.array:
        """Every member's value, one behind the other along the first axis."""
        return self._checked(Operation.ALL_GATHER, _ALL_GATHER, value, tag)

    @contextlib.contextmanager
    def governing(self) -> Iterator[None]:
        """Every collective that is begun inside is a checked one, tagged with its place in
        line."""
        places: dict[str, Any] = {
            "all_sum": self._in_line(self.all_sum, "sum"),
            "all_gather": self._in_line(self.all_gather, "gather"),
            **{name: _refusal(name) for name in _REFUSED if hasattr(mx.distributed, name)},
        }
        before = {name: getattr(mx.distributed, name) for name in places}
        for name, checked in places.items():
            setattr(mx.distributed, name, checked)
        try:
            yield
        finally:
            for name, raw in before.items():
                setattr(mx.distributed, name, raw)

    def _in_line(self, checked: Callable[..., mx.array], word: str) -> Callable[..., mx.array]:
        count = 0

        def collective(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
            nonlocal count
            count += 1
            return checked(x, tag=f"{word} {count} of the forward")

        return collective

    def _checked(self, operation: Operation, run: Any, value: mx.array, tag: str) -> mx.array:
        if value.dtype not in _DTYPES or not 1 <= value.ndim <= AXES_MAX:
            raise FrameMalformed("not for a collective", dtype=value.dtype, shape=value.shape)
        meeting = self.meeting
        shape = (*value.shape, *(0,) * (AXES_MAX - value.ndim))
        fields = (digest(tag.encode()), _DTYPES[value.dtype], value.ndim, *shape)
        # Computed first: a forward that hangs must not look like a peer that does.
        mx.eval(value)
        meeting.agree(operation, fields, _NAMES)
        result = meeting.collective(lambda: run(value, group=meeting.group), tag)
        meeting.agree(Operation.RESULT, (digest(tag.encode()), result_digest(result)), _RESULT)
        return result


_RESULT = ("tag", "result")


def result_digest(result: mx.array) -> int:
    """CRC32C of the bytes of an array, which is evaluated for it."""
    return digest(np.array(result.view(mx.uint8)).tobytes())


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise ModelRefused(f"the divided model calls {name}, which cannot be checked")

    return refuse


def divide(model: Any, config: Mapping[str, Any], group: Any) -> None:
    """Leave ``model`` this member's part of every layer, lazily. Raises ModelRefused for a type
    that cannot be divided, or not by this many."""
    size, kind = group.size(), str(config.get("model_type"))
    if not callable(getattr(model, "shard", None)):
        raise ModelRefused("mlx-lm cannot divide this model type over devices", model_type=kind)
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, Mapping) else {}):
        for name in _HEADS:
            heads = place.get(name)
            if isinstance(heads, int) and heads % size:
                raise ModelRefused(
                    f"{name} {heads} cannot be divided by {size}", model_type=kind, devices=size
                )
    try:
        model.shard(group)
    except Exception as error:
        raise ModelRefused(
            f"cannot be divided over {size} devices: {type(error).__name__}: {error}",
            model_type=kind,
        ) from error
