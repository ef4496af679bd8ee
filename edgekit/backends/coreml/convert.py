"""From a torch network to a Core ML package that an app can add, checked before it is handed over."""

from __future__ import annotations

from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jinja2
import numpy as np
import torch
from torch import nn

import edgekit
from edgekit.backends import Source
from edgekit.backends.coreml import engine, structure
from edgekit.backends.coreml.program import Package
from edgekit.backends.coreml.session import ReferenceSession
from edgekit.backends.coreml.structure import INPUT, NOISE_LEVEL, OUTPUT
from edgekit.bundle import Built
from edgekit.errors import InputError, IntegrityError, UnsupportedError
from edgekit.target import Target

if TYPE_CHECKING:
    from edgekit.backends import Array

Compute = Literal["float16", "float32"]
SWIFT = "Denoiser.swift"
# Rounding every activation of a shipped network to half precision costs 70 to 80 dB; a wrong pad or a lost bias costs
# far more, so the bounds tell the two apart.
LEAST_AGREEMENT_DB: dict[Compute, float] = {"float16": 60.0, "float32": 100.0}
_SIGMA_SHAPE = (1, 1, 1, 1)


def build(source: Source, target: Target, out: Path) -> Built:
    """Write `<name>.mlpackage` and `Denoiser.swift` into `out`; equal sources give equal bytes.

    The package is reloaded from disk before this returns: its weights must equal the network's, and its reference
    evaluation must agree with the network on one picture (`LEAST_AGREEMENT_DB`).

    Raises:
        UnsupportedError: INT8, a shape that is not fixed, or an operator that does not convert (exit code 4).
        InputError: A tile that is no multiple of the model's stride (exit code 2).
        IntegrityError: The written package is not the network that went in (exit code 6).
    """
    compute = _compute_precision(target)
    shape = _tile_shape(source, target)
    module = source.module().eval()
    artifact = f"{source.name}.mlpackage"
    shapes = {INPUT: shape} | ({NOISE_LEVEL: _SIGMA_SHAPE} if source.takes_sigma else {})
    engine.convert(module, shapes, OUTPUT, compute, _description(source, target, compute, shape), out / artifact)

    package = structure.check_structure(out / artifact)
    weights = structure.check_weights(package, module)
    agreement_db = check_agreement(package, module, _check_picture(source, shape), LEAST_AGREEMENT_DB[compute])
    (out / SWIFT).write_text(_swift(source, shape), encoding="utf-8")
    return Built(
        files={"artifact": artifact, "swift": SWIFT},
        precision=compute,
        tools={"coremltools": engine.VERSION, "torch": torch.__version__},
        facts={
            "package_bytes": sum(p.stat().st_size for p in (out / artifact).rglob("*") if p.is_file()),
            "tile": f"{shape[3]}x{shape[2]}",
            "spec_version": package.spec_version,
            "minimum_deployment_target": engine.MINIMUM_IOS,
            "operators": ", ".join(f"{n} {name}" for name, n in package.program.operator_counts().items()),
            "weights_checked": weights,
            "reference_agreement_db": int(agreement_db),
        },
        notes=(
            f"Computes in {compute}; inputs and output are float32.",
            "Converted and checked by reference evaluation; Core ML itself was not run by `compile`.",
            f"{SWIFT} was not compiled here.",
        ),
    )


def check_agreement(package: Package, module: nn.Module, picture: tuple[Array, float], least_db: float) -> float:
    """Return the PSNR in dB (peak 1) of the package's reference evaluation against the network.

    Args:
        package: Read from disk.
        module: The network that it was made from, in eval mode.
        picture: (noisy (1, c, h, w) of the package's shape, sigma).
        least_db: Below this the package is refused.

    Raises:
        IntegrityError: They agree less than that, or either gives a value that is not finite (exit code 6).
    """
    noisy, sigma = picture
    got = ReferenceSession(package)(noisy, sigma)
    level = (torch.full(_SIGMA_SHAPE, sigma),) if NOISE_LEVEL in package.program.inputs else ()
    with torch.no_grad():
        wanted: Array = module(torch.from_numpy(noisy), *level).numpy()
    error = float(np.mean((got.astype(np.float64) - wanted) ** 2))
    agreement_db = -10 * float(np.log10(max(error, 1e-20)))
    if not agreement_db >= least_db:
        raise IntegrityError(
            f"{package.path}: its evaluation agrees with the network to {agreement_db:.1f} dB, "
            f"expected at least {least_db:.0f}",
            remedy="if its values exceed half precision's range (65504), set the target's 'precision: float32'",
        )
    return agreement_db


def check(target: Target) -> None:
    """Refuse INT8, a shape that is not fixed, and an emulator; raises as the protocol says."""
    _compute_precision(target)
    _tile(target)
    if target.runner.kind == "qemu":
        raise UnsupportedError(
            f"target '{target.name}': no emulator runs a Core ML package", remedy="set 'runner: {kind: reference}'"
        )


def _compute_precision(target: Target) -> Compute:
    if target.precision == "int8":
        raise UnsupportedError(
            f"target '{target.name}': the Core ML backend does not do int8 in this release",
            remedy="set 'precision: float16' (or float32) in the target",
        )
    return target.precision


def _tile(target: Target) -> tuple[int, int]:
    height, width = target.input.height, target.input.width
    if height is None or width is None:
        raise UnsupportedError(
            f"target '{target.name}': a Core ML package has a fixed tile here, input is {width} x {height}",
            remedy="set 'input: {height: 256, width: 256}' in the target",
        )
    return height, width


def _tile_shape(source: Source, target: Target) -> tuple[int, int, int, int]:
    height, width = _tile(target)
    if height % source.stride or width % source.stride or min(height, width) < 1:
        raise InputError(
            f"target '{target.name}': the tile {width}x{height} is no multiple of {source.stride}, "
            f"the stride of '{source.name}'",
            remedy=f"choose multiples of {source.stride} for input.height and input.width",
        )
    return (1, source.channels, height, width)


def _description(
    source: Source, target: Target, compute: Compute, shape: tuple[int, int, int, int]
) -> engine.Description:
    height, width = shape[2:]
    kind = "Image denoiser" if source.takes_sigma else "Blind image denoiser"
    return engine.Description(
        author=f"edgekit {edgekit.__version__}",
        license="The licence of the weights is stated in the model card beside this package.",
        version=edgekit.__version__,
        summary=f"{kind} '{source.name}' for {width}x{height} tiles, computed in {compute}",
        features={
            INPUT: f"{' x '.join(map(str, shape))} float32: pixels in 0...1 plus noise, unclipped",
            NOISE_LEVEL: "Standard deviation of the noise on the scale of the pixels: 25/255 for 'sigma 25'",
            OUTPUT: f"{' x '.join(map(str, shape))} float32: the denoised picture, not clipped to 0...1",
        },
        metadata={
            "com.edgekit.version": edgekit.__version__,
            "com.edgekit.model": source.name,
            "com.edgekit.target": target.name,
            "com.edgekit.precision": compute,
            "com.edgekit.tile": f"{width}x{height}",
            "com.edgekit.stride": str(source.stride),
            "com.edgekit.channels": str(source.channels),
        },
    )


def _check_picture(source: Source, shape: tuple[int, int, int, int]) -> tuple[Array, float]:
    """Return the first calibration picture, repeated or cut to the tile; uniform noise where there is none."""
    if not source.calibration:
        return np.random.default_rng(0).random(shape, np.float32), 0.1
    noisy, sigma = source.calibration[0]
    height, width = noisy.shape[2:]
    repeats = (1, 1, -(-shape[2] // height), -(-shape[3] // width))
    return np.ascontiguousarray(np.tile(noisy, repeats)[:, :, : shape[2], : shape[3]]), sigma


def _swift(source: Source, shape: tuple[int, int, int, int]) -> str:
    text = (resources(__package__) / f"{SWIFT}.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(text)
    return template.render(
        version=edgekit.__version__,
        resource=source.name,
        takes_sigma=source.takes_sigma,
        channels=shape[1],
        height=shape[2],
        width=shape[3],
    )
