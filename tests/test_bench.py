"""`edgekit bench`: a bundle's own library, measured on a phone, a board and emulated cores by its own program."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from board import Board
from conftest import Call, tree
from devices import connected
from phone import CPUINFO, Phone

from edgekit import bundle, target
from edgekit.errors import IncompleteError, InputError, IntegrityError, ToolMissingError, UnsupportedError
from edgekit.pipeline import bench, measurement, verify
from edgekit.pipeline import compile as compiling
from edgekit.report import Limit
from edgekit.runners import instructions, qemu
from edgekit.target import InputShape

pytest.importorskip("tvm")
from edgekit.backends.tvm import bench as library_bench
from edgekit.backends.tvm import link

pytestmark = [pytest.mark.backend, pytest.mark.emulated]

# The least tile that delivers something: nano's halo is 40 pixels on each side.
SIDE = 96
DELIVERED = 16 * 16
BRIEF = bench.Settings(warm_up=0, runs=2, seconds=0, side=104, threads=2, count_instructions=False)


@pytest.fixture(scope="module")
def android(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wanted = dataclasses.replace(
        target.load("android-arm64"), precision="float32", input=InputShape(height=SIDE, width=SIDE)
    )
    return compiling.compile_model("nano", [wanted], folder=tmp_path_factory.mktemp("run")).bundles["android-arm64"]


def changed(bundle_folder: Path, to: Path, file: str, content: bytes) -> Path:
    """Return a copy of a bundle with another content in one file, which its manifest knows of."""
    shutil.copytree(bundle_folder, to)
    (to / file).unlink()
    (to / file).write_bytes(content)
    manifest = json.loads((to / bundle.MANIFEST).read_text())
    manifest["files"] = bundle.hashes(to)
    (to / bundle.MANIFEST).write_text(json.dumps(manifest))
    return to


def test_a_phone_is_measured_and_keeps_nothing(android: Path, phone: Phone) -> None:
    found = bench.bench(android, "adb", settings=BRIEF)
    latency = found.latency
    assert latency is not None
    assert latency.megapixel is not None
    assert (found.device, found.level, found.emulated_us, latency.runs) == ("adb", "native", None, 2)
    assert 0 < latency.call.p10_us <= latency.call.p50_us <= latency.call.p90_us
    assert found.shape == bench.Shape(height=SIDE, width=SIDE, halo=40, delivered_pixels=DELIVERED)
    assert (latency.side, latency.threads, latency.picture_runs) == (104, 2, 2)
    assert 0 < latency.megapixel.p10_us <= latency.megapixel.p50_us <= latency.megapixel.p90_us
    assert latency.load_us is not None
    assert latency.load_us > 0
    assert latency.first_us > 0
    assert sum(latency.cores.values()) == 2
    assert found.before.temperature_mc == found.after.temperature_mc == 44_100
    assert found.features == ("asimd", "asimdhp", "asimddp")
    assert (found.variant, found.before.model) == ("float32", "edgekit Phone 1")
    assert found.cost.peak_memory_kib is not None
    assert found.cost.arena_bytes is not None
    assert 1024 * found.cost.peak_memory_kib > found.cost.arena_bytes
    assert (found.quality.agreement_mdb, found.quality.pictures) == (100_000, 4)
    assert 26_000 < found.quality.psnr_mdb < 34_000, "noise of 25 alone is 20.2 dB"
    assert not phone.files


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the board's shell is this machine's, and says so")
def test_a_board_is_measured_through_ssh_and_one_that_is_emulated_has_no_latency(android: Path, sshed: Board) -> None:
    found = bench.bench(android, "ssh:board", settings=BRIEF)
    assert (found.device, found.level, found.quality.agreement_mdb) == ("ssh", "emulated", 100_000)
    assert (found.latency, found.cost.peak_memory_kib) == (None, None)
    assert found.features == ("asimd",), "a cortex-a72 has no more, whatever the board says"
    assert not list((sshed.folder / "tmp").iterdir())


def test_a_board_with_cores_of_its_own_is_timed_through_ssh(android: Path, sshed: Board) -> None:
    sshed.tell("/proc/cpuinfo", CPUINFO)
    found = bench.bench(android, "ssh:board", settings=BRIEF)
    assert (found.level, found.before.cpu) == ("native", "1x Cortex-A55, 1x Cortex-A76")
    assert found.latency is not None
    assert found.latency.runs == 2


def runs_on_target(bundle_folder: Path, *records: Path) -> Limit:
    settings = verify.Settings(seconds=0.1)
    limits = verify.verify(bundle_folder, settings=settings, records=records or None).limits
    (found,) = (limit for limit in limits if limit.name == "runs_on_target")
    return found


def test_a_phones_record_decides_that_the_bundle_runs_on_its_target(
    android: Path, phone: Phone, call: Call, tmp_path: Path
) -> None:
    here = shutil.copytree(android, tmp_path / "nano")
    shown = call("bench", here, "--device", "adb", "--runs", "2", "--seconds", "0", "--side", "104")
    file = tmp_path / "nano.bench.adb-edgekit-phone-1.json"
    assert file.name in shown.out
    measured = measurement.read(file)
    assert measured.latency is not None
    found = runs_on_target(here)
    assert (found.verdict, found.measured) == ("pass", f"{measured.latency.call.p50_us / 1000:.2f} ms a tile")
    assert found.reason.startswith("edgekit Phone 1, adb (native), variant float32, 2 runs, measured 20")


def test_what_a_phone_does_without_a_feature_lies_apart_and_decides_nothing(
    android: Path, phone: Phone, call: Call, tmp_path: Path
) -> None:
    here = shutil.copytree(android, tmp_path / "nano")
    brief = ("--device", "adb", "--runs", "2", "--seconds", "0", "--side", "104")
    call("bench", here, *brief)
    first = measurement.beside(here)
    content = first[0].read_bytes()
    assert call("bench", here, *brief, "--without", "asimddp").code == 0
    assert (measurement.beside(here), first[0].read_bytes()) == (first, content)
    apart = tmp_path / "nano.bench-without-asimddp.adb-edgekit-phone-1.json"
    found = measurement.read(apart)
    assert (found.hidden, found.features) == (("asimddp",), ("asimd", "asimdhp"))
    assert found.protocol.endswith("; the library does not see asimddp")
    assert runs_on_target(here).verdict == "pass"
    named = runs_on_target(here, apart)
    assert named.verdict == "incomplete"
    assert f"{apart.name}: asimddp was hidden from the library: it is not what edgekit Phone 1 does" in named.reason


def test_records_of_emulators_leave_it_undecided_and_say_why(android: Path, server: None, tmp_path: Path) -> None:
    with connected(tmp_path, properties={"ro.kernel.qemu": "1"}):
        emulator = bench.bench(android, "adb", settings=BRIEF)
    core = bench.bench(android, "qemu:cortex-a53", settings=BRIEF)
    files = [measurement.default_path(tmp_path / "nano", found) for found in (core, emulator)]
    assert [file.name for file in files] == [
        "nano.bench.qemu-cortex-a53.json",
        "nano.bench.adb-edgekit-phone-1.json",
    ]
    for found, file in zip((core, emulator), files, strict=True):
        measurement.write(found, file)
    limit = runs_on_target(android, *files)
    assert limit.verdict == "incomplete"
    for file, name in zip(files, ("cortex-a53", "edgekit Phone 1"), strict=True):
        assert f"{file.name}: {name} was emulated, and emulated time is not latency" in limit.reason


def test_emulated_time_is_nowhere_called_latency(android: Path, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "results" / "devices" / "nano.json"
    shown = call("bench", android, "--device", "qemu:cortex-a53", "--no-instructions", "-o", out)
    assert shown.code == 0
    assert "s, emulated, not a latency" in shown.out
    assert "latency of" not in shown.out
    record = json.loads(out.read_text())
    assert (record["level"], record["latency"], record["kind"]) == ("emulated", None, "edgekit-device-measurement")
    assert record["emulated_us"] > 0
    assert record["cost"]["peak_memory_kib"] is None, "it would be the emulator's"
    assert record["features"] == ["asimd"]


def test_androids_emulator_has_no_latency_though_adb_reaches_it(android: Path, server: None, tmp_path: Path) -> None:
    with connected(tmp_path, properties={"ro.kernel.qemu": "1"}):
        found = bench.bench(android, "adb", settings=BRIEF)
    assert (found.device, found.level, found.latency) == ("adb", "emulated", None)


def test_the_record_is_what_json_says_and_names_neither_device_nor_machine(
    android: Path, phone: Phone, call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "record.json"
    shown = call(
        "bench", android, "--device", "adb", "--runs", "2", "--seconds", "0", "--side", "96", "--json", "-o", out
    )
    assert shown.code == 0
    printed = json.loads(shown.out)
    assert printed == json.loads(out.read_text())
    for name in (phone.serial, "127.0.0.1", str(android)):
        assert name not in out.read_text()


@pytest.mark.slow
def test_instructions_are_counted_alike_twice_and_loading_drops_out(android: Path) -> None:
    two = bench.instructions_per_picture(android, "cortex-a76", pictures=2)
    four = bench.instructions_per_picture(android, "cortex-a76", pictures=4)
    assert two.per_call == pytest.approx(four.per_call, rel=1e-3)
    assert two.of_one - two.per_call > 0.01 * two.per_call, "loading and reading take some"
    macs = bench._cost(bench._open(android), [], ran(), None, "").macs
    # A vector instruction makes four multiply-accumulates in float32; loads and stores come on top.
    assert macs / 4 < two.per_call < 4 * macs


def ran() -> bench._Ran:
    return bench._Ran(
        outputs=[],
        times_us=(),
        pictures_us=(),
        side=0,
        load_us=None,
        first_us=0,
        cores={},
        threads=1,
        variant="",
        features=(),
        peak_memory_kib=None,
        protocol="",
    )


def test_bench_shows_the_instructions_of_an_emulated_core(android: Path, call: Call) -> None:
    shown = call("bench", android, "--device", "qemu:cortex-a76", "--json")
    found = json.loads(shown.out)["cost"]["instructions"]
    assert (found["cpu"], found["qemu"]) == ("cortex-a76", qemu.version(instructions.emulator()))
    assert found["per_call"] == found["of_all"] - found["of_one"]


def test_the_qemu_that_counts_is_asked_for_its_version(
    android: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, static = shutil.which("qemu-aarch64"), shutil.which("qemu-aarch64-static")
    script = f'case "$1" in --version) echo version 99.0;; -help) ;; *) exec {static} "$@";; esac'
    (tmp_path / "qemu-aarch64-static").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "qemu-aarch64-static").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert qemu.version() == "99.0"
    assert bench.instructions_per_picture(android, "cortex-a76").qemu == qemu.version(counts)


@pytest.mark.parametrize(
    ("tools", "words"),
    [(("qemu-aarch64-static",), "no QEMU on the PATH takes plugins"), (("qemu-aarch64",), "none of gcc, cc, clang")],
    ids=["static QEMU", "no compiler"],
)
def test_without_the_tools_instructions_are_left_out_with_the_reason(
    tools: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in tools:
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissingError, match=words):
        instructions.count("cortex-a76", ["program"])


def test_a_program_that_could_not_be_compiled_is_compiled_the_next_time(monkeypatch) -> None:
    def fails(source: Path, program: Path, zig_target: str) -> None:
        raise ToolMissingError("no compiler")

    monkeypatch.setattr(link, "compile_program", fails)
    with pytest.raises(ToolMissingError):
        library_bench._program("another")
    monkeypatch.setattr(link, "compile_program", lambda source, program, zig_target: program.write_bytes(b""))
    assert library_bench._program("another").is_file()


def test_a_program_that_fails_has_no_count() -> None:
    with pytest.raises(
        IncompleteError, match=r"true on qemu cortex-a76 ended with exit code \d+ while its instructions were counted"
    ):
        instructions.count("cortex-a76", [shutil.which("true") or ""])


def test_a_library_that_crashes_is_named_with_its_signal(android: Path, phone: Phone, tmp_path: Path) -> None:
    library = next(android.rglob("*.so"))
    code = bytearray(library.read_bytes())
    start = code.index(b"\xc0\x03\x5f\xd6")  # the first ret: zeros after it are undefined instructions
    code[start : start + 0x4000] = bytes(len(code[start : start + 0x4000]))
    broken = changed(android, tmp_path / "broken", str(library.relative_to(android)), bytes(code))
    with pytest.raises(IntegrityError, match=r"libedgekit_nano\.so on adb .* was killed by SIGILL"):
        bench.bench(broken, "adb", settings=BRIEF)
    assert not phone.files


def test_a_library_that_is_no_library_is_refused(android: Path, tmp_path: Path) -> None:
    library = next(android.rglob("*.so"))
    broken = changed(android, tmp_path / "broken", str(library.relative_to(android)), b"no library at all")
    with pytest.raises(IntegrityError, match=r"ended with exit code 3: .*libedgekit_nano\.so: it is no library"):
        bench.bench(broken, "qemu:cortex-a76", settings=BRIEF)


def test_the_time_of_wrong_pictures_is_refused(android: Path, tmp_path: Path) -> None:
    file = sorted(android.glob("golden/*.denoised.f32"))[1]
    wrong = (np.fromfile(file, "<f4") + np.float32(0.02)).astype("<f4").tobytes()
    broken = changed(android, tmp_path / "wrong", str(file.relative_to(android)), wrong)
    with pytest.raises(IntegrityError, match=r"agree with the golden ones to 34\.0 dB only"):
        bench.bench(broken, "qemu:cortex-a76", settings=BRIEF)


def test_a_phone_that_goes_away_in_mid_run_leaves_no_record(
    android: Path, phone: Phone, call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "record.json"
    ended_early = threading.Event()

    def unplug_when_it_runs() -> None:
        while not any(file.name == "pid" for file in phone.files):
            if ended_early.wait(0.05):
                return
        phone.unplug()

    watcher = threading.Thread(target=unplug_when_it_runs)
    watcher.start()
    try:
        ended = call("-q", "bench", android, "--device", "adb", "--seconds", "120", "-o", out)
    finally:
        ended_early.set()
        watcher.join()
    ended.refused(7, f"adb {phone.serial}", "the device went away", "nothing of this run is kept")
    assert not out.exists()


def test_a_run_that_takes_too_long_is_ended(android: Path, phone: Phone, call: Call) -> None:
    ended = call("-q", "bench", android, "--device", "adb", "--seconds", "60", "--timeout", "2")
    ended.refused(7, "did not end within 2 s")
    assert not phone.files


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is one that the library is for")
def test_a_library_for_another_processor_is_refused(android: Path, call: Call) -> None:
    ended = call("-q", "bench", android, "--device", "local")
    ended.refused(4, "is for aarch64, and local is", "--device qemu:cortex-a76")


def test_a_feature_can_be_hidden_from_the_library(android: Path) -> None:
    settings = dataclasses.replace(BRIEF, without=("asimddp",))
    assert bench.bench(android, "qemu:cortex-a76", settings=settings).features == ("asimd", "asimdhp")
    with pytest.raises(UnsupportedError, match="'avx2' cannot be hidden"):
        bench.bench(android, "qemu:cortex-a76", settings=dataclasses.replace(BRIEF, without=("avx2",)))


@pytest.mark.parametrize(
    ("features", "variant"), [(("asimd", "asimddp"), "dotprod"), (("asimd",), "neon"), ((), "neon")]
)
def test_the_variant_is_the_first_that_the_processor_can_run(
    android: Path, features: tuple[str, ...], variant: str
) -> None:
    _, library = bench._library(bench._open(android))
    assert dataclasses.replace(library, variants=("dotprod", "neon")).variant(features) == variant


def test_an_artifact_of_an_engine_in_this_process_is_timed_here_only(
    finished: Path, call: Call, tmp_path: Path
) -> None:
    folder = finished / "bundles" / "kept"
    before = tree(folder)
    out = tmp_path / "record.json"
    shown = call("bench", folder, "--device", "local", "--runs", "5", "--seconds", "0", "--json", "-o", out)
    found = json.loads(shown.out)
    assert (found["level"], found["latency"]["runs"], found["latency"]["load_us"]) == ("native", 5, None)
    assert found["quality"]["agreement_mdb"] > 40_000
    assert found["protocol"] == (
        "each golden picture once; then 3 warm-up runs and 5 timed ones at least and for 0 s, "
        "of a whole picture of 256x256 float32 pixels by one thread"
    )
    assert tree(folder) == before
    call("-q", "bench", folder, "--device", "qemu:cortex-a76").refused(4, "is no library", "--device local")
    hiding = call("-q", "bench", folder, "--device", "local", "--without", "asimddp")
    hiding.refused(4, "the feature 'asimddp' cannot be hidden from 'onnxruntime'")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the library has to be for this machine")
def test_nothing_can_be_hidden_from_a_library_for_x86(android: Path, tmp_path: Path) -> None:
    other = shutil.copytree(android, tmp_path / "x86")
    manifest = json.loads((other / bundle.MANIFEST).read_text())
    manifest["target"]["isa"]["triple"] = "x86_64-linux-gnu"
    (other / bundle.MANIFEST).write_text(json.dumps(manifest))
    settings = dataclasses.replace(BRIEF, without=("asimddp",))
    with pytest.raises(UnsupportedError, match=r"'asimddp' cannot be hidden from .*\.so, which is for x86_64"):
        bench.bench(other, "local", settings=settings)


def test_the_protocol_names_what_was_timed_and_nothing_else() -> None:
    assert bench._library_protocol(BRIEF, 104, timed=True) == (
        "each golden picture once; then 0 warm-up runs and 2 timed ones at least and for 0 s, first of one tile by one "
        "thread, then of a picture of 104x104 pixels of bytes by 2"
    )
    assert bench._library_protocol(BRIEF, 0, timed=True).endswith("0 s, of one tile by one thread")
    shape = bench.Shape(height=64, width=96, halo=0, delivered_pixels=64 * 96)
    assert bench._session_protocol(BRIEF, shape).endswith(
        "of a whole picture of 96x64 float32 pixels by one thread, then by 2 after one warm-up run"
    )


def test_one_of_several_bundles_has_to_be_named(finished: Path, call: Call) -> None:
    call("-q", "bench", finished, "--device", "local").refused(2, "has 3 bundles", "name one")


@pytest.mark.parametrize(
    ("times_us", "wanted"),
    [
        ((5,), (5, 5, 5, None)),
        ((30, 10, 20), (10, 20, 30, None)),
        (tuple(range(1, 101)), (10, 50, 90, 99)),
        ((*range(1, 100), 5000), (10, 50, 90, 99)),
    ],
    ids=["one", "three", "hundred", "one slow"],
)
def test_percentiles_are_times_that_were_measured(times_us: tuple[int, ...], wanted: tuple[int | None, ...]) -> None:
    assert dataclasses.astuple(bench._percentiles(times_us, 1.0)) == wanted


def test_a_megapixel_is_what_a_picture_delivers() -> None:
    times = dataclasses.replace(ran(), times_us=(10, 20, 30), pictures_us=(1000, 2000, 4000), side=500, threads=4)
    found = bench._latency(times)
    assert found.megapixel is not None
    assert (found.call.p50_us, found.megapixel.p50_us, found.threads) == (20, 8000, 4)
    assert bench._latency(dataclasses.replace(times, pictures_us=(), side=0)).megapixel is None


def test_a_bundle_is_asked_for(tmp_path: Path, call: Call) -> None:
    call("-q", "bench", tmp_path, "--device", "local").refused(2, "is neither a bundle nor a run with bundles")
    with pytest.raises(InputError, match="is not a bundle"):
        bench.bench(tmp_path, "local")
    assert not list(tmp_path.iterdir())
