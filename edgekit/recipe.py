"""Recipes: everything that decides what a run makes.

The classes are plain dataclasses, so that a training machine without pydantic can read them from JSON; `load` checks a
YAML file against them strictly, and names the line of whatever is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from edgekit.target import STRICT, Bound, Check, Name

Option = bool | int | str
LEAST_CALIBRATION_PICTURES = 8
# A noise level this much above another is another level: an activation that is wide enough for one is not for both.
_NEAR = 1.2
Count = Annotated[int, Bound(least=1, most=2**31 - 1)]
Fraction = Annotated[float, Bound(least=0.0, most=1.0)]
Source = Annotated[str, Check(lambda text: text != "", "name a folder, or embedded")]
NotNegative = Annotated[float, Bound(least=0.0)]
Positive = Annotated[float, Bound(above=0.0)]
Sigma = Annotated[float, Bound(least=0.0, most=255.0)]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network and where its weights come from.

    model: A name of `edgekit models`.
    weights: `shipped` (those for these options and the data's channels), `random`, or the path of a safetensors file.
    options: Options of the network that differ from its defaults.
    """

    __pydantic_config__: ClassVar = STRICT
    model: str
    weights: str = "shipped"
    options: Mapping[str, Option] = field(default_factory=dict)

    def options_for(self, channels: int) -> dict[str, Option]:
        """Return the options, with the data's channels where they are not a network's default."""
        return {**self.options, **({"channels": channels} if channels != 1 else {})}


@dataclass(frozen=True, kw_only=True)
class Data:
    """The pictures; `embedded` is the set that needs no download, anything else is a folder.

    train: Pictures to learn from; several folders may be named.
    evaluation: Pictures that nothing is learned or chosen from. One folder in both places is divided in three.
    calibration: Pictures that ranges and the best weights are chosen on, at least 8; None takes a part of the first
        of `train`.
    channels: 1 for gray, 3 for colour.
    evaluation_pictures: Most pictures that verification looks at; all that lie there are kept out of training.
    """

    __pydantic_config__: ClassVar = STRICT
    train: Annotated[tuple[Source, ...], Bound(entries=1)] = ("embedded",)
    evaluation: Source = "embedded"
    calibration: Source | None = None
    channels: Literal[1, 3] = 1
    evaluation_pictures: Count = 4


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Gaussian noise; standard deviations are on the scale of 0 to 255.

    train: The lowest and the highest that is learned. seed: Of the noise that is measured with (`data/noise.py`).
    """

    __pydantic_config__: ClassVar = STRICT
    train: Annotated[
        tuple[Sigma, Sigma],
        Check(lambda ends: ends[0] <= ends[1], "give the lower noise level first"),
        Check(lambda ends: ends[1] >= 1, "noise levels are on the scale of 0 to 255"),
    ] = (0.0, 55.0)
    evaluate: Sigma = 25.0
    seed: Annotated[int, Bound(least=0, most=4000)] = 0

    def levels(self, usual: Iterable[float]) -> tuple[float, ...]:
        """Return the usual levels that `train` has, then `evaluate`, then the end of `train` if it is well above them.

        One may come twice.
        """
        low, high = self.train
        found = (*(sigma255 for sigma255 in usual if low <= sigma255 <= high), self.evaluate)
        return found if high <= _NEAR * max(found) else (*found, high)


NoiseSettings = Annotated[
    Noise,
    Check(
        lambda noise: noise.train[0] <= noise.evaluate <= noise.train[1],
        "give as `evaluate`, which is 25 unless told, a noise level within `train`",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of the one training loop.

    steps: Optimizer steps; the learning rate follows them. With 0 the rate follows time, up to `max_minutes`.
    max_minutes: Training ends at the latest then; 0 sets no limit. A run that a time limit ends is not repeatable.
    batch: Patches of one forward pass on one device. accumulate: Forward passes of one step.
    patch: Side of a patch in pixels; from `late_from` (a fraction of the run) on it is `late_patch`.
    optimizer: `muon` brings dense convolutions much farther in as many steps than `adamw`, which has all else
        (`training/optimizer.py`).
    peak_rate, final_rate: Learning rate after the warm-up and at the end of the cosine.
    loss: `charbonnier`, or `psnr`: the mean PSNR itself, for which a picture with little noise counts as much as one
        with much. From `mse_from` on (a fraction of the run) Charbonnier's gives way to the mean squared error.
    rounding_from: Fraction of the run from which maps and weights are rounded, so that the student loses less in INT8;
        1 for never. rounding_bits: Of a map then; weights have 8.
    ema: Decay of the moving average of the weights, which is what a run keeps.
    precision: `bf16` computes the forward and backward pass in bfloat16, `float32` does not.
    validate_every, checkpoint_seconds: How often the held-out PSNR is taken and the state is saved.
    keep_better: Keep the starting weights if the trained ones are not better on the held-out pictures, or make one of
        them worse by more than 0.02 dB.
    """

    __pydantic_config__: ClassVar = STRICT
    steps: Annotated[int, Bound(least=0)] = 1000
    max_minutes: NotNegative = 0.0
    batch: Count = 16
    accumulate: Count = 1
    patch: Annotated[int, Bound(least=16)] = 96
    late_patch: Annotated[int, Bound(least=16)] | None = None
    late_from: Fraction = 0.8
    optimizer: Literal["muon", "adamw"] = "muon"
    peak_rate: Positive = 1e-3
    final_rate: Positive = 1e-6
    warmup_steps: Annotated[int, Bound(least=0)] = 100
    weight_decay: NotNegative = 0.0
    clip_norm: Positive = 1.0
    ema: Fraction = 0.999
    loss: Literal["charbonnier", "psnr"] = "charbonnier"
    mse_from: Fraction = 0.9
    rounding_from: Fraction = 1.0
    rounding_bits: Annotated[int, Bound(least=2, most=8)] = 8
    precision: Literal["bf16", "float32"] = "bf16"
    validate_every: Count = 250
    checkpoint_seconds: Positive = 30.0
    keep_better: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How much of the loss comes from the teacher.

    output_weight: Share of the loss that compares with the teacher's picture instead of the clean one.
    feature_weight: Weight of the feature loss (1x1 adapters at the bottleneck and the deepest decoder level), which
        falls to nothing at the fraction `feature_until` of the run.
    """

    __pydantic_config__: ClassVar = STRICT
    output_weight: Fraction = 0.5
    feature_weight: NotNegative = 0.05
    feature_until: Fraction = 0.7


@dataclass(frozen=True, kw_only=True)
class Qat:
    """Quantization-aware training, for a graph that loses a good part of its budget.

    steps: Optimizer steps; 0 never trains. batch, patch: Patches of a step, and their side in pixels.
    rate, scale_rate: Peak learning rate (Adam) of weights and biases, and of the logarithms of scales; both fall by a
        cosine.
    teacher_share: Share of the loss that compares with the float graph's picture instead of the clean one.
    feature_weight: Weight of the distance to the float graph's features at the lowest resolution.
    ema: Decay of the moving average of weights and scales, which is what is kept.
    checkpoint_seconds: How often the state is saved.
    """

    __pydantic_config__: ClassVar = STRICT
    steps: Annotated[int, Bound(least=0)] = 600
    batch: Count = 4
    patch: Annotated[int, Bound(least=16)] = 96
    rate: Positive = 1e-4
    scale_rate: NotNegative = 2e-3
    teacher_share: Fraction = 0.8
    feature_weight: NotNegative = 0.0
    ema: Fraction = 0.99
    checkpoint_seconds: Positive = 30.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """INT8: symmetric weights per channel, activations per tensor.

    mode: `static` fixes the ranges before; `dynamic` finds them in each picture, which is slower than float for
        convolutions and is there to be compared with.
    method: Where the ranges end: at the outermost values of the calibration pictures, or so that 0.01 % of each picture
        lies outside at either end.
    equalize: Make the channels of a tensor alike in range first; the network's function stays the same.
    change_basis: Mix the channels of residual trunks so that rounding harms the output least; the network's function
        stays the same. A trunk of 16 bits, as our own kernels have it, needs none.
    reduce_range: Weights of 7 bits. ONNX Runtime and OpenVINO need them on Intel and AMD processors without VNNI, where
        their sums of two products saturate; `auto` asks the processor at hand. Our own kernels need none.
    keep_float: Parts that stay in float whatever the budget: `head` and `tail` are the first and the last convolution,
        `skip` the additions of residuals and skips, which then read the unrounded tensors.
    qat: Training of the graph with its rounding, for when it loses more than a quarter of the budget (half of it where
        the trunk has 16 bits); takes some minutes.
    """

    __pydantic_config__: ClassVar = STRICT
    mode: Literal["static", "dynamic"] = "static"
    method: Literal["minmax", "percentile"] = "percentile"
    calibration_pictures: Annotated[int, Bound(least=LEAST_CALIBRATION_PICTURES)] = 32
    equalize: bool = True
    change_basis: bool = True
    reduce_range: Literal["auto", "always", "never"] = "auto"
    keep_float: tuple[Literal["head", "tail", "skip"], ...] = ()
    qat: Qat = field(default_factory=Qat)


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Most dB that may be lost: from the teacher to the student, and from the student to the artifact.

    student_drop_db: At the noise level of `noise.evaluate`; None asks for nothing, as of a network of one's own.
    int8_drop_db: In the mean over the pictures; None takes the model's own, see `int8_drop_db`.
    int8_worst_db: On any one picture; None takes the model's own, see `int8_worst_db`.
    """

    __pydantic_config__: ClassVar = STRICT
    student_drop_db: float | None = 1.0
    int8_drop_db: NotNegative | None = None
    int8_worst_db: NotNegative | None = None


# The smaller the network, the more of its precision its activations need.
_INT8_DROP_DB = {"nano": 0.08, "small": 0.08}
_INT8_WORST_DB = {"base": 0.15, "large": 0.15, "control": 0.15}


def int8_drop_db(budgets: Budgets, model: str) -> float:
    """Return the most dB that INT8 may cost a model: the recipe's, else 0.08 for nano and small and 0.05 for others.

    `model` is a name of `edgekit models`, and not what a user calls a file.
    """
    return _INT8_DROP_DB.get(model, 0.05) if budgets.int8_drop_db is None else budgets.int8_drop_db


def int8_worst_db(budgets: Budgets, model: str) -> float | None:
    """Return the most dB that INT8 may cost on one picture: the recipe's, else 0.15 for base, large and control.

    None for any other network: the flattest picture decides it, and whether such pictures matter its owner knows.
    """
    return _INT8_WORST_DB.get(model) if budgets.int8_worst_db is None else budgets.int8_worst_db


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way from a teacher to artifacts. name: Also of its run folder, `runs/<name>`."""

    __pydantic_config__: ClassVar = STRICT
    schema_version: Literal[1]
    name: Name
    description: str
    teacher: Model | None = None
    student: Model
    data: Data = field(default_factory=Data)
    noise: NoiseSettings = field(default_factory=Noise)
    training: Training = field(default_factory=Training)
    distillation: Distillation = field(default_factory=Distillation)
    quantization: Quantization = field(default_factory=Quantization)
    budgets: Budgets = field(default_factory=Budgets)


def load(name_or_path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Return the shipped recipe of that name, or the recipe in that YAML file.

    Args:
        name_or_path: A shipped name, or a path that ends in .yaml or .yml.
        overrides: Dotted settings such as `training.steps=100`, with YAML values.

    Raises:
        InputError: No such recipe, or something in it is wrong; names file, line and the nearest key (exit code 2).
    """
    from edgekit import config

    return config.load_named(name_or_path, kind="recipe", into=Recipe, overrides=overrides)


def names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    from edgekit import config

    return config.shipped("recipe")
