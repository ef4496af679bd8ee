"""An ML Program run operator by operator with torch: what the package computes, without Core ML.

Every operator computes in float32 on the stored constants, and its result is rounded to half precision where the
program declares fp16. That is an engine with fp16 storage and fp32 accumulation; the Neural Engine's own accumulation
is not documented, so agreement here says that the package is right, not what a device computes to the last bit.

Operators: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit.backends.coreml.program import REPLACE, Constant, Program, Step, TensorType
from edgekit.errors import IntegrityError, UnsupportedError

Value = Tensor | str


class Operands:
    """The inputs of one operator by MIL name, in the type that the operator wants."""

    def __init__(self, step: Step, values: Mapping[str, Value]) -> None:
        self._step, self._values = step, values

    def has(self, name: str) -> bool:
        """Return whether the program gives this input."""
        return name in self._step.arguments

    def tensor(self, name: str) -> Tensor:
        """Return a tensor input."""
        value = self._value(name)
        if isinstance(value, str):
            raise self.unsupported(name, value)
        return value

    def optional(self, name: str) -> Tensor | None:
        """Return a tensor input, None where the program leaves it out."""
        return self.tensor(name) if self.has(name) else None

    def tensors(self, name: str) -> list[Tensor]:
        """Return an input that is a list of tensors."""
        names = self._step.arguments[name]
        values = [self._values[n] for n in ((names,) if isinstance(names, str) else names)]
        return [v for v in values if isinstance(v, Tensor)]

    def number(self, name: str, default: float) -> float:
        """Return a scalar input."""
        return float(self.tensor(name)) if self.has(name) else default

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return a boolean input."""
        return bool(self.tensor(name)) if self.has(name) else default

    def integers(self, name: str, default: list[int]) -> list[int]:
        """Return a list of integers."""
        return [int(n) for n in self.tensor(name).flatten()] if self.has(name) else default

    def text(self, name: str, default: str) -> str:
        """Return a string input."""
        value = self._value(name) if self.has(name) else default
        if not isinstance(value, str):
            raise self.unsupported(name, value)
        return value

    def unsupported(self, name: str, value: object) -> UnsupportedError:
        """Return the error for a value that the reference does not evaluate."""
        return UnsupportedError(
            f"operator '{self._step.name}' ({self._step.operator}): no reference evaluation for {name} = {value}",
            remedy=REPLACE,
        )

    def _value(self, name: str) -> Value:
        key = self._step.arguments[name]
        if not isinstance(key, str):
            raise self.unsupported(name, key)
        return self._values[key]


def run(program: Program, constants: Mapping[str, Value], feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the program's outputs.

    Args:
        program: As read from the package.
        constants: From `prepare`.
        feeds: Input name -> float32 tensor of the declared shape.

    Raises:
        UnsupportedError: An operator, or a setting of one, that is not evaluated here (exit code 4).
        IntegrityError: An operator's result has not the shape that the package declares (exit code 6).
    """
    values: dict[str, Value] = {**constants}
    values |= {name: _as_declared(feeds[name], type_, name) for name, type_ in program.inputs.items()}
    with torch.no_grad():
        for step in program.steps:
            if step.operator not in OPERATORS:
                raise UnsupportedError(
                    f"operator '{step.name}': no reference evaluation for '{step.operator}'", remedy=REPLACE
                )
            made = OPERATORS[step.operator](Operands(step, values))
            results = (made,) if isinstance(made, Tensor) else made
            for result, (name, type_) in zip(results, step.results.items(), strict=True):
                values[name] = _as_declared(result, type_, step.name)
    return {name: value for name in program.outputs if isinstance(value := values[name], Tensor)}


def prepare(program: Program) -> dict[str, Value]:
    """Return the program's constants as torch values: floats as float32, integers as int64."""
    return {name: _to_torch(value) for name, value in program.constants.items()}


def _to_torch(value: Constant) -> Value:
    if isinstance(value, str):
        return value
    kinds = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}
    return torch.tensor(value.astype(kinds[value.dtype.kind]))


def _as_declared(value: Tensor, declared: TensorType, name: str) -> Tensor:
    if tuple(value.shape) != declared.shape:
        raise IntegrityError(f"'{name}' gives {tuple(value.shape)}, the package declares {declared.shape}")
    return value.half().float() if declared.dtype == "fp16" else value


def _padding(op: Operands, size: torch.Size, kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Return the padding as torch's `pad` takes it: (left, right, top, bottom)."""
    kind = op.text("pad_type", "valid")
    if kind == "valid":
        return [0, 0, 0, 0]
    if kind == "custom":
        top, bottom, left, right = op.integers("pad", [0, 0, 0, 0])
        return [left, right, top, bottom]
    if kind != "same":
        raise op.unsupported("pad_type", kind)
    pairs = []
    for n, k, s, d in zip(reversed(size), reversed(kernel), reversed(strides), reversed(dilations), strict=False):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pairs += [total // 2, total - total // 2]
    return pairs


def _conv(op: Operands) -> Tensor:
    x, weight = op.tensor("x"), op.tensor("weight")
    if x.ndim != 4:
        raise op.unsupported("x", f"a tensor of {x.ndim} dimensions")
    strides, dilations = op.integers("strides", [1, 1]), op.integers("dilations", [1, 1])
    x = F.pad(x, _padding(op, x.shape, list(weight.shape[2:]), strides, dilations))
    return F.conv2d(x, weight, op.optional("bias"), strides, 0, dilations, int(op.number("groups", 1)))


def _conv_transpose(op: Operands) -> Tensor:
    x, weight = op.tensor("x"), op.tensor("weight")
    kind = op.text("pad_type", "valid")
    if x.ndim != 4 or kind not in ("valid", "custom"):
        raise op.unsupported("pad_type", kind)
    strides, dilations = op.integers("strides", [1, 1]), op.integers("dilations", [1, 1])
    y = F.conv_transpose2d(x, weight, op.optional("bias"), strides, 0, 0, int(op.number("groups", 1)), dilations)
    top, bottom, left, right = op.integers("pad", [0] * 4) if kind == "custom" else [0] * 4
    height, width = op.integers("output_shape", [0, 0, y.shape[2] - top - bottom, y.shape[3] - left - right])[-2:]
    if top + height > y.shape[2] or left + width > y.shape[3]:
        # Beyond the full result (an output_padding past the kernel) there is nothing but the bias.
        raise op.unsupported("output_shape", f"{height}x{width}")
    return y[:, :, top : top + height, left : left + width]


def _crop(op: Operands) -> Tensor:
    x = op.tensor("x")
    (top, bottom), (left, right) = op.integers("crop_height", [0, 0]), op.integers("crop_width", [0, 0])
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def _max_pool(op: Operands) -> Tensor:
    x, kernel = op.tensor("x"), op.integers("kernel_sizes", [])
    _refuse_ceil_mode(op)
    strides = op.integers("strides", [1, 1])
    padding = _padding(op, x.shape, kernel, strides, [1, 1])
    return F.max_pool2d(F.pad(x, padding, value=float("-inf")), kernel, strides)


def _avg_pool(op: Operands) -> Tensor:
    x, kernel = op.tensor("x"), op.integers("kernel_sizes", [])
    _refuse_ceil_mode(op)
    strides = op.integers("strides", [1, 1])
    padding = _padding(op, x.shape, kernel, strides, [1, 1])
    mean = F.avg_pool2d(F.pad(x, padding), kernel, strides)
    if op.flag("exclude_padding_from_average"):
        mean = mean / F.avg_pool2d(F.pad(torch.ones_like(x[:1, :1]), padding), kernel, strides)
    return mean


def _refuse_ceil_mode(op: Operands) -> None:
    if op.flag("ceil_mode"):
        raise op.unsupported("ceil_mode", True)


def _pad(op: Operands) -> Tensor:
    x, pad = op.tensor("x"), op.integers("pad", [])
    pairs = [n for i in reversed(range(0, len(pad), 2)) for n in pad[i : i + 2]]
    mode = op.text("mode", "constant")
    if mode == "constant":
        return F.pad(x, pairs, value=op.number("constant_val", 0.0))
    if mode not in ("reflect", "replicate") or any(pairs[4:]):
        raise op.unsupported("mode", mode)
    return F.pad(x, pairs[:4], mode=mode)


def _batch_norm(op: Operands) -> Tensor:
    mean, variance = op.tensor("mean"), op.tensor("variance")
    gamma, beta = op.optional("gamma"), op.optional("beta")
    return F.batch_norm(op.tensor("x"), mean, variance, gamma, beta, eps=op.number("epsilon", 1e-5))


def _instance_norm(op: Operands) -> Tensor:
    gamma, beta = op.optional("gamma"), op.optional("beta")
    return F.instance_norm(op.tensor("x"), weight=gamma, bias=beta, eps=op.number("epsilon", 1e-5))


def _layer_norm(op: Operands) -> Tensor:
    x, axes = op.tensor("x"), op.integers("axes", [])
    shape = x.shape[-len(axes) :]
    if sorted(axis % x.ndim for axis in axes) != list(range(x.ndim - len(axes), x.ndim)):
        raise op.unsupported("axes", axes)
    return F.layer_norm(x, shape, op.optional("gamma"), op.optional("beta"), op.number("epsilon", 1e-5))


def _prelu(op: Operands) -> Tensor:
    return F.prelu(op.tensor("x"), op.tensor("alpha"))


def _gelu(op: Operands) -> Tensor:
    modes = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
    mode = op.text("mode", "EXACT")
    if mode not in modes:
        raise op.unsupported("mode", mode)
    return F.gelu(op.tensor("x"), approximate=modes[mode])


def _thresholded_relu(op: Operands) -> Tensor:
    x = op.tensor("x")
    return torch.where(x >= op.number("alpha", 1.0), x, torch.zeros_like(x))


def _sigmoid_hard(op: Operands) -> Tensor:
    return (op.number("alpha", 0.2) * op.tensor("x") + op.number("beta", 0.5)).clamp(0, 1)


def _upsample(op: Operands, mode: str) -> Tensor:
    scale = (op.number("scale_factor_height", 1.0), op.number("scale_factor_width", 1.0))
    corners = op.flag("align_corners", default=True) if mode == "bilinear" else None
    if corners is not None and op.flag("half_pixel_centers", default=not corners) == corners:
        raise op.unsupported("half_pixel_centers", corners)
    return F.interpolate(op.tensor("x"), scale_factor=scale, mode=mode, align_corners=corners)


def _concat(op: Operands) -> Tensor:
    if op.flag("interleave"):
        raise op.unsupported("interleave", True)
    return torch.cat(op.tensors("values"), int(op.number("axis", 0)))


def _expand_dims(op: Operands) -> Tensor:
    x, axes = op.tensor("x"), op.integers("axes", [])
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _fill_like(op: Operands) -> Tensor:
    return torch.full_like(op.tensor("ref_tensor"), op.number("value", 0.0))


def _slice_by_index(op: Operands) -> Tensor:
    x = op.tensor("x")
    begin, end = op.integers("begin", []), op.integers("end", [])
    strides = op.integers("stride", [1] * x.ndim)
    all_below, all_above, alone = (op.integers(f"{name}_mask", [0] * x.ndim) for name in ("begin", "end", "squeeze"))
    if min(strides) < 1:
        raise op.unsupported("stride", strides)
    chosen = [
        begin[i]
        if alone[i]
        else slice(None if all_below[i] else begin[i], None if all_above[i] else end[i], strides[i])
        for i in range(x.ndim)
    ]
    return x[tuple(chosen)]


def _split(op: Operands) -> tuple[Tensor, ...]:
    x, axis = op.tensor("x"), int(op.number("axis", 0))
    parts = int(op.number("num_splits", 1))
    return torch.split(x, op.integers("split_sizes", [x.shape[axis] // parts] * parts), axis)


def _cast(op: Operands) -> Tensor:
    dtype = op.text("dtype", "")
    if dtype not in ("fp16", "fp32"):
        raise op.unsupported("dtype", dtype)
    return op.tensor("x")


def _axes(op: Operands) -> list[int]:
    return op.integers("axes", list(range(op.tensor("x").ndim)))


OPERATORS: dict[str, Callable[[Operands], Tensor | tuple[Tensor, ...]]] = {
    "add": lambda op: op.tensor("x") + op.tensor("y"),
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "clip": lambda op: op.tensor("x").clamp(op.number("alpha", 0), op.number("beta", 1)),
    "concat": _concat,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "crop": _crop,
    "expand_dims": _expand_dims,
    "fill_like": _fill_like,
    "gelu": _gelu,
    "identity": lambda op: op.tensor("x"),
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "leaky_relu": lambda op: F.leaky_relu(op.tensor("x"), op.number("alpha", 0.01)),
    "max_pool": _max_pool,
    "maximum": lambda op: torch.maximum(op.tensor("x"), op.tensor("y")),
    "minimum": lambda op: torch.minimum(op.tensor("x"), op.tensor("y")),
    "mul": lambda op: op.tensor("x") * op.tensor("y"),
    "pad": _pad,
    "pixel_shuffle": lambda op: F.pixel_shuffle(op.tensor("x"), int(op.number("upscale_factor", 1))),
    "pixel_unshuffle": lambda op: F.pixel_unshuffle(op.tensor("x"), int(op.number("downscale_factor", 1))),
    "prelu": _prelu,
    "real_div": lambda op: op.tensor("x") / op.tensor("y"),
    "reduce_max": lambda op: op.tensor("x").amax(_axes(op), keepdim=op.flag("keep_dims")),
    "reduce_mean": lambda op: op.tensor("x").mean(_axes(op), keepdim=op.flag("keep_dims")),
    "relu": lambda op: F.relu(op.tensor("x")),
    "reshape": lambda op: op.tensor("x").reshape(op.integers("shape", [])),
    "sigmoid": lambda op: torch.sigmoid(op.tensor("x")),
    "sigmoid_hard": _sigmoid_hard,
    "silu": lambda op: F.silu(op.tensor("x")),
    "slice_by_index": _slice_by_index,
    "split": _split,
    "sqrt": lambda op: op.tensor("x").sqrt(),
    "square": lambda op: op.tensor("x").square(),
    "sub": lambda op: op.tensor("x") - op.tensor("y"),
    "tanh": lambda op: torch.tanh(op.tensor("x")),
    "thresholded_relu": _thresholded_relu,
    "tile": lambda op: op.tensor("x").tile(op.integers("reps", [])),
    "transpose": lambda op: op.tensor("x").permute(op.integers("perm", [])),
    "upsample_bilinear": lambda op: _upsample(op, "bilinear"),
    "upsample_nearest_neighbor": lambda op: _upsample(op, "nearest"),
}
