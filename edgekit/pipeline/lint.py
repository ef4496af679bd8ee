"""MODEL -> what will hurt on a target, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from edgekit import models
from edgekit.graph import lint as rules
from edgekit.graph.lint import Finding
from edgekit.models.denoiser import Denoiser
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import networks
from edgekit.target import Target


def lint(
    what: str,
    target: Target | None = None,
    *,
    options: Mapping[str, models.Option] | None = None,
    weights: Path | None = None,
) -> list[Finding]:
    """Return what will hurt in a network; without a target, what hurts any.

    Args:
        what: A network of `edgekit models` (which needs no weights), shipped weights, a run folder, an ONNX file, or
            `package.module:Class`.
        target: Leaves out what its precision does not mind.
        options: Of a network of `edgekit models`.
        weights: Of a class; random ones do as well.

    Raises:
        InputError: Nothing of that name, an unknown option, options or weights for what does not heed them, or a graph
            that is quantized already.
        UnsupportedError: A graph that edgekit cannot export or read.
    """
    networks.refuse_ignored(what, weights=weights, options=options)
    found = rules.lint(_graph(what, dict(options or {}), weights))
    if target is None or target.precision == "int8":
        return found
    return [finding for finding in found if not finding.only_int8]


def _graph(what: str, options: Mapping[str, models.Option], weights: Path | None) -> onnx.ModelProto:
    if what.endswith(".onnx"):
        return compiling.simplified(Path(what))
    return compiling.float_model(_network(what, options, weights))


def _network(what: str, options: Mapping[str, models.Option], weights: Path | None) -> Denoiser:
    if networks.is_run(what):
        return networks.from_run(Path(what)).net
    if ":" in what:
        return networks.from_class(what, weights).net if weights else networks.untrained(what)
    if what in models.names():
        return models.create(what, options).eval()
    card = networks.card(what)
    return models.create(card.model, {**card.options, **options}).eval()
