"""The C code around the kernels: a library's header, its entry points and the calls of the kernels in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from edgekit.backends.tvm.program import ALIGNMENT, Constant, Input, Layout, Step, Tensor

C_FOLDER = Path(__file__).parent / "c"
PROVIDED = frozenset({"memcpy", "memmove", "memset"})
# Saved registers and spills of a kernel and of the entry point, generously.
FRAME_KIB = 4
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
    stack_bytes: The most that a kernel takes of the caller's stack.
    version: What `edgekit_<model>_version()` returns.
    """

    model: str
    channels: int
    height: int
    width: int
    takes_sigma: bool
    triple: str
    stack_bytes: int
    version: str

    @property
    def header(self) -> str:
        """Name of the header file."""
        return f"edgekit_{self.model}.h"

    @property
    def library(self) -> str:
        """Name of the shared library, which is its SONAME too."""
        return f"libedgekit_{self.model}.so"

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the functions that the library exports."""
        return tuple(
            f"edgekit_{self.model}_{name}" for name in ("denoise_f32", "error_text", "version", "workspace_size")
        )


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files that a library is made from, besides the kernels."""

    header: str
    code: str
    cmake: str
    weights: bytes


def generate(steps: Sequence[Step], layout: Layout, interface: Interface) -> Sources:
    """Return the C code that runs `steps` in the places of `layout`."""
    names: dict[str, object] = {
        "model": interface.model,
        "MODEL": interface.model.upper(),
        "header": interface.header,
        "library": interface.library,
        "channels": interface.channels,
        "height": interface.height,
        "width": interface.width,
        "takes_sigma": interface.takes_sigma,
        "triple": interface.triple,
        "version": interface.version,
        "stack_kib": interface.stack_bytes // 1024 + FRAME_KIB,
        "alignment": ALIGNMENT,
        "arena_bytes": layout.arena_bytes,
        "kernels": {step.kernel: ["const float *"] * len(step.reads) + ["float *"] for step in steps},
        "calls": [{"kernel": step.kernel, "arguments": _arguments(step, layout)} for step in steps],
    }
    return Sources(
        header=_templates.get_template("library.h.j2").render(names),
        code=_templates.get_template("library.c.j2").render(names),
        cmake=_templates.get_template("package.cmake.j2").render(names),
        weights=layout.weights,
    )


def _arguments(step: Step, layout: Layout) -> list[str]:
    return [_place(tensor, layout) for tensor in (*step.reads, step.writes)]


def _place(tensor: Tensor, layout: Layout) -> str:
    """Return the C expression for a tensor's address."""
    if isinstance(tensor, Input):
        return _INPUTS[tensor.name]
    if isinstance(tensor, Constant):
        return f"(const float *)(weights + {layout.weight_offsets[tensor]})"
    if tensor.step not in layout.arena_offsets:
        return "denoised"
    return f"(float *)((char *)workspace + {layout.arena_offsets[tensor.step]})"
