"""coremltools, imported in one place and quietly: tracing to a package, and a package on disk to plain records."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import platform
import re
import shutil
import sys
import uuid
import warnings
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgekit import files
from edgekit.backends.coreml.program import REPLACE, Argument, Constant, Package, Program, Step, TensorType
from edgekit.errors import InputError, IntegrityError, UnsupportedError

ON_A_MAC = platform.system() == "Darwin"
_UNTESTED_VERSION = re.compile(
    r"(Torch|scikit-learn|XGBoost|TensorFlow) version \S+ (has not been tested|is not supported)"
)
_MAC_ONLY_LIBRARY = re.compile(r"Failed to load _ML\w+: No module named 'coremltools\.libcoremlpython'")
_OPERATOR = re.compile(r"\s*ERROR - converting '.*' op \(located at: ")


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Return False for what coremltools always says off a Mac and about versions; `build` checks numbers instead.

    So for the operator that it does not convert: the error that it raises, too, becomes edgekit's own.
    """
    message = record.getMessage()
    hidden = _UNTESTED_VERSION.match(message) or _OPERATOR.match(message)
    return not (hidden or (not ON_A_MAC and _MAC_ONLY_LIBRARY.match(message)))


logging.getLogger("coremltools").addFilter(_is_worth_reading)

import coremltools as ct  # noqa: E402
from coremltools.converters.mil.frontend.milproto.load import load as _load_milproto  # noqa: E402
from coremltools.converters.mil.mil import types as _types  # noqa: E402

VERSION: str = ct.__version__
MINIMUM_IOS = "iOS17"
WEIGHTS = Path("com.apple.CoreML/weights")
WEIGHT_FILE = Path("Data") / WEIGHTS / "weight.bin"
SPEC_FILE = Path("Data/com.apple.CoreML/model.mlmodel")

# Fusing is edgekit's own stage, measured and verified there. Without these passes the package holds the network's
# weights one to one, which is what lets `structure.check_weights` demand equality.
_WEIGHT_REWRITING_PASSES = {
    "common::fuse_conv_batchnorm",
    "common::fuse_conv_bias",
    "common::fuse_conv_scale",
    "common::fuse_elementwise_to_batchnorm",
    "common::fuse_linear_bias",
    "common::fuse_matmul_weight_bias",
}
_DESCRIPTION_DTYPES = {
    ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16: "fp16",
    ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32: "fp32",
    ct.proto.FeatureTypes_pb2.ArrayFeatureType.INT32: "int32",
}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a package says about itself, in Xcode and to the app.

    features: Input or output name -> one line on what it holds.
    metadata: User-defined keys.
    """

    author: str
    license: str
    version: str
    summary: str
    features: Mapping[str, str]
    metadata: Mapping[str, str]


def convert(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    output: str,
    compute: Literal["float16", "float32"],
    description: Description,
    package: Path,
) -> None:
    """Write a traced network as an ML Program with float32 inputs and output; equal arguments give equal bytes.

    Args:
        module: Network in eval mode, called with one tensor per entry of `shapes`, in that order.
        shapes: Input name -> fixed shape.
        output: Name of the one output.
        compute: Arithmetic and stored weights.
        description: Written into the package.
        package: The `.mlpackage` folder; replaced where it exists.

    Raises:
        InputError: The network does not run on inputs of these shapes (exit code 2).
        UnsupportedError: coremltools has no translation for an operator of the network (exit code 4).
    """
    traced = _trace(module, shapes)
    pipeline = ct.PassPipeline()
    pipeline.remove_passes(_WEIGHT_REWRITING_PASSES)
    try:
        with _without_progress_bars():
            model = ct.convert(
                traced,
                # Without a dtype, coremltools silently makes the inputs of iOS16 and later float16.
                inputs=[ct.TensorType(name=name, shape=shape, dtype=np.float32) for name, shape in shapes.items()],
                outputs=[ct.TensorType(name=output, dtype=np.float32)],
                convert_to="mlprogram",
                minimum_deployment_target=ct.target[MINIMUM_IOS],
                compute_precision=ct.precision[compute.upper()],
                pass_pipeline=pipeline,
                skip_model_load=True,
            )
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{type(module).__name__}: coremltools {VERSION} does not convert it: {error}",
            remedy=REPLACE,
        ) from error
    spec = model.get_spec()
    weights = Path(model.weights_dir)
    if not (weights / WEIGHT_FILE.name).exists():
        raise UnsupportedError(f"{type(module).__name__}: has no weights, so there is nothing to put into a package")
    _describe(spec, description, weight_sha256=files.sha256(weights / WEIGHT_FILE.name))
    _write_package(spec.SerializeToString(deterministic=True), weights, package)


def read(package: Path, operators: Container[str]) -> Package:
    """Return a package as it lies on disk, specification and weights.

    Args:
        package: The `.mlpackage` folder.
        operators: The MIL operators that the caller knows.

    Raises:
        IntegrityError: Not a complete, well-formed ML Program package (exit code 6).
        UnsupportedError: The program has an operator that is not among `operators` (exit code 4).
    """
    with _damage(package):
        spec = ct.utils.load_spec(str(package))
        (function,) = spec.mlProgram.functions.values()
        (block,) = function.block_specializations.values()
    unknown = {op.type for op in block.operations if op.type != "const" and op.type not in operators}
    if unknown:
        raise UnsupportedError(
            f"{package}: no reference evaluation for the MIL operator(s) {', '.join(sorted(unknown))}",
            remedy=REPLACE,
        )
    with _damage(package):
        loaded = _load_milproto(spec, spec.specificationVersion, str((package / WEIGHT_FILE).parent))
        return Package(
            path=package,
            spec_version=int(spec.specificationVersion),
            described_inputs={f.name: _described(f) for f in spec.description.input},
            described_outputs={f.name: _described(f) for f in spec.description.output},
            metadata=dict(spec.description.metadata.userDefined),
            program=_program(*loaded.functions.values()),
        )


def predictor(package: Path) -> ct.models.MLModel:
    """Return the package loaded by Core ML itself; only a Mac can."""
    return ct.models.MLModel(str(package), compute_units=ct.ComputeUnit.CPU_AND_NE)


def _trace(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> torch.jit.ScriptModule:
    examples = tuple(torch.full(shape, 0.5) for shape in shapes.values())
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The tile is fixed, so a size that the trace freezes is the right one.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            warnings.simplefilter("ignore", DeprecationWarning)
            traced: torch.jit.ScriptModule = torch.jit.trace(module, examples, check_trace=False)  # type: ignore[no-untyped-call]
    except (RuntimeError, TypeError, ValueError) as error:
        wanted = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(f"{type(module).__name__}: does not run on {wanted}: {error}") from error
    return traced


def _describe(spec: ct.proto.Model_pb2.Model, description: Description, weight_sha256: str) -> None:
    about = spec.description.metadata
    about.author, about.license = description.author, description.license
    about.versionString, about.shortDescription = description.version, description.summary
    about.userDefined.update(description.metadata)
    about.userDefined["com.edgekit.weights_sha256"] = weight_sha256
    del about.userDefined["com.github.apple.coremltools.conversion_date"]
    for feature in (*spec.description.input, *spec.description.output):
        feature.shortDescription = description.features[feature.name]


def _write_package(spec: bytes, weights: Path, package: Path) -> None:
    """Lay the files out as Apple's ModelPackage does, but for its random UUIDs, which would differ every time."""
    with files.atomic_folder(package) as folder:
        (folder / SPEC_FILE).parent.mkdir(parents=True)
        (folder / SPEC_FILE).write_bytes(spec)
        (folder / WEIGHT_FILE).parent.mkdir()
        shutil.copyfile(weights / WEIGHT_FILE.name, folder / WEIGHT_FILE)
        model = _item(SPEC_FILE.relative_to("Data"), "CoreML Model Specification", folder / SPEC_FILE)
        stored = _item(WEIGHTS, "CoreML Model Weights", folder / WEIGHT_FILE)
        manifest = {
            "fileFormatVersion": "1.0.0",
            "itemInfoEntries": dict(sorted([model, stored])),
            "rootModelIdentifier": model[0],
        }
        (folder / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")


def _item(path: Path, description: str, content: Path) -> tuple[str, dict[str, str]]:
    """Return an entry of the manifest under a UUID that follows from the path and the content."""
    identifier = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{path.as_posix()} {files.sha256(content)}"))
    author = path.parts[0]
    return identifier, {"author": author, "description": description, "name": path.name, "path": path.as_posix()}


@contextlib.contextmanager
def _damage(package: Path) -> Iterator[None]:
    """Turn what coremltools raises on a damaged package, which may be anything, into one error."""
    try:
        yield
    except Exception as error:
        raise IntegrityError(
            f"{package}: not a readable ML Program package: {error or type(error).__name__}", remedy="compile it again"
        ) from error


def _described(feature: ct.proto.Model_pb2.FeatureDescription) -> TensorType:
    array = feature.type.multiArrayType
    return TensorType(dtype=_DESCRIPTION_DTYPES[array.dataType], shape=tuple(array.shape))


def _program(function: ct.converters.mil.Function) -> Program:
    constants: dict[str, Constant] = {}
    steps = []
    for op in function.operations:
        if op.op_type == "const":
            (result,) = op.outputs
            constants[result.name] = _constant(result.val)
        else:
            arguments = {key: _argument(value) for key, value in op.inputs.items() if value is not None}
            results = {result.name: _type(result) for result in op.outputs}
            steps.append(Step(operator=op.op_type, name=op.name, arguments=arguments, results=results))
    return Program(
        inputs={name: _type(var) for name, var in function.inputs.items()},
        outputs={var.name: _type(var) for var in function.outputs},
        constants=constants,
        steps=tuple(steps),
    )


def _type(var: ct.converters.mil.Var) -> TensorType:
    return TensorType(dtype=_types.builtin_to_string(var.dtype), shape=tuple(int(n) for n in var.shape))


def _argument(value: ct.converters.mil.Var | list[ct.converters.mil.Var]) -> Argument:
    return tuple(v.name for v in value) if isinstance(value, list | tuple) else str(value.name)


def _constant(value: str | NDArray[np.generic]) -> Constant:
    return value if isinstance(value, str) else np.asarray(value)


class _BarFilter(io.TextIOBase):
    """Passes everything on but tqdm's bars, which start with a carriage return and end with a lone newline."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._after_bar = False

    def write(self, text: str) -> int:
        """Write what is no part of a bar."""
        is_bar = text.startswith("\r") or (self._after_bar and text in ("", "\n"))
        self._after_bar = is_bar
        return len(text) if is_bar else self._stream.write(text)

    def flush(self) -> None:
        """Flush the stream behind."""
        self._stream.flush()


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide coremltools' progress bars, for which it has no switch; all else on stderr comes through."""
    with contextlib.redirect_stderr(_BarFilter(sys.stderr)):
        yield
