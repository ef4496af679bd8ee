import dataclasses

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from edgekit import backends, models, target
from edgekit.backends import Source, onnxruntime, onnxruntime_graph
from edgekit.backends.weight_bits import weight_bits
from edgekit.compress.export import export_onnx
from edgekit.compress.quantize import quantize_dynamic, quantize_static
from edgekit.compress.simplify import simplify
from edgekit.errors import InputError, IntegrityError, UnsupportedError
from edgekit.graph import walk
from edgekit.graph.checks import read_onnx
from edgekit.graph.reference import agreement_db, probe
from edgekit.recipe import Quantization

SIGMA = 25 / 255
ONNX = target.load("onnx")
SETTINGS = Quantization(calibration_pictures=8, keep_float=("head", "tail"), change_basis=False)
FLOAT = dataclasses.replace(ONNX, precision="float32")


@pytest.fixture(scope="module", params=[True, False], ids=["told the noise level", "blind"])
def source(request, tmp_path_factory) -> Source:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nano")
    net = models.create("nano", {"noise_level": request.param}).eval()
    traced = export_onnx(net, channels=1, takes_sigma=net.takes_sigma, stride=8, out=folder / "traced.onnx")
    fp32 = simplify(traced, folder / "simple.onnx")
    pictures = [(probe(48, 64, 1, seed=i), SIGMA) for i in range(8)]
    int8 = quantize_static(fp32, pictures, folder / "int8.onnx", SETTINGS).onnx
    return Source(
        name="nano",
        fp32_onnx=fp32,
        int8_onnx=int8,
        module=lambda: net,
        channels=1,
        takes_sigma=net.takes_sigma,
        stride=8,
        calibration=pictures,
    )


def torch_output(source: Source, noisy: np.ndarray) -> np.ndarray:
    arguments = (torch.full((1, 1, 1, 1), SIGMA),) if source.takes_sigma else ()
    with torch.no_grad():
        return source.module()(torch.from_numpy(noisy), *arguments).numpy()


@pytest.mark.parametrize(("wanted", "least_db"), [(ONNX, 30.0), (FLOAT, 100.0)], ids=["int8", "float32"])
def test_the_artifact_is_the_file_of_the_targets_precision(tmp_path, source, wanted, least_db):
    backend = backends.load("onnxruntime")
    built = backend.build(source, wanted, tmp_path)
    if wanted.precision == "int8":
        given = onnxruntime_graph.rewritten(read_onnx(source.int8_onnx)).SerializeToString(deterministic=True)
    else:
        given = source.fp32_onnx.read_bytes()
    assert (tmp_path / built.files["artifact"]).read_bytes() == given
    assert (tmp_path / built.files["fp32"]).read_bytes() == source.fp32_onnx.read_bytes()
    assert built.precision == wanted.precision
    ((label, session),) = backend.open_session(tmp_path, built, wanted)
    assert (label, session.level) == ("onnxruntime", "native")
    noisy = probe(40, 72, 1, seed=50)
    assert agreement_db(session(noisy, SIGMA), torch_output(source, noisy)) > least_db


def test_a_rewriting_that_changes_the_picture_stops(tmp_path, source, monkeypatch):
    def with_channels_mixed_up(model):
        changed = walk.copied(model)
        tensor = next(t for t in changed.graph.initializer if t.name.startswith("tail") and len(t.dims) == 4)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, ::-1].copy(), tensor.name))
        return changed

    monkeypatch.setattr(onnxruntime_graph, "rewritten", with_channels_mixed_up)
    with pytest.raises(IntegrityError, match=r"int8\.onnx: as ONNX Runtime computes it quickest it is [\d.]+ dB"):
        onnxruntime.build(source, ONNX, tmp_path)
    assert not (tmp_path / "model.int8.onnx").exists()


def test_integers_are_counted_in_the_graph_that_is_run(tmp_path, source):
    facts = onnxruntime.build(source, ONNX, tmp_path / "int8").facts
    assert 800 < facts["integer_macs_permille"] < 1000
    assert onnxruntime.build(source, FLOAT, tmp_path / "float").facts == {"integer_macs_permille": 0}


@pytest.mark.parametrize(("asked", "bits", "said"), [("always", 7, "do not saturate"), ("never", 8, "sums saturate")])
def test_the_bundle_says_how_many_bits_weights_have(tmp_path, source, asked, bits, said):
    settings = dataclasses.replace(SETTINGS, reduce_range=asked, change_basis=False)
    int8 = quantize_static(source.fp32_onnx, source.calibration, tmp_path / "int8.onnx", settings).onnx
    built = onnxruntime.build(dataclasses.replace(source, int8_onnx=int8), ONNX, tmp_path / "bundle")
    assert built.facts["weight_bits"] == bits
    assert [said in note for note in built.notes] == [True]


def test_weights_without_a_sign_have_nothing_to_saturate(tmp_path, source):
    assert weight_bits(quantize_dynamic(source.fp32_onnx, tmp_path / "int8.onnx")) is None


def test_int8_that_would_run_in_float_is_refused(tmp_path, source):
    pretended = dataclasses.replace(source, int8_onnx=source.fp32_onnx)
    with pytest.raises(UnsupportedError, match="none of its convolutions in integers"):
        onnxruntime.build(pretended, ONNX, tmp_path)


def test_int8_without_a_quantized_graph_is_refused(tmp_path, source):
    with pytest.raises(InputError, match=r"'onnx' asks for int8.*'nano' has no INT8 graph"):
        onnxruntime.build(dataclasses.replace(source, int8_onnx=None), ONNX, tmp_path)


def test_float16_is_refused(tmp_path, source):
    with pytest.raises(UnsupportedError, match="no float16 convolutions"):
        onnxruntime.build(source, dataclasses.replace(ONNX, precision="float16"), tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"not a model", "half"], ids=["missing", "empty", "junk", "cut short"])
def test_a_file_that_is_no_onnx_is_refused_by_name(tmp_path, source, content):
    path = tmp_path / "model.onnx"
    if content == "half":
        content = source.fp32_onnx.read_bytes()[:40_000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        onnxruntime.open_onnx(path, 1)
    assert str(path) in str(error.value)


def test_a_damaged_artifact_is_refused_by_name(tmp_path, source):
    built = onnxruntime.build(source, ONNX, tmp_path)
    artifact = tmp_path / built.files["artifact"]
    artifact.write_bytes(artifact.read_bytes()[:1000])
    with pytest.raises(InputError, match=str(artifact)):
        onnxruntime.open_session(tmp_path, built, ONNX)


def test_threads_are_those_that_were_asked_for(source):
    options = onnxruntime.open_onnx(source.fp32_onnx, 2)._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_the_shipped_target_takes_any_size_and_runs_here():
    assert (ONNX.engine, ONNX.precision, ONNX.runner.kind) == ("onnxruntime", "int8", "local")
    assert ONNX.input == target.InputShape(height=None, width=None)
