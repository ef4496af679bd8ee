"""bundle -> verdict: run the artifact itself, and hold what it does against every limit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np

from edgekit import backends, bundle, run
from edgekit.backends import Session
from edgekit.bundle import Built, Manifest
from edgekit.data import sets
from edgekit.data.sets import PictureSet
from edgekit.errors import EdgekitError, IncompleteError, InputError, IntegrityError, ToolMissingError
from edgekit.files import write_json
from edgekit.measure import host, latency, quality
from edgekit.measure.latency import Paired, Ratio
from edgekit.measure.quality import Array, QualityReport
from edgekit.pipeline import baseline, measurement, networks, worth
from edgekit.pipeline.baseline import Baseline
from edgekit.pipeline.golden import GOLDEN_DB, GOLDEN_SIDE, golden_agreement_db, read_golden
from edgekit.pipeline.measurement import Measurement
from edgekit.recipe import Budgets, int8_drop_db
from edgekit.report import Audit, Limit, OnDevice, Recorded, Report, Row, Verdict, overall
from edgekit.target import Target

log = logging.getLogger(__name__)
Say = Callable[[str], None]
_MIN_PAIRS = 8
_REFERENCE_ENGINE: Literal["onnxruntime"] = "onnxruntime"
_MOST_DIGITS = 6
_SATURATES = "This processor is x86 without VNNI: with these weights, the engine's sums saturate here."
_NO_TEACHER = "the bundle holds no teacher; name one with teacher.model where it is compiled"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long verification measures.

    threads: Of every engine that takes them, while it is timed. seconds: For the interleaved runs.
    """

    threads: int = 1
    seconds: float = 12.0


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """What an INT8 artifact loses against its FP32 self over several noise levels, in thousandths of a dB.

    levels: Which these are. mean_mdb: Over pictures and levels. worst_mdb: On that picture at that level that lose
        most.
    """

    how: str
    levels: str
    mean_mdb: int
    worst_mdb: int


@dataclass(frozen=True, kw_only=True)
class _Timing:
    """Interleaved runs of the FP32 teacher and the artifact."""

    paired: Paired
    ratio: Ratio
    engine: str
    shape: tuple[int, ...]
    threads: int


def bundles_of(path: Path) -> list[Path]:
    """Return the bundle at a path, or all bundles of a run folder.

    Raises:
        InputError: It is neither, or the run has another student by now than a bundle was compiled from.
    """
    if (path / bundle.MANIFEST).is_file():
        return [path]
    # What `compile` has not finished has a name with a dot.
    found = sorted(p.parent for p in (path / "bundles").glob(f"[!.]*/{bundle.MANIFEST}"))
    if not found:
        raise InputError(
            f"{path}: is neither a bundle nor a run with bundles", remedy="make one: edgekit compile --target T"
        )
    if student := _student_of(path):
        for folder in found:
            with _no_report_left(folder):
                chain = bundle.read(folder).chain
            made_from = next((link.sha256 for link in chain if link.kind == "student"), student)
            if made_from != student:
                raise InputError(
                    f"{folder}: was compiled from another student than the run has by now",
                    remedy=f"compile it again, or remove it: edgekit compile {path} --target {folder.name}",
                )
    return found


def _student_of(root: Path) -> str:
    """Return the hash of a run's student; empty where the folder has none."""
    try:
        stages = run.read_stages(root, check=False)
    except InputError:
        return ""
    files = next((stage.files for stage in stages if stage.name == "student"), {})
    return next((digest for name, digest in files.items() if name.endswith(networks.WEIGHTS)), "")


def verify(
    path: str | Path,
    *,
    settings: Settings | None = None,
    records: Sequence[str | Path] | None = None,
    say: Say = log.info,
) -> Report:
    """Return the report on one bundle, decided from the bundle and what was measured of it on devices.

    Args:
        path: The bundle.
        settings: How latency is measured.
        records: Of `edgekit bench`, of this very artifact; None: those that lie beside the bundle, where one that is
            damaged, old or of another artifact is not an error but decides nothing.
        say: Told what is being done.

    Raises:
        InputError: No bundle, one that was compiled anew meanwhile, or a named record is none.
        UnsupportedError: A graph that cannot be evaluated.
        IntegrityError: A file of the bundle changed; a named record is damaged, or is of another artifact.
    """
    settings, path = settings or Settings(), Path(path)
    named = None if records is None else [Path(record) for record in records]
    with _no_report_left(path):
        manifest = bundle.read(path)
        golden = read_golden(path, manifest.protocol.pictures, manifest.protocol.files)
        artifact_sha256 = bundle.combined_sha256(bundle.artifact_files(path, manifest.built.files))
    # A record that the user named wrongly says nothing of the bundle.
    measured = _measured(path, named, artifact_sha256, golden, manifest)
    with _no_report_left(path):
        report = _judged(path, manifest, golden, measured, settings, say)
    # It takes a while, and nothing keeps another process from compiling meanwhile.
    if bundle.read(path) != manifest:
        raise InputError(f"{path}: was compiled anew while it was verified", remedy="verify it again")
    return report


def _judged(
    path: Path, manifest: Manifest, golden: PictureSet, measured: _Measured, settings: Settings, say: Say
) -> Report:
    target, built = manifest.target, manifest.built
    judge = _Judge(path, manifest, golden)
    shipped = bundle.artifact_files(path, built.files)
    noisy = judge.row("noisy input", judge.measured_on(), quality.noisy_input, None, ())
    teacher = judge.reference("teacher FP32", "teacher.fp32.onnx", say)
    student = judge.reference("student FP32", "student.fp32.onnx", say)
    sessions, missing = _open(path, built, target, settings)
    artifacts, agreements = _artifacts(judge, sessions, measured.devices, student, shipped, say)
    native = next((session for _, session in sessions if session.level == "native"), None)
    here = [(row, session) for row, (_, session) in zip(artifacts, sessions, strict=False) if session.level == "native"]
    losses = [] if student is None else judge.losses(student, here, say)
    timing = None
    if native is not None and teacher is not None:
        say(f"{target.name}: timing against the FP32 teacher for {settings.seconds:g} s")
        timing = _time(path, target, native, manifest, settings)
        artifacts[0] = replace(artifacts[0], latency_us=timing.paired.b_median_us)
        timed = "" if timing.engine == _REFERENCE_ENGINE else f", timed in {timing.engine}"
        teacher = replace(teacher, how=f"{teacher.how}{timed}", latency_us=timing.paired.a_median_us)
    counted = _audit(path, built, target)
    notes_here = () if native is None else _notes_here(path, manifest, native, counted, settings, say)
    notes = (*_harm(manifest, student, noisy), *built.notes, *notes_here)
    baselines = baseline.recorded()
    limits = [
        *_student_limits(manifest, teacher, student, golden, baselines.records),
        *_int8_limits(manifest.budgets, artifacts, losses, missing),
        *_golden_limits(agreements, missing),
        *_deployment_limits(target, built, path, counted),
        *_speed_limits(target, timing, measured, [s.level for _, s in sessions], missing),
    ]
    return Report(
        target=target.name,
        model=manifest.model.name,
        verdict=overall(limits),
        limits=tuple(limits),
        rows=(noisy, *(row for row in (teacher, student) if row is not None), *artifacts),
        protocol={**asdict(manifest.protocol), "threads": settings.threads},
        speedup=None if timing is None else {"engine": timing.engine, "shape": timing.shape, **asdict(timing.ratio)},
        baselines=tuple(r for b in baselines.records for r in _recorded(b)),
        host=asdict(host.describe()),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        notes=notes,
        audit=counted if isinstance(counted, Audit) else None,
        devices=measured.devices,
        refused=(*measured.refused, *baselines.refused),
    )


@contextmanager
def _no_report_left(path: Path) -> Iterator[None]:
    """Remove the report that lies beside a bundle where it cannot be verified any more."""
    try:
        yield
    except (EdgekitError, OSError):
        report = bundle.report_path(path)
        if report.is_file():
            report.unlink()
            log.warning("%s: removed, for the bundle cannot be verified any more", report)
        raise


def write(report: Report, path: str | Path) -> Path:
    """Write a report beside its bundle, or to a file of the user's; return where it lies."""
    write_json(Path(path), report.as_json())
    return Path(path)


class _Judge:
    """Measures rows by one protocol."""

    def __init__(self, path: Path, manifest: Manifest, golden: PictureSet) -> None:
        self._path, self._manifest, self._golden = path, manifest, golden
        self._seeds = manifest.protocol.seeds
        self._found: dict[Row, QualityReport] = {}

    def measured_on(self) -> str:
        """Return which pictures with which noise all rows are measured on."""
        draws = "" if len(self._seeds) == 1 else f", {len(self._seeds)} draws"
        return f"{len(self._golden)} golden pictures, noise level {self._manifest.protocol.sigma255:g}{draws}"

    def row(
        self, name: str, how: str, denoise: Callable[[Array, float], Array], before: Row | None, files: Sequence[Path]
    ) -> Row:
        """Return the quality of one denoiser."""
        found = self._quality(denoise, self._manifest.protocol.sigma255)
        reference = None if before is None else self._found[before]
        row = Row(
            name=name,
            how=how,
            sha256=bundle.combined_sha256(files) if files else "",
            psnr_mdb=found.psnr_mdb,
            drop_mdb=None if reference is None else reference.psnr_mdb - found.psnr_mdb,
            worst_drop_mdb=None if reference is None else quality.worst_drop_mdb(reference, found),
            ssim_e5=found.ssim_e5,
            size_bytes=size_bytes(files) if files else None,
        )
        self._found[row] = found
        return row

    def row_of(self, device: OnDevice, before: Row | None, files: Sequence[Path]) -> Row:
        """Return what a device made of the golden pictures."""
        # A device denoises the pictures of the first seed alone; a mean over several is another figure.
        reference = before.psnr_mdb if before is not None and len(self._seeds) == 1 else None
        return Row(
            name="artifact",
            how=device.how(),
            sha256=bundle.combined_sha256(files),
            psnr_mdb=device.psnr_mdb,
            drop_mdb=None if reference is None else reference - device.psnr_mdb,
            latency_us=device.call.p50_us,
            size_bytes=size_bytes(files),
        )

    def reference(self, name: str, file: str, say: Say) -> Row | None:
        """Return the row of one of the bundle's FP32 graphs; None where the bundle has none."""
        path = self._path / "reference" / file
        if not path.is_file():
            return None
        say(self.told(name))
        session = backends.load_onnx(_REFERENCE_ENGINE).open_onnx(path, threads=2)
        return self.row(name, f"{_REFERENCE_ENGINE} (native)", session, None, (path,))

    def losses(self, student: Row, artifacts: Sequence[tuple[Row, Session]], say: Say) -> list[_Loss]:
        """Return what the artifact loses in each session over the manifest's noise levels; none where it has one."""
        protocol = self._manifest.protocol
        others = [level for level in protocol.levels if level != protocol.sigma255]
        if not others or not artifacts:
            return []
        path = self._path / "reference" / "student.fp32.onnx"
        reference = backends.load_onnx(_REFERENCE_ENGINE).open_onnx(path, threads=2)
        before = [self._found[student], *(self._quality(reference, level) for level in others)]
        named = f"noise levels {', '.join(f'{level:g}' for level in protocol.levels)}"
        found = []
        for row, session in artifacts:
            say(self.told(f"the artifact at {named}"))
            after = [self._found[row], *(self._quality(session, level) for level in others)]
            pairs = list(zip(before, after, strict=True))
            mean_mdb = round(fmean(b.psnr_mdb - a.psnr_mdb for b, a in pairs))
            worst_mdb = max(quality.worst_drop_mdb(b, a) for b, a in pairs)
            found.append(_Loss(how=row.how, levels=named, mean_mdb=mean_mdb, worst_mdb=worst_mdb))
        return found

    def told(self, what: str) -> str:
        """Return the line that says what is being run."""
        return f"{self._manifest.target.name}: running {what} on {len(self._golden)} pictures"

    def agreement_db(self, outputs: Sequence[Array]) -> float | None:
        """Return the least agreement of outputs with the golden ones; None where the bundle has none.

        Args:
            outputs: One (1, c, h, w) for each golden picture and seed, in the order in which `row` asks for them.
        """
        # The golden outputs are of the first seed.
        return golden_agreement_db(self._path, self._golden, outputs[:: len(self._seeds)])

    def _quality(self, denoise: Callable[[Array, float], Array], sigma255: float) -> QualityReport:
        return quality.evaluate(
            denoise,
            self._golden,
            sigma255=sigma255,
            seeds=self._seeds,
            stride=self._manifest.model.stride,
        )


def _artifacts(
    judge: _Judge,
    sessions: Sequence[tuple[str, Session]],
    devices: Sequence[OnDevice],
    student: Row | None,
    shipped: Sequence[Path],
    say: Say,
) -> tuple[list[Row], list[tuple[str, float | None]]]:
    """Return a row for each way in which the artifact was run, those here first; and how each agrees with the golden.

    That is the label of the way and dB, None where the bundle has no golden outputs.
    """
    rows, agreements = [], []
    for label, session in sessions:
        say(judge.told(f"the artifact ({label}, {session.level})"))
        how, outputs = f"{label} ({session.level})", list[Array]()
        rows.append(judge.row("artifact", how, _keeping(session, outputs), student, shipped))
        agreements.append((how, judge.agreement_db(outputs)))
    rows += [judge.row_of(device, student, shipped) for device in devices]
    agreements += [(device.how(), _agreement_db(device)) for device in devices]
    return rows, agreements


def _notes_here(
    path: Path, manifest: Manifest, artifact: Session, counted: Audit | str, settings: Settings, say: Say
) -> Iterator[str]:
    """Give what must be known of an artifact that runs on this machine."""
    target, built = manifest.target, manifest.built
    if built.precision == "int8":
        say(f"{target.name}: timing against its FP32 self for {settings.seconds / 2:g} s")
        fp32, shape = path / "reference" / "student.fp32.onnx", _shape(target, manifest)
        found = worth.compare(
            target.engine,
            fp32,
            artifact,
            shape,
            threads=settings.threads,
            seconds=settings.seconds / 2,
            released=isinstance(counted, Audit) and bool(counted.float_nodes),
            dynamic=isinstance(counted, Audit) and "DynamicQuantizeLinear" in counted.float_ops_between,
        )
        if found is not None:
            yield found.sentence()
    if built.facts.get("weight_bits") == 8 and host.sums_saturate():
        yield _SATURATES


def _harm(manifest: Manifest, student: Row | None, noisy: Row) -> Iterator[str]:
    """Give a line where the network makes the pictures worse before it is in INT8."""
    if student is not None and student.psnr_mdb is not None and noisy.psnr_mdb is not None:
        sigma255 = manifest.protocol.sigma255
        if said := networks.told_of_harm(manifest.model.name, student.psnr_mdb, noisy.psnr_mdb, sigma255):
            yield said


def _keeping(session: Session, outputs: list[Array]) -> Callable[[Array, float], Array]:
    """Return the session as a function that appends whatever comes out to `outputs`."""

    def denoise(noisy: Array, sigma: float) -> Array:
        outputs.append(session(noisy, sigma))
        return outputs[-1]

    return denoise


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Records of devices that count, and why others do not."""

    devices: tuple[OnDevice, ...]
    refused: tuple[str, ...]


def _measured(
    path: Path, records: Sequence[Path] | None, artifact_sha256: str, golden: PictureSet, manifest: Manifest
) -> _Measured:
    devices, refused = [], []
    for file in measurement.beside(path) if records is None else records:
        try:
            record = measurement.read(file)
        except (InputError, IntegrityError) as error:
            if records is not None:
                raise
            refused.append(f"{file.name}: {str(error).removeprefix(f'{file}: ')}")
            continue
        another = _another(record, artifact_sha256, golden, manifest)
        if another and records is not None:
            raise IntegrityError(f"{file}: {another}", remedy=f"measure this one: edgekit bench {path} --device DEVICE")
        if why := another or record.not_counted:
            refused.append(f"{file.name}: {why}")
        else:
            devices.append(_on_device(file, record))
    return _Measured(devices=tuple(devices), refused=tuple(refused))


def _another(record: Measurement, artifact_sha256: str, golden: PictureSet, manifest: Manifest) -> str:
    """Return why a record is not of this bundle; empty where it is."""
    if record.artifact_sha256 != artifact_sha256:
        return f"was measured of another artifact ({record.artifact_sha256[:12]}, here {artifact_sha256[:12]})"
    noise, protocol = (record.quality.sigma255, record.quality.seed), manifest.protocol
    if record.quality.pictures_sha256 != sets.digest(golden) or noise != (protocol.sigma255, protocol.seeds[0]):
        return "was measured on other golden pictures"
    return ""


def _on_device(file: Path, record: Measurement) -> OnDevice:
    latency = record.latency
    assert latency is not None, "a record without one is refused"
    return OnDevice(
        record=file.name,
        device=record.name,
        soc=record.before.soc,
        system=record.before.system,
        runner=record.device,
        variant=record.variant,
        threads=latency.threads,
        side=latency.side,
        call=latency.call,
        runs=latency.runs,
        megapixel=latency.megapixel,
        picture_runs=latency.picture_runs,
        first_us=latency.first_us,
        psnr_mdb=record.quality.psnr_mdb,
        agreement_mdb=record.quality.agreement_mdb,
        date=record.date,
    )


def _agreement_db(device: OnDevice) -> float | None:
    if device.agreement_mdb is None:
        return None
    return math.inf if device.agreement_mdb >= quality.CEILING_MDB else device.agreement_mdb / 1000


def _recorded(record: Baseline) -> list[Recorded]:
    return [
        Recorded(
            teacher=record.teacher,
            device=record.device,
            height=entry.height,
            width=entry.width,
            arithmetic=entry.arithmetic,
            threads=record.threads,
            median_us=entry.median_us,
            date=record.date,
        )
        for entry in record.latencies
    ]


def _open(path: Path, built: Built, target: Target, settings: Settings) -> tuple[Sequence[tuple[str, Session]], str]:
    """Return the artifact's sessions, or none and why there are none."""
    try:
        return backends.load(target.engine).open_session(path, built, target, threads=settings.threads), ""
    except (ToolMissingError, IncompleteError) as error:
        return (), str(error)


def _audit(path: Path, built: Built, target: Target) -> Audit | str:
    """Return the engine's account of the artifact here; where it gives none, the recorded one, or why there is none."""
    recorded = built.facts.get("integer_macs_permille")
    try:
        found = backends.load(target.engine).audit(path, built, target)
    except (ToolMissingError, IncompleteError) as error:
        if built.audit is None and recorded is None:
            return f"not counted: {error}"
        kept = built.audit or Audit(integer_macs_permille=int(recorded or 0), how="its machine code")
        return replace(kept, how=f"{kept.how}, as recorded when it was compiled; not counted here: {error}")
    differs = recorded is not None and int(recorded) != found.integer_macs_permille
    then = f" ({int(recorded or 0) / 10:.1f} % where it was compiled)" if differs else ""
    return replace(found, how=f"{found.how}, here{then}")


def _time(path: Path, target: Target, artifact: Session, manifest: Manifest, settings: Settings) -> _Timing:
    # The teacher runs in the artifact's own engine where it can, so that the ratio is the model's and not the engine's.
    engine: Literal["onnxruntime", "openvino"] = "openvino" if target.engine == "openvino" else "onnxruntime"
    teacher = backends.load_onnx(engine).open_onnx(path / "reference" / "teacher.fp32.onnx", threads=settings.threads)
    shape = _shape(target, manifest)
    noisy = np.random.default_rng(0).random(shape, dtype=np.float32)
    paired = latency.interleave(
        lambda: _run(teacher, noisy), lambda: _run(artifact, noisy), min_pairs=_MIN_PAIRS, max_seconds=settings.seconds
    )
    return _Timing(
        paired=paired, ratio=latency.ratio_with_bound(paired), engine=engine, shape=shape, threads=settings.threads
    )


def _shape(target: Target, manifest: Manifest) -> tuple[int, int, int, int]:
    """Return the shape of the picture that is timed."""
    return 1, manifest.model.channels, target.input.height or GOLDEN_SIDE, target.input.width or GOLDEN_SIDE


def _run(session: Session, noisy: Array) -> None:
    session(noisy, 25 / 255)


def _student_limits(
    manifest: Manifest,
    teacher: Row | None,
    student: Row | None,
    golden: PictureSet,
    baselines: Sequence[Baseline],
) -> list[Limit]:
    """Return the limit of what the student may be behind the teacher; none where the budgets ask for nothing."""
    most_db = manifest.budgets.student_drop_db
    if most_db is None:
        return []
    limit = f"at most {most_db:.3f} dB"
    hashes = {link.sha256 for link in manifest.chain if link.kind == "teacher"}
    sigma255 = manifest.protocol.sigma255
    same = [b for b in baselines if b.teacher_sha256 in hashes] if manifest.protocol.seeds == (0,) else []
    recorded = [b for b in same if b.psnr_mdb(golden, sigma255) is not None]
    best = recorded[-1].psnr_mdb(golden, sigma255) if recorded else teacher.psnr_mdb if teacher else None
    if best is None or student is None or student.psnr_mdb is None:
        return [_not_run("student_drop_db", limit, _NO_TEACHER)]
    drop = best - student.psnr_mdb
    source = f"teacher on {recorded[-1].device}" if recorded else "teacher measured here"
    verdict: Verdict = "pass" if drop <= round(1000 * most_db) else "fail"
    measured = f"{drop / 1000:+.3f} dB"
    return [Limit(name="student_drop_db", limit=limit, measured=measured, verdict=verdict, reason=source)]


def _int8_limits(budgets: Budgets, artifacts: Sequence[Row], losses: Sequence[_Loss], missing: str) -> list[Limit]:
    # The bundle's own; the name says nothing, for a user's own network may be called like a shipped one.
    mean_db = int8_drop_db(budgets, "")
    mean = [(row.how, row.drop_mdb) for row in artifacts]
    mean += [(f"{loss.how}, mean over {loss.levels}", loss.mean_mdb) for loss in losses]
    # Records of devices have no figures of single pictures.
    worst = [(row.how, row.worst_drop_mdb) for row in artifacts if row.worst_drop_mdb is not None]
    worst += [(f"{loss.how}, any of {loss.levels}", loss.worst_mdb) for loss in losses]
    return [
        *_drop_limits("int8_drop_db", mean_db, mean, missing),
        *_drop_limits("int8_worst_db", budgets.int8_worst_db, worst, missing),
    ]


def _drop_limits(
    name: str, most_db: float | None, drops: Sequence[tuple[str, int | None]], missing: str
) -> list[Limit]:
    """Return the limit for each artifact; none where the budgets ask for nothing.

    drops: How and over what each was measured, and what it loses in thousandths of a dB; None where a device saw one
        seed of several.
    missing: Why none was run here; a device's figure is as good.
    """
    if most_db is None:
        return []
    limit = f"at most {most_db:.3f} dB"
    found = [] if drops else [_not_run(name, limit, missing)]
    for how, drop_mdb in drops:
        if drop_mdb is None:
            found.append(_not_run(name, limit, f"{how}: its pictures are of one seed of several"))
            continue
        verdict: Verdict = "pass" if drop_mdb <= round(1000 * most_db) else "fail"
        found.append(Limit(name=name, limit=limit, measured=f"{drop_mdb / 1000:+.3f} dB", verdict=verdict, reason=how))
    return found


def _golden_limits(agreements: Sequence[tuple[str, float | None]], missing: str) -> list[Limit]:
    name, limit = "golden_outputs", f"at least {GOLDEN_DB:g} dB alike"
    found = [] if agreements else [_not_run(name, limit, missing)]
    for how, agreement in agreements:
        if agreement is None:
            found.append(_not_run(name, limit, "the bundle records no outputs; compile it where it can be run"))
            continue
        verdict: Verdict = "pass" if agreement >= GOLDEN_DB else "fail"
        measured = "equal" if agreement == math.inf else f"{_shown(agreement, GOLDEN_DB, digits=1)} dB"
        found.append(Limit(name=name, limit=limit, measured=measured, verdict=verdict, reason=how))
    return found


def _deployment_limits(target: Target, built: Built, path: Path, counted: Audit | str) -> list[Limit]:
    found = []
    if target.limits.size_mib is not None:
        size = size_bytes(bundle.artifact_files(path, built.files))
        found.append(_at_most("size_mib", target.limits.size_mib, size / 2**20, "MiB", "the files that an app ships"))
    if target.limits.peak_memory_mib is not None:
        arena = built.facts.get("arena_bytes")
        if arena is None:
            found.append(
                _not_run(
                    "peak_memory_mib", f"at most {target.limits.peak_memory_mib} MiB", "not measured for this engine"
                )
            )
        else:
            found.append(
                _at_most(
                    "peak_memory_mib",
                    target.limits.peak_memory_mib,
                    int(arena) / 2**20,
                    "MiB",
                    "planned arena of one thread; each more takes as much",
                )
            )
    if target.limits.min_integer_macs is not None:
        found.append(_integer_limit(target.limits.min_integer_macs, counted))
    return found


def _speed_limits(
    target: Target, timing: _Timing | None, measured: _Measured, levels: Sequence[str], missing: str
) -> list[Limit]:
    found, devices = [], measured.devices
    why = "; ".join((_why_not_native(levels, missing), *measured.refused))
    if target.limits.speedup_vs_fp32 is not None:
        alone = "the records of devices time the artifact alone, without the FP32 teacher"
        found.append(_speed_limit(target, timing, levels, alone if devices else why))
    if "native" not in levels:
        found += [_runs_limit(device) for device in devices]
    if "native" not in levels and target.limits.speedup_vs_fp32 is None and not devices:
        found.append(_not_run("runs_on_target", "runs on the target", why))
    if (most := target.limits.megapixel_ms) is not None:
        asked = "; ".join(("no device was measured: edgekit bench BUNDLE --device DEVICE", *measured.refused))
        found += [_megapixel_limit(most, device) for device in devices] or [
            _not_run("megapixel_ms", f"at most {most:g} ms", asked)
        ]
    return found


def _runs_limit(device: OnDevice) -> Limit:
    return Limit(
        name="runs_on_target",
        limit="runs on the target",
        measured=f"{device.call.p50_us / 1000:.2f} ms a tile",
        verdict="pass",
        reason=f"{device.how()}, variant {device.variant}, {device.runs} runs, measured {device.date[:10]}",
    )


def _megapixel_limit(most_ms: float, device: OnDevice) -> Limit:
    name = "megapixel_ms"
    if device.megapixel is None:
        return _not_run(name, f"at most {most_ms:g} ms", f"{device.how()}: no picture larger than a tile was timed")
    how = f"{device.how()}, median of {device.picture_runs} pictures of {device.side}x{device.side}"
    return _at_most(name, most_ms, device.megapixel.p50_us / 1000, "ms", f"{how}, {_threads(device.threads)}")


def _integer_limit(least: float, counted: Audit | str) -> Limit:
    name, limit = "min_integer_macs", f"at least {100 * least:g} %"
    if isinstance(counted, str):
        return _not_run(name, limit, counted)
    share = counted.integer_macs_permille
    return Limit(
        name=name,
        limit=limit,
        measured=f"{share / 10:.1f} %",
        verdict="pass" if share >= round(1000 * least, 6) else "fail",
        reason=f"{counted.how}; in float: {counted.in_float()}" if counted.float_nodes else counted.how,
    )


def _speed_limit(target: Target, timing: _Timing | None, levels: Sequence[str], why: str) -> Limit:
    least = target.limits.speedup_vs_fp32
    assert least is not None
    limit = f"at least {least:g}x"
    if timing is None:
        reason = why if "native" not in levels else _NO_TEACHER
        return _not_run("speedup_vs_fp32", limit, reason)
    ratio = timing.ratio
    decided = latency.decide(ratio, least)
    measured, low, high = (_shown(e3 / 1000, least, digits=1) for e3 in (ratio.ratio_e3, ratio.low_e3, ratio.high_e3))
    threads = _threads(timing.threads)
    if timing.threads > 1 and target.engine not in backends.THREADED:
        threads += " of the teacher alone"
    return Limit(
        name="speedup_vs_fp32",
        limit=limit,
        measured=f"{measured}x ({low} to {high})",
        verdict="incomplete" if decided == "inconclusive" else decided,
        reason=f"{ratio.pairs} interleaved pairs, {timing.engine}, {threads}"
        + (", inconclusive: the bound straddles the limit" if decided == "inconclusive" else ""),
    )


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _why_not_native(levels: Sequence[str], missing: str) -> str:
    if missing:
        return missing
    if "emulated" in levels:
        return "emulated here; emulated time is not latency, a device has to be measured"
    return "evaluated without its engine here; the engine itself was not run"


def _not_run(name: str, limit: str, reason: str) -> Limit:
    return Limit(name=name, limit=limit, measured="not run", verdict="incomplete", reason=reason)


def _at_most(name: str, limit: float, found: float, unit: str, reason: str) -> Limit:
    verdict: Verdict = "pass" if found <= limit else "fail"
    return Limit(
        name=name,
        limit=f"at most {limit:g} {unit}",
        measured=f"{_shown(found, limit, digits=2)} {unit}",
        verdict=verdict,
        reason=reason,
    )


def _shown(found: float, limit: float, *, digits: int) -> str:
    """Return a figure with so many digits behind the point, or with more where rounding would bring it to its limit."""
    while digits < _MOST_DIGITS and found != limit and round(found, digits) == round(limit, digits):
        digits += 1
    return f"{found:.{digits}f}"


def size_bytes(files: Sequence[Path]) -> int:
    """Return the size of files and of the files of folders."""
    whole = [p for path in files for p in (path.rglob("*") if path.is_dir() else (path,))]
    return sum(p.stat().st_size for p in whole if p.is_file())
