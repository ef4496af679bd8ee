import gc
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from edgekit import run
from edgekit.errors import InputError
from edgekit.measure import host
from edgekit.measure.latency import WARM_UP_RUNS, Paired, Ratio, decide, interleave, ratio_with_bound

X86_CPUINFO = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz
flags\t\t: fpu sse2 avx avx2 fma avx512f avx512_vnni
processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM_CPUINFO = """\
processor\t: 0
Features\t: fp asimd evtstrm aes asimdhp cpuid asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd0b
"""
MACOS_SYSCTL = """\
machdep.cpu.brand_string: Apple M2
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 0
"""


class Machine:
    """A clock that only its programs move, and a list of who ran."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.ran: list[str] = []
        self.rng = np.random.default_rng(0)

    def clock_ns(self) -> int:
        return self.now_ns

    def program(self, name: str, base_us: float, *, spread: float = 0.0, drift: float = 0.0):
        def run() -> None:
            slower = 1 + drift * len(self.ran) + abs(self.rng.normal(0, spread))
            self.now_ns += round(base_us * 1000 * slower)
            self.ran.append(name)

        return run


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_programs_run_by_turns_after_a_warm_up(machine):
    paired = interleave(
        machine.program("a", 500), machine.program("b", 100), min_pairs=6, max_seconds=0, clock_ns=machine.clock_ns
    )
    assert "".join(machine.ran) == "ab" * WARM_UP_RUNS + "abba" * 3
    assert paired == Paired(a_us=(500,) * 6, b_us=(100,) * 6)
    assert (paired.a_median_us, paired.b_median_us) == (500, 100)


def test_one_disturbed_run_does_not_move_the_times_which_are_whole_microseconds():
    paired = Paired(a_us=(401, 400, 90_000, 400, 402, 400), b_us=(100, 101, 100, 100, 101, 7000))
    assert (paired.a_median_us, paired.b_median_us) == (400, 100)


def test_pairs_go_on_until_the_time_is_over(machine):
    paired = interleave(
        machine.program("a", 8000), machine.program("b", 2000), min_pairs=6, max_seconds=0.25, clock_ns=machine.clock_ns
    )
    assert len(paired.a_us) == len(paired.b_us) == 25


def test_slow_programs_still_get_their_least_pairs(machine):
    paired = interleave(
        machine.program("a", 9e6), machine.program("b", 1e6), min_pairs=7, max_seconds=1, clock_ns=machine.clock_ns
    )
    assert len(paired.a_us) == 7


def test_garbage_collection_is_off_while_timing_and_on_after_even_a_failure(machine):
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        if len(seen) > WARM_UP_RUNS:
            raise RuntimeError("stop")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="stop"):
        interleave(fail, lambda: None, min_pairs=6, max_seconds=0)
    assert seen == [True] * WARM_UP_RUNS + [False]
    assert gc.isenabled()


def test_too_few_pairs_are_refused(machine):
    with pytest.raises(InputError, match="5 pairs bound nothing"):
        interleave(machine.program("a", 1), machine.program("b", 1), min_pairs=5, max_seconds=0)
    with pytest.raises(InputError, match="2 pairs bound nothing"):
        ratio_with_bound(Paired(a_us=(2, 2), b_us=(1, 1)))


def test_the_ratio_stands_still_while_the_machine_slows_down(machine):
    paired = interleave(
        machine.program("a", 4000, drift=0.01, spread=0.02),
        machine.program("b", 1000, drift=0.01, spread=0.02),
        min_pairs=200,
        max_seconds=0,
        clock_ns=machine.clock_ns,
    )
    ratio = ratio_with_bound(paired)
    assert max(paired.a_us) > 4 * min(paired.a_us)
    assert ratio.low_e3 <= 4000 <= ratio.high_e3
    assert ratio.high_e3 - ratio.low_e3 < 100
    assert ratio.pairs == 200


def test_one_disturbed_run_does_not_move_the_ratio(machine):
    calm = Paired(a_us=(400,) * 20, b_us=(100,) * 20)
    disturbed = Paired(a_us=(400,) * 19 + (90_000,), b_us=(100,) * 20)
    assert ratio_with_bound(disturbed).ratio_e3 == ratio_with_bound(calm).ratio_e3 == 4000


def test_the_bound_is_the_same_for_the_same_seed_and_rounded_outwards():
    rng = np.random.default_rng(1)
    paired = Paired(a_us=tuple(rng.integers(900, 1100, 50).tolist()), b_us=tuple(rng.integers(290, 310, 50).tolist()))
    ratio = ratio_with_bound(paired, seed=1)
    assert ratio == ratio_with_bound(paired, seed=1)
    assert ratio.low_e3 < ratio.ratio_e3 < ratio.high_e3
    wider = ratio_with_bound(paired, confidence=0.999, seed=1)
    assert wider.low_e3 <= ratio.low_e3
    assert wider.high_e3 >= ratio.high_e3


def test_the_bound_is_rounded_outwards_and_the_ratio_to_the_nearest():
    # 1.33357.
    ratio = ratio_with_bound(Paired(a_us=(40_007,) * 8, b_us=(30_000,) * 8))
    assert (ratio.low_e3, ratio.ratio_e3, ratio.high_e3) == (1333, 1334, 1334)


def test_the_bound_is_of_the_confidence_that_was_asked_for():
    """Of 6 pairs the sign test makes it, of many the bootstrap."""
    rng = np.random.default_rng(3)
    for pairs, less in ((6, 0.5), (60, 0.8)):
        paired = Paired(a_us=tuple(rng.integers(900, 1100, pairs).tolist()), b_us=(300,) * pairs)
        narrow, wide = ratio_with_bound(paired, confidence=less), ratio_with_bound(paired)
        assert narrow.low_e3 > wide.low_e3
        assert narrow.high_e3 < wide.high_e3
        assert (narrow.confidence, wide.confidence) == (less, 0.95)


def test_pairs_that_are_like_their_neighbours_widen_the_bound():
    """A machine that is slow for a while tells less than as many pairs that have nothing to do with each other."""
    rng = np.random.default_rng(4)
    slow = np.repeat(rng.normal(4000, 200, 25), 5).astype(int)
    mixed = rng.permutation(slow)
    widths = [
        (bound := ratio_with_bound(Paired(a_us=tuple(times.tolist()), b_us=(1000,) * 125))).high_e3 - bound.low_e3
        for times in (slow, mixed)
    ]
    assert widths[0] > 1.3 * widths[1]


@pytest.mark.parametrize("pairs", [6, 8, 12])
def test_nineteen_of_twenty_bounds_of_few_pairs_hold_the_true_ratio(pairs):
    rng = np.random.default_rng(2)
    found = [
        ratio_with_bound(Paired(a_us=tuple(rng.normal(40_000, 2000, pairs).astype(int)), b_us=(10_000,) * pairs))
        for _ in range(200)
    ]
    assert sum(ratio.low_e3 <= 4000 <= ratio.high_e3 for ratio in found) >= 0.94 * 200


@pytest.mark.parametrize(
    ("low_e3", "high_e3", "decision"),
    [
        (16_100, 17_000, "pass"),
        (16_099, 17_000, "inconclusive"),
        (15_000, 16_100, "inconclusive"),
        (15_000, 16_099, "fail"),
    ],
)
def test_a_bound_that_is_the_limit_reaches_it(low_e3, high_e3, decision):
    assert 1000 * 16.1 > 16_100
    ratio = Ratio(ratio_e3=(low_e3 + high_e3) // 2, low_e3=low_e3, high_e3=high_e3, confidence=0.95, pairs=50)
    assert decide(ratio, 16.1) == decision


@pytest.mark.parametrize(
    ("low_e3", "high_e3", "decision"),
    [(4000, 4400, "pass"), (3999, 4400, "inconclusive"), (3500, 4000, "inconclusive"), (3500, 3999, "fail")],
)
def test_the_limit_is_decided_by_the_bound(low_e3, high_e3, decision):
    ratio = Ratio(ratio_e3=(low_e3 + high_e3) // 2, low_e3=low_e3, high_e3=high_e3, confidence=0.95, pairs=50)
    assert decide(ratio, 4.0) == decision


def test_a_real_program_that_sleeps_longer_takes_longer():
    paired = interleave(lambda: time.sleep(0.009), lambda: time.sleep(0.003), min_pairs=12, max_seconds=0.2)
    ratio = ratio_with_bound(paired)
    assert min(paired.a_us) >= 9000
    assert decide(ratio, 1.5) == "pass"
    assert decide(ratio, 6.0) == "fail"


def test_the_host_is_described_without_its_name():
    described = host.describe()
    assert described.logical_cores >= described.usable_cores >= 1
    assert described.architecture == platform.machine()
    assert described.packages["numpy"] == np.__version__
    assert not re.search(rf"\b{re.escape(platform.node())}\b", str(asdict(described)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_knows_its_processor_and_memory_on_linux():
    described = host.describe()
    assert described.cpu.model
    assert described.memory_mib is not None
    assert described.memory_mib > 500


def test_a_package_that_is_missing_is_left_out():
    assert list(run.versions(["numpy", "no-such-package"])) == ["numpy"]


@pytest.mark.parametrize(
    ("parsed", "model", "features"),
    [
        (
            host.parse_cpuinfo(X86_CPUINFO),
            "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz",
            ("avx2", "avx512f", "avx512_vnni"),
        ),
        (
            host.parse_cpuinfo(ARM_CPUINFO),
            "implementer 0x41 part 0xd0b",
            ("asimd", "asimdhp", "asimddp", "i8mm", "bf16"),
        ),
        (host.parse_sysctl(MACOS_SYSCTL), "Apple M2", ("asimd", "asimddp")),
    ],
    ids=["x86", "arm", "macos"],
)
def test_processors_are_read_from_what_systems_print(parsed, model, features):
    assert parsed == host.Cpu(model=model, features=features)


def test_describing_the_host_imports_no_heavy_package():
    code = (
        "import sys; from edgekit.measure import host; host.describe();"
        "print({'torch', 'onnxruntime', 'openvino', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_a_cuda_device_there_is_no_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert host.gpu() is None


_FAILS = "echo 'Driver/library version mismatch'; echo 'NVML library version: 550.54'; exit 18"


@pytest.mark.parametrize("script", ["exec sleep 60", None, _FAILS], ids=["hangs", "does not start", "says why"])
def test_a_driver_that_does_not_tell_its_version_is_no_failure(tmp_path, monkeypatch, script):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("" if script is None else f"#!/bin/sh\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(host, "_ANSWER_S", 0.2)
    assert ("550.54" in host._output([str(tool)])) == (script == _FAILS)
    if not Path("/proc/driver/nvidia/version").is_file():
        assert host._nvidia_driver() is None


def test_the_drivers_version_is_what_its_tool_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '550.54.15\\n550.54.15\\n'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert host._nvidia_driver() == "550.54.15"


@pytest.mark.gpu
def test_the_gpu_is_described():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = host.gpu()
    assert found is not None
    assert found.name == torch.cuda.get_device_name(0)
    assert found.driver
    assert found.memory_mib > 1000
