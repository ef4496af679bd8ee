import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import tiny
import torch

from edgekit import backends, models, target
from edgekit.backends import Source
from edgekit.compress.export import export_onnx
from edgekit.compress.placement import PLACEMENTS
from edgekit.compress.quantize import quantize_static
from edgekit.compress.simplify import simplify
from edgekit.errors import InputError, IntegrityError, UnsupportedError
from edgekit.graph import walk
from edgekit.graph.reference import agreement_db, probe
from edgekit.measure import host
from edgekit.pipeline import pages
from edgekit.recipe import Quantization

pytestmark = pytest.mark.backend
openvino = pytest.importorskip("edgekit.backends.openvino", exc_type=ModuleNotFoundError)

SIGMA = 25 / 255
INT8 = target.load("linux-x86_64")
SETTINGS = Quantization(calibration_pictures=8, keep_float=("head", "tail"), change_basis=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nano")
    net = models.create("nano").eval()
    fp32 = simplify(
        export_onnx(net, channels=1, takes_sigma=True, stride=8, out=folder / "traced.onnx"), folder / "simple.onnx"
    )
    pictures = [(probe(48, 64, 1, seed=i), SIGMA) for i in range(8)]
    int8 = quantize_static(fp32, pictures, folder / "int8.onnx", SETTINGS, placement=PLACEMENTS["openvino"]).onnx
    return Source(
        name="nano",
        fp32_onnx=fp32,
        int8_onnx=int8,
        module=lambda: net,
        channels=1,
        takes_sigma=True,
        stride=8,
        calibration=pictures,
    )


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return folder, openvino.build(source, INT8, folder)


def precision(name: str) -> target.Target:
    return dataclasses.replace(INT8, precision=name)


def torch_output(source: Source, noisy: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return source.module()(torch.from_numpy(noisy), torch.full((1, 1, 1, 1), SIGMA)).numpy()


def test_the_readmes_lines_compute_what_is_verified(built, tmp_path, monkeypatch):
    folder, made = built
    ((_, session),) = openvino.open_session(folder, made, INT8)
    noisy = probe(64, 96, 1, seed=1)
    pages.write(tmp_path, tiny.manifest(INT8, made), None)
    given = {"noisy": noisy}
    monkeypatch.chdir(folder)
    exec((tmp_path / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], given)
    # On a processor with AMX, OpenVINO's own default is bfloat16, which is about 50 dB from this.
    assert agreement_db(given["denoised"], session(noisy, SIGMA)) > 80


# Each ended with a segmentation fault where all sessions of a process had one core, or each one of this thread's.
AFTER_OTHERS = {
    "an interruption": """
signal.signal(signal.SIGINT, signal.default_int_handler)
first, second = opened(), opened()
del first
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("sound")
""",
    "another network": """
for _ in range(20):
    refused = opened()
    refused(np.zeros((1, 1, 32, 48), np.float32), 0.1)
    try:
        refused(np.zeros((1, 1, 24, 40), np.float32), 0.1)
    except InputError:
        del refused
        opened()(np.zeros((1, 1, 32, 48), np.float32), 0.1)
        print("sound")
""",
}
BEFORE = """
import functools, os, signal, sys
from pathlib import Path
import numpy as np
from edgekit.backends import openvino
from edgekit.errors import InputError
opened = functools.partial(openvino.open_onnx, Path(sys.argv[1]), 1)
"""


@pytest.mark.parametrize(("what", "times"), [("an interruption", 1), ("another network", 20)])
def test_what_comes_after_sessions_that_have_gone_is_sound(tmp_path, what, times):
    path = export_onnx(tiny.Deep().eval(), channels=1, takes_sigma=False, stride=16, out=tmp_path / "deep.onnx")
    command = [sys.executable, "-c", BEFORE + AFTER_OTHERS[what], str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, times * "sound\n"), done.stderr


def test_the_int8_artifact_denoises_like_the_network(source, built):
    folder, made = built
    assert made.precision == "int8"
    ((label, session),) = backends.load("openvino").open_session(folder, made, INT8)
    assert (label, session.level) == ("openvino", "native")
    noisy = probe(40, 72, 1, seed=50)
    assert agreement_db(session(noisy, SIGMA), torch_output(source, noisy)) > 35
    assert session(noisy, SIGMA).shape == noisy.shape


def test_all_convolutions_but_head_and_tail_run_in_integers(source, built):
    folder, made = built
    session = openvino.open_onnx(folder / made.files["artifact"], 1)
    kernels = {}
    for node in session.compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) == "Convolution":
            kernels[node.get_friendly_name()] = info["runtimePrecision"].astype(str)
    in_float = {name.removesuffix("/WithoutBiases") for name, kind in kernels.items() if kind == "f32"}
    assert in_float == set(walk.float_convolutions(onnx.load(source.int8_onnx)))
    assert 800 < made.facts["integer_macs_permille"] < 1000


def test_the_bundle_says_how_many_bits_weights_have(built):
    _, made = built
    assert made.facts["weight_bits"] == (7 if host.sums_saturate() else 8)
    assert f"Weights have {made.facts['weight_bits']} bits" in made.notes[1]


def test_equal_sources_give_equal_bytes_without_notes_or_paths(source, built, tmp_path):
    folder, made = built
    assert openvino.build(source, INT8, tmp_path) == made
    for name in made.files.values():
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    xml = (tmp_path / "model.xml").read_text(encoding="utf-8")
    assert not re.findall(rf"nncf|<rt_info>\s*<info|{re.escape(str(tmp_path))}", xml)


@pytest.mark.parametrize(("name", "least_db", "kilobytes"), [("float32", 100, (150, 250)), ("float16", 60, (75, 125))])
def test_float_artifacts_say_that_they_compute_in_float32(source, tmp_path, name, least_db, kilobytes):
    made = openvino.build(source, precision(name), tmp_path)
    assert (made.precision, made.facts) == ("float32", {"integer_macs_permille": 0})
    assert kilobytes[0] * 1000 < (tmp_path / "model.bin").stat().st_size < kilobytes[1] * 1000
    noisy = probe(64, 64, 1, seed=51)
    ((_, session),) = openvino.open_session(tmp_path, made, precision(name))
    assert agreement_db(session(noisy, SIGMA), torch_output(source, noisy)) > least_db


def test_float_parts_are_computed_in_float32_with_the_threads_asked_for(source):
    compiled = openvino.open_onnx(source.fp32_onnx, 2).compiled
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == min(2, len(os.sched_getaffinity(0)))
    assert compiled.get_property("NUM_STREAMS") == 1


def test_int8_needs_a_quantized_graph(source, tmp_path):
    with pytest.raises(InputError, match="has no INT8 graph"):
        openvino.build(dataclasses.replace(source, int8_onnx=None), INT8, tmp_path)


def test_int8_that_would_run_in_float_is_refused(source, tmp_path):
    everything_in_float = dataclasses.replace(source, int8_onnx=source.fp32_onnx)
    with pytest.raises(UnsupportedError, match="no convolution of 'nano' in integers"):
        openvino.build(everything_in_float, INT8, tmp_path)


def test_the_int8_graph_of_another_network_is_refused(source, tmp_path):
    other = onnx.load(source.int8_onnx)
    scale = next(t for t in other.graph.initializer if t.name == "tail.weight")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * -50, scale.name))
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    with pytest.raises(IntegrityError, match=r"is -?\d+\.\d dB from the float graph"):
        openvino.build(dataclasses.replace(source, int8_onnx=tmp_path / "other.onnx"), INT8, tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"not a model"], ids=["missing", "empty", "junk"])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, content):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        openvino.open_onnx(path, 1)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("file", ["model.xml", "model.bin"])
@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_a_damaged_artifact_is_refused_by_name(built, tmp_path, file, damage):
    folder, made = built
    for name in made.files.values():
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:500])
    if damage == "removed":
        (tmp_path / file).unlink()
    with pytest.raises(InputError) as error:
        openvino.open_session(tmp_path, made, INT8)
    assert str(tmp_path / "model.") in str(error.value)


def test_nothing_is_reported_to_a_server():
    code = "import edgekit.backends.openvino, openvino.tools.ovc.telemetry_utils as t; print(t.tm.__name__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "openvino.tools.ovc.telemetry_stub"


def test_the_shipped_target_takes_any_size_and_runs_here():
    assert (INT8.engine, INT8.precision, INT8.runner.kind) == ("openvino", "int8", "local")
    assert INT8.input == target.InputShape(height=None, width=None)
