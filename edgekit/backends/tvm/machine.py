"""The instruction sets: how each multiplies int8, widens, rounds and narrows. Kernels are written once on top.

| | `DotProduct` | `Neon` | `Vnni` |
|---|---|---|---|
| processor | armv8.2 with dotprod | any armv8.0 | x86 with AVX-512 VNNI and VBMI |
| lanes of int32 | 4 | 4 | 16 |
| four products and their sum | sdot | smull, smlal, sadalp (of eight) | vpdpbusd |
| activations in memory | int8 | int8 | uint8, 128 more |

`Amx` is `Vnni` with tile registers, in which dense convolutions are summed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from tvm import tirx

from edgekit.backends.tvm.emitter import Buffer, Emitter, Expr, Index, intrinsic, load, reinterpret, shuffle
from edgekit.backends.tvm.integer import INT8_MIN, UNBOUNDED

_NEON = "llvm.aarch64.neon"


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What brings the sums of one tile's channels to their grid.

    shift: Bits to the right, of int32 lanes; on ARM negative, as sshl takes them.
    left: Bits to the left before that; None where there are none, or where `shift` tells them too.
    multiplier: int16 lanes of all vectors that are finished together.
    residual: The residual's multiplier in all lanes of int16; None where nothing is added.
    keeps_rest: Whether what rounding takes away is asked for too.
    """

    shift: Sequence[Expr]
    left: Sequence[Expr] | None
    multiplier: Expr
    residual: Expr | None
    fraction: int
    low: int
    keeps_rest: bool


@dataclass(frozen=True, kw_only=True)
class Added:
    """Where activations to be added lie.

    rest: Of the second plane; None where there is none.
    rest_bits: As in `integer.Feature`.
    """

    buffer: Buffer
    whole: Index
    rest: Index | None
    rest_bits: int


Finished = tuple[Expr, Expr | None]


class Machine(ABC):
    """An instruction set.

    lanes: int32 lanes of a vector, so output channels that one accumulator sums.
    parts: Vectors that one accumulator takes.
    step: Groups of four input channels that are multiplied at once.
    chunk: Such groups that `quads` loads at once.
    vectors: Accumulators of neighbouring channels that `finish` takes together, at most.
    most_vectors: Accumulators of neighbouring channels for which a dense kernel loads activations once, at most.
    registers: Accumulators that fit into the registers beside what they are summed from.
    unrolled: Groups of four input channels of a window that a kernel writes out; it loops over more. On x86, LLVM moves
        the weights of a longer one out of the loop over pixels, and then has no registers for the sums.
    unsigned: Whether activations lie in memory as uint8, 128 more.
    tiles: Whether there are tile registers (`tiles`).
    """

    name: str
    lanes: int
    parts: int
    step: int
    chunk: int
    vectors: int
    most_vectors: int
    registers: int
    unrolled: int
    unsigned: bool
    tiles: bool = False

    @property
    def activation(self) -> str:
        """Type of an activation in memory."""
        return "uint8" if self.unsigned else "int8"

    def order(self, vectors: int) -> list[int]:
        """Return the channels, counted from the first, of the lanes of neighbouring accumulators."""
        return list(range(vectors * self.lanes))

    def start(self, e: Emitter, sums: Buffer, slot: int, bias: Expr) -> None:
        """Set an accumulator to its bias."""
        e.store(sums, slot, bias)

    def total(self, sums: Buffer, slot: int, bias: Expr) -> Expr:
        """Return what an accumulator came to."""
        return load(sums, slot)

    @abstractmethod
    def quads(self, e: Emitter, x: Buffer, index: Index, count: int) -> list[Expr]:
        """Return `count` (at most four) groups of four activations, each in all lanes."""

    @abstractmethod
    def dot(self, e: Emitter, sums: Buffer, slot: int, pairs: Sequence[tuple[Expr, Expr]]) -> None:
        """Add to an accumulator, in each lane, the products of four weights and four activations, per pair."""

    @abstractmethod
    def transposed(self, e: Emitter, x: Buffer, indices: Sequence[Index], vectors: int) -> list[Expr]:
        """Return the channels of four pixels, grouped by channel: for so many accumulators (at most `vectors`)."""

    @abstractmethod
    def finish(self, e: Emitter, totals: Sequence[Expr], constants: Constants, added: Added | None) -> Finished:
        """Return sums (at most `vectors` of them) as activations, and the second plane of them if it is kept."""


class DotProduct(Machine):
    """armv8.2 with dotprod."""

    name, lanes, parts, step, chunk, unsigned = "dotprod", 4, 1, 1, 4, False
    vectors, most_vectors, registers, unrolled = 2, 2, 16, 24

    def quads(self, e: Emitter, x: Buffer, index: Index, count: int) -> list[Expr]:
        """Return lanes of one vector: sdot takes its second operand by lane."""
        words = e.let(reinterpret("int32x4", load(x, index, 16)))
        return [reinterpret("int8x16", shuffle([words], [quad] * 4)) for quad in range(count)]

    def dot(self, e: Emitter, sums: Buffer, slot: int, pairs: Sequence[tuple[Expr, Expr]]) -> None:
        """One sdot per pair."""
        for weights, activations in pairs:
            total = intrinsic("int32x4", f"{_NEON}.sdot.v4i32.v16i8", load(sums, slot), weights, activations)
            e.store(sums, slot, total)

    def transposed(self, e: Emitter, x: Buffer, indices: Sequence[Index], vectors: int) -> list[Expr]:
        """Two rounds of zip: bytes of neighbours, then pairs of pairs."""
        assert vectors == self.vectors  # channels are stored as multiples of 16
        pixels = [e.let(load(x, index, 16)) for index in indices]
        bytes_zipped = [i for pair in zip(range(8), range(16, 24), strict=True) for i in pair]
        left, right = (
            reinterpret("int16x8", shuffle([one, other], bytes_zipped)) for one, other in (pixels[:2], pixels[2:])
        )
        low, high = (
            [i for pair in zip(range(k, k + 4), range(8 + k, 12 + k), strict=True) for i in pair] for k in (0, 4)
        )
        left, right = e.let(left), e.let(right)
        return [e.let(reinterpret("int8x16", shuffle([left, right], order))) for order in (low, high)]

    def finish(self, e: Emitter, totals: Sequence[Expr], constants: Constants, added: Added | None) -> Finished:
        """Eight channels: sshl, sqxtn, sqrdmulh, (sqrdmulh, sqadd), sqrshrn, (sqsub, sqxtn)."""
        halves = [
            intrinsic("int16x4", f"{_NEON}.sqxtn.v4i16", intrinsic("int32x4", f"{_NEON}.sshl.v4i32", total, shift))
            for total, shift in zip(totals, constants.shift, strict=True)
        ]
        u = _high_product("int16x8", shuffle(halves, range(8)), constants.multiplier)
        if added is not None:
            residual = tirx.Cast("int16x8", load(added.buffer, added.whole, 8)) << tirx.const(8, "int16x8")
            if added.rest is not None:
                rest = tirx.Cast("int16x8", load(added.buffer, added.rest, 8))
                rest = rest << tirx.const(8 - added.rest_bits, "int16x8")
                residual = intrinsic("int16x8", f"{_NEON}.sqadd.v8i16", residual, rest)
            u = intrinsic("int16x8", f"{_NEON}.sqadd.v8i16", u, _high_product("int16x8", residual, constants.residual))
        if not constants.keeps_rest:
            q = intrinsic("int8x8", f"{_NEON}.sqrshrn.v8i8", u, tirx.const(constants.fraction, "int32"))
            return _at_least(q, constants.low, INT8_MIN, "int8x8"), None
        u = e.let(_at_least(u, constants.low << constants.fraction, UNBOUNDED << constants.fraction, "int16x8"))
        q = e.let(intrinsic("int8x8", f"{_NEON}.sqrshrn.v8i8", u, tirx.const(constants.fraction, "int32")))
        whole = tirx.Cast("int16x8", q) << tirx.const(constants.fraction, "int16x8")
        rest = intrinsic("int16x8", f"{_NEON}.sqsub.v8i16", u, whole)
        return q, intrinsic("int8x8", f"{_NEON}.sqxtn.v8i8", rest)


class Neon(DotProduct):
    """Any armv8.0: products of int8 pairwise in int16, two at a time, which fit since no weight is -128."""

    name, parts, step, registers = "neon", 2, 2, 8

    def start(self, e: Emitter, sums: Buffer, slot: int, bias: Expr) -> None:
        """Set both halves to zero; the bias is added in the end."""
        for part in range(2):
            e.store(sums, 2 * slot + part, tirx.const(0, "int32x4"))

    def total(self, sums: Buffer, slot: int, bias: Expr) -> Expr:
        """Return the sums of neighbouring lanes, and the bias."""
        return intrinsic("int32x4", f"{_NEON}.addp.v4i32", load(sums, 2 * slot), load(sums, 2 * slot + 1)) + bias

    def dot(self, e: Emitter, sums: Buffer, slot: int, pairs: Sequence[tuple[Expr, Expr]]) -> None:
        """Per half of the lanes: smull, smlal for a second pair, sadalp."""
        for first in range(0, len(pairs), 2):
            for part, lanes in enumerate((range(8), range(8, 16))):
                product = reduce(
                    add,
                    (
                        intrinsic("int16x8", f"{_NEON}.smull.v8i16", shuffle([w], lanes), shuffle([a], lanes))
                        for w, a in pairs[first : first + 2]
                    ),
                )
                widened = intrinsic("int32x4", f"{_NEON}.saddlp.v4i32.v8i16", product)
                e.store(sums, 2 * slot + part, load(sums, 2 * slot + part) + widened)


class Vnni(Machine):
    """x86 with AVX-512 VNNI and VBMI.

    Two accumulators are finished together, as one vector of int16: `vpackssdw` puts four of one beside four of the
    other, so these hold the channels by fours in turn.
    """

    name, lanes, parts, step, chunk, unsigned = "vnni", 16, 1, 1, 1, True
    vectors, most_vectors, registers, unrolled = 2, 6, 22, 8

    def order(self, vectors: int) -> list[int]:
        """Return fours of channels in turn for each pair; a last one without a partner has its own as they come."""
        pairs, alone = divmod(vectors, 2)
        fours = [32 * pair + 8 * four + 4 * half for pair in range(pairs) for half in (0, 1) for four in range(4)]
        order = [first + channel for first in fours for channel in range(4)]
        return order + list(range(32 * pairs, 32 * pairs + 16 * alone))

    def quads(self, e: Emitter, x: Buffer, index: Index, count: int) -> list[Expr]:
        """Return groups broadcast from memory."""
        words = [reinterpret("int32", load(x, index + 4 * quad, 4)) for quad in range(count)]
        return [e.let(reinterpret("uint8x64", tirx.Broadcast(word, 16))) for word in words]

    def dot(self, e: Emitter, sums: Buffer, slot: int, pairs: Sequence[tuple[Expr, Expr]]) -> None:
        """One vpdpbusd per pair."""
        for weights, activations in pairs:
            total = intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", load(sums, slot), activations, weights)
            e.store(sums, slot, total)

    def transposed(self, e: Emitter, x: Buffer, indices: Sequence[Index], vectors: int) -> list[Expr]:
        """Sixteen channels of four pixels in one vector."""
        channels = 16 * vectors
        pixels = [e.let(load(x, index, channels)) for index in indices]
        order = self.order(vectors)
        lanes = [order[first : first + 16] for first in range(0, channels, 16)]
        return [
            e.let(shuffle(pixels, [channels * pixel + channel for channel in held for pixel in range(4)]))
            for held in lanes
        ]

    def finish(self, e: Emitter, totals: Sequence[Expr], constants: Constants, added: Added | None) -> Finished:
        """32 channels: vpsravd, vpackssdw, vpmulhrsw, (vpmulhrsw, vpaddsw), vpmulhrsw, vpmovswb."""
        left = constants.left or [None] * len(totals)
        shifted = [
            (total if by is None else total << by) >> shift
            for total, by, shift in zip(totals, left, constants.shift, strict=True)
        ]
        lanes = _Lanes(16 * len(totals))
        narrow = _saturated(shifted[0], "int32x16", "int16x16") if len(totals) == 1 else _packed(*shifted)
        u = lanes.product(narrow, constants.multiplier)
        if added is not None:
            # 256 x (value - 128) in int16 is what flipping the top bit leaves.
            value = lanes.load(added.buffer, added.whole) << lanes.const(8)
            residual = value ^ lanes.const(-32768)
            if added.rest is not None:
                signed = lanes.load(added.buffer, added.rest) - lanes.const(128)
                residual = lanes.sum(residual, signed << lanes.const(8 - added.rest_bits))
            u = lanes.sum(u, lanes.product(residual, constants.residual))
        if constants.keeps_rest:
            low, lowest = constants.low << constants.fraction, UNBOUNDED << constants.fraction
            u = e.let(_at_least(u, low, lowest, lanes.dtype))
        # (u x 2^(15 - fraction) + 2^14) >> 15 is u in steps of 2^fraction, rounded.
        q = lanes.within_int8(
            lanes.product(u, lanes.const(1 << (15 - constants.fraction))), max(constants.low, INT8_MIN)
        )
        if not constants.keeps_rest:
            return lanes.stored(q), None
        q = e.let(q)
        rest = lanes.difference(u, q << lanes.const(constants.fraction))
        return lanes.stored(q), lanes.stored(lanes.within_int8(rest, -128))


class Amx(Vnni):
    """x86 with AMX's products of 8-bit integers too."""

    name, tiles = "amx", True


@dataclass(frozen=True)
class _Lanes:
    """Arithmetic of x86 on 16 or 32 lanes of int16."""

    lanes: int

    @property
    def dtype(self) -> str:
        return f"int16x{self.lanes}"

    def const(self, value: int) -> Expr:
        return tirx.const(value, self.dtype)

    def load(self, buffer: Buffer, index: Index) -> Expr:
        """Return bytes without sign."""
        return tirx.Cast(self.dtype, load(buffer, index, self.lanes))

    def product(self, one: Expr, other: Expr) -> Expr:
        """Return products of fractions of 15 bits, rounded."""
        name = "avx512.pmul.hr.sw.512" if self.lanes == 32 else "avx2.pmul.hr.sw"
        return intrinsic(self.dtype, f"llvm.x86.{name}", one, other)

    def sum(self, one: Expr, other: Expr) -> Expr:
        return intrinsic(self.dtype, f"llvm.sadd.sat.v{self.lanes}i16", one, other)

    def difference(self, one: Expr, other: Expr) -> Expr:
        return intrinsic(self.dtype, f"llvm.ssub.sat.v{self.lanes}i16", one, other)

    def within_int8(self, value: Expr, low: int) -> Expr:
        return tirx.min(tirx.max(value, self.const(low)), self.const(127))

    def stored(self, value: Expr) -> Expr:
        """Return values, all within 8 bits, as they lie in memory."""
        narrow = reinterpret(f"uint8x{self.lanes}", tirx.Cast(f"int8x{self.lanes}", value))
        return narrow ^ tirx.const(128, f"uint8x{self.lanes}")


def _high_product(dtype: str, one: Expr, other: Expr) -> Expr:
    return intrinsic(dtype, f"{_NEON}.sqrdmulh.v8i16", one, other)


def _packed(one: Expr, other: Expr) -> Expr:
    return intrinsic("int16x32", "llvm.x86.avx512.packssdw.512", one, other)


def _saturated(value: Expr, wide: str, narrow: str) -> Expr:
    bounded = tirx.min(tirx.max(value, tirx.const(-32768, wide)), tirx.const(32767, wide))
    return tirx.Cast(narrow, bounded)


def _at_least(value: Expr, low: int, lowest: int, dtype: str) -> Expr:
    return value if low == lowest else tirx.max(value, tirx.const(low, dtype))
