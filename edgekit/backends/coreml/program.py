"""An ML Program as plain records, so that only `engine` touches coremltools' own objects.

MIL, the language of ML Programs: https://apple.github.io/coremltools/source/coremltools.converters.mil.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Constant = NDArray[np.generic] | str
Argument = str | tuple[str, ...]

# What to do about an operator that is not converted or not evaluated.
REPLACE = "replace that operator in the network, or choose another target"


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """Element type in MIL's spelling (`fp16`, `fp32`, `int32`) and the fixed shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator.

    arguments: MIL parameter -> the name of the value, or the names where the parameter takes a list.
    results: Name of each value that it makes -> its type, in the operator's order.
    """

    operator: str
    name: str
    arguments: Mapping[str, Argument]
    results: Mapping[str, TensorType]


@dataclass(frozen=True, kw_only=True)
class Program:
    """The one function of a package, in the order in which it runs.

    constants: Name -> value, as stored (half precision stays half precision).
    """

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    constants: Mapping[str, Constant]
    steps: tuple[Step, ...]

    def operator_counts(self) -> dict[str, int]:
        """Return how often each operator occurs, sorted by name."""
        operators = sorted(step.operator for step in self.steps)
        return {name: operators.count(name) for name in dict.fromkeys(operators)}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A `.mlpackage` as read from disk.

    described_inputs, described_outputs: The interface that an app sees; the file keeps it apart from the program's.
    metadata: What the author wrote into it, `com.edgekit.*` among it.
    """

    path: Path
    spec_version: int
    described_inputs: Mapping[str, TensorType]
    described_outputs: Mapping[str, TensorType]
    metadata: Mapping[str, str]
    program: Program
