import pytest
import tiny

from edgekit import backends
from edgekit.compress.export import export_onnx
from edgekit.measure.latency import Paired
from edgekit.pipeline import worth

OPTIONS = {"plain": {}, "v3": {"activation": "hardswish", "se": True}}


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    return {
        name: export_onnx(
            tiny.network("nano", options), channels=1, takes_sigma=True, stride=8, out=folder / f"{name}.onnx"
        )
        for name, options in OPTIONS.items()
    }


def compared(
    path, fp32_us: int, int8_us: int, *, spread_us: int = 0, released: bool = False, dynamic: bool = False
) -> str:
    """Return the sentence for run times that are made up; the programs themselves are real and run once."""

    def interleave(a, b, *, min_pairs, max_seconds):
        a()
        b()
        slower = (spread_us * (-1) ** pair for pair in range(min_pairs))
        return Paired(a_us=tuple(fp32_us + us for us in slower), b_us=(int8_us,) * min_pairs)

    session = backends.load_onnx("onnxruntime").open_onnx(path, threads=1)
    found = worth.compare(
        "onnxruntime",
        path,
        session,
        (1, 1, 32, 32),
        threads=1,
        seconds=0.1,
        released=released,
        dynamic=dynamic,
        interleave=interleave,
    )
    assert found is not None
    return found.sentence()


def test_int8_that_is_faster_is_reported_with_its_figures(students):
    said = compared(students["plain"], 30_000, 12_000)
    assert "12.0 ms against 30.0 ms, 2.50x (2.50 to 2.50)" in said
    assert "not worth" not in said


def test_int8_that_is_slower_is_not_worth_it_and_the_operators_to_blame_are_named(students):
    said = compared(students["v3"], 20_000, 40_000)
    assert "0.50x" in said
    assert "not worth it" in said
    assert "HardSwish, HardSigmoid, ReduceMean run in float" in said
    assert "activation=relu and se=false" in said


def test_a_slow_plain_network_is_told_what_to_do_about_it(students):
    said = compared(students["plain"], 20_000, 25_000)
    assert "not worth it" in said
    assert "larger student" in said
    assert "budgets" not in said, "nothing is in float that a larger budget would bring back"


def test_a_slow_network_with_layers_in_float_is_told_of_the_budget(students):
    said = compared(students["plain"], 20_000, 25_000, released=True)
    assert "convolutions are in float; raise budgets.int8_drop_db, or take a larger student, where the budget" in said
    assert "else leave out quantization.keep_float and what `edgekit lint` names" in said


def test_dynamic_int8_that_is_slower_is_told_that_its_mode_is_to_blame(students):
    said = compared(students["v3"], 20_000, 40_000, released=True, dynamic=True)
    assert "not worth it here: ranges are found in each picture; leave out quantization.mode=dynamic, or" in said
    assert "budgets" not in said
    assert "activation" not in said


def test_a_difference_within_the_noise_is_no_speed_up(students):
    assert "not worth it" in compared(students["plain"], 20_000, 20_001)


def test_what_a_busy_machine_leaves_open_is_no_verdict_on_int8(students):
    said = compared(students["v3"], 24_000, 20_000, spread_us=6_000)
    assert "1.20x (0.90 to 1.50)" in said
    assert "not decided" in said
    assert "not worth it" not in said


def test_the_engines_own_time_is_what_is_measured(students):
    session = backends.load_onnx("onnxruntime").open_onnx(students["plain"], threads=1)
    found = worth.compare("onnxruntime", students["plain"], session, (1, 1, 64, 64), threads=1, seconds=0.2)
    assert found.ratio.low_e3 < 1300
    assert found.ratio.high_e3 > 700


def test_an_engine_that_runs_no_onnx_has_nothing_to_compare_with(students):
    assert (
        worth.compare("tvm", students["plain"], lambda noisy, sigma: noisy, (1, 1, 8, 8), threads=1, seconds=1) is None
    )
