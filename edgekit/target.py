"""Targets: what an artifact is compiled for, how it is run here, and the limits that it must keep.

The classes are plain dataclasses, so that they load where pydantic is not installed; `load` checks a YAML file
against them strictly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

from edgekit.errors import InputError

Precision = Literal["float32", "float16", "int8"]
Engine = Literal["onnxruntime", "openvino", "tvm", "coreml"]
STRICT = {"extra": "forbid", "strict": True}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The range that a number must lie in; entries: how many a list must have at least."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    entries: int | None = None

    def __get_pydantic_core_schema__(
        self, source: object, handler: Callable[[object], dict[str, object]]
    ) -> dict[str, object]:
        """Return pydantic's schema of the value with this range; called by pydantic, which need not be installed."""
        limits = {"ge": self.least, "gt": self.above, "le": self.most, "min_length": self.entries}
        return handler(source) | {name: value for name, value in limits.items() if value is not None}


@dataclass(frozen=True)
class Check(Generic[T]):
    """What must hold between the parts of a value, and what is told where it does not."""

    holds: Callable[[T], bool]
    told: str

    def __get_pydantic_core_schema__(
        self, source: object, handler: Callable[[object], dict[str, object]]
    ) -> dict[str, object]:
        """Return pydantic's schema of the value with this check; as `Bound`'s."""
        return {
            "type": "function-after",
            "function": {"type": "no-info", "function": self._checked},
            "schema": handler(source),
        }

    def _checked(self, value: T) -> T:
        if not self.holds(value):
            raise ValueError(self.told)
        return value


Side = Annotated[int, Bound(least=1)]


# Of a recipe or a target.
Name = Annotated[
    str,
    Check(
        lambda name: re.fullmatch(r"\w[\w.-]*", name) is not None,
        "a folder is called like it: use letters, digits, '-', '_' and '.', a letter or digit first",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Isa:
    """The processor that machine code is made for, in LLVM's names; only engines that write machine code read it."""

    __pydantic_config__: ClassVar = STRICT
    triple: str
    cpu: str
    features: tuple[
        Annotated[
            str,
            # LLVM takes one without a sign for one to leave out.
            Check(
                lambda feature: re.match(r"[+-]\S", feature) is not None, "write +NAME to use it, -NAME to do without"
            ),
        ],
        ...,
    ] = ()


@dataclass(frozen=True, kw_only=True)
class InputShape:
    """Height and width in pixels of the artifact's input; None where any multiple of the stride is taken."""

    __pydantic_config__: ClassVar = STRICT
    height: Side | None = None
    width: Side | None = None


@dataclass(frozen=True, kw_only=True)
class Runner:
    """How the artifact is run for verification.

    kind: `local` natively on this machine, `qemu` under user-mode emulation as each of `cpus`,
        `reference` by evaluating the artifact's own program without its engine.
    """

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["local", "qemu", "reference"]
    cpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the target demands of an artifact; None where it demands nothing.

    speedup_vs_fp32: least ratio of the FP32 teacher's latency to the artifact's, on one machine in one run.
    min_integer_macs: least share, 0 to 1, of the multiply-accumulates that run in integers.
    size_mib: most MiB of the files that an app ships.
    peak_memory_mib: most MiB of working memory for one input of the target's shape.
    megapixel_ms: most milliseconds for a megapixel delivered on the device, the median of `edgekit bench`'s runs.
    """

    __pydantic_config__: ClassVar = STRICT
    speedup_vs_fp32: Annotated[float, Bound(above=0)] | None = None
    min_integer_macs: Annotated[float, Bound(least=0, most=1)] | None = None
    size_mib: Annotated[float, Bound(above=0)] | None = None
    peak_memory_mib: Annotated[float, Bound(above=0)] | None = None
    megapixel_ms: Annotated[float, Bound(above=0)] | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """One place where a model shall run. name: Also of its bundle in a run's folder.

    student: The shipped student that is compiled where no run is there to take one from: of those measured, the best
        for its time on this engine (docs/models.md). None where no time was measured.
    """

    __pydantic_config__: ClassVar = STRICT
    schema_version: Literal[1]
    name: Name
    description: str
    engine: Engine
    precision: Precision
    input: Annotated[
        InputShape,
        Check(lambda shape: (shape.height is None) == (shape.width is None), "give both height and width, or neither"),
    ] = field(default_factory=InputShape)
    isa: Isa | None = None
    runner: Annotated[
        Runner,
        Check(lambda runner: runner.kind != "qemu" or bool(runner.cpus), "qemu needs cpus, such as [cortex-a76]"),
    ]
    limits: Limits = field(default_factory=Limits)
    student: str | None = None

    def with_tile(self, side: int) -> Target:
        """Return the same target with a tile of `side` x `side` pixels.

        Raises:
            InputError: It takes pictures of any size.
        """
        if self.input.height is None or self.input.width is None:
            raise InputError(
                f"target '{self.name}' takes pictures of any size, so it has no tile", remedy="leave --tile out for it"
            )
        return replace(self, input=InputShape(height=side, width=side))


def load(name_or_path: str | Path) -> Target:
    """Return the shipped target of that name, or the target in that YAML file.

    Raises:
        InputError: No such target, or a file that does not follow the schema (exit code 2).
    """
    from edgekit import config

    return config.load_named(name_or_path, kind="target", into=Target)


def names() -> list[str]:
    """Return the names of the shipped targets, sorted."""
    from edgekit import config

    return config.shipped("target")
