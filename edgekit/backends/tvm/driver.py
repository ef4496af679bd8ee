"""The C code around the kernels: a library's header, its entry points and the calls of the kernels in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from edgekit.backends.tvm.processor import Needs
from edgekit.backends.tvm.program import ALIGNMENT, Constant, Input, Layout, Step, Tensor, lay_out
from edgekit.backends.tvm.variants import Variant

C_FOLDER = Path(__file__).parent / "c"
CODE = ("library.c", "api.c", "jni.c")
PROVIDED = frozenset({"memcpy", "memmove", "memset"})
# What a library asks the system's libc; bionic exports them all since API 21 (its libc.map.txt).
ASKED = frozenset({"free", "getauxval", "malloc", "pthread_create", "pthread_join"})
_FUNCTIONS = (
    "create",
    "denoise_f32",
    "denoise_u8",
    "destroy",
    "error_text",
    "last_error",
    "tile_f32",
    "tile_workspace_size",
    "version",
    "workspace_size",
)
_METHODS = ("create", "denoise", "destroy", "errorText", "version")
# Saved registers and spills of a kernel (2.8 KiB in base's for 64-bit ARM), and all between the entry point and it (3).
FRAME_KIB = 8
_INPUTS = {"noisy": "noisy", "sigma": "&sigma"}

_templates = Environment(
    loader=FileSystemLoader(C_FOLDER),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What an app sees of a library.

    model: Name of the model; part of every symbol.
    triple: What the code is compiled for, for the header's first line.
    halo: Pixels at a tile's cut edges that are not right, a multiple of the stride; all of it where none is known.
    halo_known: Whether it is.
    tile_only: Why pictures larger than a tile are refused; empty where they are not.
    stride: Of the network.
    needs: Features of every processor that runs it.
    stack_bytes: The most that a kernel takes of the caller's stack.
    version: What `edgekit_<model>_version()` returns.
    """

    model: str
    channels: int
    height: int
    width: int
    takes_sigma: bool
    halo: int
    halo_known: bool
    tile_only: str
    stride: int
    needs: Needs
    triple: str
    stack_bytes: int
    version: str

    @property
    def prefix(self) -> str:
        """What the names of all its functions begin with; the package of its classes."""
        return f"edgekit_{self.model}"

    @property
    def jni_package(self) -> str:
        """The package as the names of native methods have it."""
        return self.prefix.replace("_", "_1")

    @property
    def pictures(self) -> str:
        """Which pictures it takes."""
        size = f"at most {self.width} x {self.height} pixels" if self.tile_only else "any size"
        return f"pictures of {size}"

    @property
    def header(self) -> str:
        """Name of the header file."""
        return f"{self.prefix}.h"

    @property
    def library(self) -> str:
        """Name of the shared library, which is its SONAME too."""
        return f"lib{self.prefix}.so"

    @property
    def archive(self) -> str:
        """Name of the static library."""
        return f"lib{self.prefix}.a"

    @property
    def program(self) -> str:
        """Name of the command-line denoiser."""
        return f"{self.prefix}_denoise"

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the functions that the library exports, those for a Java virtual machine too."""
        methods = (f"Java_{self.jni_package}_ByteDenoiser_{name}" for name in _METHODS)
        return (*(f"{self.prefix}_{name}" for name in _FUNCTIONS), *methods)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files that a library is made from, besides the kernels.

    code: Name -> text of the C files. names: What the templates know, for those of other languages.
    """

    header: str
    code: Mapping[str, str]
    weights: bytes
    names: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the tensors of all variants lie: one copy of the weights, and one arena that is enough for each."""

    layouts: tuple[Layout, ...]

    @property
    def weights(self) -> bytes:
        """Every constant once."""
        return self.layouts[0].weights

    @property
    def arena_bytes(self) -> int:
        """Size of the working memory."""
        return max(layout.arena_bytes for layout in self.layouts)


def places(variants: Sequence[Variant]) -> Places:
    """Return where the tensors of all variants lie."""
    stored = tuple(chain.from_iterable(variant.steps for variant in variants))
    return Places(layouts=tuple(lay_out(variant.steps, stored) for variant in variants))


def generate(variants: Sequence[Variant], where: Places, interface: Interface) -> Sources:
    """Return the C code that runs one of the variants, the first that the processor can run."""
    names: dict[str, object] = {
        "model": interface.model,
        "MODEL": interface.model.upper(),
        "header": interface.header,
        "library": interface.library,
        "channels": interface.channels,
        "height": interface.height,
        "width": interface.width,
        "takes_sigma": interface.takes_sigma,
        "halo": interface.halo,
        "halo_known": interface.halo_known,
        "tile_only": interface.tile_only,
        "pictures": interface.pictures,
        "stride": interface.stride,
        "needs": interface.needs,
        "jni_package": interface.jni_package,
        "slot_bytes": where.arena_bytes + 8 * interface.channels * interface.height * interface.width,
        "triple": interface.triple,
        "version": interface.version,
        "stack_kib": interface.stack_bytes // 1024 + FRAME_KIB,
        "alignment": ALIGNMENT,
        "arena_bytes": where.arena_bytes,
        "variants": [
            {
                "name": variant.name,
                "requires": variant.requires,
                "kernels": {step.kernel: ["const void *"] * len(step.reads) + ["void *"] for step in variant.steps},
                "calls": [{"kernel": step.kernel, "arguments": _arguments(step, layout)} for step in variant.steps],
            }
            for variant, layout in zip(variants, where.layouts, strict=True)
        ],
    }
    return Sources(
        header=_templates.get_template("edgekit.h.j2").render(names),
        code={name: _templates.get_template(f"{name}.j2").render(names) for name in CODE},
        weights=where.weights,
        names=names,
    )


def render(template: str, sources: Sources) -> str:
    """Return a file of another language for the same library."""
    return _templates.get_template(template).render(sources.names)


def _arguments(step: Step, layout: Layout) -> list[str]:
    return [_place(tensor, layout) for tensor in (*step.reads, step.writes)]


def _place(tensor: Tensor, layout: Layout) -> str:
    """Return the C expression for a tensor's address."""
    if isinstance(tensor, Input):
        return _INPUTS[tensor.name]
    if isinstance(tensor, Constant):
        return f"weights + {layout.weight_offsets[tensor]}"
    if tensor.step not in layout.arena_offsets:
        return "denoised"
    return f"arena + {layout.arena_offsets[tensor.step]}"
