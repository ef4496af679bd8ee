"""The target for x86 processors with AVX-512 VNNI: a library of our own kernels, run and timed on this machine."""

from __future__ import annotations

import json

import pytest
from conftest import Call
from PIL import Image
from skimage import data

from edgekit.measure import host

pytest.importorskip("tvm")
NAME = "linux-x86_64-vnni"
pytestmark = [
    pytest.mark.backend,
    pytest.mark.slow,
    pytest.mark.skipif(
        "avx512_vnni" not in host.describe(packages=()).cpu.features, reason="this processor has no AVX-512 VNNI"
    ),
]


def test_the_shipped_nano_is_compiled_run_and_timed_here_and_denoises_a_photograph(cwd, call: Call):
    assert call("compile", "nano", "-t", NAME, "-o", "run").code == 0
    bundle = cwd / "run" / "bundles" / NAME
    # Whether the teacher is forty times slower is for a quiet machine to say.
    assert call("verify", bundle, "--seconds", "1", "--allow-unverified").code in (0, 3)
    report = json.loads((bundle.parent / f"{NAME}.report.json").read_text())
    limits = {limit["name"]: limit for limit in report["limits"]}
    for name in ("int8_drop_db", "golden_outputs", "min_integer_macs", "peak_memory_mib", "size_mib"):
        assert limits[name]["verdict"] == "pass", limits[name]
    assert limits["min_integer_macs"]["measured"] == "100.0 %"
    assert "interleaved pairs" in limits["speedup_vs_fp32"]["reason"]

    Image.fromarray(data.camera()[:300, :280]).save(cwd / "camera.png")
    assert call("denoise", "camera.png", "-m", bundle, "--sigma", "25", "-o", "out.png").code == 0
    assert Image.open(cwd / "out.png").size == (280, 300)
