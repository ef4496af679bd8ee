"""Loop schedules for the fused float32 kernels that TVM's Relax makes of an NCHW denoiser.

A fused kernel has at most one reduction. Its blocks are

    input -> [packed: zero padding or a plain copy] -> sums -> [output: bias, activation, skip]

and a schedule tiles the output, moves the sums under a tile, so that they stay in registers, and moves the packed input
under a band or a tile of the picture, so that it stays in a small buffer on the stack. Nothing that a schedule makes
needs a heap, a thread or state between calls.

TVM's generic CPU pipelines leave such kernels as plain loops, and its search takes minutes for one convolution; these
rules are deterministic and take milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from edgekit.errors import UnsupportedError

Kind = Literal["elementwise", "mean", "vector", "pointwise", "depthwise", "dense", "unknown"]

PIXELS_PER_TILE = 16
CHANNELS_PER_TILE = 4
ROWS_PER_BAND = 8
BYTES_PER_BAND = 48 * 1024
ELEMENTWISE_CHUNK = 8


@dataclass(frozen=True, kw_only=True)
class _Kernel:
    """The blocks of one fused kernel, after everything elementwise was inlined.

    sums: The reduction; None in a kernel without one.
    packed: The block that pads or copies the reduction's input; None where it reads the input itself.
    output: The block that writes the result; never the reduction.
    space: Extents of the reduction's result, (n, c, h, w) in a convolution.
    window: Extents of the axes that are summed over, (c, h, w) in a convolution.
    packed_shape: Extents of the packed input.
    """

    sums: SBlockRV | None
    packed: SBlockRV | None
    output: SBlockRV
    space: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    packed_shape: tuple[int, ...] = ()


def schedule(name: str, function: tirx.PrimFunc, *, lanes: int) -> tirx.PrimFunc:
    """Return the kernel with its loops tiled, unrolled and vectorized for vectors of `lanes` floats.

    Raises:
        UnsupportedError: No rule covers the kernel; the message names it.
    """
    plan = s_tir.Schedule(function)
    try:
        kernel = _analyse(plan)
        rule = _RULES.get(_kind(kernel))
        if rule is not None:
            rule(plan, kernel, lanes)
    except s_tir.ScheduleError as error:
        raise UnsupportedError(f"kernel '{name}' cannot be scheduled: {_last_line(error)}") from error
    if rule is None:
        raise UnsupportedError(
            f"kernel '{name}' has no schedule: it sums over {kernel.window or 'several blocks'} into {kernel.space}",
            remedy="use another engine for this model, or add a rule to edgekit.backends.tvm.schedule",
        )
    return plan.mod["main"]


def _last_line(error: Exception) -> str:
    """Return the reason that TVM gives below its print of the whole kernel."""
    return str(error).strip().splitlines()[-1]


def _kind(kernel: _Kernel) -> Kind:
    if kernel.sums is None:
        return "elementwise"
    if len(kernel.space) != 4 or len(kernel.window) not in (2, 3):
        return "unknown"
    if kernel.space[2:] == (1, 1):
        return "mean" if len(kernel.window) == 2 else "vector"
    if kernel.packed is None:
        return "unknown"
    if len(kernel.window) == 2 or (kernel.window[0] == 1 and kernel.packed_shape[1] == kernel.space[1] > 1):
        return "depthwise"
    same_pixels = kernel.packed_shape[2:] == kernel.space[2:]
    return "pointwise" if kernel.window[1:] == (1, 1) and same_pixels else "dense"


def _analyse(plan: s_tir.Schedule) -> _Kernel:
    root = plan.get_sblock("root")
    (output,) = (block for block in plan.get_child_blocks(root) if not plan.get_consumers(block))
    reductions = [block for block in plan.get_child_blocks(root) if _window(plan, block)]
    sums = reductions[0] if len(reductions) == 1 else None
    packed = _packed(plan, sums) if sums is not None else None
    for block in plan.get_child_blocks(root):
        if not _window(plan, block) and not any(_same(plan, block, kept) for kept in (packed, output) if kept):
            plan.compute_inline(block)
    if len(reductions) > 1:
        return _Kernel(sums=reductions[-1], packed=None, output=output)
    if sums is None:
        return _Kernel(sums=None, packed=None, output=output)
    if _same(plan, sums, output):
        output = plan.cache_write(sums, 0, "global")
    return _Kernel(
        sums=sums,
        packed=packed,
        output=output,
        space=_space(plan, sums),
        window=_window(plan, sums),
        packed_shape=_space(plan, packed) if packed is not None else (),
    )


def _packed(plan: s_tir.Schedule, sums: SBlockRV) -> SBlockRV | None:
    """Return the block between the input and a reduction over a picture; for a single pixel it is not worth a copy.

    TVM puts none before a pool without padding, which therefore gets one here.
    """
    producers = plan.get_producers(sums)
    if len(producers) > 1 or _space(plan, sums)[2:] == (1, 1):
        return None
    return producers[0] if producers else plan.cache_read(sums, 0, "global")


def _same(plan: s_tir.Schedule, one: SBlockRV, other: SBlockRV) -> bool:
    return bool(plan.get(one).same_as(plan.get(other)))


def _space(plan: s_tir.Schedule, block: SBlockRV) -> tuple[int, ...]:
    return tuple(int(i.dom.extent) for i in plan.get(block).iter_vars if i.iter_type == tirx.IterVar.DataPar)


def _window(plan: s_tir.Schedule, block: SBlockRV) -> tuple[int, ...]:
    return tuple(int(i.dom.extent) for i in plan.get(block).iter_vars if i.iter_type == tirx.IterVar.CommReduce)


def _extent(plan: s_tir.Schedule, loop: LoopRV) -> int:
    return int(plan.get(loop).extent)


def _divisor(extent: int, most: int) -> int:
    """Return the largest divisor of `extent` that is at most `most`."""
    return next(size for size in range(min(extent, most), 0, -1) if extent % size == 0)


def _elementwise(plan: s_tir.Schedule, kernel: _Kernel, lanes: int) -> None:
    x = plan.get_loops(kernel.output)[-1]
    _, chunk = plan.split(x, [None, _divisor(_extent(plan, x), ELEMENTWISE_CHUNK)])
    _vectorize(plan, chunk, lanes)


def _vector(plan: s_tir.Schedule, kernel: _Kernel, lanes: int) -> None:
    """A matrix times one pixel, then its epilogue over the picture, as squeeze-and-excitation has it."""
    _elementwise(plan, kernel, lanes)


def _mean(plan: s_tir.Schedule, kernel: _Kernel, lanes: int) -> None:
    """One partial sum per lane over the whole picture, then the sum of the lanes."""
    loops = plan.get_loops(kernel.sums)
    pixels = plan.fuse(*loops[-2:])
    if _extent(plan, pixels) % lanes:
        return
    _, lane = plan.split(pixels, [None, lanes])
    partial = plan.rfactor(lane, 4)
    *_, chunk, lane = plan.get_loops(partial)
    plan.reorder(chunk, lane)
    plan.vectorize(lane)
    plan.decompose_reduction(partial, chunk)


def _pointwise(plan: s_tir.Schedule, kernel: _Kernel, lanes: int) -> None:
    """A 1x1 convolution: the input channels of one tile of pixels are packed once and used by every output channel."""
    _, tile = _sum_tiles_of_channels(plan, kernel, lanes)
    _pack(plan, kernel, tile, lanes)


def _dense(plan: s_tir.Schedule, kernel: _Kernel, lanes: int) -> None:
    """A convolution with a window or a stride: as pointwise, but whole rows are packed where they are small enough."""
    row, tile = _sum_tiles_of_channels(plan, kernel, lanes)
    _, channels, _, width = kernel.packed_shape
    fits = 4 * channels * kernel.window[-2] * width <= BYTES_PER_BAND
    _pack(plan, kernel, row if fits else tile, lanes)


def _depthwise(plan: s_tir.Schedule, kernel: _Kernel, lanes: int) -> None:
    """A convolution of each channel by itself: the rows under a band of the result are padded together."""
    _, _, y, x = plan.get_loops(kernel.output)
    band, _ = plan.split(y, [None, _divisor(_extent(plan, y), ROWS_PER_BAND)])
    tile, _ = plan.split(x, [None, _divisor(_extent(plan, x), PIXELS_PER_TILE)])
    _sum_in_registers(plan, kernel, tile, lanes)
    _pack(plan, kernel, band, lanes)


def _sum_tiles_of_channels(plan: s_tir.Schedule, kernel: _Kernel, lanes: int) -> tuple[LoopRV, LoopRV]:
    """Sum a few output channels of a few pixels at a time; returns the loops over rows and over a row's tiles."""
    n, c, y, x = plan.get_loops(kernel.output)
    tile, x_in_tile = plan.split(x, [None, _divisor(_extent(plan, x), PIXELS_PER_TILE)])
    channels, c_in_tile = plan.split(c, [None, _divisor(_extent(plan, c), CHANNELS_PER_TILE)])
    plan.reorder(n, y, tile, channels, c_in_tile, x_in_tile)
    _sum_in_registers(plan, kernel, channels, lanes)
    return y, tile


def _sum_in_registers(plan: s_tir.Schedule, kernel: _Kernel, tile: LoopRV, lanes: int) -> None:
    """Move the sums under the loop `tile` of the output and unroll what is inside until it fits in registers."""
    plan.compute_at(kernel.sums, tile, preserve_unit_loops=True)
    loops = plan.get_loops(kernel.sums)
    summed = loops[-len(kernel.window) :]
    inside = loops[-len(kernel.window) - 4 : -len(kernel.window)]
    plan.reorder(*summed, *inside)
    for block, depth in ((kernel.sums, len(loops) - 4), (kernel.output, len(loops) - len(kernel.window) - 4)):
        *unrolled, x = plan.get_loops(block)[depth:]
        for loop in unrolled:
            _unroll(plan, loop)
        _vectorize(plan, x, lanes)
    for loop in summed[-2:]:
        _unroll(plan, loop)
    plan.decompose_reduction(kernel.sums, summed[0])


def _pack(plan: s_tir.Schedule, kernel: _Kernel, loop: LoopRV, lanes: int) -> None:
    """Move the packed input under `loop`; in whole rows the padding is set apart, so that the rest is a plain copy."""
    plan.compute_at(kernel.packed, loop, preserve_unit_loops=True)
    x = plan.get_loops(kernel.packed)[-1]
    columns = int(plan.get(kernel.packed).reads[0].source.ty.shape[-1])
    left = (kernel.packed_shape[-1] - columns) // 2
    right = _extent(plan, x) - left - columns
    if left > 0 and right >= 0:
        plan.loop_partition(x, [left, columns] if right else [left])  # the last part is what remains
    else:
        _vectorize(plan, x, lanes)


def _vectorize(plan: s_tir.Schedule, loop: LoopRV, lanes: int) -> None:
    extent = _extent(plan, loop)
    width = lanes if extent % lanes == 0 else _divisor(extent, lanes)
    if width == 1:
        return
    outer, inner = plan.split(loop, [None, width])
    plan.vectorize(inner)
    _unroll(plan, outer)


def _unroll(plan: s_tir.Schedule, loop: LoopRV) -> None:
    if 1 < _extent(plan, loop) <= PIXELS_PER_TILE:
        plan.unroll(loop)


_RULES: dict[Kind, Callable[[s_tir.Schedule, _Kernel, int], None]] = {
    "elementwise": _elementwise,
    "mean": _mean,
    "vector": _vector,
    "pointwise": _pointwise,
    "dense": _dense,
    "depthwise": _depthwise,
}
