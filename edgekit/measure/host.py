"""The machine and the software that a figure was measured with. No names of hosts or of people."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.run import versions

# What decides how fast INT8 and half-precision kernels run; the rest of a processor's features says little.
FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
# macOS names the features of ARM otherwise than Linux does.
MACOS_FEATURES = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
}
_WIDE_SUMS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
_ANSWER_S = 10.0
PACKAGES = ("numpy", "onnx", "onnxruntime", "openvino", "torch", "apache-tvm", "coremltools", "scikit-image")


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """A processor.

    model: Its name as the system gives it; empty where it gives none.
    features: Those of `FEATURES` that it has, in that order.
    """

    model: str
    features: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine and its software.

    architecture: As `x86_64`, `aarch64` or `arm64`.
    usable_cores: Cores that this process may run on, of the `logical_cores`.
    memory_mib: None where the system does not tell.
    packages: Name -> version of those that are installed.
    """

    system: str
    kernel: str
    architecture: str
    cpu: Cpu
    logical_cores: int
    usable_cores: int
    memory_mib: int | None
    python: str
    packages: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device.

    driver: Version of its driver; None where neither nvidia-smi nor the kernel module tells.
    cuda: Version of CUDA that PyTorch was built with.
    """

    name: str
    memory_mib: int
    compute_capability: str
    driver: str | None
    cuda: str


def describe(packages: Iterable[str] = PACKAGES) -> Host:
    """Return this machine, with the versions of the named packages, none of which is imported."""
    return Host(
        system=platform.system(),
        kernel=platform.release(),
        architecture=platform.machine(),
        cpu=_cpu(),
        logical_cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        memory_mib=_memory_mib(),
        python=platform.python_version(),
        packages=versions(sorted(packages)),
    )


def sums_saturate() -> bool:
    """Return whether this processor's sums of two 8-bit products saturate at 16 bits: x86 without VNNI."""
    machine = describe(packages=())
    return machine.architecture in ("x86_64", "AMD64") and _WIDE_SUMS.isdisjoint(machine.cpu.features)


def gpu() -> Gpu | None:
    """Return the first CUDA device that PyTorch can use; None where there is none, or no PyTorch."""
    try:
        # PyTorch takes seconds to import, and most who ask for the host have no use for it.
        import torch
    except ModuleNotFoundError:
        return None
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(0)
    return Gpu(
        name=device.name,
        memory_mib=device.total_memory >> 20,
        compute_capability=f"{device.major}.{device.minor}",
        driver=_nvidia_driver(),
        cuda=torch.version.cuda or "",
    )


def parse_cpuinfo(text: str) -> Cpu:
    """Return the first processor of Linux's /proc/cpuinfo, x86 or ARM."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    present = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name") or fields.get("Model") or ""
    if not model and "CPU part" in fields:
        model = f"implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    return Cpu(model=model, features=tuple(name for name in FEATURES if name in present))


def parse_sysctl(text: str) -> Cpu:
    """Return the processor from the output of macOS's `sysctl machdep.cpu.brand_string hw.optional`."""
    pairs = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    present = {feature for key, feature in MACOS_FEATURES.items() if pairs.get(key) == "1"}
    model = pairs.get("machdep.cpu.brand_string", "")
    return Cpu(model=model, features=tuple(name for name in FEATURES if name in present))


def _cpu() -> Cpu:
    if sys.platform == "linux":
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    if sys.platform == "darwin":
        return parse_sysctl(_output(["/usr/sbin/sysctl", "machdep.cpu.brand_string", "hw.optional"]))
    return Cpu(model=platform.processor(), features=())


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_mib() -> int | None:
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def _nvidia_driver() -> str | None:
    smi, version = shutil.which("nvidia-smi"), r"\d{3}\.\d+(?:\.\d+)?"
    listed = _output([smi, "--query-gpu=driver_version", "--format=csv,noheader"]).split() if smi else []
    # A tool that fails prints why in the same place.
    if listed and re.fullmatch(version, listed[0]):
        return listed[0]
    module = Path("/proc/driver/nvidia/version")
    if module.is_file() and (found := re.search(rf"\b({version})\b", module.read_text(encoding="utf-8"))):
        return found[1]
    return None


def _output(command: list[str]) -> str:
    """Return what a command prints, nothing where it takes too long or does not start.

    Its exit status says nothing here, for a missing key is no failure.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
