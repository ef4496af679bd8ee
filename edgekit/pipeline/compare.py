"""clean pictures -> method table: every method by one protocol, each network as the product itself makes it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias

import numpy as np

from edgekit import __version__, backends, bundle, run, target, zoo
from edgekit.bundle import artifact_files, combined_sha256
from edgekit.data import noise, sets
from edgekit.data.photos import Channels
from edgekit.data.sets import PictureSet
from edgekit.errors import EdgekitError, InputError, ToolMissingError, UnsupportedError, is_out_of_memory, nearest
from edgekit.files import storage_errors
from edgekit.graph import checks, cost
from edgekit.graph.receptive_field import tile_stride
from edgekit.measure import host, latency, quality
from edgekit.measure.quality import Array, Denoise
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import denoise as denoising
from edgekit.pipeline import networks
from edgekit.pipeline.comparison import Arithmetic, Comparison, Figure, Pictures, Row
from edgekit.pipeline.compile import Compiled
from edgekit.pipeline.golden import GOLDEN_SIDE
from edgekit.pipeline.pictures import LISTING, learned_from, refuse_shown, refuse_small
from edgekit.pipeline.verify import size_bytes
from edgekit.target import Engine, Target

log = logging.getLogger(__name__)
Say = Callable[[str], None]
OnnxEngine: TypeAlias = Literal["onnxruntime", "openvino"]
# Float graphs are run in these; a student's artifacts are those of the targets.
FLOAT_ENGINES: tuple[OnnxEngine, ...] = ("onnxruntime", "openvino")
TARGETS = ("onnx", "linux-x86_64")
CLASSICS = ("nlm", "bm3d")
BM3D_LICENCE = "the package bm3d (Tampere University) may be used for non-commercial purposes only"
_LEFT_OUT = "left out on request"
_ONE_THREAD = "on one thread, whatever was asked for"
_STRIDE = 8
_MODELS = "models"  # the folder that networks are compiled in
_SIDE = GOLDEN_SIDE
_PROTOCOL = (
    "white Gaussian noise by docs/protocol.md (RandomState(index + 1000003 * seed)), unclipped; PSNR of a peak of 1, "
    "no crop, the result neither clipped nor rounded, mean over seeds and then pictures; SSIM with a Gaussian window "
    "11x11. Every method is told the noise level, unless its network is blind."
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured.

    sigmas: Noise levels on the scale 0 to 255. seeds: Draws of noise for each picture. without: Of `CLASSICS`.
    seconds: For each row's runs by turns with the reference. threads: Of every method that can be told.
    dynamic: Whether each student has a row of dynamic INT8 too.
    """

    sigmas: tuple[float, ...] = (25.0,)
    seeds: int = 1
    seconds: float = 5.0
    threads: int = 1
    without: tuple[str, ...] = ()
    dynamic: bool = False


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A network of others, as an ONNX file that is run as it is. sigma255: The only noise level that it is for."""

    name: str
    path: Path
    sigma255: float | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """A method, opened.

    files: What an app ships. graph: The float graph. notes: What a reader must know.
    timed: Whether its latency says anything: not where it is emulated, or evaluated without its engine.
    """

    denoise: Denoise
    files: tuple[Path, ...] = ()
    graph: Path | None = None
    integer_macs_permille: int | None = None
    notes: tuple[str, ...] = ()
    timed: bool = True


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row to be.

    sigmas: Those that it is measured at. open: Raises EdgekitError where it cannot be run. reason: Why it shall not be.
    rank: Place among those that the others may be timed against, the lowest first; None for one that may not.
    target: Whose artifact it is; empty for what is none.
    """

    name: str
    arithmetic: Arithmetic
    engine: str
    pictures: PictureSet
    sigmas: tuple[float, ...]
    stride: int
    open: Callable[[], Program]
    reason: str = ""
    rank: int | None = None
    target: str = ""

    def empty(self, reason: str = "") -> Row:
        """Return the row without any figure."""
        return Row(
            name=self.name,
            arithmetic=self.arithmetic,
            engine=self.engine,
            target=self.target,
            pictures=self.pictures.name,
            reason=reason or self.reason,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be compared; nothing has been run."""

    entries: tuple[Entry, ...]
    settings: Settings
    folder: Path


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A network to compare. alone: It has an FP32 row only, for it is what students are compared with."""

    name: str
    what: str
    channels: Channels
    stride: int
    alone: bool = False


def parse_peer(text: str) -> Peer:
    """Return the peer that `NAME=FILE.onnx` or `NAME@SIGMA=FILE.onnx` names.

    Raises:
        InputError: It is neither.
    """
    name, equals, file = text.partition("=")
    _, at, level = name.partition("@")
    if not (name and equals and file):
        raise InputError(f"--peer {text}: is not NAME=FILE.onnx", remedy="as in --peer DnCNN@25=dncnn.onnx")
    try:
        sigma255 = float(level) if at else None
    except ValueError:
        sigma255 = math.nan
    # Not a number is in no range either.
    if sigma255 is not None and not 0 < sigma255 <= 255:
        raise InputError(
            f"--peer {text}: '{level}' is no noise level", remedy="give a number above 0, up to 255, as in DnCNN@25"
        )
    return Peer(name=name, path=Path(file), sigma255=sigma255)


def plan(
    what: Sequence[str],
    *,
    targets: Sequence[Target] | None = None,
    peers: Sequence[Peer] = (),
    pictures: Path | None = None,
    settings: Settings,
    folder: Path,
) -> Plan:
    """Return the rows in their order, after checking everything that can be checked without running it.

    Args:
        what: Shipped names, run folders and ONNX files; unless told, what ships but the variants of `base`.
        targets: Each student has a row of its artifact for each; `TARGETS` unless told.
        peers: Networks of others.
        pictures: Folder of clean pictures; the embedded evaluation set unless told.
        settings: How much is measured.
        folder: Where the networks are compiled; they are re-used there.

    Raises:
        InputError: An unknown model, no pictures, a file that is no denoiser's, or pictures that a model learned from.
        UnsupportedError: A graph that does not take every multiple of the stride, or a target that its engine or a
            student cannot be compiled for.
    """
    sigmas = tuple(sorted(set(settings.sigmas)))
    settings = dataclasses.replace(settings, sigmas=sigmas)
    _check_settings(settings, peers)
    given = list(what) or _shipped()
    # A file that is quantized already cannot go through the product's own quantization; it is run as it is.
    finished = [w for w in given if w.endswith(".onnx") and checks.is_quantized(checks.load_onnx(Path(w)))]
    peers = [*peers, *(Peer(name=Path(w).stem, path=Path(w)) for w in finished)]
    models = [_model(w) for w in given if w not in finished]
    chosen_targets = _targets(targets, models)
    interfaces = [_onnx_interface(p.path) for p in peers]
    channels = {m.channels for m in models} | {of_peer for of_peer, _ in interfaces}
    _check_names(["noisy", "NLM", "BM3D", *(m.name for m in models), *(p.name for p in peers)])
    chosen = {c: _pictures(pictures, c) for c in sorted(channels)}
    for model in models:
        _check_unseen(model, chosen[model.channels])
    entries = [entry for found in chosen.values() for entry in _classics(found, settings)]
    entries += [_peer(p, chosen[c], stride, settings) for p, (c, stride) in zip(peers, interfaces, strict=True)]
    entries += [e for m in models for e in _networks(m, chosen_targets, chosen[m.channels], settings, folder)]
    return Plan(entries=tuple(entries), settings=settings, folder=folder)


def compare(planned: Plan, *, say: Say = log.info) -> Comparison:
    """Return the measured table; a row that cannot be run says why.

    Args:
        planned: What to compare.
        say: Told what is being measured.

    Raises:
        InputError: The folder cannot be written to, or another comparison is being made in it.
    """
    settings, models = planned.settings, planned.folder / _MODELS
    with storage_errors(planned.folder):
        models.mkdir(parents=True, exist_ok=True)
    rows = []
    with run.lock(models):
        reference, timer = _reference(planned)
        for number, entry in enumerate(planned.entries, 1):
            say(f"{number}/{len(planned.entries)}: {entry.empty().title} on {entry.pictures.name}")
            rows.append(_row(entry, settings, timer))
    unique = {e.pictures.name: e.pictures for e in planned.entries}
    return Comparison(
        rows=tuple(rows),
        pictures=tuple(
            Pictures(name=p.name, sha256=sets.digest(p), count=len(p), channels=len(p.pictures[0].pixels))
            for p in unique.values()
        ),
        sigmas=settings.sigmas,
        seeds=tuple(range(settings.seeds)),
        threads=settings.threads,
        seconds=settings.seconds,
        pairs=latency.LEAST_PAIRS,
        reference="" if reference is None else reference.empty().title,
        protocol=_PROTOCOL,
        host=asdict(host.describe((*host.PACKAGES, "bm3d", "bm4d", "pillow"))),
        edgekit=__version__,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _check_settings(settings: Settings, peers: Sequence[Peer]) -> None:
    for sigma255 in settings.sigmas:
        if not (math.isfinite(sigma255) and 0 < sigma255 <= 255):
            raise InputError(f"noise level {sigma255:g} is not between 0 and 255", remedy="as in --sigma 25")
    if not settings.sigmas or settings.seeds < 1:
        raise InputError(f"nothing to measure with {len(settings.sigmas)} noise levels and {settings.seeds} seeds")
    for name in settings.without:
        if name not in CLASSICS:
            raise InputError(f"there is no method '{name}' to leave out; {nearest(name, CLASSICS)}")
    for peer in peers:
        if peer.sigma255 is not None and peer.sigma255 not in settings.sigmas:
            raise InputError(
                f"peer '{peer.name}' is for noise level {peer.sigma255:g}, which is not measured",
                remedy=f"add --sigma {peer.sigma255:g}",
            )


def _targets(given: Sequence[Target] | None, models: Sequence[_Model]) -> list[Target]:
    """Return the targets, each once, all of which students can be compiled for; raises as `plan`.

    One whose engine is not installed has rows that say so.
    """
    loaded = [target.load(name) for name in TARGETS] if given is None else given
    installed = [t for t in loaded if not _missing_engine(t.engine)]
    compiling.check_targets(installed)
    for model in models:
        if not model.alone:
            compiling.check_tiles(model.name, model.stride, installed)
        if model.what.endswith(".onnx"):
            compiling.check_onnx(model.what, installed)
    return list({t.name: t for t in loaded}.values())


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are called '{name}'", remedy="rename one of them, or name it once")


def _shipped() -> list[str]:
    """Return the names of the shipped networks as they are by default, the largest first; variants are to be named."""
    cards = [zoo.card(name) for name in zoo.names()]
    return [card.name for card in sorted(cards, key=lambda card: -card.parameters) if not card.options]


def _model(what: str) -> _Model:
    path = Path(what)
    if what.endswith(".onnx"):
        channels, stride = _onnx_interface(path)
        return _Model(name=path.stem, what=what, channels=channels, stride=stride)
    if networks.is_run(what):
        network, name = networks.from_run(path), path.resolve().name
    elif what in zoo.names():
        network, name = networks.shipped(what), what
    else:
        raise InputError(
            f"'{what}' is no model with shipped weights, no run folder and no ONNX file; {nearest(what, zoo.names())}"
        )
    return _Model(
        name=name,
        what=what,
        channels=3 if network.net.channels == 3 else 1,
        stride=network.net.stride,
        alone=network.model.startswith("teacher"),
    )


def _onnx_interface(path: Path) -> tuple[Channels, int]:
    """Return the channels and the stride of a file; raises as `plan`."""
    model = checks.load_onnx(path)
    channels = checks.interface(model, path).channels
    if channels not in (1, 3):
        raise InputError(f"{path}: takes {channels} channels", remedy="compare networks for 1 or 3")
    return 1 if channels == 1 else 3, tile_stride(model, path)


def _pictures(path: Path | None, channels: Channels) -> PictureSet:
    found = sets.embedded("evaluation", channels=channels) if path is None else sets.folder(path, channels=channels)
    refuse_small(found)
    return PictureSet(name=f"{found.name} in colour" if channels == 3 else found.name, pictures=found.pictures)


def _check_unseen(model: _Model, pictures: PictureSet) -> None:
    """Raise InputError where a run learned from, or chose its weights by, one of the pictures or a part of one.

    Parts are looked for as far as the run's folders still hold what it learned from.
    """
    if not networks.is_run(model.what):
        return
    root = Path(model.what)
    for stage in run.read_stages(root):
        known = learned_from(root / stage.folder / LISTING) if stage.name == "pictures" else {}
        for picture in pictures:
            if picture.sha256 in known:
                raise InputError(
                    f"{root}: learned from '{known[picture.sha256]}', which is '{picture.name}' of {pictures.name}",
                    remedy="compare on pictures that it has not seen",
                )
        if stage.name == "pictures":
            refuse_shown(compiling.recipe_of(root).data, pictures)


def _classics(pictures: PictureSet, settings: Settings) -> list[Entry]:
    """Return the rows of the methods that are no network."""
    noisy = Entry(
        name="noisy",
        arithmetic="",
        engine="",
        pictures=pictures,
        sigmas=settings.sigmas,
        stride=_STRIDE,
        open=lambda: Program(denoise=quality.noisy_input, timed=False),
    )
    nlm = dataclasses.replace(
        noisy,
        name="NLM",
        engine=_versioned("scikit-image"),
        open=lambda: Program(denoise=quality.nlm, notes=(_ONE_THREAD,) if settings.threads > 1 else ()),
        reason=_LEFT_OUT if "nlm" in settings.without else "",
        rank=3,
    )
    bm3d = dataclasses.replace(
        noisy,
        name="BM3D",
        engine=_versioned("bm3d"),
        open=lambda: _open_bm3d(settings.threads),
        reason=_LEFT_OUT if "bm3d" in settings.without else _missing(_import_bm3d),
    )
    return [noisy, nlm, bm3d]


def _peer(peer: Peer, pictures: PictureSet, stride: int, settings: Settings) -> Entry:
    def open_() -> Program:
        denoise = backends.load_onnx("onnxruntime").open_onnx(peer.path, threads=settings.threads)
        notes = () if peer.sigma255 is None else (f"measured at noise level {peer.sigma255:g} alone, which it is for",)
        return Program(denoise=denoise, files=checks.files_of(peer.path), graph=peer.path, notes=notes)

    quantized = checks.is_quantized(checks.load_onnx(peer.path))
    return Entry(
        name=peer.name,
        arithmetic="int8" if quantized else "float32",
        engine=_versioned("onnxruntime"),
        pictures=pictures,
        sigmas=settings.sigmas if peer.sigma255 is None else (peer.sigma255,),
        stride=stride,
        open=open_,
        rank=2,
    )


def _networks(
    model: _Model, targets: Sequence[Target], pictures: PictureSet, settings: Settings, folder: Path
) -> list[Entry]:
    """Return the rows of one network: FP32, its artifacts and, if asked, dynamic INT8; a teacher has FP32 alone."""
    root = folder / _MODELS / model.name
    # One file serves both engines' rows and the reference.
    float_graph = functools.cache(lambda: _float_graph(model, root))

    def entry(arithmetic: Arithmetic, engine: Engine, open_: Callable[[], Program], of_target: str = "") -> Entry:
        return Entry(
            name=model.name,
            arithmetic=arithmetic,
            engine=_versioned(backends.DISTRIBUTIONS[engine]),
            pictures=pictures,
            sigmas=settings.sigmas,
            stride=model.stride,
            open=open_,
            reason=_missing_engine(engine),
            target=of_target,
        )

    def float_program(engine: OnnxEngine) -> Program:
        path = float_graph()
        denoise = backends.load_onnx(engine).open_onnx(path, threads=settings.threads)
        return Program(denoise=denoise, files=(path,), graph=path)

    def dynamic() -> Program:
        where, overrides = root.with_name(f"{model.name}-dynamic"), "quantization.mode=dynamic"
        return _open_artifact(str(float_graph()), target.load("onnx"), settings.threads, where, overrides)

    entries = [entry("float32", engine, functools.partial(float_program, engine)) for engine in FLOAT_ENGINES]
    entries[0] = dataclasses.replace(entries[0], rank=0 if model.alone else 1)
    if model.alone:
        return entries
    for wanted in targets:
        open_ = functools.partial(_open_artifact, model.what, wanted, settings.threads, root)
        entries.append(entry(wanted.precision, wanted.engine, open_, wanted.name))
    return [*entries, entry("int8-dynamic", "onnxruntime", dynamic)] if settings.dynamic else entries


def _float_graph(model: _Model, folder: Path) -> Path:
    """Return the fused, simplified float graph: what INT8 is made from."""
    made = _compiled(model.what, (), (), folder)
    stage = next(s for s in run.read_stages(made.folder) if s.name == "simplify")
    return made.folder / stage.folder / "student.fp32.onnx"


def _compiled(what: str, targets: Sequence[Target], overrides: Sequence[str], folder: Path) -> Compiled:
    """Compile into a folder, which may hold what another comparison left; a run keeps its bundles in itself."""
    if networks.is_run(what):
        return compiling.compile_model(what, targets, overrides=overrides)
    return compiling.compile_model(what, targets, overrides=overrides, folder=folder, overwrite=True)


def _open_artifact(what: str, wanted: Target, threads: int, folder: Path, *overrides: str) -> Program:
    """Compile for a target, and open the bundle's artifact, cut into tiles where it takes one size only."""
    path = _compiled(what, [wanted], overrides, folder).bundles[wanted.name]
    built, opened = bundle.read(path).built, denoising.open_model(path, threads=threads)
    permille = built.facts.get("integer_macs_permille")
    timed = opened.level == "native"
    notes = [*built.notes] if timed else [*built.notes, f"by {opened.how}, whose time is no latency"]
    if timed and threads > 1 and wanted.engine not in backends.THREADED:
        notes.append(_ONE_THREAD)
    return Program(
        denoise=opened if opened.tile else opened.denoise,
        files=tuple(artifact_files(path, built.files)),
        graph=path / "reference" / "student.fp32.onnx",
        integer_macs_permille=None if permille is None else int(permille),
        notes=tuple(notes),
        timed=timed,
    )


def _open_bm3d(threads: int) -> Program:
    """Open BM3D (Dabov et al., 2007; the authors' package), profile `np`, block matching in luminance for colour.

    Raises:
        ToolMissingError: It is not installed, or does not load.
    """
    bm3d = _import_bm3d()
    profile = bm3d.BM3DProfile()
    profile.num_threads = threads

    def denoise(noisy: Array, sigma: float) -> Array:
        planes = noisy[0].transpose(1, 2, 0).astype(np.float64)
        if planes.shape[-1] == 3:
            denoised = bm3d.bm3d_rgb(planes, sigma, profile).transpose(2, 0, 1)
        else:
            denoised = bm3d.bm3d(planes[:, :, 0], sigma, profile).reshape(1, *planes.shape[:2])
        return np.ascontiguousarray(denoised[None], dtype=np.float32)

    return Program(denoise=denoise, notes=(BM3D_LICENCE,))


def _import_bm3d() -> ModuleType:
    try:
        return importlib.import_module("bm3d")
    except ModuleNotFoundError as error:
        raise ToolMissingError(
            f"BM3D needs the package '{error.name}', which is not installed",
            remedy=f"run: pip install 'edgekit[bm3d]' ({BM3D_LICENCE})",
        ) from error
    except (ImportError, OSError) as error:
        raise ToolMissingError(f"the package bm3d is installed but does not load: {error}") from error


def _missing_engine(engine: Engine) -> str:
    return _missing(lambda: backends.load(engine))


def _missing(load: Callable[[], object]) -> str:
    """Return why a package cannot be used; empty where it can."""
    try:
        load()
    except ToolMissingError as error:
        return str(error)
    return ""


def _versioned(package: str) -> str:
    return f"{package} {run.versions((package,)).get(package, '')}".rstrip()


@dataclass(frozen=True, kw_only=True)
class _Timer:
    """Times a program by turns with the reference."""

    reference: Callable[[], None]
    seconds: float

    def __call__(self, program: Callable[[], None]) -> latency.Paired:
        return latency.interleave(self.reference, program, min_pairs=latency.LEAST_PAIRS, max_seconds=self.seconds)


def _reference(planned: Plan) -> tuple[Entry | None, _Timer | None]:
    """Return what the others are timed against: the first by rank that runs; both are None where none does."""
    ranked = [(entry.rank, entry) for entry in planned.entries if entry.rank is not None and not entry.reason]
    for _, entry in sorted(ranked, key=lambda pair: pair[0]):
        try:
            program = entry.open()
        except EdgekitError as error:
            log.debug("%s is no reference: %s", entry.name, error)
            continue
        return entry, _Timer(reference=_runner(entry, program), seconds=planned.settings.seconds)
    return None, None


def _runner(entry: Entry, program: Program) -> Callable[[], None]:
    """Return one run of a program on the middle of its first picture."""
    first = PictureSet(name=entry.pictures.name, pictures=entry.pictures.pictures[:1])
    (picture,) = sets.centred(first, _SIDE, _SIDE)
    noisy = noise.add_gaussian(picture.pixels, entry.sigmas[0], index=0)[None]

    def once() -> None:
        program.denoise(noisy, entry.sigmas[0] / 255)

    return once


def _row(entry: Entry, settings: Settings, timer: _Timer | None) -> Row:
    """Return the measured row, or why there is none."""
    if entry.reason:
        return entry.empty()
    try:
        program = entry.open()
        figures = tuple(_figure(entry, program, sigma255, settings) for sigma255 in entry.sigmas)
        row = _described(entry, program, figures)
        if not program.timed or timer is None:
            return row
        paired = timer(_runner(entry, program))
    except EdgekitError as error:
        return entry.empty(str(error))
    except Exception as error:
        # An hour of other rows must not go with this one.
        if not is_out_of_memory(error):
            raise
        return entry.empty("memory ran out")
    return dataclasses.replace(
        row,
        latency_us=paired.b_median_us,
        reference_us=paired.a_median_us,
        speedup=latency.ratio_with_bound(paired),
        slowdown=latency.ratio_with_bound(latency.Paired(a_us=paired.b_us, b_us=paired.a_us)),
    )


def _figure(entry: Entry, program: Program, sigma255: float, settings: Settings) -> Figure:
    found = quality.evaluate(
        program.denoise,
        entry.pictures,
        sigma255=sigma255,
        seeds=tuple(range(settings.seeds)),
        stride=entry.stride,
    )
    return Figure(
        sigma255=sigma255,
        psnr_mdb=found.psnr_mdb,
        ssim_e5=found.ssim_e5,
        nonfinite_pixels=found.nonfinite_pixels,
    )


def _described(entry: Entry, program: Program, figures: tuple[Figure, ...]) -> Row:
    notes = list(program.notes)
    notes += [
        f"{f.nonfinite_pixels} values at noise level {f.sigma255:g} are not finite; their pictures count as 0 dB"
        for f in figures
        if f.nonfinite_pixels
    ]
    parameters, macs = None, None
    if program.graph is not None:
        graph = checks.read_onnx(program.graph)
        parameters = cost.parameters(graph)
        try:
            macs = sum(cost.macs_by_node(graph, _SIDE, _SIDE).values())
        except UnsupportedError as error:
            notes.append(f"MACs were not counted: {error}")
    return dataclasses.replace(
        entry.empty(),
        figures=figures,
        parameters=parameters,
        macs_256=macs,
        integer_macs_permille=program.integer_macs_permille,
        size_bytes=size_bytes(program.files) if program.files else None,
        sha256=combined_sha256(program.files) if program.files else "",
        notes=tuple(notes),
    )
