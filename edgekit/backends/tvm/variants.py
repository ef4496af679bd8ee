"""What a library holds: a network for one processor, or for several of a family, chosen when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.backends import Source
from edgekit.backends.tvm import integer_program, machine_code, qdq
from edgekit.backends.tvm.kernels import assemble, compile_kernels, fuse, target_of
from edgekit.backends.tvm.machine import Amx, DotProduct, Machine, Neon, Vnni
from edgekit.backends.tvm.program import Step, steps_of
from edgekit.errors import UnsupportedError
from edgekit.target import Isa


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network compiled for one processor.

    name: Part of the names of its functions.
    requires: C expression that is true on a processor that runs it; None for every processor of the target.
    features: What LLVM was told that the processor has, beyond the target's own.
    object_file: Holds the kernels.
    integer_macs: Multiply-accumulates for one picture in kernels whose machine code multiplies integers.
    macs: All of them.
    """

    name: str
    requires: str | None
    features: tuple[str, ...] = ()
    object_file: Path
    steps: tuple[Step, ...]
    stack_bytes: int
    integer_macs: int
    macs: int

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels, sorted."""
        return tuple(sorted({step.kernel for step in self.steps}))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An integer machine, the features that LLVM needs to be told of, and when it can be chosen."""

    machine: Machine
    features: tuple[str, ...]
    requires: str | None


_AVX512 = ("+avx512vnni", "+avx512vbmi", "+avx512bw", "+avx512vl")
# In the order in which they are tried. HWCAP_ASIMDDP is bit 20 of AT_HWCAP, which is 16:
# https://docs.kernel.org/arch/arm64/elf_hwcaps.html; tiles_allowed is in library.c.
_CHOICES: Mapping[str, tuple[Choice, ...]] = {
    "aarch64": (
        Choice(machine=DotProduct(), features=("+dotprod",), requires="getauxval(16) & 1ul << 20"),
        Choice(machine=Neon(), features=(), requires=None),
    ),
    "x86_64": (
        Choice(machine=Amx(), features=(*_AVX512, "+amx-tile", "+amx-int8"), requires="tiles_allowed()"),
        Choice(machine=Vnni(), features=_AVX512, requires=None),
    ),
}


def compile_float(source: Source, isa: Isa, height: int, width: int, folder: Path) -> tuple[Variant, ...]:
    """Return the one float32 variant, its object file in `folder`.

    Raises:
        UnsupportedError: An operator without a kernel, or another family of processors.
    """
    family(isa)
    machine = target_of(isa)
    shapes = {"noisy": (1, source.channels, height, width)}
    if source.takes_sigma:
        shapes["sigma"] = (1, 1, 1, 1)
    module = fuse(source.fp32_onnx, shapes, machine)
    steps = steps_of(module)
    kernels = tuple(sorted({step.kernel for step in steps}))
    object_file = folder / "float32.o"
    stack_bytes = compile_kernels(module, kernels, machine, object_file)
    return (
        Variant(
            name="float32",
            requires=None,
            object_file=object_file,
            steps=steps,
            stack_bytes=stack_bytes,
            integer_macs=0,
            macs=0,
        ),
    )


def compile_integer(source: Source, isa: Isa, height: int, width: int, folder: Path) -> tuple[Variant, ...]:
    """Return the integer variants in the order in which they are tried, their object files in `folder`.

    Raises:
        UnsupportedError: No QDQ graph, something in it that is not computed in integers, or another family.
    """
    if source.int8_onnx is None:
        raise UnsupportedError(f"'{source.name}' has no quantized graph, which int8 is compiled from")
    network = qdq.read(source.int8_onnx, channels=source.channels, height=height, width=width)
    made = []
    for choice in choices(isa):
        program = integer_program.write(network, choice.machine)
        object_file = folder / f"{choice.machine.name}.o"
        stack_bytes = assemble(program.kernels, target_of(isa, *choice.features), object_file)
        integer = machine_code.integer_kernels(object_file, choice.machine.name)
        made.append(
            Variant(
                name=choice.machine.name,
                requires=choice.requires,
                features=choice.features,
                object_file=object_file,
                steps=program.steps,
                stack_bytes=stack_bytes,
                integer_macs=sum(macs for kernel, macs in program.macs.items() if kernel in integer),
                macs=sum(program.macs.values()),
            )
        )
    return tuple(made)


def choices(isa: Isa) -> tuple[Choice, ...]:
    """Return the machines that a library for an instruction set has variants for, in the order in which they are tried.

    One that needs what the target's `isa.features` rule out (`-amx-int8`) is left out, but never the last.

    Raises:
        UnsupportedError: Another family of processors.
    """
    *first, last = _CHOICES[family(isa)]
    without = {f"+{feature[1:]}" for feature in isa.features if feature.startswith("-")}
    return (*(choice for choice in first if without.isdisjoint(choice.features)), last)


def family(isa: Isa) -> str:
    """Return the family of processors that a triple names.

    Raises:
        UnsupportedError: Not one that this engine has kernels for.
    """
    name = isa.triple.partition("-")[0]
    if name not in _CHOICES:
        raise UnsupportedError(
            f"isa.triple '{isa.triple}' is not supported", remedy=f"the engine 'tvm' takes {', '.join(_CHOICES)}"
        )
    return name
