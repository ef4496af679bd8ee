r"""Measures the arm64 libraries under QEMU, beside other engines: instructions, quality, memory, time to compile.

    python benchmarks/arm64.py base --root ROOT --executorch VENV/bin/python --research-data DATA --runs RUNS
    python benchmarks/arm64.py nano --parts compile          # one of them

Each part writes results/arm64/<model>-<part>.json. Emulated time is never a latency: instructions are counted.

ROOT is an arm64 root with Python and the engines, for `instructions` alone (80 MB from Debian, 40 MB from PyPI):

    apt-get install debootstrap qemu-user qemu-user-static gcc libc6-dev g++-aarch64-linux-gnu
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libgomp1,libstdc++6 bookworm ROOT
    for deb in ROOT/var/cache/apt/archives/*.deb; do dpkg-deb -x $deb ROOT; done
    pip install --target ROOT/opt/site --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --python-version 3.11 --only-binary=:all: --no-deps onnxruntime numpy executorch
    python -m venv VENV && VENV/bin/pip install executorch torchao torch==<edgekit's own>

The engines choose kernels by what /proc/cpuinfo and /sys say, which under QEMU is this machine's; so the emulated
core's are written into ROOT, where QEMU looks first. Without them ONNX Runtime 1.32 crashes when it is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from edgekit import __version__, backends, bundle, target, zoo
from edgekit.backends import Session
from edgekit.backends.tvm import driver, link
from edgekit.backends.tvm import session as emulated
from edgekit.compress import fuse
from edgekit.data import sets
from edgekit.errors import EdgekitError, InputError, IntegrityError, ToolMissingError, UnsupportedError
from edgekit.files import sha256, write_json
from edgekit.measure import host, quality
from edgekit.measure.quality import Array
from edgekit.pipeline import bench, int8, networks
from edgekit.pipeline import compile as compiling
from edgekit.pipeline.golden import read_golden
from edgekit.runners import instructions, qemu
from edgekit.target import InputShape, Target

RESULTS = Path(__file__).parent.parent / "results" / "arm64"
C_FOLDER = Path(__file__).parent / "arm64"
SHIPPED = target.load("android-arm64")
ONNX = target.load("onnx")
CPUS = ("cortex-a53", "cortex-a72", "cortex-a76")
SIDE, SIGMA = 256, 25.0
ANDROID = dataclasses.replace(SHIPPED, name="android-arm64-256", input=InputShape(height=SIDE, width=SIDE))
FLOAT = dataclasses.replace(ANDROID, name="android-arm64-256-float32", precision="float32")
# More than two, because these programs load far longer than they denoise.
PICTURES = 4
THREADS = (1, 4)
Figures = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the command line says.

    root: The arm64 root. executorch: The Python of its environment. side: Of the picture whose memory is measured.
    """

    runs: Path
    root: Path | None
    executorch: Path | None
    research_data: Path | None
    cpus: tuple[str, ...]
    side: int


@dataclass(frozen=True, kw_only=True)
class Core:
    """What Linux says of one core of a kind: numbers of /proc/cpuinfo, sizes of its caches as phones have them."""

    part: int
    variant: int
    l1: str
    l2: str
    dot_product: bool


_CORES: Mapping[str, Core] = {
    "cortex-a53": Core(part=0xD03, variant=0, l1="32K", l2="512K", dot_product=False),
    "cortex-a72": Core(part=0xD08, variant=0, l1="32K", l2="1024K", dot_product=False),
    "cortex-a76": Core(part=0xD0B, variant=1, l1="64K", l2="512K", dot_product=True),
}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Another engine's program inside the arm64 root: argv takes NOISY DENOISED PICTURES SIGMA behind it."""

    name: str
    artifact: Path
    argv: tuple[str, ...]
    facts: Figures


def main() -> None:
    """Measure the named students."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="shipped names")
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--root", type=Path, help="arm64 root with the engines")
    parser.add_argument("--executorch", type=Path, help="Python with executorch and torchao")
    parser.add_argument("--research-data", type=Path, default=os.environ.get("EDGEKIT_RESEARCH_DATA"))
    parser.add_argument("--cpus", nargs="+", default=list(CPUS), choices=sorted(_CORES))
    parser.add_argument("--side", type=int, default=1448, help="of the picture whose memory is measured, in pixels")
    parser.add_argument("--runs", type=Path, help="keep and re-use run folders here")
    said = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        given = Given(
            runs=(said.runs or Path(scratch)).absolute(),
            root=said.root.resolve() if said.root else None,
            executorch=said.executorch.absolute() if said.executorch else None,
            research_data=Path(said.research_data) if said.research_data else None,
            cpus=tuple(said.cpus),
            side=said.side,
        )
        for model in said.models:
            for part in said.parts:
                write(model, part, given)
    print(table_of_instructions(RESULTS), table_of_quality(RESULTS), sep="\n")


def write(model: str, part: str, given: Given) -> None:
    """Measure one part and write its file."""
    start = time.perf_counter()
    measure, protocol = PARTS[part]
    figures = measure(model, given)
    seconds = round(time.perf_counter() - start)
    record = {
        "schema_version": 1,
        "kind": f"edgekit-arm64-{part}",
        "model": model,
        "weights_sha256": zoo.card(model).sha256,
        "protocol": protocol,
        "figures": figures,
        "tools": {
            "edgekit": __version__,
            "qemu": qemu.version(instructions.emulator() if part == "instructions" else None),
        }
        | {name: metadata.version(name) for name in ("apache-tvm", "ziglang")},
        "host": asdict(host.describe()),
        "seconds": seconds,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(RESULTS / f"{model}-{part}.json", record)
    print(f"{model} {part}: {seconds} s", flush=True)


# ---- the tables of docs/tvm.md ----


class Count(TypedDict):
    """A record's count on one core."""

    per_call: int


class Counted(TypedDict):
    """A record's figures of one engine."""

    counts: dict[str, Count]
    golden_psnr_mdb: int
    artifact_bytes: int


def table_of_instructions(results: Path) -> str:
    """Return the records of instructions as a table in Markdown."""
    rows = []
    for model, file in _records(results, "instructions"):
        engines: dict[str, Counted] = json.loads(file.read_text(encoding="utf-8"))["figures"]
        for name, label in _ENGINES.items():
            found = engines[name]
            counts = (found["counts"].get(cpu) for cpu in _NEWEST_FIRST)
            millions = (f"{count['per_call'] / 1e6:.1f} M" if count else "not counted" for count in counts)
            quality_db, mb = found["golden_psnr_mdb"] / 1000, found["artifact_bytes"] / 1e6
            rows.append([model, label, *millions, f"{quality_db:.2f} dB", f"{mb:.2f} MB"])
    return _table(["model", "engine", *(cpu.title() for cpu in _NEWEST_FIRST), "golden pictures", "file"], rows)


def table_of_quality(results: Path) -> str:
    """Return the records of quality as a table in Markdown."""
    rows = []
    for model, file in _records(results, "quality"):
        found: dict[str, dict[str, int]] = json.loads(file.read_text(encoding="utf-8"))["figures"]
        rows.append([model, *(f"{found[name]['psnr_mdb'] / 1000:.3f} dB" for name in _SESSIONS)])
    return _table(["model", *_SESSIONS.values()], rows)


_NEWEST_FIRST = tuple(reversed(CPUS))
_ENGINES = {
    "edgekit int8": "edgekit INT8",
    "edgekit float32": "edgekit float32",
    "executorch int8": "ExecuTorch INT8",
    "onnxruntime int8": "ONNX Runtime INT8",
}
_SESSIONS = {
    "onnxruntime float32": "float32",
    "edgekit int8": "the library",
    "onnxruntime on the library's graph": "its graph in ONNX Runtime",
    "onnxruntime int8": "ONNX Runtime's own INT8",
}


def _records(results: Path, part: str) -> list[tuple[str, Path]]:
    found = ((model, results / f"{model}-{part}.json") for model in zoo.names())
    return [(model, file) for model, file in found if file.is_file()]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


# ---- instructions ----


def count_instructions(model: str, given: Given) -> Figures:
    """Return instructions per picture of each engine on each core, and its quality on the golden pictures."""
    made = _compile(model, given, (ANDROID, FLOAT, ONNX))
    ours = {"edgekit int8": made[ANDROID.name], "edgekit float32": made[FLOAT.name]}
    with tempfile.TemporaryDirectory() as folder:
        with _one_core():
            found: dict[str, Figures] = {name: _ours(path, given.cpus) for name, path in ours.items()}
        golden = made[ANDROID.name] / "golden"
        for engine in _engines(model, made[ONNX.name], given, Path(folder)):
            found[engine.name] = _theirs(engine, golden, given, Path(folder))
    return found


def _ours(path: Path, cpus: Sequence[str]) -> Figures:
    built = bundle.read(path).built
    counts, told = {}, None
    for cpu in cpus:
        told = bench.bench(path, f"qemu:{cpu}", settings=bench.Settings(threads=1))
        if told.cost.instructions is None:
            raise ToolMissingError(f"{path}: no instructions were counted; {told.cost.instructions_reason}")
        counts[cpu] = asdict(told.cost.instructions)
    assert told is not None
    return {
        "counts": counts,
        "golden_psnr_mdb": told.quality.psnr_mdb,
        "artifact_sha256": told.artifact_sha256,
        "artifact_bytes": told.cost.artifact_bytes,
        "facts": dict(built.facts),
    }


def _theirs(engine: Engine, golden: Path, given: Given, folder: Path) -> Figures:
    assert given.root is not None
    files = sorted(golden.glob("*.noisy.f32"))
    noisy, denoised = folder / "noisy.f32", folder / "denoised.f32"
    noisy.write_bytes(b"".join(file.read_bytes() for file in files))
    counts: dict[str, Figures] = {}
    for cpu in given.cpus:
        describe_core(given.root, cpu)

        def argv(pictures: int, out: str = "-") -> list[str]:
            return [*engine.argv, str(noisy), out, str(pictures), repr(SIGMA / 255)]

        with _inside(given.root), _one_core():
            one, all_of_them = (instructions.count(cpu, argv(pictures)) for pictures in (1, PICTURES))
            if cpu == given.cpus[-1]:
                done = qemu.find(cpu).run(argv(len(files), str(denoised)))
                if done.code != 0:
                    raise IntegrityError(f"{engine.name} on {cpu} {done.ending()}: {done.stderr.decode()[-200:]}")
        counts[cpu] = {
            "cpu": cpu,
            "per_call": round((all_of_them - one) / (PICTURES - 1)),
            "pictures": PICTURES,
            "of_all": all_of_them,
            "of_one": one,
        }
        print(engine.name, counts[cpu], flush=True)
    got = np.fromfile(denoised, "<f4").reshape(len(files), 1, SIDE, SIDE)
    clean = read_golden(golden.parent, "golden", [f.name.removesuffix(".noisy.f32") for f in files])
    psnr = [quality.psnr(o, p.pixels.astype(np.float32) / 255) for o, p in zip(got, clean, strict=True)]
    return {
        "counts": counts,
        "golden_psnr_mdb": round(1000 * float(np.mean(psnr))),
        "artifact_sha256": sha256(engine.artifact),
        "artifact_bytes": engine.artifact.stat().st_size,
        "facts": dict(engine.facts),
    }


def _engines(model: str, onnx: Path, given: Given, folder: Path) -> Iterator[Engine]:
    if given.root is None:
        raise ToolMissingError(
            "instructions: no --root with the other engines", remedy="see --help for how to make one"
        )
    yield _onnxruntime(onnx, given.root)
    yield _executorch(model, given.root, given.executorch, folder)


def _onnxruntime(onnx: Path, root: Path) -> Engine:
    artifact = onnx / bundle.read(onnx).built.files["artifact"]
    python = next(iter(sorted((root / "usr" / "bin").glob("python3.*[0-9]"))), None)
    if python is None:
        raise ToolMissingError(f"{root}: no usr/bin/python3.*", remedy="see --help for how to make it")
    return Engine(
        name="onnxruntime int8",
        artifact=artifact,
        # Without -S it would look for packages of its own.
        argv=(str(python), "-S", str(C_FOLDER / "onnxruntime_pictures.py"), str(artifact)),
        facts={"onnxruntime": _wheel(root, "onnxruntime"), "numpy": _wheel(root, "numpy")},
    )


def _executorch(model: str, root: Path, python: Path | None, folder: Path) -> Engine:
    if python is None:
        raise ToolMissingError("instructions: no --executorch", remedy="see --help for how to make its environment")
    network = networks.shipped(model)
    noisy, sigma = networks.example(network.net)
    if sigma is None:
        raise UnsupportedError(f"{model}: a blind network; the program for ExecuTorch gives it a noise level")
    net = fuse.fuse(network.net, noisy, sigma)
    with torch.no_grad():
        exported = torch.export.export(net, (torch.zeros(1, 1, SIDE, SIDE), sigma), strict=False)
    torch.export.save(exported, folder / "network.pt2")
    shown = int8.calibration(compiling.default_recipe(model, network.net.channels), network.net.stride)
    np.savez(
        folder / "calibration.npz",
        noisy=np.concatenate([noisy for noisy, _ in shown]),
        sigma=np.array([sigma for _, sigma in shown], np.float32),
    )
    artifact = folder / "model.pte"
    script = C_FOLDER / "executorch_int8.py"
    files = [str(folder / "network.pt2"), str(folder / "calibration.npz"), str(artifact)]
    told = _run([str(python), str(script), *files])
    return Engine(
        name="executorch int8",
        artifact=artifact,
        argv=(str(_executorch_program(root, folder)), str(artifact)),
        facts={"executorch in the root": _wheel(root, "executorch")} | json.loads(told.splitlines()[-1]),
    )


def _executorch_program(root: Path, folder: Path) -> Path:
    compiler, wheel = "aarch64-linux-gnu-g++", root / "opt" / "site" / "executorch"
    if shutil.which(compiler) is None:
        raise ToolMissingError(f"{compiler} is not on the PATH", remedy="apt-get install g++-aarch64-linux-gnu")
    parts = ("", "_kernels_optimized", "_kernels_quantized", "_backend_xnnpack", "_threadpool")
    command = [compiler, "-std=c++17", "-O2", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    command += [f"-I{wheel}/include", f"-I{wheel}/include/executorch/runtime/core/portable_type/c10"]
    command += [str(C_FOLDER / "executorch_pictures.cpp"), "-o", str(folder / "executorch_pictures")]
    # They register themselves when they are loaded, so nothing names them.
    command += [f"-L{wheel}/lib", f"-Wl,-rpath,{wheel}/lib", "-Wl,--allow-shlib-undefined", "-Wl,--no-as-needed"]
    _run([*command, *(f"-lexecutorch{part}" for part in parts)])
    return folder / "executorch_pictures"


def describe_core(root: Path, cpu: str) -> None:
    """Write into an arm64 root what Linux says of a machine with one such core; cpuinfo.h's library reads it."""
    core, devices = _CORES[cpu], root / "sys" / "devices" / "system" / "cpu"
    features = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
    features += " atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp" if core.dot_product else ""
    midr = 0x41 << 24 | core.variant << 20 | 0xF << 16 | core.part << 4
    files = dict.fromkeys(("possible", "present", "online", "cpu0/topology/core_id", *_SIBLINGS), "0") | {
        "cpu0/topology/physical_package_id": "0",
        "cpu0/cpufreq/cpuinfo_max_freq": "2000000",
        "cpu0/cpufreq/cpuinfo_min_freq": "2000000",
        "cpu0/regs/identification/midr_el1": f"0x{midr:016x}",
    }
    for index, (level, kind, size) in enumerate(
        ((1, "Data", core.l1), (1, "Instruction", core.l1), (2, "Unified", core.l2))
    ):
        cache = {"level": str(level), "type": kind, "size": size, "shared_cpu_list": "0", "coherency_line_size": "64"}
        files |= {f"cpu0/cache/index{index}/{name}": value for name, value in cache.items()}
    for name, text in files.items():
        (devices / name).parent.mkdir(parents=True, exist_ok=True)
        (devices / name).write_text(text + "\n")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(
        f"processor\t: 0\nBogoMIPS\t: 38.40\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
        f"CPU variant\t: 0x{core.variant:x}\nCPU part\t: 0x{core.part:03x}\nCPU revision\t: 0\n\n"
    )


_SIBLINGS = tuple(
    f"cpu0/topology/{name}"
    for name in ("core_siblings_list", "cluster_cpus_list", "package_cpus_list", "thread_siblings_list")
)


def _wheel(root: Path, name: str) -> str:
    found = list((root / "opt" / "site").glob(f"{name}-*.dist-info"))
    if not found:
        raise ToolMissingError(f"{root / 'opt' / 'site'}: no {name}", remedy="see --help for how to install it there")
    return found[0].name.removesuffix(".dist-info").removeprefix(f"{name}-")


@contextmanager
def _inside(root: Path) -> Iterator[None]:
    """Let emulated programs find their libraries and packages in an arm64 root; the same ones at each run."""
    changed = {"QEMU_LD_PREFIX": str(root), "PYTHONPATH": str(root / "opt" / "site"), "PYTHONHASHSEED": "0"}
    kept = os.environ.copy()
    os.environ.update(changed | {"PYTHONDONTWRITEBYTECODE": "1"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


@contextmanager
def _one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EdgekitError(f"{' '.join(command[:2])} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


# ---- quality ----


def compare_quality(model: str, given: Given) -> Figures:
    """Return the PSNR on Set12 of the library under QEMU, and of ONNX Runtime on both INT8 graphs and the float one."""
    if given.research_data is None:
        raise InputError("quality: no --research-data with test/set12, and EDGEKIT_RESEARCH_DATA is not set")
    pictures = sets.folder(given.research_data / "test" / "set12", channels=1)
    made = _compile(model, given, (ANDROID, ONNX))
    engine = backends.load_onnx("onnxruntime")
    onnx = made[ONNX.name]
    own = onnx / bundle.read(onnx).built.files["artifact"]
    sessions: dict[str, quality.Denoise] = {
        "onnxruntime float32": engine.open_onnx(onnx / "reference" / "student.fp32.onnx", threads=1),
        "onnxruntime on the library's graph": engine.open_onnx(_arm_graph(model, given), threads=1),
        "onnxruntime int8": engine.open_onnx(own, threads=1),
        "edgekit int8": _library(made[ANDROID.name]),
    }
    found = {}
    for name, session in sessions.items():
        report = quality.evaluate(session, pictures, sigma255=SIGMA)
        found[name] = {"psnr_mdb": report.psnr_mdb, "pictures": {p.name: p.psnr_mdb for p in report.pictures}}
        print(name, report.psnr_mdb, flush=True)
    return found


def _library(path: Path) -> quality.Denoise:
    """Return the bundle's library on an emulated Cortex-A76, as a function of whole pictures."""
    manifest = bundle.read(path)
    built = manifest.built
    runner = dataclasses.replace(ANDROID.runner, cpus=("cortex-a76",))
    ((_, session),) = backends.load("tvm").open_session(path, built, dataclasses.replace(ANDROID, runner=runner))
    tile: Session = session

    def whole(noisy: Array, sigma: float) -> Array:
        halo = int(built.facts["halo_px"])
        return quality.denoise_tiled(tile, noisy, sigma, tile_height=SIDE, tile_width=SIDE, halo=halo)

    return whole


def _arm_graph(model: str, given: Given) -> Path:
    return given.runs / model / "06-quantize" / int8.PLACEMENTS["tvm"] / int8.FILE


# ---- memory ----


def measure_memory(model: str, given: Given) -> Figures:
    """Return what the library asks malloc for beyond a square picture, emulated as a Cortex-A76."""
    path = _compile(model, given, (SHIPPED,))[SHIPPED.name]
    built = bundle.read(path).built
    library = path / built.files["artifact"]
    prefix = library.name.removeprefix("lib").removesuffix(".so")
    figures: dict[str, object] = {"side": given.side, "tile": built.facts["tile"]}
    figures |= {"stack_bytes_of_a_thread": built.facts["stack_bytes"]}
    pixels = set()
    with tempfile.TemporaryDirectory() as folder:
        for source in (driver.C_FOLDER / "bench.c", C_FOLDER / "memory.c"):
            shutil.copy(source, folder)
        program = Path(folder) / "memory"
        link.compile_program(Path(folder) / "memory.c", program, "aarch64-linux-musl")
        for threads in THREADS:
            argv = [str(program), str(library), prefix, str(given.side), str(threads), "1"]
            done = qemu.find("cortex-a76").run(argv, timeout_s=7200)
            if done.code != 0:
                raise IntegrityError(f"{library.name} {done.ending()}: {done.stderr.decode()[-200:]}")
            told = json.loads(done.stdout)
            pixels.add(told.pop("hash"))
            figures[f"{threads} threads"] = told
            print(threads, told, flush=True)
    if len(pixels) != 1:
        raise IntegrityError(f"{library.name}: the picture depends on the number of threads")
    return figures


# ---- compile time ----


def time_compilation(model: str, given: Given) -> Figures:
    """Return the seconds of `edgekit compile MODEL -t android-arm64` from an empty run folder, and of its stages."""
    # zig makes musl once per machine.
    emulated.host_folder()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        # Objects of an earlier compilation would be taken from here.
        os.environ["ZIG_LOCAL_CACHE_DIR"] = cache
        start, cpu = time.perf_counter(), _cpu_seconds()
        made = compiling.compile_model(model, [SHIPPED], folder=Path(folder) / "run")
        seconds, used = time.perf_counter() - start, _cpu_seconds() - cpu
        del os.environ["ZIG_LOCAL_CACHE_DIR"]
        measured = json.loads((made.folder / "measured.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "stages": {name: stage["seconds"] for name, stage in measured.items()},
        "load_before": round(before, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count() or 1,
    }


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _compile(model: str, given: Given, targets: Sequence[Target]) -> Mapping[str, Path]:
    return compiling.compile_model(model, targets, folder=given.runs / model).bundles


PARTS: Mapping[str, tuple[Callable[[str, Given], Figures], str]] = {
    "instructions": (
        count_instructions,
        f"per picture of {SIDE}x{SIDE}, one thread, one core: the difference of k pictures and one, over k - 1, in one "
        "process; QEMU's user mode, edgekit/runners/instructions.c; PSNR: mean of the golden pictures, sigma 25",
    ),
    "quality": (
        compare_quality,
        "Set12, sigma 25, seed 0, docs/protocol.md; edgekit int8: the .so on an emulated Cortex-A76, whole pictures of "
        "tiles with halo; ONNX Runtime on this machine",
    ),
    "memory": (
        measure_memory,
        "a gray picture of bytes, in place, emulated Cortex-A76: the most that malloc had given the library at once, "
        "the picture not counted; stacks of its threads come on top",
    ),
    "compile": (
        time_compilation,
        "edgekit compile MODEL -t android-arm64, an empty run folder, one thread of torch, zig's global cache warm, "
        "its local one empty; other work ran on the machine",
    ),
}


if __name__ == "__main__":
    main()
