"""TVM: machine code for Android and Linux, as a shared library that needs nothing but itself (and libc's getauxval).

    float32:  ONNX -> Relax -> legalized, fused -> scheduled                            (kernels, schedule)
    int8:     QDQ ONNX -> integer network -> kernels, written on top of each machine (qdq, integer, integer_*, machine)
    both:     -> object files -> calls in order, one planned arena -> C around it -> linked (program, driver, link)

`reference` computes an integer network in numpy, to the last bit as every variant of the library does.

Around the tile lies what an app sees: whole pictures (c/api.c.j2), the native methods of a Java virtual machine
(c/jni.c.j2), and files for other languages (library). `processor` tells which instructions a library cannot do without.

**The contract of a tile**, for whatever C is put around it. A library holds, hidden from its users,

    int edgekit_<model>_tile(const float *noisy, float sigma, float *denoised, void *workspace);
    int edgekit_<model>_<variant>_tile(const float *noisy, float sigma, float *denoised, void *workspace);

The first chooses the variant that the processor can run, at each call and without state; the others are the variants:
`float32`, or `dotprod` and `neon` (64-bit ARM), or `amx` and `vnni` (x86). `amx` is to be called only where Linux has
let the process use tiles, for which the first asks. `noisy` and `denoised` are channels x height x width floats of
the size in the facts `tile` and `channels`; they may lie anywhere a float may, and must not overlap. `sigma` is
ignored by a blind model. `workspace` is at a multiple of 64 and has `arena_bytes` bytes (a fact, the same for all
variants of a library); its content before and after means nothing. They return 0, cannot fail, keep nothing between
calls, allocate nothing, and take `stack_bytes` of stack and a few KiB; any number may run at once, each with its own
workspace.
"""

from pathlib import Path

from edgekit.backends.tvm import qdq
from edgekit.backends.tvm.compile import build, check
from edgekit.backends.tvm.session import open_session
from edgekit.bundle import Built
from edgekit.errors import IncompleteError
from edgekit.report import Audit
from edgekit.target import Target

__all__ = ["audit", "build", "check", "check_int8", "open_session"]


def check_int8(int8_onnx: Path, *, channels: int, side: int) -> None:
    """Refuse a QDQ graph that `build` would not compile, whatever its numbers are; nothing is made.

    Args:
        int8_onnx: The graph, in the placement for ARM.
        channels: Planes of the picture.
        side: Of a picture that the graph takes, in pixels.

    Raises:
        UnsupportedError: Something in the graph is not computed in integers; the message names it.
    """
    qdq.read(int8_onnx, channels=channels, height=side, width=side)


def audit(bundle: Path, built: Built, target: Target) -> Audit:
    """Return that a float library has no integers.

    Raises:
        IncompleteError: The library is INT8: it no longer has the names of its kernels, so what `build` read from their
            machine code stands.
    """
    if built.precision != "int8":
        return Audit(integer_macs_permille=0, how=f"{built.precision} kernels")
    raise IncompleteError(
        f"{built.files['artifact']}: its machine code was read when it was linked, and has not changed"
    )
