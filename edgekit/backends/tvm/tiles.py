"""AMX: eight tile registers of up to 16 rows of 64 bytes, and the integer product of two of them.

Here four of them hold sums of 16 pixels (rows) and 16 channels, two hold activations (a row is a pixel), and two hold
weights (a row is a group of four input channels of all lanes).

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2, LDTILECFG.
"""

from __future__ import annotations

from tvm import tirx

from edgekit.backends.tvm.emitter import Buffer, Emitter, Expr, Index, address

ROWS = 16
SUMS, ACTIVATIONS, WEIGHTS = (0, 1, 2, 3), (4, 5), (6, 7)
_ROW_BYTES = 64
_GROUP_BYTES = 4
_CONFIGURATION_BYTES = 64
_FIRST_WIDTH, _FIRST_HEIGHT = 16, 48
_PALETTE = 1


def configure(e: Emitter, depth: int) -> None:
    """Give the tiles their shapes for products over `depth` groups of four input channels (at most 16)."""
    shapes = dict.fromkeys(SUMS, (ROWS, _ROW_BYTES))
    shapes |= dict.fromkeys(ACTIVATIONS, (ROWS, depth * _GROUP_BYTES)) | dict.fromkeys(WEIGHTS, (depth, _ROW_BYTES))
    content = bytearray(_CONFIGURATION_BYTES)
    content[0] = _PALETTE
    for tile, (height, width) in shapes.items():
        content[_FIRST_WIDTH + 2 * tile], content[_FIRST_HEIGHT + tile] = width, height
    words = [int.from_bytes(content[first : first + 8], "little") for first in range(0, _CONFIGURATION_BYTES, 8)]
    configuration = e.registers(len(words), "int64")
    for place, word in enumerate(words):
        e.store(configuration, place, tirx.const(word, "int64"))
    e.call("llvm.x86.ldtilecfg", address(configuration, 0))


def release(e: Emitter) -> None:
    """Leave the tiles as a process has them that never used any."""
    e.call("llvm.x86.tilerelease")


def load(e: Emitter, tile: int, buffer: Buffer, index: Index, stride: int) -> None:
    """Read a tile's rows, `stride` bytes one behind the other (0: all of them the same)."""
    e.call("llvm.x86.tileloadd64", _number(tile), address(buffer, index), tirx.const(stride, "int64"))


def store(e: Emitter, tile: int, buffer: Buffer, index: Index, stride: int) -> None:
    """Write a tile's rows, `stride` bytes one behind the other."""
    e.call("llvm.x86.tilestored64", _number(tile), address(buffer, index), tirx.const(stride, "int64"))


def dot(e: Emitter, sums: int, activations: int, weights: int) -> None:
    """Add the product of uint8 activations and int8 weights to a tile of sums: tdpbusd."""
    e.call("llvm.x86.tdpbusd", _number(sums), _number(activations), _number(weights))


def _number(tile: int) -> Expr:
    return tirx.const(tile, "int8")
