"""What can be checked of a package without running it: its files, its interface, its operators, its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edgekit import files
from edgekit.backends.coreml import engine
from edgekit.backends.coreml.evaluate import OPERATORS
from edgekit.backends.coreml.program import Constant, Package, TensorType
from edgekit.errors import IntegrityError

INPUT, NOISE_LEVEL, OUTPUT = "noisy", "sigma", "denoised"
WEIGHTS_KEY = "com.edgekit.weights_sha256"
_REMEDY = "the package was changed or damaged after it was made; compile it again"


def check_structure(package: Path) -> Package:
    """Return the package after checking all that the package alone can tell.

    It reloads from disk; `weight.bin` has the hash that the specification records; the interface that it describes to
    the app is the one of its program, with edgekit's names, in float32; every operator can be evaluated here.
    coremltools' own reload checks none of the second and third.

    Raises:
        IntegrityError: One of these does not hold (exit code 6).
        UnsupportedError: An operator without a reference (exit code 4).
    """
    loaded = engine.read(package, OPERATORS)
    _check_weight_file(loaded)
    _check_same(package, "inputs", loaded.described_inputs, loaded.program.inputs)
    _check_same(package, "outputs", loaded.described_outputs, loaded.program.outputs)
    _check_interface(loaded)
    return loaded


def check_weights(package: Package, module: nn.Module) -> int:
    """Return how many weights the package holds, each of them equal to a parameter or buffer of the network.

    Every constant of real numbers but the scalars counts as a weight. It is compared in the precision in which the
    package stores it, so in half precision the network's weight is rounded first.

    Raises:
        IntegrityError: A constant is no weight of the network, or there are none at all (exit code 6).
    """
    tensors = [t.detach().cpu().numpy() for t in (*module.parameters(), *module.buffers())]
    constants = {name: c for name, c in package.program.constants.items() if _is_weight(c)}
    if not constants:
        raise IntegrityError(f"{package.path}: holds no weights", remedy=_REMEDY)
    with np.errstate(over="ignore"):
        expected = {
            dtype: {t.astype(dtype).tobytes() for t in tensors} for dtype in {c.dtype for c in constants.values()}
        }
    for name, constant in sorted(constants.items()):
        if constant.tobytes() not in expected[constant.dtype]:
            raise IntegrityError(
                f"{package.path}: the constant '{name}' {constant.shape} is no weight of {type(module).__name__}",
                remedy="bake what the network computes (weight norm, a mask) into parameters or buffers first",
            )
    return len(constants)


def _is_weight(constant: Constant) -> TypeGuard[NDArray[np.floating]]:
    return not isinstance(constant, str) and constant.dtype.kind == "f" and constant.ndim > 0


def _check_weight_file(package: Package) -> None:
    recorded = package.metadata.get(WEIGHTS_KEY)
    found = files.sha256(package.path / engine.WEIGHT_FILE)
    if found != recorded:
        raise IntegrityError(
            f"{package.path / engine.WEIGHT_FILE}: SHA-256 is {found}, the package records {recorded}", remedy=_REMEDY
        )


def _check_same(
    package: Path, side: str, described: Mapping[str, TensorType], computed: Mapping[str, TensorType]
) -> None:
    if dict(described) != dict(computed):
        raise IntegrityError(
            f"{package}: describes the {side} {_spell(described)}, its program has {_spell(computed)}", remedy=_REMEDY
        )


def _check_interface(package: Package) -> None:
    inputs, outputs = package.described_inputs, package.described_outputs
    names_ok = set(inputs) in ({INPUT}, {INPUT, NOISE_LEVEL}) and set(outputs) == {OUTPUT}
    if not names_ok or inputs[INPUT] != outputs[OUTPUT] or {t.dtype for t in inputs.values()} != {"fp32"}:
        raise IntegrityError(
            f"{package.path}: has {_spell(inputs)} -> {_spell(outputs)}, expected float32 '{INPUT}' "
            f"(and '{NOISE_LEVEL}') -> '{OUTPUT}' of the same shape",
            remedy=_REMEDY,
        )


def _spell(types: Mapping[str, TensorType]) -> str:
    return ", ".join(f"{name} {t.dtype} {'x'.join(map(str, t.shape))}" for name, t in types.items()) or "nothing"
