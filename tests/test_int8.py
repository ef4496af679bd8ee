"""What of an INT8 graph is in float before it is trained."""

from __future__ import annotations

import pytest

from edgekit.compress import budget, quantize
from edgekit.compress.export import export_onnx
from edgekit.compress.placement import PLACEMENTS, place
from edgekit.compress.simplify import simplify
from edgekit.errors import UnsupportedError
from edgekit.graph import checks, walk
from edgekit.graph.reference import probe
from edgekit.pipeline import int8, networks
from edgekit.recipe import Quantization

PICTURES = [(probe(48, 64, 1, seed=i), 25 / 255) for i in range(8)]
SETTINGS = Quantization(calibration_pictures=8, change_basis=False)


def student(name, folder):
    net = networks.shipped(name).net.eval()
    raw = export_onnx(net, channels=1, takes_sigma=True, stride=net.stride, out=folder / "raw.onnx")
    return quantize.prepare(simplify(raw, folder / "fp32.onnx"), PICTURES, SETTINGS)


def ends(prepared, name):
    graph = place(prepared.model, prepared.ranges, PLACEMENTS[name])
    return graph, int8.ends_in_float(graph, prepared, PLACEMENTS[name])


def test_onnxruntime_has_the_ends_of_base_in_float(tmp_path):
    prepared = student("base", tmp_path)
    graph, found = ends(prepared, "onnxruntime")
    (head,) = walk.first_convolutions(prepared.model, checks.NOISY)
    (tail,) = walk.last_convolutions(prepared.model, checks.DENOISED)
    assert walk.float_convolutions(graph) == ()
    assert walk.float_convolutions(found) == (head, tail)
    assert 950 <= budget.integer_macs_permille(found) < 1000
    # What the last one reads was not rounded.
    read = next(n for n in found.graph.node if n.name == tail).input[0]
    assert walk.producers(found)[read].op_type == "Add"


def test_ends_that_are_much_of_a_network_stay_integers(tmp_path):
    graph, found = ends(student("nano", tmp_path), "onnxruntime")
    assert found is graph


def test_openvino_rounds_no_results_and_has_the_ends_in_integers(tmp_path):
    graph, found = ends(student("base", tmp_path), "openvino")
    assert found is graph


def test_layers_that_dynamic_int8_would_not_leave_in_float_are_refused():
    int8.refuse("onnxruntime", Quantization(mode="dynamic"))
    with pytest.raises(UnsupportedError, match=r"keep_float is \[head\], and dynamic INT8 has no float layers"):
        int8.refuse("onnxruntime", Quantization(mode="dynamic", keep_float=("head",)))
