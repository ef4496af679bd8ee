"""The integer kernels: loops over pixels and channels, written on top of a `Machine`.

Feature maps lie as (row, column, channel) with a margin of zero points around them, so that a window at the border
reads like any other: the kernel that writes a map also fills its margin. A dense window is a matrix product whose
inner axis is, per row of the window, one run of bytes. A depthwise window takes four neighbours of a row at a time, so
that the instruction that sums four products sums over the row. What only moves values is the same on every machine: a
vector of bytes, signed or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

from tvm import tirx

from edgekit.backends.tvm import tiles
from edgekit.backends.tvm.emitter import Buffer, Emitter, Expr, Index, intrinsic, load, shuffle
from edgekit.backends.tvm.integer import Resampling
from edgekit.backends.tvm.machine import Added, Constants, Machine

QUAD = 4
VECTOR_BYTES = 16
_LOOP_QUADS = 8
_ROWS_PER_BAND = 8
_PIXELS_PER_BLOCK = 16
_STORED_PIXELS = 4
_FLOAT = "float32"
_SQUARE = ((0, 0), (0, 1), (1, 0), (1, 1))
Place = tuple[Index, Index, Index]


@dataclass(frozen=True, kw_only=True)
class Map:
    """Where a feature map lies: (height + 2 margin, width + 2 margin, channels) bytes and some to read beyond.

    rest_bits: As in `integer.Feature`; the second plane, if any, follows the first.
    """

    height: int
    width: int
    channels: int
    margin: int
    rest_bits: int = 0

    @property
    def row(self) -> int:
        """Bytes from one row to the next."""
        return (self.width + 2 * self.margin) * self.channels

    @property
    def plane(self) -> int:
        """Bytes of one plane. Vectors and groups of four pixels are read whole at the end too."""
        return (self.height + 2 * self.margin) * self.row + QUAD * self.channels + VECTOR_BYTES

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.plane * (2 if self.rest_bits else 1)

    def index(self, y: Index, x: Index, channel: Index = 0) -> Index:
        """Return the place of a value; row and column may lie in the margin."""
        return (y + self.margin) * self.row + (x + self.margin) * self.channels + channel


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How sums are stored as a feature map; the parts of `integer.Convolution` that change the code."""

    writes: Map
    shuffle: int
    residual: Map | None
    fraction: int
    low: int
    left: bool


@dataclass(frozen=True, kw_only=True)
class ToPicture:
    """How sums are stored as the picture; see `integer.Picture`."""

    planes: int
    height: int
    width: int
    block: int
    places: tuple[tuple[int, int, int], ...]
    onto_noisy: bool


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a convolution reads for each pixel of (height, width)."""

    reads: Map
    rows: int
    columns: int
    stride: int
    padding: int
    height: int
    width: int

    def index(self, y: Index, x: Index, row: Index = 0, column: int = 0, channel: Index = 0) -> Index:
        """Return the place of a value in the window of the pixel (y, x)."""
        top, left = y * self.stride + (row - self.padding), x * self.stride + (column - self.padding)
        return self.reads.index(top, left, channel)

    @property
    def run(self) -> int:
        """Groups of four bytes in one row of a dense window."""
        return self.columns * self.reads.channels // QUAD

    @property
    def groups(self) -> int:
        """Groups of four pixels in one row of a depthwise window."""
        return -(-self.columns // QUAD)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A convolution over all channels.

    wide: Whether it reads both planes, with weights of 16 bits; those of the second follow the first's.
    folded: Columns that lie beside each other in the lanes where `window` has the first alone: lane c x n + k of n
        outputs sums what a pixel gives to output k of the pixel c before it. 1 where the window has all columns.
    """

    window: Window
    channels: int
    ends: Finish | ToPicture
    wide: bool = False
    folded: int = 1


@dataclass(frozen=True, kw_only=True)
class Depthwise:
    """A convolution of each channel by itself."""

    window: Window
    ends: Finish


@dataclass(frozen=True, kw_only=True)
class FromPicture:
    """The picture on a grid; see `integer.Quantize`."""

    planes: int
    block: int
    places: tuple[tuple[int, int, int] | None, ...]
    writes: Map


@dataclass(frozen=True, kw_only=True)
class Level:
    """A bias with the noise level in it."""

    channels: int


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Maps one behind the other along the channels; see `integer.Concat`.

    parts: Of each map its channels, without those that fill it up, and where it lies.
    """

    parts: tuple[tuple[int, Map], ...]
    writes: Map


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """A map at twice or half its resolution; see `integer.Resample`."""

    how: Resampling
    reads: Map
    writes: Map


Kernel = Dense | Depthwise | FromPicture | Level | Joined | Resampled


def write(kernel: Kernel, name: str, machine: Machine) -> tirx.PrimFunc:
    """Return the code of a kernel; its parameters are in the order of `program`'s steps."""
    if isinstance(kernel, Dense):
        return (_TiledDense if is_tiled(kernel, machine) else _Dense)(kernel, machine).function(name)
    if isinstance(kernel, Depthwise):
        return _Depthwise(kernel, machine).function(name)
    if isinstance(kernel, Joined):
        return _joined(kernel, name, machine)
    if isinstance(kernel, Resampled):
        return _resampled(kernel, name, machine)
    return _from_picture(kernel, name, machine) if isinstance(kernel, FromPicture) else _level(kernel, name)


def vectors_of(kernel: Dense | Depthwise, machine: Machine) -> int:
    """Return how many vectors of output channels a convolution sums at a time."""
    if isinstance(kernel, Depthwise):
        return math.gcd(kernel.ends.writes.channels // machine.lanes, machine.vectors)
    vectors = -(-kernel.channels // machine.lanes)
    if isinstance(kernel.ends, ToPicture):
        return vectors
    if is_tiled(kernel, machine):
        return math.gcd(vectors, machine.vectors)
    # As many products as possible for each vector of weights and each group of activations that is loaded.
    fitting = [n for n in range(1, machine.most_vectors + 1) if vectors % n == 0]
    return min(fitting, key=lambda n: (1 / n + 1 / (machine.registers // n), -n))


def is_tiled(kernel: Dense, machine: Machine) -> bool:
    """Return whether a convolution is summed in tile registers: whole vectors of channels, a tile's pixels in a row."""
    window, to_map = kernel.window, isinstance(kernel.ends, Finish)
    fits = window.width >= tiles.ROWS and window.reads.channels % VECTOR_BYTES == 0
    return machine.tiles and to_map and fits and not kernel.wide


def folded_columns(window: Window, outputs: int, machine: Machine) -> int:
    """Return how many columns of a window lie in the lanes of a vector that its few outputs would leave empty."""
    return window.columns if window.stride == 1 and outputs * window.columns <= machine.lanes else 1


def lanes_of(kernel: Dense | Depthwise, machine: Machine) -> list[int]:
    """Return the channels, counted from the first of a block, of the lanes that a convolution sums at a time."""
    vectors = vectors_of(kernel, machine)
    return list(range(vectors * machine.lanes)) if isinstance(kernel.ends, ToPicture) else machine.order(vectors)


class _Ending:
    """The end of a convolution: parameters, constants of a block of channels, and the stores."""

    def __init__(self, e: Emitter, machine: Machine, ends: Finish | ToPicture, channels: int) -> None:
        self._e, self._machine, self._ends = e, machine, ends
        self.biases = e.parameter("bias", "int32", channels)
        if isinstance(ends, ToPicture):
            self._scale = e.parameter("scale", _FLOAT, channels)
            size = ends.planes * ends.height * ends.width
            if ends.onto_noisy:
                self._noisy = e.parameter("noisy", _FLOAT, size)
            self._picture = e.parameter("denoised", _FLOAT, size)
            return
        self._shift = e.parameter("shift", "int32", channels)
        if ends.left:
            self._left = e.parameter("left", "int32", channels)
        self._multiplier = e.parameter("multiplier", "int16", channels)
        if ends.residual is not None:
            self._added = e.parameter("added", machine.activation, ends.residual.bytes)
            self._times = e.parameter("times", "int16", machine.vectors * machine.lanes)
        self._written, fill = _written(e, machine, ends.writes)
        fill()

    def bias(self, channel: Index, vector: int) -> Expr:
        """Return the bias of one vector of channels."""
        return self._e.let(load(self.biases, channel + vector * self._machine.lanes, self._machine.lanes))

    def constants(self, channel: Index, vectors: int) -> list[Constants]:
        """Return what the channels of a block need at the end, per `Machine.vectors`; to be asked for before a loop."""
        ends, lanes = self._ends, self._machine.lanes
        if isinstance(ends, ToPicture):
            return []
        made = []
        for first in range(0, vectors, self._machine.vectors):
            together = min(self._machine.vectors, vectors - first)
            at = [channel + (first + vector) * lanes for vector in range(together)]
            made.append(
                Constants(
                    shift=[self._e.let(load(self._shift, index, lanes)) for index in at],
                    left=[self._e.let(load(self._left, index, lanes)) for index in at] if ends.left else None,
                    multiplier=self._e.let(load(self._multiplier, at[0], together * lanes)),
                    residual=self._e.let(load(self._times, 0, together * lanes)) if ends.residual else None,
                    fraction=ends.fraction,
                    low=ends.low,
                    keeps_rest=ends.writes.rest_bits > 0,
                )
            )
        return made

    def store(self, totals: list[Expr], constants: list[Constants], y: Index, x: Index, place: Place) -> None:
        """Store the sums of one pixel; `place` is the row and column in a shuffled square, and the first channel."""
        if isinstance(self._ends, ToPicture):
            self._store_picture(totals, y, x)
            return
        row, column, channel = place
        factor, lanes, together = self._ends.shuffle, self._machine.lanes, self._machine.vectors
        for number, settings in enumerate(constants):
            first = number * together
            at = (y * factor + row, x * factor + column, channel + first * lanes)
            index, writes = self._ends.writes.index(*at), self._ends.writes
            added = self._residual(at, self._ends.residual) if self._ends.residual is not None else None
            value, rest = self._machine.finish(self._e, totals[first : first + together], settings, added)
            self._e.store(self._written, index, value)
            if rest is not None:
                self._e.store(self._written, index + writes.plane, rest)

    def _residual(self, at: Place, area: Map) -> Added:
        whole = area.index(*at)
        rest = whole + area.plane if area.rest_bits else None
        return Added(buffer=self._added, whole=whole, rest=rest, rest_bits=area.rest_bits)

    def _store_picture(self, totals: list[Expr], y: Index, x: Index) -> None:
        ends, lanes = self._ends, self._machine.lanes
        assert isinstance(ends, ToPicture)
        for vector, total in enumerate(totals):
            floats = self._e.let(tirx.Cast(f"{_FLOAT}x{lanes}", total))
            for lane, (plane, row, column) in enumerate(ends.places[vector * lanes : (vector + 1) * lanes]):
                index = (plane * ends.height + y * ends.block + row) * ends.width + x * ends.block + column
                value, scale = shuffle([floats], [lane]), load(self._scale, vector * lanes + lane)
                if ends.onto_noisy:
                    # Said outright, as LLVM would fuse the two or not as it likes.
                    value = intrinsic(_FLOAT, "llvm.fma.f32", value, scale, load(self._noisy, index))
                else:
                    value = value * scale
                self._e.store(self._picture, index, value)


class _Dense:
    """A tile of pixels and of output channels is summed in registers over the whole window."""

    def __init__(self, kernel: Dense, machine: Machine) -> None:
        self._e, self._machine, self._window = Emitter(), machine, kernel.window
        self._vectors = vectors_of(kernel, machine)
        self._squares = kernel.ends.shuffle if isinstance(kernel.ends, Finish) else 1
        self._blocks = -(-kernel.channels // (self._vectors * machine.lanes))
        stored = kernel.channels * self._squares**2
        self._x = self._e.parameter("x", machine.activation, kernel.window.reads.bytes)
        self._wide, self._folded = kernel.wide, kernel.folded
        self._outputs = len(kernel.ends.places) if isinstance(kernel.ends, ToPicture) else 0
        self._part = kernel.window.rows * kernel.window.run * QUAD * stored
        self._weights = self._e.parameter("weights", "int8", self._part * (2 if kernel.wide else 1))
        self._ending = _Ending(self._e, machine, kernel.ends, stored)

    def function(self, name: str) -> tirx.PrimFunc:
        """Return the kernel."""
        e, squares, channels = self._e, self._squares, self._vectors * self._machine.lanes
        tile = max(1, self._machine.registers // self._vectors - (self._folded - 1))
        with _blocks(e, self._window.height, squares, self._blocks, channels) as (y, block, place):
            biases = [self._ending.bias(block * channels, vector) for vector in range(self._vectors)]
            constants = self._ending.constants(block * channels, self._vectors)

            def sum_tile(x: Index, pixels: int) -> None:
                sums = self._sums(y, x, pixels + self._folded - 1, block, biases)
                for pixel in range(pixels):
                    totals = self._unfolded(sums, pixel) if self._folded > 1 else sums[pixel]
                    self._ending.store(totals, constants, y, x + pixel, place)

            _in_tiles(e, self._window.width, tile, sum_tile)
        return e.function(name)

    def _sums(self, y: Index, left: Index, pixels: int, block: Index, biases: list[Expr]) -> list[list[Expr]]:
        """Return the sums of a tile, per pixel one for each vector of channels."""
        machine, plane = self._machine, self._window.reads.plane
        kind, count = f"int32x{machine.lanes}", pixels * self._vectors * machine.parts
        sums = self._e.registers(count, kind)
        starts = [tirx.const(0, kind)] * self._vectors if self._wide else biases
        slots = [(pixel * self._vectors + vector, vector) for pixel in range(pixels) for vector in range(self._vectors)]
        for slot, vector in slots:
            machine.start(self._e, sums, slot, starts[vector])

        def add_quads(row: Index, first: Index, count: int, x: Index, weights: Index) -> None:
            for done in range(0, count, machine.chunk):
                quads = min(machine.chunk, count - done)
                at = [self._window.index(y, left + pixel, row, 0, (first + done) * QUAD) + x for pixel in range(pixels)]
                order = (block * self._window.rows + row) * self._window.run + first + done
                if machine.chunk == 1 and self._vectors < pixels:
                    # The fewer of weights and activations stay in registers, the others pass by.
                    matrix = [self._matrix(order, vector, weights) for vector in range(self._vectors)]
                    for pixel, index in enumerate(at):
                        (quad,) = machine.quads(self._e, self._x, index, 1)
                        for vector in range(self._vectors):
                            machine.dot(self._e, sums, pixel * self._vectors + vector, [(matrix[vector], quad)])
                    continue
                loaded = [machine.quads(self._e, self._x, index, quads) for index in at]
                for step in range(0, quads, machine.step):
                    now = slice(step, step + machine.step)
                    for vector in range(self._vectors):
                        matrix = [self._matrix(order + step + k, vector, weights) for k in range(len(loaded[0][now]))]
                        for pixel in range(pixels):
                            pairs = list(zip(matrix, loaded[pixel][now], strict=True))
                            machine.dot(self._e, sums, pixel * self._vectors + vector, pairs)

        def add_window(x: Index, weights: Index) -> None:
            body = partial(add_quads, x=x, weights=weights)
            _over_window(self._e, self._window.rows, self._window.run, machine.unrolled, body)

        add_window(0, 0)
        if self._wide:
            for slot in range(count):
                self._e.store(sums, slot, load(sums, slot) << tirx.const(self._window.reads.rest_bits, kind))
            add_window(plane, 0)
            add_window(0, self._part)
        totals = [machine.total(sums, slot, starts[vector]) for slot, vector in slots]
        if self._wide:
            totals = [total + biases[vector] for total, (_, vector) in zip(totals, slots, strict=True)]
        return [totals[first : first + self._vectors] for first in range(0, len(totals), self._vectors)]

    def _unfolded(self, sums: list[list[Expr]], pixel: int) -> list[Expr]:
        """Return the sums of a pixel, parts of which lie with the pixels behind it, in the first lanes."""
        lanes = self._machine.lanes
        parts = [
            shuffle(sums[pixel + column], [(column * self._outputs + lane) % lanes for lane in range(lanes)])
            for column in range(self._folded)
        ]
        return [reduce(add, parts)]

    def _matrix(self, order: Index, vector: int, first: Index) -> Expr:
        """Return the weights of one group of input channels and one vector of output channels."""
        size = self._machine.lanes * QUAD
        return self._e.let(load(self._weights, (order * self._vectors + vector) * size + first, size))


class _TiledDense:
    """Up to 32 pixels in a row and 32 output channels are summed in tile registers over the whole window."""

    def __init__(self, kernel: Dense, machine: Machine) -> None:
        assert isinstance(kernel.ends, Finish)
        self._e, self._machine, self._window = Emitter(), machine, kernel.window
        self._vectors, self._squares = vectors_of(kernel, machine), kernel.ends.shuffle
        self._channels = self._vectors * machine.lanes
        self._blocks = kernel.channels // self._channels
        self._halves = 2 if kernel.window.width >= 2 * tiles.ROWS else 1
        self._pixels = self._halves * tiles.ROWS
        # Of input channels, groups that are multiplied at once.
        self._depth = max(n for n in range(1, tiles.ROWS + 1) if kernel.window.run % n == 0)
        stored = kernel.channels * self._squares**2
        self._x = self._e.parameter("x", machine.activation, kernel.window.reads.bytes)
        self._weights = self._e.parameter("weights", "int8", kernel.window.rows * kernel.window.run * QUAD * stored)
        self._ending = _Ending(self._e, machine, kernel.ends, stored)
        self._sums = self._e.registers(self._pixels * self._vectors, f"int32x{machine.lanes}")

    def function(self, name: str) -> tirx.PrimFunc:
        """Return the kernel."""
        e, width = self._e, self._window.width
        tiles.configure(e, self._depth)
        with _blocks(e, self._window.height, self._squares, self._blocks, self._channels) as (y, block, place):
            constants = self._ending.constants(block * self._channels, self._vectors)
            with e.loop(width // self._pixels) as turn:
                self._tile(y, turn * self._pixels, block, constants, place)
            if width % self._pixels:
                # The last pixels, some of them once more, so that no tile reaches beyond the row.
                self._tile(y, width - self._pixels, block, constants, place)
        tiles.release(e)
        return e.function(name)

    def _tile(self, y: Index, left: Index, block: Index, constants: list[Constants], place: Place) -> None:
        """Sum and store a tile of pixels."""
        self._sum(y, left, block)

        def store(first: Index, count: int) -> None:
            for pixel in range(count):
                at = (first + pixel) * self._vectors
                totals = [self._e.let(load(self._sums, at + vector)) for vector in range(self._vectors)]
                self._ending.store(totals, constants, y, left + first + pixel, place)

        _in_tiles(self._e, self._pixels, _STORED_PIXELS, store)

    def _sum(self, y: Index, left: Index, block: Index) -> None:
        e, window, lanes, depth = self._e, self._window, self._machine.lanes, self._depth
        stride = self._vectors * lanes * QUAD
        held = [
            (tiles.SUMS[half * self._vectors + vector], half, vector)
            for half in range(self._halves)
            for vector in range(self._vectors)
        ]
        for tile, _, vector in held:
            tiles.load(e, tile, self._ending.biases, (block * self._vectors + vector) * lanes, 0)
        with e.loop(window.rows) as row, e.loop(window.run // depth) as step:
            for half in range(self._halves):
                at = window.index(y, left + half * tiles.ROWS, row, 0, step * depth * QUAD)
                tiles.load(e, tiles.ACTIVATIONS[half], self._x, at, window.stride * window.reads.channels)
            order = (block * window.rows + row) * window.run + step * depth
            for vector in range(self._vectors):
                at = (order * self._vectors + vector) * lanes * QUAD
                tiles.load(e, tiles.WEIGHTS[vector], self._weights, at, stride)
            for tile, half, vector in held:
                tiles.dot(e, tile, tiles.ACTIVATIONS[half], tiles.WEIGHTS[vector])
        for tile, half, vector in held:
            tiles.store(e, tile, self._sums, half * tiles.ROWS * self._vectors + vector, stride)


def _over_window(
    e: Emitter, rows: int, run: int, unrolled: int, add_quads: Callable[[Index, Index, int], None]
) -> None:
    """Go over all groups of a window; in loops where there are more than `unrolled`."""
    if rows * run <= unrolled:
        for row in range(rows):
            add_quads(row, 0, run)
        return
    with e.loop(rows) as row:
        turns = run // _LOOP_QUADS
        if turns:
            with e.loop(turns) as turn:
                add_quads(row, turn * _LOOP_QUADS, _LOOP_QUADS)
        if run % _LOOP_QUADS:
            add_quads(row, turns * _LOOP_QUADS, run % _LOOP_QUADS)


@contextmanager
def _blocks(e: Emitter, height: int, squares: int, blocks: int, channels: int) -> Iterator[tuple[Index, Index, Place]]:
    """Go over rows and over blocks of so many channels, in each square of a shuffle: (row, block, place)."""
    with e.loop(height) as y, e.loop(squares) as row, e.loop(squares) as column, e.loop(blocks) as inner:
        yield y, (row * squares + column) * blocks + inner, (row, column, inner * channels)


def _in_tiles(e: Emitter, extent: int, size: int, body: Callable[[Index, int], None]) -> None:
    """Write `body(first, length)` for the whole tiles of an axis, in a loop, and for what remains."""
    whole, rest = divmod(extent, size)
    if whole:
        with e.loop(whole) as tile:
            body(tile * size, size)
    if rest:
        body(whole * size, rest)


class _Depthwise:
    """A column of pixels is summed over a band of rows, each of which is read and transposed once."""

    def __init__(self, kernel: Depthwise, machine: Machine) -> None:
        self._e, self._machine, self._window = Emitter(), machine, kernel.window
        self._vectors = vectors_of(kernel, machine)
        self._channels = self._vectors * machine.lanes
        self._blocks = kernel.ends.writes.channels // self._channels
        self._neighbours = 2 if shares_groups(kernel.window) else 1
        self._x = self._e.parameter("x", machine.activation, kernel.window.reads.bytes)
        groups = kernel.window.rows * kernel.window.groups * self._neighbours
        self._weights = self._e.parameter("weights", "int8", groups * QUAD * kernel.ends.writes.channels)
        self._ending = _Ending(self._e, machine, kernel.ends, kernel.ends.writes.channels)

    def function(self, name: str) -> tirx.PrimFunc:
        """Return the kernel."""

        def band(top: Index, rows: int) -> None:
            _in_tiles(
                self._e,
                self._window.width,
                _PIXELS_PER_BLOCK,
                lambda left, width: self._area(top, rows, left, width),
            )

        _in_tiles(self._e, self._window.height, _ROWS_PER_BAND, band)
        return self._e.function(name)

    def _area(self, top: Index, rows: int, left: Index, width: int) -> None:
        """All channels of an area whose inputs fit into the first cache."""
        with self._e.loop(self._blocks) as block:
            biases = [self._ending.bias(block * self._channels, vector) for vector in range(self._vectors)]
            constants = self._ending.constants(block * self._channels, self._vectors)

            def column(x: Index, pixels: int) -> None:
                for y, pixel, totals in self._sums(top, rows, left + x, pixels, block, biases):
                    place = (0, 0, block * self._channels)
                    self._ending.store(totals, constants, top + y, left + x + pixel, place)

            _in_tiles(self._e, width, self._neighbours, column)

    def _sums(
        self, top: Index, rows: int, left: Index, pixels: int, block: Index, biases: list[Expr]
    ) -> Iterator[tuple[int, int, list[Expr]]]:
        """Give (row, pixel, sums of the vectors of channels) of a column; rows are read once for all sums."""
        window, machine = self._window, self._machine
        read: list[list[list[Expr]]] = []  # row, group, vector
        for y in range(rows):
            while len(read) < y * window.stride + window.rows:
                read.append([self._group(top, left, len(read), group, block) for group in range(window.groups)])
            sums = self._e.registers(pixels * self._vectors * machine.parts, f"int32x{machine.lanes}")
            for pixel in range(pixels):
                slots = range(pixel * self._vectors, (pixel + 1) * self._vectors)
                for vector, slot in enumerate(slots):
                    machine.start(self._e, sums, slot, biases[vector])
                    pairs = [
                        (self._matrix(block, row, group, pixel, vector), read[y * window.stride + row][group][vector])
                        for row in range(window.rows)
                        for group in range(window.groups)
                    ]
                    machine.dot(self._e, sums, slot, pairs)
                yield y, pixel, [machine.total(sums, slot, bias) for slot, bias in zip(slots, biases, strict=True)]

    def _group(self, top: Index, left: Index, row: int, group: int, block: Index) -> list[Expr]:
        """Return four neighbours in a row, grouped by channel, for each vector of channels."""
        first = [self._window.index(top, left, row, QUAD * group + k, block * self._channels) for k in range(QUAD)]
        return self._machine.transposed(self._e, self._x, first, self._vectors)

    def _matrix(self, block: Index, row: int, group: int, pixel: int, vector: int) -> Expr:
        """Return the weights of one row of the window for one of the pixels that share a group."""
        window, size = self._window, self._machine.lanes * QUAD
        order = (row * window.groups + group) * self._neighbours + pixel
        place = (block * (window.rows * window.groups * self._neighbours) + order) * self._vectors + vector
        return load(self._weights, place * size, size)


def shares_groups(window: Window) -> bool:
    """Return whether a group of four pixels in a row holds the windows of two neighbours."""
    return window.columns < QUAD and window.stride == 1


def _written(e: Emitter, machine: Machine, area: Map) -> tuple[Buffer, Callable[[], None]]:
    """Return the map that a kernel writes, its last parameter, and what writes the code that fills its margin."""
    outside = _outside(e, machine, area) if area.margin else None
    written = e.parameter("written", machine.activation, area.bytes)
    return written, lambda: fill_margin(e, area, outside, written) if outside is not None else None


def fill_margin(e: Emitter, area: Map, outside: Buffer, written: Buffer) -> None:
    """Set the pixels around a map to its zero point, and those of its second plane to nothing."""
    for plane in range(2 if area.rest_bits else 1):
        _fill_margin(e, area, (outside, plane * VECTOR_BYTES), (written, plane * area.plane))


def _outside(e: Emitter, machine: Machine, area: Map) -> Buffer:
    """Return the parameter with what the margin of a map is filled with: a vector for each plane."""
    return e.parameter("outside", machine.activation, VECTOR_BYTES * (2 if area.rest_bits else 1))


def _fill_margin(e: Emitter, area: Map, outside: tuple[Buffer, int], plane: tuple[Buffer, int]) -> None:
    step = VECTOR_BYTES if area.channels % VECTOR_BYTES == 0 else QUAD
    value = e.let(load(*outside, step))
    written, base = plane

    def fill(start: Index, size: int) -> None:
        with e.loop(size // step) as turn:
            e.store(written, base + start + turn * step, value)

    with e.loop(area.margin) as y:
        fill(area.index(y - area.margin, -area.margin), area.row)
        fill(area.index(y + area.height, -area.margin), area.row)
    with e.loop(area.height) as y:
        fill(area.index(y, -area.margin), area.margin * area.channels)
        fill(area.index(y, area.width), area.margin * area.channels)


def _from_picture(kernel: FromPicture, name: str, machine: Machine) -> tirx.PrimFunc:
    """One value at a time: there are few, next to what the convolutions make of them."""
    e, writes, block = Emitter(), kernel.writes, kernel.block
    height, width = writes.height * block, writes.width * block
    noisy = e.parameter("noisy", _FLOAT, kernel.planes * height * width)
    if None in kernel.places:
        sigma = e.parameter("sigma", _FLOAT, 1)
    # inverse of the scale, lowest and highest rounded value, zero point in memory
    settings = e.parameter("settings", _FLOAT, 4)
    outside = _outside(e, machine, writes)
    written = e.parameter("written", machine.activation, writes.bytes)
    fill_margin(e, writes, outside, written)
    offset_rest, bits = 128 if machine.unsigned else 0, writes.rest_bits
    inverse, low, high, offset = (e.let(load(settings, place)) for place in range(4))
    with e.loop(writes.height) as y, e.loop(writes.width) as x:
        for channel, place in enumerate(kernel.places):
            if place is None:
                value = load(sigma, 0)
            else:
                plane, row, column = place
                value = load(noisy, (plane * height + y * block + row) * width + x * block + column)
            bounded = tirx.min(tirx.max(value * inverse, low), high)
            rounded = e.let(tirx.Cast("int32", tirx.nearbyint(bounded) + offset))
            index = writes.index(y, x, channel)
            if not bits:
                e.store(written, index, tirx.Cast(machine.activation, rounded))
                continue
            whole = e.let((rounded + (1 << (bits - 1))) >> bits)
            e.store(written, index, tirx.Cast(machine.activation, whole))
            rest = rounded - (whole << bits) + offset_rest
            e.store(written, index + writes.plane, tirx.Cast(machine.activation, rest))
    return e.function(name)


def _joined(kernel: Joined, name: str, machine: Machine) -> tirx.PrimFunc:
    """Vectors that reach beyond their part are overwritten by what comes next: a part, a pixel, a row, the margin."""
    e, writes = Emitter(), kernel.writes
    parts = [
        (channels, area, e.parameter(f"part{number}", machine.activation, area.bytes))
        for number, (channels, area) in enumerate(kernel.parts)
    ]
    written, fill = _written(e, machine, writes)
    with e.loop(writes.height) as y, e.loop(writes.width) as x:
        first = 0
        for channels, area, part in parts:
            with e.loop(area.channels // VECTOR_BYTES) as vector:
                at = vector * VECTOR_BYTES
                e.store(written, writes.index(y, x, first + at), load(part, area.index(y, x, at), VECTOR_BYTES))
            first += channels
    fill()
    return e.function(name)


def _resampled(kernel: Resampled, name: str, machine: Machine) -> tirx.PrimFunc:
    """A pixel of the smaller map and the square of 2 x 2 in the larger one, a vector of channels at a time."""
    e, reads, writes = Emitter(), kernel.reads, kernel.writes
    read = e.parameter("x", machine.activation, reads.bytes)
    written, fill = _written(e, machine, writes)
    fill()
    smaller = writes if kernel.how == "maximum" else reads
    with e.loop(smaller.height) as y, e.loop(smaller.width) as x, e.loop(reads.channels // VECTOR_BYTES) as vector:
        at = vector * VECTOR_BYTES

        def pixel(row: Index, column: Index) -> Expr:
            return e.let(load(read, reads.index(row, column, at), VECTOR_BYTES))

        if kernel.how == "maximum":
            square = [pixel(2 * y + row, 2 * x + column) for row, column in _SQUARE]
            e.store(written, writes.index(y, x, at), reduce(tirx.max, square))
        else:
            rows, columns = _beside(y, reads.height), _beside(x, reads.width)
            values = [pixel(y, x)] * len(_SQUARE) if kernel.how == "nearest" else _bilinear(e, pixel, rows, columns)
            for (row, column), value in zip(_SQUARE, values, strict=True):
                stored = tirx.Cast(f"{machine.activation}x{VECTOR_BYTES}", value)
                e.store(written, writes.index(2 * y + row, 2 * x + column, at), stored)
    return e.function(name)


def _bilinear(
    e: Emitter, pixel: Callable[[Index, Index], Expr], rows: Sequence[Index], columns: Sequence[Index]
) -> list[Expr]:
    """Return the square that the middle of 3 x 3 pixels becomes, in int16; 128 more in each give 128 more."""
    wide = f"int16x{VECTOR_BYTES}"
    three, half, bits = (tirx.const(value, wide) for value in (3, 8, 4))
    before, middle, behind = ([e.let(tirx.Cast(wide, pixel(row, column))) for column in columns] for row in rows)
    between = [[e.let(three * m + s) for m, s in zip(middle, side, strict=True)] for side in (before, behind)]
    return [(three * row[1] + row[side] + half) >> bits for row in between for side in (0, 2)]


def _beside(index: Index, extent: int) -> tuple[Index, Index, Index]:
    """Return the places before, at and behind one along an axis; at its ends the place itself."""
    if isinstance(index, int):
        return max(index - 1, 0), index, min(index + 1, extent - 1)
    return tirx.max(index - 1, 0), index, tirx.min(index + 1, extent - 1)


def _level(kernel: Level, name: str) -> tirx.PrimFunc:
    """The bias of a convolution that is told the noise level."""
    e = Emitter()
    sigma = e.parameter("sigma", _FLOAT, 1)
    base = e.parameter("base", "int32", kernel.channels)
    gain = e.parameter("gain", _FLOAT, kernel.channels)
    bound = e.parameter("bound", _FLOAT, kernel.channels)
    written = e.parameter("written", "int32", kernel.channels)
    with e.loop(kernel.channels) as channel:
        most = load(bound, channel)
        value = load(sigma, 0) * load(gain, channel)
        whole = tirx.Cast("int32", tirx.nearbyint(tirx.min(tirx.max(value, -most), most)))
        e.store(written, channel, load(base, channel) + whole)
    return e.function(name)
