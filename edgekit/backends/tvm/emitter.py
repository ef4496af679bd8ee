"""A writer of TIR: loops, vector loads and stores, and registers, in the order in which they are written.

TVM lowers, optimizes and compiles what comes out as any other PrimFunc; there is no schedule to apply, because the
loops are written as they shall run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from tvm import tirx
from tvm.ir import Expr, PointerType, PrimType
from tvm.tirx import Buffer

__all__ = ["Buffer", "Emitter", "Expr", "Index", "address", "intrinsic", "load", "reinterpret", "shuffle"]

Index: TypeAlias = Expr | int


class Emitter:
    """The body of one kernel."""

    def __init__(self) -> None:
        self._bodies: list[list[tirx.Stmt]] = [[]]
        self._parameters: list[Buffer] = []
        self._names = 0

    def parameter(self, name: str, dtype: str, elements: int) -> Buffer:
        """Return a flat buffer that the kernel gets as a bare pointer; in the order of the calls."""
        buffer = tirx.decl_buffer((elements,), dtype, name)
        self._parameters.append(buffer)
        return buffer

    def registers(self, count: int, dtype: str) -> Buffer:
        """Return variables that keep their value over the turns of a loop; LLVM holds them in registers."""
        buffer = tirx.decl_buffer((count,), dtype, self._name("r"), scope="local")
        self._write(tirx.AllocBuffer(buffer))
        return buffer

    def let(self, value: Expr) -> Expr:
        """Return a name for a value, so that it is computed here and once."""
        variable = tirx.Var(self._name("v"), value.ty)
        self._write(tirx.Bind(variable, value))
        return variable

    def store(self, buffer: Buffer, index: Index, value: Expr) -> None:
        """Write a scalar or a vector."""
        self._write(buffer.vstore([index], value))

    def call(self, name: str, *arguments: Expr) -> None:
        """Call an LLVM intrinsic that gives nothing back."""
        self._write(tirx.Evaluate(tirx.call_llvm_intrin("void", name, *arguments)))

    @contextmanager
    def loop(self, extent: int) -> Iterator[Index]:
        """Write what is written inside `extent` times; gives the number of the turn."""
        if extent == 1:
            yield 0
            return
        turn = tirx.Var(self._name("i"), "int32")
        self._bodies.append([])
        yield turn
        body = _sequence(self._bodies.pop())
        self._write(tirx.For(turn, tirx.const(0), tirx.const(extent), tirx.ForKind.SERIAL, body))

    def function(self, name: str) -> tirx.PrimFunc:
        """Return the kernel: one bare pointer per parameter, none of which overlap."""
        pointers = [
            tirx.Var(f"{buffer.name}_data", PointerType(PrimType(str(buffer.dtype)))) for buffer in self._parameters
        ]
        views = [tirx.DeclBuffer(buffer, data=data) for buffer, data in zip(self._parameters, pointers, strict=True)]
        function = tirx.PrimFunc(pointers, _sequence([*views, *self._bodies[0]]), None, None)
        return function.with_attr("global_symbol", name).with_attr("tirx.noalias", True)

    def _write(self, statement: tirx.Stmt) -> None:
        self._bodies[-1].append(statement)

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"


def load(buffer: Buffer, index: Index, lanes: int = 1) -> Expr:
    """Return `lanes` elements of a buffer from `index` on."""
    return buffer.vload([index], dtype=f"{buffer.dtype}x{lanes}" if lanes > 1 else str(buffer.dtype))


def address(buffer: Buffer, index: Index) -> Expr:
    """Return a pointer to an element of a buffer."""
    return tirx.address_of(buffer[index])


def intrinsic(dtype: str, name: str, *arguments: Expr) -> Expr:
    """Return what an LLVM intrinsic without side effects computes."""
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)


def shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """Return those lanes of the vectors, counted through all of them."""
    return tirx.Shuffle(list(vectors), list(lanes))


def reinterpret(dtype: str, value: Expr) -> Expr:
    """Return the same bits as another type."""
    return tirx.reinterpret(dtype, value)


def _sequence(statements: Sequence[tirx.Stmt]) -> tirx.Stmt:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))
