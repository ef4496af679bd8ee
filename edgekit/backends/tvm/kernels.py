"""From an ONNX graph to fused and scheduled kernels, and from those to one object file.

    ONNX -> Relax -> legalized, fused -> scheduled, one rule per kernel -> lowered -> object file

The kernels get a bare calling convention, `void kernel(const float *in, ..., float *out)`, in place of TVM's packed
one: no argument records, no runtime and no allocator are needed around them, and no alignment beyond that of a float.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper
from tvm import relax, s_tir, tirx
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic
from tvm.relax.frontend.onnx import from_onnx
from tvm.tirx.build import codegen_build

from edgekit.backends.tvm.schedule import schedule
from edgekit.backends.tvm.transposed import without_transposed
from edgekit.errors import UnsupportedError, nearest
from edgekit.graph.cost import infer_shapes
from edgekit.graph.walk import attribute, copied, free_name, initializers, names
from edgekit.target import Isa

LANES = 4
MOST_STACK_BYTES = 64 * 1024
_FUNCTION = re.compile(r"^define .*?@(\w+)\(.*?^}", re.MULTILINE | re.DOTALL)
_ALLOCA = re.compile(r"= alloca \[(\d+) x (?:<(\d+) x (\w+)>|(\w+))\]")
_ELEMENT_BYTES = {"float": 4, "double": 8, "i8": 1, "i32": 4, "i64": 8}


def target_of(isa: Isa, *more_features: str) -> tvm.target.Target:
    """Return TVM's target for an instruction set, with more features than it names if asked for.

    Raises:
        UnsupportedError: LLVM does not know the processor or a feature; it would warn, and compile without them.
    """
    features = [*isa.features, *more_features]
    if "-android" in isa.triple:
        # Android keeps x18 for shadow call stacks (developer.android.com/ndk/guides/abis). LLVM takes the third word of
        # three for the system, so it does not see that this is Android.
        features.append("+reserve-x18")
    cpus, known = _known(isa.triple)
    if isa.cpu not in cpus:
        raise UnsupportedError(f"isa.cpu: LLVM knows no '{isa.cpu}' for {isa.triple}", remedy=nearest(isa.cpu, cpus))
    for feature in isa.features:
        if feature[1:] not in known:
            raise UnsupportedError(
                f"isa.features: LLVM knows no '{feature[1:]}' for {isa.triple}", remedy=nearest(feature[1:], known)
            )
    return tvm.target.Target(
        {"kind": "llvm", "mtriple": isa.triple, "mcpu": isa.cpu, "mattr": features, "num-cores": 1}
    )


@cache
def _known(triple: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the processors that LLVM knows for a triple, and the features that any of them has."""

    def asked(name: str, cpu: str) -> list[str]:
        target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": cpu})
        return [str(found) for found in tvm.get_global_func(f"target.llvm_get_cpu_{name}")(target)]

    cpus = asked("archlist", "generic")
    return tuple(cpus), tuple(sorted({feature for cpu in cpus for feature in asked("features", cpu)}))


def fuse(path: Path, shapes: Mapping[str, tuple[int, ...]], target: tvm.target.Target) -> tvm.IRModule:
    """Return the Relax module of a float32 ONNX graph at fixed input shapes, as calls of fused kernels.

    Raises:
        UnsupportedError: An operator that TVM does not take.
    """
    try:
        graph = _reordered_by_convolutions(without_transposed(onnx.load(path)), shapes["noisy"])
        module = from_onnx(graph, shape_dict={name: list(shape) for name, shape in shapes.items()})
    except (tvm.error.OpError, ValueError) as error:
        raise UnsupportedError(f"{path.name}: TVM does not take an operator: {error}") from error
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        *cpu_generic.legalize_passes(target),
    ]
    with target:
        return tvm.transform.Sequential(passes)(module)


def _reordered_by_convolutions(model: onnx.ModelProto, picture: tuple[int, ...]) -> onnx.ModelProto:
    """Return a float graph in which a 1x1 of ones and zeros, which is exact, picks channels as a Gather does.

    Its constant is float32, and no other has a place in a library. PixelUnshuffle of a picture in colour has such a
    Gather behind it where a map of the noise level is joined to it, as in FFDNet.
    """
    changed, stored, taken = copied(model), initializers(model), names(model)
    picking = [
        node
        for node in changed.graph.node
        if node.op_type == "Gather" and attribute(node, "axis") == 1 and node.input[1] in stored
    ]
    sizes = infer_shapes(changed, *picture[-2:]) if picking else {}
    for node in picking:
        places, size = numpy_helper.to_array(stored[node.input[1]]), sizes.get(node.input[0], ())
        if places.ndim == 1 and len(size) == 4:
            weights = np.eye(size[1], dtype=np.float32)[places, :, None, None]
            name = free_name(f"{node.output[0]}_weights", taken)
            changed.graph.initializer.append(numpy_helper.from_array(weights, name))
            node.CopyFrom(helper.make_node("Conv", [node.input[0], name], list(node.output), node.name))
    return changed


def compile_kernels(
    module: tvm.IRModule, names: Iterable[str], target: tvm.target.Target, path: Path, *, lanes: int = LANES
) -> int:
    """Write the machine code of the named kernels to the object file `path`.

    Returns:
        The most bytes of stack that one of them takes for its packed input.

    Raises:
        UnsupportedError: A kernel without a schedule, or one that wants too much stack; the message names it.
    """
    scheduled = {name: schedule(name, module[name], lanes=lanes).with_attr("global_symbol", name) for name in names}
    bound = tirx.transform.BindTarget(target.with_host(target))(tvm.IRModule(scheduled))
    with target:
        lowered = tvm.transform.Sequential(_lowering())(bound)
    bare = {variable.name_hint: _with_bare_pointers(f) for variable, f in lowered.functions.items()}
    return assemble(bare, target, path)


def assemble(functions: Mapping[str, tirx.PrimFunc], target: tvm.target.Target, path: Path) -> int:
    """Write the machine code of functions that have bare pointers and final loops to the object file `path`.

    Returns:
        The most bytes of stack that one of them takes for its arrays.

    Raises:
        UnsupportedError: One wants too much stack; the message names it.
    """
    bound = tirx.transform.BindTarget(target.with_host(target))(tvm.IRModule(dict(functions)))
    with target:
        machine_code = codegen_build(tirx.transform.LowerIntrin()(bound), target)
    stack = stack_bytes(machine_code.inspect_source("ll"))
    for name, size in stack.items():
        if size > MOST_STACK_BYTES:
            raise UnsupportedError(f"kernel '{name}' needs {size} bytes of stack, more than {MOST_STACK_BYTES}")
    machine_code.write_to_file(str(path))
    return max(stack.values(), default=0)


def stack_bytes(llvm_ir: str) -> dict[str, int]:
    """Return the bytes of the arrays that each function of optimized LLVM IR keeps on the stack."""
    return {f.group(1): sum(map(_array_bytes, _ALLOCA.finditer(f.group()))) for f in _FUNCTION.finditer(llvm_ir)}


def _array_bytes(alloca: re.Match[str]) -> int:
    count, vector_lanes, vector_element, element = alloca.groups()
    return int(count) * int(vector_lanes or 1) * _ELEMENT_BYTES[vector_element or element]


def _with_bare_pointers(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the kernel with a float pointer in place of each buffer parameter."""
    pointer = tvm.ir.PointerType(tvm.ir.PrimType("float32"))
    pointers = [tirx.Var(f"{buffer.name}_data", pointer) for buffer in function.params]
    views = [tirx.DeclBuffer(buffer, data=data) for buffer, data in zip(function.params, pointers, strict=True)]
    return tirx.PrimFunc(pointers, tirx.SeqStmt([*views, function.body]), None, function.attrs)


def _lowering() -> list[tvm.transform.Pass]:
    """TVM's pipeline for scheduled kernels (tvm/s_tir/pipeline.py), less what is for GPUs and for its own runtime.

    Left out on purpose: MakePackedAPI, so that the kernels keep bare pointers, and LowerTVMBuiltin, which would turn
    buffers of more than a kilobyte into calls of the runtime's allocator.
    """
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.VerifyMemory(),
    ]
