"""What the driver runs: the kernel calls in order, and a place for every tensor that they read and write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import tvm
from numpy.typing import NDArray

from edgekit.errors import UnsupportedError

ALIGNMENT = 64


@dataclass(frozen=True)
class Input:
    """The network's input of that name."""

    name: str


@dataclass(frozen=True)
class Constant:
    """Weights or a bias, compared and stored by value."""

    data: bytes


@dataclass(frozen=True)
class Result:
    """What the step of that number writes; `bytes` long."""

    step: int
    bytes: int


Tensor = Input | Constant | Result


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of a kernel."""

    kernel: str
    reads: tuple[Tensor, ...]
    writes: Result


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the tensors lie.

    weights: Every constant once, each at a multiple of ALIGNMENT.
    weight_offsets: Constant -> its first byte in `weights`.
    arena_bytes: Size of the working memory.
    arena_offsets: Number of a step -> first byte of its result in the arena; the last step writes the network's output.
    """

    weights: bytes
    weight_offsets: Mapping[Constant, int]
    arena_bytes: int
    arena_offsets: Mapping[int, int]


def steps_of(module: tvm.IRModule) -> tuple[Step, ...]:
    """Return the calls that `main` of a fused module makes, in order; the last one writes the network's output.

    Raises:
        UnsupportedError: Something in it is not a call of a float32 kernel; the message names it.
    """
    main = module["main"]
    known: dict[tvm.ir.Var, Tensor] = {}
    for parameter in main.params:
        _float_bytes(parameter)
        known[parameter] = Input(parameter.name)
    steps: list[Step] = []
    for binding in chain.from_iterable(block.bindings for block in main.body.blocks):
        if isinstance(binding.value, tvm.ir.Var):
            known[binding.var] = known[binding.value]
            continue
        kernel, arguments = _call(binding)
        reads = tuple(_tensor(argument, known) for argument in arguments)
        steps.append(Step(kernel=kernel, reads=reads, writes=Result(len(steps), _float_bytes(binding.var))))
        known[binding.var] = steps[-1].writes
    if not steps or known[main.body.body] != steps[-1].writes:
        raise UnsupportedError("the network's output is not what its last kernel writes")
    return tuple(steps)


def lay_out(steps: Sequence[Step], stored: Sequence[Step] = ()) -> Layout:
    """Return a place for every tensor, results that live at the same time apart from each other.

    `stored` names the steps whose constants are stored, where that is more than `steps`.

    Greedy by size, as in Pisarchyk and Lee, "Efficient memory management for deep neural net inference" (2020): the
    largest result first, each at the lowest offset that no result alive at the same time occupies.
    """
    weight_offsets, weights = _weights(stored or steps)
    last_read = {step.writes.step: step.writes.step for step in steps}
    for number, step in enumerate(steps):
        last_read.update({tensor.step: number for tensor in step.reads if isinstance(tensor, Result)})
    placed: dict[Result, int] = {}
    for result in sorted((step.writes for step in steps[:-1]), key=lambda result: (-result.bytes, result.step)):
        placed[result] = _lowest_free(result, placed, last_read)
    return Layout(
        weights=weights,
        weight_offsets=weight_offsets,
        arena_bytes=max((offset + _aligned(result.bytes) for result, offset in placed.items()), default=ALIGNMENT),
        arena_offsets={result.step: offset for result, offset in placed.items()},
    )


def _call(binding: tvm.relax.VarBinding) -> tuple[str, Sequence[tvm.ir.Expr]]:
    call = binding.value
    operator = getattr(getattr(call, "op", None), "name", type(call).__name__)
    if operator != "relax.call_tir":
        raise UnsupportedError(f"the network computes '{binding.var.name}' by '{operator}', which is not a kernel")
    return call.args[0].name_hint, call.args[1].fields


def _tensor(argument: tvm.ir.Expr, known: Mapping[tvm.ir.Var, Tensor]) -> Tensor:
    if not isinstance(argument, tvm.ir.GenericConst):
        return known[argument]
    data: NDArray[np.float32] = argument.value.numpy()
    if data.dtype != np.float32:
        raise UnsupportedError(f"the network has a constant of type {data.dtype}, expected float32")
    return Constant(np.ascontiguousarray(data).tobytes())


def _float_bytes(variable: tvm.ir.Var) -> int:
    shape = getattr(variable.ty, "shape", None)
    if shape is None or variable.ty.dtype != "float32":
        raise UnsupportedError(f"'{variable.name}' is {variable.ty}, expected one float32 tensor")
    return 4 * math.prod(int(extent) for extent in shape.values)


def _weights(steps: Sequence[Step]) -> tuple[dict[Constant, int], bytes]:
    offsets: dict[Constant, int] = {}
    weights = bytearray()
    for constant in chain.from_iterable(step.reads for step in steps):
        if isinstance(constant, Constant) and constant not in offsets:
            offsets[constant] = len(weights)
            weights += constant.data.ljust(_aligned(len(constant.data)), b"\0")
    return offsets, bytes(weights)


def _lowest_free(result: Result, placed: Mapping[Result, int], last_read: Mapping[int, int]) -> int:
    """Return the lowest offset at which `result` touches nothing that is alive with it."""
    offset = 0
    for other, start in sorted(placed.items(), key=lambda item: item[1]):
        together = other.step <= last_read[result.step] and result.step <= last_read[other.step]
        if together and offset < start + _aligned(other.bytes) and start < offset + _aligned(result.bytes):
            offset = start + _aligned(other.bytes)
    return offset


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
