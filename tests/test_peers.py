"""The protocol is right if published networks reach their published figures under it.

The pictures and the networks are others' work, so that they are not in the project: EDGEKIT_RESEARCH_DATA names the
folder that holds `test/set12` and `peers`.
"""

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgekit.data import sets
from edgekit.data.sets import PictureSet
from edgekit.measure.quality import Denoise, evaluate, noisy_input

RESEARCH_DATA = Path(os.environ.get("EDGEKIT_RESEARCH_DATA", Path(__file__).parent.parent / "../shared/data"))

pytestmark = pytest.mark.skipif(
    not (RESEARCH_DATA / "test/set12").is_dir() or not (RESEARCH_DATA / "peers").is_dir(),
    reason="no test/set12 and peers in EDGEKIT_RESEARCH_DATA",
)


@pytest.fixture(scope="module")
def set12() -> PictureSet:
    pictures = sets.folder(RESEARCH_DATA / "test/set12", channels=1)
    assert len(pictures) == 12
    return pictures


def opened(name: str) -> Denoise:
    """Return a published network as a denoiser, on two threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    path = RESEARCH_DATA / "peers" / f"{name}.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    takes_sigma = "sigma" in {found.name for found in session.get_inputs()}

    def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
        level = {"sigma": np.full((1, 1, 1, 1), sigma, np.float32)} if takes_sigma else {}
        return session.run(None, {"noisy": noisy} | level)[0]

    return denoise


def test_the_noisy_input_of_set12_has_the_recorded_psnr(set12):
    assert evaluate(noisy_input, set12, sigma255=25).psnr_mdb == pytest.approx(20_170, abs=10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published_mdb"),
    [("dncnn_sigma25", 30_440), ("ffdnet_gray", 30_430)],
    ids=["DnCNN (Zhang 2017)", "FFDNet (Zhang 2018)"],
)
def test_a_published_network_reaches_its_published_psnr_on_set12(set12, name, published_mdb):
    report = evaluate(opened(name), set12, sigma255=25)
    assert report.psnr_mdb == pytest.approx(published_mdb, abs=30)
