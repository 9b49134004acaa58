"""From a model directory to an mlx-lm module whose arrays are not yet read.

mlx-lm does the loading (its model classes, its ``sanitize``, its quantization rules). Everything
stays lazy: an array is read from disk when it is first evaluated, so a span that never evaluates a
layer never holds it. Beside the module, `load_module` returns which *stored* tensors each module's
parameters came from, so that a span's fingerprint and verification speak of bytes on disk. A
parameter that ``sanitize`` passed through is traced by identity; one that it computed (stacked
experts, split projections) is traced to every stored tensor of the same layer that nothing else
claimed.

`DTypePolicy` decides what the arrays become. On this project's CPUs float32 is the fast type and a
packed 4-bit product is some eighty times slower than the dense one, so AUTO unpacks to float32 on a
CPU when memory allows, and keeps what is stored on a GPU.
"""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx.utils import tree_unflatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from stage_worker.boundary import parameters
from stage_worker.weights import read_config, weight_files
from stagemesh.errors import ModelDamaged, ModelError, ModelRefused

_LAYER_INDEX = re.compile(r"\.(\d+)\.")
_UNPACKED: dict[type, type] = {
    QuantizedLinear: Linear,
    QuantizedEmbedding: Embedding,
    QuantizedSwitchLinear: SwitchLinear,
    QuantizedMultiLinear: MultiLinear,
}


class DTypePolicy(enum.Enum):
    """What the weights (and so the activations) become when they are loaded."""

    AUTO = "auto"
    """float32 on a CPU, as stored on a GPU."""
    STORED = "stored"
    """As stored; packed weights stay packed."""
    F32 = "float32"
    F16 = "float16"
    BF16 = "bfloat16"

    def resolve(self) -> DTypePolicy:
        """AUTO as the policy it stands for on this machine's default device."""
        if self is not DTypePolicy.AUTO:
            return self
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        return DTypePolicy.F32 if on_cpu else DTypePolicy.STORED


_MLX_DTYPE = {
    DTypePolicy.F32: mx.float32,
    DTypePolicy.F16: mx.float16,
    DTypePolicy.BF16: mx.bfloat16,
}


@dataclass(frozen=True, slots=True)
class LoadedModule:
    """An mlx-lm model with lazy arrays, its configuration, and stored tensor names by module
    path."""

    model: Module
    config: dict[str, Any]
    sources: Mapping[str, frozenset[str]]


def load_module(directory: Path, policy: DTypePolicy = DTypePolicy.AUTO) -> LoadedModule:
    """Load the model in ``directory`` lazily under ``policy``.

    Raises ModelNotFound, ModelDamaged (a tensor is missing or a file is broken) and ModelRefused
    (an unsupported type, or a configuration that asks to run the model's own code).
    """
    if read_config(directory).get("model_file") is not None:
        raise ModelRefused("the model brings its own code, which is never run")
    weight_files(directory)
    tracer = _SourceTracer()
    try:
        model, config = mlx_lm_utils.load_model(
            directory, lazy=True, get_model_classes=tracer.classes
        )
    except ModelError:
        raise
    except Exception as error:
        raise _load_error(error) from error
    apply_policy(model, policy)
    return LoadedModule(model, config, tracer.by_module())


def _load_error(error: Exception) -> ModelError:
    text = str(error).strip() or type(error).__name__
    first_line = text.splitlines()[0][:300]
    if "Missing" in first_line or isinstance(error, (RuntimeError, OSError)):
        return ModelDamaged(f"the model's weights are incomplete or unreadable: {text[:300]}")
    return ModelRefused(f"mlx-lm cannot build this model: {first_line}")


class _SourceTracer:
    """Wraps a model's ``sanitize`` to see which stored tensor became which parameter."""

    def __init__(self) -> None:
        self._stored: dict[str, mx.array] = {}
        self._loaded: dict[str, mx.array] = {}

    def classes(self, config: dict[str, Any]) -> tuple[Any, Any]:
        """mlx-lm's hook for choosing classes: its own choice, with ``sanitize`` observed."""
        # mlx-lm's own default for this very hook, private as it is.
        model_class, arguments_class = mlx_lm_utils._get_classes(config)  # noqa: SLF001

        def build(arguments: Any) -> Module:
            model: Module = model_class(arguments)
            original = getattr(model, "sanitize", lambda weights: weights)

            def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
                self._stored = dict(weights)
                self._loaded = dict(original(weights))
                object.__delattr__(model, "sanitize")
                return self._loaded

            object.__setattr__(model, "sanitize", sanitize)
            return model

        return build, arguments_class

    def by_module(self) -> dict[str, frozenset[str]]:
        """Stored tensor names by the path of the module that holds the parameter."""
        name_of = {id(array): name for name, array in self._stored.items()}
        claimed: set[str] = set()
        found: defaultdict[str, set[str]] = defaultdict(set)
        derived: list[str] = []
        for path, array in self._loaded.items():
            name = name_of.get(id(array))
            if name is None:
                derived.append(path)
            else:
                claimed.add(name)
                found[module_path(path)].add(name)
        left: defaultdict[int | None, set[str]] = defaultdict(set)
        for name in self._stored.keys() - claimed:
            left[layer_index(name)].add(name)
        for path in derived:
            found[module_path(path)] |= left[layer_index(path)]
        return {path: frozenset(names) for path, names in found.items()}


def module_path(parameter: str) -> str:
    """``"model.layers.3.mlp.up_proj"`` for ``"model.layers.3.mlp.up_proj.weight"``."""
    return parameter.rpartition(".")[0]


def layer_index(name: str) -> int | None:
    """The first number between dots in a tensor's name, or None for an edge tensor."""
    found = _LAYER_INDEX.search(f".{name}.")
    return int(found.group(1)) if found else None


def apply_policy(model: Any, policy: DTypePolicy) -> None:
    """Unpack and cast ``model``'s arrays lazily, in place."""
    dtype = _MLX_DTYPE.get(policy.resolve())
    if dtype is None:
        return
    unpacked = [
        (name, _unpack(module, dtype))
        for name, module in model.named_modules()
        if type(module) in _UNPACKED
    ]
    if unpacked:
        model.update_modules(tree_unflatten(unpacked))
    keep = getattr(model, "cast_predicate", None) if dtype != mx.float32 else None
    casts = [
        (path, array.astype(dtype))
        for path, array in parameters(model)
        if mx.issubdtype(array.dtype, mx.floating)
        and array.dtype != dtype
        and (keep is None or keep(path))
    ]
    if casts:
        model.update(tree_unflatten(casts))


def _unpack(module: Any, dtype: mx.Dtype) -> Any:
    """The dense counterpart of a quantized module, its weight computed in ``dtype``."""
    biases = module.get("biases")
    scales = module.scales
    if module.mode == "affine":
        scales = scales.astype(dtype)
        biases = None if biases is None else biases.astype(dtype)
    kind: Any = _UNPACKED[type(module)]
    dense: Any = kind.__new__(kind)
    # Not the class's own initialiser, which would draw random weights.
    Module.__init__(dense)  # type: ignore[no-untyped-call]
    dense.weight = mx.dequantize(
        module.weight,
        scales,
        biases,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        global_scale=module.get("global_scale"),
        dtype=dtype,
    )
    if "bias" in module:
        dense.bias = module.bias
    dense.eval()
    return dense


def evaluate(modules: Iterable[Module]) -> None:
    """Read and convert the parameters of each module in turn, so that sources are freed as it goes.

    Raises ModelDamaged if a file cannot be read.
    """
    for module in modules:
        try:
            mx.eval([array for _, array in parameters(module)])
        except RuntimeError as error:
            raise ModelDamaged(f"a weight file became unreadable: {error}") from error
