"""The way from a float32 ONNX graph to a shared library that an Android app loads."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import edgekit
from edgekit.backends import Built, Source
from edgekit.backends.tvm import driver, elf, link
from edgekit.backends.tvm.driver import Interface
from edgekit.backends.tvm.kernels import compile_kernels, fuse, target_of
from edgekit.backends.tvm.program import Layout, Step, lay_out, steps_of
from edgekit.errors import EdgekitError, ToolMissingError, UnsupportedError
from edgekit.target import Isa, Target

ABI = "arm64-v8a"
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
    """Compile a model into `out`: a shared library, its C header and a CMake file.

    The library is byte for byte the same for the same model, target and versions.

    Raises:
        UnsupportedError: INT8, a target without a fixed tile or instruction set, or an operator without a kernel.
        ToolMissingError: The installed TVM does not work with the installed apache-tvm-ffi, or zig is not installed.
    """
    isa, tile = _settings(source, target)
    _probe()
    with tempfile.TemporaryDirectory(prefix="edgekit-tvm-") as folder:
        work = Path(folder)
        log.info("%s: compiling kernels for %s, tile %s", source.name, isa.triple, tile)
        program = _compile(source, isa, tile, work / "kernels.o")
        log.info("%s: linking %d kernels", source.name, len(program.kernels))
        interface = _interface(source, isa, tile, program)
        sources = driver.generate(program.steps, program.layout, interface)
        library = _link(sources, interface, isa, work)
        elf.check(library, link.android_api(isa))
        _check_stateless(library)
        files = _deliver(library, sources, interface, out)
    versions = {name: metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")}
    return Built(
        files=files,
        precision="float32",
        tools=versions | link.tools(),
        facts={
            "tile": str(tile),
            "channels": source.channels,
            "kernel_count": len(program.kernels),
            "arena_bytes": program.layout.arena_bytes,
            "weights_bytes": len(program.layout.weights),
            "stack_bytes": program.stack_bytes,
            "so_bytes": (out / files["artifact"]).stat().st_size,
        },
        notes=(
            f"Compiled for {isa.triple}, {isa.cpu} with {', '.join(isa.features) or 'no extra features'}.",
            "It computes in float32: this engine has no integer kernels yet.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Tile:
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, kw_only=True)
class _Program:
    """A compiled network: names of its kernels, their calls, the places of its tensors, and the stack that it takes."""

    kernels: tuple[str, ...]
    steps: tuple[Step, ...]
    layout: Layout
    stack_bytes: int


def _compile(source: Source, isa: Isa, tile: _Tile, kernels_o: Path) -> _Program:
    """Write the network's kernels to an object file; returns how they are called."""
    machine = target_of(isa)
    shapes = {"noisy": (1, source.channels, tile.height, tile.width)}
    if source.takes_sigma:
        shapes["sigma"] = (1, 1, 1, 1)
    module = fuse(source.fp32_onnx, shapes, machine)
    steps = steps_of(module)
    kernels = tuple(sorted({step.kernel for step in steps}))
    stack_bytes = compile_kernels(module, kernels, machine, kernels_o)
    return _Program(kernels=kernels, steps=steps, layout=lay_out(steps), stack_bytes=stack_bytes)


def _settings(source: Source, target: Target) -> tuple[Isa, _Tile]:
    """Return the instruction set and the tile, or say which of the target's settings this engine cannot do."""
    if target.precision != "float32":
        raise UnsupportedError(
            f"target '{target.name}': the engine 'tvm' has no {target.precision} kernels yet",
            remedy="use precision: float32",
        )
    if target.isa is None:
        raise UnsupportedError(f"target '{target.name}' has no 'isa'", remedy="set isa.triple and isa.cpu")
    height, width = target.input.height, target.input.width
    if height is None or width is None or height % source.stride or width % source.stride:
        raise UnsupportedError(
            f"target '{target.name}': input {width}x{height} is not a tile that '{source.name}' can be compiled for",
            remedy=f"set input.height and input.width to multiples of {source.stride}",
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


def _interface(source: Source, isa: Isa, tile: _Tile, program: _Program) -> Interface:
    weights_hash = hashlib.sha256(program.layout.weights).hexdigest()[:16]
    return Interface(
        model=source.name,
        channels=source.channels,
        height=tile.height,
        width=tile.width,
        takes_sigma=source.takes_sigma,
        triple=isa.triple,
        stack_bytes=program.stack_bytes,
        version=f"{source.name} float32 {tile}, weights {weights_hash}, edgekit {edgekit.__version__}",
    )


def _link(sources: driver.Sources, interface: Interface, isa: Isa, work: Path) -> Path:
    """Return the library, linked in the folder `work` from the kernels there and the driver's code."""
    (work / "weights.bin").write_bytes(sources.weights)
    (work / interface.header).write_text(sources.header, encoding="utf-8")
    (work / "library.c").write_text(sources.code, encoding="utf-8")
    shutil.copyfile(driver.C_FOLDER / "memory.c", work / "memory.c")
    _check_imports(work / "kernels.o")
    code = [link.compile_c(work / name, link.android(isa)) for name in ("library.c", "memory.c")]
    link.link_library([*code, work / "kernels.o"], interface.symbols, work / interface.library)
    return work / interface.library


def _check_imports(kernels: Path) -> None:
    """Check that the kernels call nothing but what memory.c defines: no allocator, no runtime, no libm."""
    if foreign := sorted(elf.undefined_symbols(kernels) - driver.PROVIDED):
        raise UnsupportedError(
            f"the kernels call {', '.join(foreign)}, which a library without libc does not have",
            remedy="use a model of convolutions, ReLU, h-swish, h-sigmoid and pixel shuffles",
        )


def _check_stateless(library: Path) -> None:
    if size := elf.mutable_bytes(library):
        raise EdgekitError(f"{library.name} keeps {size} bytes of state between calls, so it is not reentrant")


def _deliver(library: Path, sources: driver.Sources, interface: Interface, out: Path) -> dict[str, str]:
    """Write the finished files into `out`; returns role -> path in it."""
    files = {
        "artifact": f"jniLibs/{ABI}/{interface.library}",
        "header": f"include/{interface.header}",
        "cmake": f"cmake/edgekit_{interface.model}.cmake",
    }
    for path in files.values():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library, out / files["artifact"])
    (out / files["header"]).write_text(sources.header, encoding="utf-8")
    (out / files["cmake"]).write_text(sources.cmake, encoding="utf-8")
    return files
