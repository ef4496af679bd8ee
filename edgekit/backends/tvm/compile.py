"""The way from an ONNX graph to a shared library that an app loads."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import edgekit
from edgekit.backends import Source
from edgekit.backends.tvm import driver, elf, link, processor
from edgekit.backends.tvm import library as library_files
from edgekit.backends.tvm.driver import Interface
from edgekit.backends.tvm.link import System
from edgekit.backends.tvm.variants import Variant, compile_float, compile_integer
from edgekit.bundle import Built
from edgekit.errors import EdgekitError, ToolMissingError, UnsupportedError
from edgekit.graph.checks import load_onnx
from edgekit.graph.receptive_field import receptive_field
from edgekit.report import Audit
from edgekit.runners import qemu
from edgekit.target import Isa, Target

PIN = "apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post0"
# With apache-tvm-ffi 0.1.15, which apache-tvm's own requirement admits, this dies by SIGSEGV.
_PROBE = """
import tvm
from tvm import te
a = te.placeholder((8,), name="a")
tvm.ir.save_json(te.create_prim_func([a, te.compute((8,), lambda i: a[i] + 1)]))
"""

log = logging.getLogger(__name__)


def build(source: Source, target: Target, out: Path) -> Built:
    """Compile a model into `out`: a shared and a static library, a C header, and what other languages need.

    The library is byte for byte the same for the same model, target and versions. In int8 it holds a variant for
    processors with the dot product instructions and one for those without, and chooses when it is called.

    Raises:
        UnsupportedError: A target without a fixed tile or instruction set, an operator without a kernel, or (int8) one
            that is not quantized.
        ToolMissingError: The installed TVM does not work with the installed apache-tvm-ffi, or zig is not installed.
    """
    isa, tile = _settings(source, target)
    system = link.system_of(isa)
    _probe()
    with tempfile.TemporaryDirectory(prefix="edgekit-tvm-") as folder:
        work = Path(folder)
        log.info("%s: compiling %s kernels for %s, tile %s", source.name, target.precision, isa.triple, tile)
        compile_variants = compile_integer if target.precision == "int8" else compile_float
        variants = compile_variants(source, isa, tile.height, tile.width, work)
        where = driver.places(variants)
        interface = _interface(source, target, isa, tile, variants, where)
        sources = driver.generate(variants, where, interface)
        log.info("%s: linking %d kernels", source.name, sum(len(variant.kernels) for variant in variants))
        library, static = _link(sources, interface, variants, system, work)
        _check(library, isa, system)
        program = library_files.link_denoiser(static, sources, interface, system, work) if system.api is None else None
        files = library_files.deliver(library, static, program, sources, interface, system, out)
        facts: dict[str, int | str] = {
            "tile": str(tile),
            "halo_px": interface.halo,
            "channels": source.channels,
            "kernel_count": sum(len(variant.kernels) for variant in variants),
            "arena_bytes": where.arena_bytes,
            "weights_bytes": len(where.weights),
            "stack_bytes": interface.stack_bytes,
            "so_bytes": (out / files["artifact"]).stat().st_size,
            "variants": " ".join(variant.name for variant in variants),
        }
    if interface.tile_only:
        facts["tile_only"] = interface.tile_only
    if account := _account(variants):
        facts["integer_macs_permille"] = account.integer_macs_permille
    versions = {name: metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")}
    return Built(
        files=files,
        precision=target.precision,
        tools=versions | link.tools(),
        facts=facts,
        notes=(
            f"Compiled for {isa.triple}, {isa.cpu} with {', '.join(isa.features) or 'no extra features'}.",
            *_notes(variants),
            *((f"It takes no picture larger than a tile: {interface.tile_only}",) if interface.tile_only else ()),
        ),
        audit=account,
    )


def _account(variants: Sequence[Variant]) -> Audit | None:
    """Return how much of the multiply-accumulates the machine code does in integers, of the variant with the least."""
    if not any(variant.macs for variant in variants):
        return None
    return Audit(
        integer_macs_permille=min(1000 * variant.integer_macs // variant.macs for variant in variants),
        how=f"the machine code of its kernels for {' and '.join(variant.name for variant in variants)}",
    )


def _notes(variants: Sequence[Variant]) -> tuple[str, ...]:
    if not any(variant.macs for variant in variants):
        return ("It computes in float32.",)
    names = " and ".join(variant.name for variant in variants)
    return (
        f"Integer kernels for {names}; the first that the processor can run is chosen at each call.",
        "In float32: the picture's way onto its grid, and the last subtraction.",
    )


@dataclass(frozen=True, kw_only=True)
class _Tile:
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def check(target: Target) -> None:
    """Refuse a target that no model is compiled or verified for; raises as the protocol says.

    Cores are looked up where QEMU is installed. `open_session` asks for it where it is not.
    """
    isa, _ = _asked(target)
    link.system_of(isa)
    processor.needs(isa, [])
    if target.runner.kind == "qemu":
        with suppress(ToolMissingError):
            for cpu in target.runner.cpus:
                qemu.find(cpu)


def _settings(source: Source, target: Target) -> tuple[Isa, _Tile]:
    """Return the instruction set and the tile, or say which of the target's settings this engine cannot do."""
    isa, tile = _asked(target)
    if tile.height % source.stride or tile.width % source.stride:
        raise UnsupportedError(
            f"target '{target.name}': input {tile} is not a tile that '{source.name}' can be compiled for",
            remedy=f"set input.height and input.width to multiples of {source.stride}",
        )
    return isa, tile


def _asked(target: Target) -> tuple[Isa, _Tile]:
    """Return the instruction set and the tile, whatever the model."""
    if target.precision == "float16":
        raise UnsupportedError(
            f"target '{target.name}': the engine 'tvm' has no float16 kernels", remedy="use precision: int8 or float32"
        )
    if target.isa is None:
        raise UnsupportedError(f"target '{target.name}' has no 'isa'", remedy="set isa.triple and isa.cpu")
    height, width = target.input.height, target.input.width
    if height is None or width is None:
        raise UnsupportedError(
            f"target '{target.name}': the engine 'tvm' has a fixed tile, input is {height} x {width}",
            remedy="set input.height and input.width",
        )
    return target.isa, _Tile(width=width, height=height)


@cache
def _probe() -> None:
    """Check in a process of its own that TVM and its foreign function interface fit together."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        versions = " and ".join(f"{name} {metadata.version(name)}" for name in ("apache-tvm", "apache-tvm-ffi"))
        raise ToolMissingError(
            f"{versions} do not work together (a probe ended with exit code {done.returncode})",
            remedy=f"run: pip install {PIN}",
        )


def _interface(
    source: Source, target: Target, isa: Isa, tile: _Tile, variants: Sequence[Variant], where: driver.Places
) -> Interface:
    halo, tile_only = _halo(source, tile)
    weights_hash = hashlib.sha256(where.weights).hexdigest()[:16]
    return Interface(
        model=source.name,
        channels=source.channels,
        height=tile.height,
        width=tile.width,
        takes_sigma=source.takes_sigma,
        halo=max(tile.height, tile.width) if halo is None else halo,
        halo_known=halo is not None,
        tile_only=tile_only,
        stride=source.stride,
        # Variants that are chosen only where the processor has their features need none of it.
        needs=processor.needs(isa, [] if variants[-1].requires else variants[-1].features),
        triple=isa.triple,
        stack_bytes=max(variant.stack_bytes for variant in variants),
        version=f"{source.name} {target.precision} {tile}, weights {weights_hash}, edgekit {edgekit.__version__}",
    )


def _halo(source: Source, tile: _Tile) -> tuple[int | None, str]:
    """Return the halo in pixels, None where it is not known; and why larger pictures than a tile are refused, if so."""
    try:
        halo = receptive_field(load_onnx(source.fp32_onnx)).aligned(source.stride)
    except UnsupportedError as error:
        return None, str(error)
    inside = min(tile.height, tile.width) > 2 * halo
    return halo, "" if inside else f"nothing of the tile {tile} lies inside its halo of {halo} px"


def _link(
    sources: driver.Sources, interface: Interface, variants: Sequence[Variant], system: System, work: Path
) -> tuple[Path, Path]:
    """Return the shared and the static library, linked in the folder `work` from the kernels there and C."""
    library_files.write_sources(sources, interface, work)
    kernels = [variant.object_file for variant in variants]
    for path in kernels:
        _check_imports(path)
    code = library_files.compile_sources(work, system.zig)
    needs = [link.link_stub(name, sorted(driver.ASKED), system, work) for name in system.libc]
    memory = link.compile_c(work / "memory.c", system.zig)
    link.link_library([*code, memory, *kernels], interface.symbols, work / interface.library, needs=needs)
    return work / interface.library, library_files.archive([*code, *kernels], interface, work)


def _check_imports(kernels: Path) -> None:
    """Check that the kernels call nothing but what memory.c defines: no allocator, no runtime, no libm."""
    if foreign := sorted(elf.undefined_symbols(kernels) - driver.PROVIDED):
        raise UnsupportedError(
            f"the kernels call {', '.join(foreign)}, which a library without libc does not have",
            remedy="use a model of convolutions, ReLU, h-swish, h-sigmoid and pixel shuffles",
        )


def _check(library: Path, isa: Isa, system: System) -> None:
    """Check what was linked: that the system's loader takes it, and that it keeps no state."""
    if isa.triple.startswith("aarch64-"):
        api = system.api if system.api is not None else elf.RELR_API
        elf.check(library, api, imports=driver.ASKED, libraries=elf.BIONIC if system.api else frozenset(system.libc))
    _check_stateless(library)


def _check_stateless(library: Path) -> None:
    if size := elf.mutable_bytes(library):
        raise EdgekitError(f"{library.name} keeps {size} bytes of state between calls, so it is not reentrant")
