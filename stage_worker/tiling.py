"""How weights lie in memory: turned round, or in tiles, where that makes a decode step's products
faster.

A general matrix product first copies (*packs*) its operands into the order in which its kernel
reads them. For many rows that is repaid; in a decode step, where every weight is used once or a few
times, it is most of the work. Two other layouts of a weight [outputs, inputs] help:

* **TURNED**: [inputs, outputs], seen through a transposed view, so that shape and meaning stay.
  Packing reads it straight. Measured (OpenBLAS 0.3.34, AVX2 kernels, 576 inputs and 1,536 outputs,
  one thread, µs): 1 row 367 → 311, 8 rows 392 → 344, 128 rows 2,273 → 2,096.
* **TILES**: [count, inputs, width], a batch of matrices so small that OpenBLAS's AVX-512 kernels
  read them as they lie, without packing, up to `SMALL_PRODUCT` multiplications. Measured: 1 row
  360 → 150, 8 rows 390 → 235, 16 rows 430 → 315; but 128 rows 1,528 → 1,766, and five whole layers
  over a chunk of 64 tokens 31 → 39 ms. That is the price: an answer has many decode steps, and a
  prompt few chunks.

What pays depends on library and processor, so it is measured once in each process (`best`), in a
way that others on the machine hardly change (`trials`). With a deterministic BLAS nothing is done:
there the order of summation is what is promised.

A model that looks into its weights instead of multiplying with them would break in tiles, so
`arrange` compares the span's outputs before and after, and puts everything back where they differ.
Memory stays what it was: arrays are replaced one by one.
"""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear

from stage_worker import blas, probing, trials

log = logging.getLogger(__name__)

SMALL_PRODUCT = 1_000_000
"""Multiplications up to which OpenBLAS takes its kernels for small matrices."""
ROWS = 16
"""Rows for which a tile should still be small: a microbatch of a busy mesh."""
WIDTHS = (96, 64, 48, 32)
"""Columns of a tile: wider ones suit prefill, narrower ones more rows."""
TURNED_GAIN_MIN = 1.04
TILES_GAIN_MIN = 1.1
"""What a layout must gain over the simpler ones. Measured (AVX-512, 48 starts, four at once on two
cores): tiles gain 1.19 to 1.7, half of them 1.4 or more."""

_TRIAL_SHAPE = (1536, 576)
_TRIAL_WEIGHTS = 6
_TRIAL_ROWS = (1, 8)


class Arrangement(enum.Enum):
    """How the weights of a span lie."""

    STORED = "as stored"
    TURNED = "turned"
    TILES = "in tiles"


def width_for(outputs: int, inputs: int) -> int | None:
    """How wide the tiles of a weight should be; None if it cannot be cut evenly."""
    fitting = [width for width in WIDTHS if outputs % width == 0]
    small = [width for width in fitting if width * inputs * ROWS <= SMALL_PRODUCT]
    return max(small, default=min(fitting, default=None))


def to_tiles(weight: mx.array, width: int) -> mx.array:
    """[outputs, inputs] as [count, inputs, width], evaluated."""
    outputs, inputs = weight.shape
    return _evaluated(weight.reshape(outputs // width, width, inputs).swapaxes(1, 2))


def from_tiles(tiles: mx.array) -> mx.array:
    """The inverse of `to_tiles`."""
    count, inputs, width = tiles.shape
    return _evaluated(tiles.swapaxes(1, 2)).reshape(count * width, inputs)


def turned(weight: mx.array) -> mx.array:
    """The same weight, with its outputs side by side in memory."""
    return _evaluated(weight.T).T


def _evaluated(view: mx.array) -> mx.array:
    array = mx.contiguous(view)
    mx.eval(array)
    return array


def product(x: mx.array, tiles: mx.array) -> mx.array:
    """``x @ weight.T`` for ``x`` [..., inputs]: [..., outputs]."""
    count, inputs, width = tiles.shape
    lead = x.shape[:-1]
    rows = x.size // inputs
    parts = x.reshape(1, rows, inputs) @ tiles
    if rows > 1:
        parts = parts.swapaxes(0, 1)
    return parts.reshape(*lead, count * width)


class TiledLinear(Linear):
    """A linear layer whose ``weight`` are tiles."""

    def __call__(self, x: mx.array) -> mx.array:
        """As `Linear`."""
        output = product(x, self.weight)
        return output + self.bias if "bias" in self else output


@functools.cache
def _tiled_embedding(base: type) -> type:
    """An embedding that serves as the head too, whose ``weight`` are tiles. On a later stage the
    lookup is the base's own (it yields zeros there, see `boundary`)."""

    def look_up(self: Any, ids: mx.array) -> mx.array:
        width = self.weight.shape[-1]
        found: mx.array = self.weight[ids // width, :, ids % width]
        return found

    def as_linear(self: Any, x: mx.array) -> mx.array:
        return product(x, self.weight)

    members: dict[str, Any] = {"as_linear": as_linear}
    if base is Embedding:
        members["__call__"] = look_up
    return type(base.__name__, (base,), members)


# -- which ----------------------------------------------------------------------------------------


@functools.cache
def best() -> Arrangement:
    """The arrangement with which a decode step's products are fastest in this process."""
    if mx.default_device().type != mx.DeviceType.cpu or blas.describe().deterministic:
        return Arrangement.STORED
    found = trials.costs({one: _trial(one) for one in Arrangement})
    log.info(
        "products of few rows, as multiples: %s",
        ", ".join(f"{one.value} {cost:.2f}" for one, cost in found.items()),
    )
    return chosen(found)


def chosen(costs: dict[Arrangement, float]) -> Arrangement:
    """The fastest by enough to be worth a change. ``costs``: of all of them, in one unit."""
    stored, turned, tiles = (costs[one] for one in Arrangement)
    if min(stored, turned) > TILES_GAIN_MIN * tiles:
        return Arrangement.TILES
    return Arrangement.TURNED if stored > TURNED_GAIN_MIN * turned else Arrangement.STORED


def _trial(arrangement: Arrangement) -> Callable[[], None]:
    """One product for each of `_TRIAL_ROWS` with each of some weights, which together are more than
    a processor keeps near: like those of a model, they come from memory every time."""
    outputs, inputs = _TRIAL_SHAPE
    layers = []
    for index in range(_TRIAL_WEIGHTS):
        layer = Linear(inputs, outputs, bias=False)
        layer.weight = mx.random.normal((outputs, inputs), key=mx.random.key(index))
        _arrange(layer, arrangement)
        layers.append(layer)
    entering = [mx.random.normal((rows, inputs), key=mx.random.key(99)) for rows in _TRIAL_ROWS]
    mx.eval([layer.weight for layer in layers], entering)

    def compute() -> None:
        for rows in entering:
            mx.eval([layer(rows) for layer in layers])

    return compute


# -- doing it -------------------------------------------------------------------------------------


def arrange(
    modules: Iterable[Module], outputs: Callable[[], mx.array], arrangement: Arrangement
) -> int:
    """Give the float32 weights of ``modules`` another layout; returns how many were changed.

    Of embeddings, pass only those that are multiplied with. ``outputs`` runs the model on fixed
    input. If it raises or answers otherwise afterwards, everything is put back and 0 returned.
    """
    if arrangement is Arrangement.STORED:
        return 0
    before = outputs()
    mx.eval(before)
    changed: list[tuple[Any, type]] = []
    for module in modules:
        kind = type(module)
        if _arrange(module, arrangement):
            changed.append((module, kind))
    problem = probing.changed(before, outputs) if changed else None
    if problem is None:
        return len(changed)
    log.warning("weights stay as they are: %s, %s", arrangement.value, problem)
    for module, kind in changed:
        module.__class__ = kind
        tiled = module.weight.ndim == 3
        module.weight = from_tiles(module.weight) if tiled else _evaluated(module.weight)
    return 0


def _arrange(module: Any, arrangement: Arrangement) -> bool:
    """Whether this module's weight was given the layout."""
    is_linear = type(module) is Linear
    weight = module.get("weight") if is_linear or isinstance(module, Embedding) else None
    if weight is None or weight.ndim != 2 or weight.dtype != mx.float32:
        return False
    if arrangement is Arrangement.STORED:
        return False
    width = width_for(*weight.shape) if arrangement is Arrangement.TILES else None
    if width is None:
        module.weight = turned(weight)
        return True
    kind: type = type(module)
    module.weight = to_tiles(weight, width)
    module.__class__ = TiledLinear if is_linear else _tiled_embedding(kind)
    return True
