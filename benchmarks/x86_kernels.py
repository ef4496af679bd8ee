"""Times each integer kernel of a quantized network on this x86 processor, by turns with VNNI alone and with AMX.

    edgekit compile base -t linux-x86_64-vnni -o runs/base
    python benchmarks/x86_kernels.py base runs/base/06-quantize/arm/student.int8.onnx

Writes results/benchmarks/x86_kernels_<name>.json: microseconds of all calls of a kernel for one square picture, one
thread, medians. Both variants are checked to give the same picture, bit by bit. The library picks a variant itself, and
hides its kernels; here they are linked with their names.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit import target
from edgekit.backends.tvm import driver, integer_program, link, qdq
from edgekit.backends.tvm.integer_program import IntegerProgram
from edgekit.backends.tvm.kernels import assemble, target_of
from edgekit.backends.tvm.program import ALIGNMENT, Constant, Input, Tensor, lay_out
from edgekit.backends.tvm.variants import choices
from edgekit.files import sha256, write_json
from edgekit.measure import host
from edgekit.target import Isa

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks"
SIGMA = 25 / 255
# linux/arch/x86/include/uapi/asm/prctl.h: ARCH_REQ_XCOMP_PERM, and the tiles' number among extended states.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
Bytes = NDArray[np.uint8]


class Kernels:
    """The kernels of a network for one machine, each with its arguments in memory."""

    def __init__(self, program: IntegerProgram, library: Path, noisy: NDArray[np.float32]) -> None:
        loaded, layout = ctypes.CDLL(str(library)), lay_out(program.steps, program.steps)
        self._weights, self._arena = _memory(len(layout.weights)), _memory(layout.arena_bytes)
        self._weights[:] = np.frombuffer(layout.weights, np.uint8)
        self._inputs = {"noisy": noisy, "sigma": np.array([SIGMA], np.float32)}
        self._picture = np.empty_like(noisy)

        def place(tensor: Tensor) -> ctypes.c_void_p:
            if isinstance(tensor, Input):
                return ctypes.c_void_p(self._inputs[tensor.name].ctypes.data)
            if isinstance(tensor, Constant):
                return ctypes.c_void_p(self._weights.ctypes.data + layout.weight_offsets[tensor])
            if tensor.step not in layout.arena_offsets:
                return ctypes.c_void_p(self._picture.ctypes.data)
            return ctypes.c_void_p(self._arena.ctypes.data + layout.arena_offsets[tensor.step])

        self.names = [step.kernel for step in program.steps]
        self._calls: list[tuple[Callable[..., object], Sequence[ctypes.c_void_p]]] = []
        for step in program.steps:
            function = loaded[step.kernel]
            function.restype = None
            self._calls.append((function, [place(tensor) for tensor in (*step.reads, step.writes)]))

    def picture(self) -> NDArray[np.float32]:
        """Return what the network makes of the noisy picture."""
        for function, given in self._calls:
            function(*given)
        return self._picture.copy()

    def times(self) -> list[float]:
        """Return the microseconds that each call takes, in order."""
        taken = []
        for function, given in self._calls:
            start = time.perf_counter_ns()
            function(*given)
            taken.append((time.perf_counter_ns() - start) / 1000)
        return taken


def main() -> None:
    """Time the kernels of one graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what the record is called")
    parser.add_argument("graph", type=Path, help="QDQ graph of a gray network, as placed for arm")
    parser.add_argument("--side", type=int, default=256, help="of the picture, pixels")
    parser.add_argument("--rounds", type=int, default=100)
    given = parser.parse_args()
    isa = target.load("linux-x86_64-vnni").isa
    assert isa is not None
    noisy = np.random.default_rng(0).random((given.side, given.side), dtype=np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        variants = {
            name: (program, Kernels(program, library, noisy))
            for name, program, library in _linked(given.graph, isa, given.side, Path(scratch))
        }
        pictures = [kernels.picture() for _, kernels in variants.values()]
        assert all(np.array_equal(pictures[0], picture) for picture in pictures)
        taken: dict[str, list[list[float]]] = {name: [] for name in variants}
        for _ in range(given.rounds):
            for name, (_, kernels) in variants.items():
                taken[name].append(kernels.times())
    found = {name: _by_kernel(program, kernels, taken[name]) for name, (program, kernels) in variants.items()}
    for name, rows in found.items():
        print(f"{name}: {sum(rows.values()):.0f} us")
        for kernel, microseconds in sorted(rows.items(), key=lambda row: -row[1]):
            macs = variants[name][0].macs[kernel]
            print(f"  {kernel:24} {microseconds:8.1f} us {macs / 1e6:8.1f} M multiply-accumulates")
    record = {
        "schema_version": 1,
        "kind": "edgekit-kernels",
        "graph_sha256": sha256(given.graph),
        "side_px": given.side,
        "protocol": f"one thread, variants by turns {given.rounds} times, medians of each call, summed by kernel",
        "microseconds": found,
        "host": asdict(host.describe()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(RESULTS / f"x86_kernels_{given.name}.json", record)


def _linked(graph: Path, isa: Isa, side: int, folder: Path) -> list[tuple[str, IntegerProgram, Path]]:
    """Return (machine, program, library with the names of its kernels) of each variant that this process may run."""
    network = qdq.read(graph, channels=1, height=side, width=side)
    denied = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    (folder / "memory.c").write_bytes((driver.C_FOLDER / "memory.c").read_bytes())
    memory = link.compile_c(folder / "memory.c", isa.triple)
    made = []
    for choice in choices(isa):
        if choice.machine.tiles and denied:
            continue
        name = choice.machine.name
        program = integer_program.write(network, choice.machine)
        assemble(program.kernels, target_of(isa, *choice.features), folder / f"{name}.o")
        library = folder / f"lib{name}.so"
        link.link_library([folder / f"{name}.o", memory], sorted(program.kernels), library)
        made.append((name, program, library))
    return made


def _memory(size: int) -> Bytes:
    whole = np.zeros(size + ALIGNMENT, np.uint8)
    return whole[-whole.ctypes.data % ALIGNMENT :][:size]


def _by_kernel(program: IntegerProgram, kernels: Kernels, taken: list[list[float]]) -> dict[str, float]:
    found = dict.fromkeys(program.kernels, 0.0)
    for name, microseconds in zip(kernels.names, np.median(taken, 0), strict=True):
        found[name] = round(found[name] + float(microseconds), 1)
    return found


if __name__ == "__main__":
    main()
