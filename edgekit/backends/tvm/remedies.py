"""What can stand in the place of what has no integer kernel."""

from __future__ import annotations

FLOAT32 = "set the target's precision to float32"
DENSE = f"put a dense convolution right before it, or {FLOAT32}"
ENDING = f"end the model with a dense convolution, or with one and PixelShuffle, or {FLOAT32}"
ENLARGING = f"use one of 2x2 with stride 2, or a 1x1 convolution and PixelShuffle, or {FLOAT32}"
FACTORS = (
    "use ReLU in place of GELU and SiLU, no gates (squeeze-and-excitation), and factors within weights; or "
    f"{FLOAT32}, which takes gates of h-sigmoid"
)
LEVEL = f"add sigma times one constant per channel to what a convolution gives, or {FLOAT32}"
LEVEL_BESIDE = f"join the picture with one map of the noise level, where convolutions read both, or {FLOAT32}"
PLACE = "quantize with the placement for arm, which leaves only the last addition or subtraction in float"
WINDOW = (
    "use dense or depthwise convolutions, without dilation, whose stride and padding are the same for both axes, or "
    f"{FLOAT32}"
)
_GLOBAL = f"leave it out, squeeze-and-excitation too, or {FLOAT32}"
_NORM = "use BatchNorm2d, which becomes a part of the convolution before it"
_RELU = "use ReLU in its place"
_RELU_OR_FLOAT32 = f"{_RELU}, or {FLOAT32}"
_ONCE = f"change the picture once, by the last operator: noisy - x or noisy + x, or {FLOAT32}"

# float32 is not named where its kernels would need libm (`expf`), or have no schedule.
_INSTEAD = {
    **dict.fromkeys(("Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu"), _RELU_OR_FLOAT32),
    **dict.fromkeys(("Elu", "Erf", "Exp", "Gelu", "Mish", "Selu", "Sigmoid", "Softplus", "Tanh"), _RELU),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization", "LayerNormalization"), _NORM),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _GLOBAL),
    **dict.fromkeys(("ConstantOfShape", "Expand", "Shape", "Tile"), LEVEL),
    "AveragePool": f"use max-pooling of 2x2 or a convolution of stride 2 in its place, or {FLOAT32}",
    "BatchNormalization": f"put it right behind a convolution, of which it becomes a part, or {FLOAT32}",
    "Pad": f"let convolutions pad with zeros, or {FLOAT32}",
    "Slice": f"crop outside of the model, use ReLU in place of gates, or {FLOAT32}",
    "Split": f"use ReLU in place of gates, or {FLOAT32}",
    "Sub": _ONCE,
}
_ANY = f"leave it out, or {FLOAT32}, which has kernels for more"


def instead_of(operator: str) -> str:
    """Return what to do about an ONNX operator that has no integer kernel."""
    return _INSTEAD.get(operator, _ANY)
