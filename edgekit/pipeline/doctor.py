"""What is installed here, and which targets can be compiled and verified with it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from dataclasses import dataclass

from edgekit import backends, run
from edgekit.measure import host
from edgekit.runners.qemu import PROGRAMS
from edgekit.target import Engine

_MODULES: dict[Engine, str] = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tvm": "tvm",
    "coreml": "coremltools",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is there or missing. fix: The command to run; empty where nothing is to be done."""

    name: str
    found: bool
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Return what edgekit needs and whether it is here; engines are looked up, not imported."""
    versions = run.versions(("torch", "apache-tvm-ffi", *backends.DISTRIBUTIONS.values()))
    gpu = host.gpu()
    machine = host.describe()
    findings = [
        Finding(
            name="machine",
            found=True,
            detail=f"{machine.cpu.model}, {machine.usable_cores} cores, Python {machine.python}",
        ),
        Finding(
            name="GPU", found=gpu is not None, detail=gpu.name if gpu else "none; training and baseline use the CPU"
        ),
    ]
    for engine, distribution in backends.DISTRIBUTIONS.items():
        there = importlib.util.find_spec(_MODULES[engine]) is not None
        extra = backends.EXTRAS.get(engine, "all")
        findings.append(
            Finding(
                name=engine,
                found=there,
                detail=versions.get(distribution, "not installed"),
                fix="" if there else f"pip install 'edgekit[{extra}]'",
            )
        )
    qemu = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    findings.append(
        Finding(
            name="qemu-aarch64",
            found=qemu is not None,
            detail="runs arm64 artifacts for verification" if qemu else "arm64 artifacts cannot be verified",
            fix="" if qemu else "apt-get install qemu-user-static",
        )
    )
    if machine.architecture == "x86_64":
        vnni = "avx512_vnni" in machine.cpu.features
        findings.append(
            Finding(
                name="AVX-512 VNNI",
                found=vnni,
                detail="runs linux-x86_64-vnni" if vnni else "linux-x86_64-vnni can be compiled, and not verified",
            )
        )
    mac = platform.system() == "Darwin"
    findings.append(
        Finding(
            name="Core ML", found=mac, detail="runs here" if mac else "needs a Mac; packages get a reference evaluation"
        )
    )
    return findings
