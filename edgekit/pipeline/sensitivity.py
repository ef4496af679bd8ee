"""A student's sensitivity table: quantize it whole for an engine, and measure each layer's dB and time."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal

import numpy as np

from edgekit.backends import DOORS, load
from edgekit.bundle import combined_sha256
from edgekit.compress import export, placement, quantize, sensitivity
from edgekit.compress.sensitivity import Table
from edgekit.errors import InputError
from edgekit.graph import checks
from edgekit.graph.receptive_field import tile_stride
from edgekit.measure import host
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import int8, networks
from edgekit.recipe import Recipe

_SIDE = 256
_RUNS = 10
_UNHEEDED = (
    *("teacher", "data.train", "data.evaluation", "data.evaluation_pictures", "noise.seed"),
    *("quantization.keep_float", "quantization.qat", "budgets"),
)


def of_model(
    what: str,
    engine: Literal["onnxruntime", "openvino"],
    *,
    weights: Path | None = None,
    overrides: Sequence[str] = (),
) -> tuple[str, Table]:
    """Return the name and the table of a shipped model, a run folder, an ONNX file or a torch class.

    Args:
        what: A MODEL or a run folder, whose own recipe is not looked at.
        engine: As in `table`.
        weights: Weights of a `package.module:Class`.
        overrides: Dotted settings of the recipe, such as `data.calibration=photos`.

    Raises:
        InputError: Nothing of that name, a wrong setting or one that is not heeded, or weights for what has its own.
            Else as `table`.
    """
    networks.refuse_ignored(what, weights=weights)
    for override in overrides:
        if f"{override.partition('=')[0]}.".startswith(tuple(f"{name}." for name in _UNHEEDED)):
            raise InputError(f"--set {override}: layers are measured without it", remedy="leave it out")
    if what.endswith(".onnx"):
        path, model = Path(what), compiling.simplified(Path(what))
        name = compiling.identifier(path.stem)
        recipe = _recipe(name, checks.interface(model, path).channels, overrides)
        with tempfile.TemporaryDirectory() as folder:
            export.write(model, fp32 := Path(folder, path.name))
            found = table(fp32, recipe, engine, stride=tile_stride(model, path))
            return name, _of(combined_sha256(checks.files_of(path)), found)
    network = networks.named(what, weights)
    with tempfile.TemporaryDirectory() as folder:
        fp32 = compiling.float_graph(network.net, Path(folder))
        recipe = _recipe(network.name, network.net.channels, overrides)
        return network.name, _of(network.sha256, table(fp32, recipe, engine, stride=network.net.stride))


def _recipe(name: str, channels: int, overrides: Sequence[str]) -> Recipe:
    """Return the settings of a MODEL, after a look for what is not heeded in sections that were set as a whole."""
    told, usual = compiling.default_recipe(name, channels, overrides), compiling.default_recipe(name, channels)
    for unheeded in _UNHEEDED:
        if attrgetter(unheeded)(told) != attrgetter(unheeded)(usual):
            of_it = [o for o in overrides if unheeded.startswith(f"{o.partition('=')[0]}.")]
            raise InputError(f"--set {of_it[-1]}: layers are measured without '{unheeded}'", remedy="leave that out")
    return told


def table(
    fp32: Path, recipe: Recipe, engine: Literal["onnxruntime", "openvino"], *, stride: int = 8, pictures: int = 4
) -> Table:
    """Return what each layer of a student costs in INT8: dB on held-out pictures, time in the engine on this machine.

    Args:
        fp32: The fused, simplified float graph, as a run's `05-simplify/student.fp32.onnx`.
        recipe: Pictures, noise and calibration.
        engine: Whose placement is looked at, and which is timed on one thread with 256x256 pixels.
        stride: Of the graph's input.
        pictures: How many held-out pictures the layers are measured on.

    Raises:
        ToolMissingError: The engine is not installed.
        InputError: Dynamic INT8 is asked for; else as `quantize.quantize_static`.
    """
    if recipe.quantization.mode != "static":
        raise InputError(
            f"quantization.mode is {recipe.quantization.mode}, and layers are measured in static INT8",
            remedy="leave it out; edgekit compare --dynamic measures dynamic INT8 as a whole",
        )
    load(engine)
    name = int8.PLACEMENTS[engine]
    where = placement.PLACEMENTS[name]
    prepared = quantize.prepare(fp32, int8.calibration(recipe, stride), recipe.quantization, where)
    quantized = placement.place(prepared.model, prepared.ranges, where, weight_limit=prepared.weight_limit)
    channels = checks.interface(prepared.model, fp32).channels
    noisy = np.random.default_rng(0).random((1, channels, _SIDE, _SIDE), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        export.write(quantized, Path(folder, "int8.onnx"))
        times = importlib.import_module(DOORS[engine]).node_times_us(Path(folder, "int8.onnx"), noisy, runs=_RUNS)
    judge = int8.judge_of(recipe, fp32, stride, exact=prepared.exact)
    found = sensitivity.sensitivity(quantized, prepared.model, (name, where), judge, times_us=times, pictures=pictures)
    levels = ", ".join(f"{sigma:g}" for sigma in int8.levels(recipe.noise))
    measured = {
        "protocol": f"dB: mean over sigma {levels}, the layers on {pictures} of the held-out pictures and the whole on "
        f"up to 16; time: shortest of {_RUNS} runs, one picture of {_SIDE}x{_SIDE}, one thread",
        "host": asdict(host.describe()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return replace(found, measured=measured)


def _of(weights_sha256: str, found: Table) -> Table:
    """Return the table with the hash of the weights, or of the user's ONNX file, that it is of."""
    return replace(found, measured={"weights_sha256": weights_sha256, **found.measured})
