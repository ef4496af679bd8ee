"""run folder -> bundles: fuse, export, simplify, quantize, and compile for each target what is not there yet."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch

from edgekit import __version__, backends, bundle, config, run
from edgekit.backends import Source
from edgekit.bundle import Built, Link, Manifest
from edgekit.compress import export, fuse, simplify
from edgekit.data import sets
from edgekit.data.sets import PictureSet
from edgekit.errors import IncompleteError, InputError, ToolMissingError, UnsupportedError
from edgekit.files import sha256
from edgekit.graph import checks, cost
from edgekit.graph.receptive_field import ReceptiveField, receptive_field, tile_stride
from edgekit.graph.reference import Reference
from edgekit.measure import quality
from edgekit.measure.quality import SSIM_WINDOW
from edgekit.models import weights
from edgekit.models.denoiser import Denoiser
from edgekit.pipeline import int8, networks, pages, pictures
from edgekit.pipeline.golden import GOLDEN_SIDE, golden_pictures, write_golden
from edgekit.pipeline.networks import Network
from edgekit.recipe import Data, Model, Quantization, Recipe, int8_drop_db, int8_worst_db
from edgekit.report import Audit
from edgekit.run import Run, Stage
from edgekit.target import Target

log = logging.getLogger(__name__)
_OF_COMPILING = ("data", "noise", "quantization", "budgets", "teacher")
_SIMPLIFYING = ("compress/export", "compress/idle", "compress/shuffles", "compress/simplify", "graph")
_SIMPLIFYING_TOOLS = ("onnx", "onnxsim", "onnxruntime")
_OF_TRAINING = {f.name for f in dataclasses.fields(Recipe)} - set(_OF_COMPILING)
_ENGINE_PACKAGES = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "tvm": ("apache-tvm", "apache-tvm-ffi", "ziglang"),
    "coreml": ("coremltools", "torch"),
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The run folder and its bundles by target.

    audits: By target, what runs in integers; none for an engine that gives no account. reused: Stages that were there
        already.
    """

    folder: Path
    bundles: Mapping[str, Path]
    audits: Mapping[str, Audit]
    reused: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """The student as graphs, with its interface.

    network: None when it came as an ONNX file. taught_by: Hash of the teacher that it learned from in this run; empty
        where it learned from none.
    """

    name: str
    network: Network | None
    fp32: Path
    channels: int
    takes_sigma: bool
    stride: int
    links: tuple[Link, ...]
    taught_by: str = ""

    @property
    def model(self) -> str:
        """The network's name in `edgekit models`, which its INT8 budget follows; empty for a user's own."""
        return self.network.model if self.network else ""


def compile_model(
    what: str | Path | None,
    targets: Sequence[Target],
    *,
    weights: str | Path | None = None,
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
    overwrite: bool = False,
) -> Compiled:
    """Compile a run's student, a shipped model, an ONNX file or a torch class for each target, and return the bundles.

    Args:
        what: A run folder, or a MODEL; the newest run unless told, and where there is none the targets' student.
        targets: What to compile for.
        weights: Weights of a `package.module:Class`.
        overrides: Dotted settings of a MODEL's recipe, such as `budgets.int8_drop_db=0.03`; a run has its own.
        folder: Where a MODEL's run folder goes; `runs/<name>` unless told. A run folder's bundles go into it.
        overwrite: Replace another run that is in the folder.

    Raises:
        InputError: Nothing of that name, a broken file, what `what` does not heed, or evaluation pictures that the
            run's student has seen.
        UnsupportedError: The target does not take the model.
        ToolMissingError: The target's engine is not installed. IntegrityError: A file changed, or outputs moved.
    """
    what = None if what is None else str(what)
    weights, folder = (None if path is None else Path(path) for path in (weights, folder))
    what = chosen(what, targets, weights=weights, overrides=overrides, folder=folder, overwrite=overwrite)
    if networks.is_run(what):
        root = Path(what)
        with run.open_run(root, None) as opened:
            network, recipe = networks.from_run(root), recipe_of(root)
            check_tiles(network.name, tile_step(network.net.stride, recipe), targets)
            return compile_student(opened, recipe, network, targets)
    if what.endswith(".onnx"):
        return _compile_onnx(Path(what), targets, overrides, folder, overwrite)
    network = networks.named(what, weights)
    recipe = default_recipe(network.name, network.net.channels, overrides)
    check_tiles(network.name, tile_step(network.net.stride, recipe), targets)
    _check_pictures(recipe, overrides)
    root, told = run.folder_of(network.name, folder), identity(recipe, what, network.sha256)
    with run.open_run(root, told, overwrite=overwrite) as opened:
        if network.model:
            _keep_student(opened, network)
        return compile_student(opened, recipe, network, targets)


def chosen(
    what: str | None,
    targets: Sequence[Target],
    *,
    weights: Path | None,
    overrides: Sequence[str],
    folder: Path | None,
    overwrite: bool,
) -> str:
    """Return the MODEL or run folder that is compiled, after all that can be refused before it is opened."""
    check_targets(targets)
    networks.refuse_ignored(what, weights=weights, folder=folder, overwrite=overwrite)
    if what is None:
        what = str(run.newest()) if run.exists() else student_of(targets)
    if networks.is_run(what):
        _refuse_overrides(Path(what), overrides)
    return what


def simplified(path: Path) -> onnx.ModelProto:
    """Return the float graph of a user's ONNX file as `compile` takes it on; raises as `checks` and `simplify`."""
    checks.load_float_onnx(path)
    with tempfile.TemporaryDirectory() as folder:
        return checks.load_onnx(simplify.simplify(path, Path(folder, path.name)))


def check_targets(targets: Sequence[Target]) -> None:
    """Look at all targets before anything is made for one.

    Raises:
        InputError: Two have one name and are not the same: one's bundle would replace the other's; or a core that
            QEMU does not know.
        ToolMissingError: The engine of one is not installed. UnsupportedError: It cannot do what one asks for.
    """
    known: dict[str, Target] = {}
    for target in targets:
        backends.load(target.engine).check(target)
        if known.setdefault(target.name, target) != target:
            raise InputError(f"two different targets are called '{target.name}'", remedy="give one another 'name:'")


def _refuse_overrides(root: Path, overrides: Sequence[str]) -> None:
    """Raise InputError where settings are given for a run, which has its own."""
    if overrides:
        raise InputError(
            f"--set {overrides[0]}: the run '{root}' has the settings of its recipe",
            remedy="start a run with other settings: edgekit distill RECIPE --set NAME=VALUE -o FOLDER",
        )


def student_of(targets: Sequence[Target]) -> str:
    """Return the one shipped student that the targets name."""
    named = {target.name: target.student for target in targets}
    [student, *others] = sorted({name or "none" for name in named.values()})
    if others or student == "none":
        told = ", ".join(f"{target}: {name or 'none'}" for target, name in named.items())
        raise InputError(
            f"there is no run in '{run.RUNS}/', and the targets name no one student ({told})",
            remedy="name the model, or start a run: edgekit distill",
        )
    log.info("no run in '%s/': compiling '%s', the student of %s", run.RUNS, student, ", ".join(named))
    return student


def _keep_student(opened: Run, network: Network) -> None:
    """Make the stage `student` of a shipped model, so that its run folder can be compiled again like any other."""

    def work(out: Path) -> Mapping[str, object]:
        shutil.copyfile(network.weights, out / networks.WEIGHTS)
        networks.describe(out, network.model, network.options)
        return {}

    opened.stage("student", number=2, inputs={"student": network.sha256}, settings={}, code=(), packages=(), work=work)


def compile_student(opened: Run, recipe: Recipe, network: Network, targets: Sequence[Target]) -> Compiled:
    """Compile a network with its weights inside an open run; raises as `compile_model`."""
    return _compile_graph(opened, recipe, _to_graph(opened, network), targets)


def _compile_onnx(
    path: Path, targets: Sequence[Target], overrides: Sequence[str], folder: Path | None, overwrite: bool
) -> Compiled:
    interface = checks.interface(loaded := checks.load_float_onnx(path), path)
    stride = tile_stride(loaded, path)
    name = identifier(path.stem)
    check_onnx(name, targets)
    recipe = default_recipe(name, interface.channels, overrides)
    check_tiles(name, tile_step(stride, recipe), targets)
    _check_pictures(recipe, overrides)
    model_sha256 = bundle.combined_sha256(checks.files_of(path))
    root, told = run.folder_of(name, folder), identity(recipe, path.name, model_sha256)
    with run.open_run(root, told, overwrite=overwrite) as opened:
        first = Link(kind="onnx", sha256=model_sha256, made_from=None)
        stage, link = _simplified(opened, path, first, stride)
        graph = _Graph(
            name=name,
            network=None,
            fp32=opened.file(stage, "student.fp32.onnx"),
            channels=interface.channels,
            takes_sigma=interface.takes_sigma,
            stride=stride,
            links=(first, link),
        )
        return _compile_graph(opened, recipe, graph, targets)


def identity(recipe: Recipe, model: str, sha256: str) -> Mapping[str, object]:
    """Return what a run is that compiles a MODEL, as its folder records it."""
    return {"recipe": asdict(recipe), "compiles": {"model": model, "sha256": sha256}}


def identifier(name: str) -> str:
    """Return a name that may stand in a file name and in C."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def _to_graph(opened: Run, network: Network) -> _Graph:
    """Make the stages `fuse`, `export` and `simplify` of a torch network."""
    net = network.net
    noisy, sigma = networks.example(net)

    def fuse_net(out: Path) -> Mapping[str, object]:
        fused = fuse.fuse(net, noisy, sigma)
        weights.save(fused.state_dict(), out / "fused.safetensors")
        return {"batchnorms_folded": sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())}

    def export_net(out: Path) -> Mapping[str, object]:
        fused = fuse.fuse(net, noisy, sigma)
        export.export_onnx(
            fused, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=out / "student.onnx"
        )
        return {}

    made_from = _made_from(network)
    fused = opened.stage(
        "fuse",
        number=3,
        inputs=made_from,
        settings={},
        code=("models", "compress/fuse"),
        packages=("torch",),
        work=fuse_net,
    )
    exported = opened.stage(
        "export",
        number=4,
        inputs=made_from | {"fused": opened.sha256(fused, "fused.safetensors")},
        settings={},
        code=("models", "compress/fuse", "compress/export"),
        packages=("torch", "onnx"),
        work=export_net,
    )
    student = Link(kind="student", sha256=network.sha256, made_from=None)
    folded = Link(kind="fused", sha256=opened.sha256(fused, "fused.safetensors"), made_from=student.sha256)
    onnx = Link(kind="onnx", sha256=opened.sha256(exported, "student.onnx"), made_from=folded.sha256)
    stage, simplified = _simplified(opened, opened.file(exported, "student.onnx"), onnx, net.stride)
    return _Graph(
        name=network.name,
        network=network,
        fp32=opened.file(stage, "student.fp32.onnx"),
        channels=net.channels,
        takes_sigma=net.takes_sigma,
        stride=net.stride,
        links=(student, folded, onnx, simplified),
        taught_by=_taught_by(opened.stages().get("student")),
    )


def _taught_by(student: Stage | None) -> str:
    """Return the hash of the teacher that the student's weights come from; empty where they come from none."""
    if student is None or "teacher" not in student.inputs:
        return ""
    return "" if student.facts["teacher_refused"] or student.facts["kept"] == "start" else student.inputs["teacher"]


def _made_from(network: Network) -> dict[str, str]:
    """Return what decides a network's graph: label -> sha256."""
    found = {"student": network.sha256}
    if not network.model:
        # A user's class is in no file of edgekit's: what it computes is known by the graph that it gives.
        with tempfile.TemporaryDirectory() as folder:
            found["graph"] = sha256(float_graph(network.net, Path(folder)))
    return found


def _simplified(opened: Run, onnx: Path, link: Link, step: int) -> tuple[Stage, Link]:
    def work(out: Path) -> Mapping[str, object]:
        path = simplify.simplify(onnx, out / "student.fp32.onnx", step=step)
        counted = cost.cost(checks.load_onnx(path), GOLDEN_SIDE, GOLDEN_SIDE)
        return {"parameters": counted.parameters, "macs_256": counted.macs}

    stage = opened.stage(
        "simplify",
        number=5,
        inputs={"onnx": link.sha256},
        settings={"stride": step},
        code=_SIMPLIFYING,
        packages=_SIMPLIFYING_TOOLS,
        work=work,
    )
    return stage, Link(kind="simplified", sha256=opened.sha256(stage, "student.fp32.onnx"), made_from=link.sha256)


def _compile_graph(opened: Run, recipe: Recipe, graph: _Graph, targets: Sequence[Target]) -> Compiled:
    evaluation = pictures.evaluation(recipe.data)
    pictures.refuse_seen(opened, recipe.data, evaluation)
    _warn_of_harm(graph, recipe, evaluation)
    teacher = _export_teacher(opened, recipe)
    bundles = {}
    for target in targets:
        student = int8.Student(name=graph.name, model=graph.model, fp32=graph.fp32, stride=graph.stride)
        quantized = int8.quantized(opened, recipe, student, target.engine) if target.precision == "int8" else None
        stage = _bundle(opened, recipe, graph, quantized, teacher, target, evaluation)
        bundles[target.name] = opened.root / stage.folder
    audits = {name: found for name, path in bundles.items() if (found := bundle.read(path).built.audit) is not None}
    return Compiled(folder=opened.root, bundles=bundles, audits=audits, reused=tuple(opened.reused))


def _warn_of_harm(graph: _Graph, recipe: Recipe, evaluation: PictureSet) -> None:
    """Say so where a network makes a picture worse, before hours are spent on it."""
    one = sets.centred(PictureSet(name="one", pictures=evaluation.pictures[:1]), GOLDEN_SIDE, GOLDEN_SIDE)
    network = Reference(checks.load_onnx(graph.fp32), name=graph.name)
    denoised, noisy = (
        quality.evaluate(denoise, one, sigma255=recipe.noise.evaluate, stride=graph.stride).psnr_mdb
        for denoise in (network, quality.noisy_input)
    )
    if said := networks.told_of_harm(graph.name, denoised, noisy, recipe.noise.evaluate):
        log.warning("%s", said)


def check_recipe(recipe: Recipe, targets: Sequence[Target], *, missing: Collection[str] = ()) -> None:
    """Refuse what a recipe's student cannot be compiled for, before it is trained; the weights make no difference.

    Args:
        recipe: The recipe.
        targets: What it is to be compiled for.
        missing: Engines that are not installed, whose kernels cannot be asked.

    Raises:
        InputError: Unknown model or option.
        UnsupportedError: A tile that it does not take, no such INT8 for an engine, or an operator without kernel.
    """
    net = networks.architecture(recipe.student, recipe.data.channels)
    check_tiles(recipe.student.model, tile_step(net.stride, recipe), targets)
    engines = {target.engine for target in targets if target.precision == "int8"}
    for engine in sorted(engines):
        int8.refuse(engine, recipe.quantization)
    if "tvm" in engines - {*missing}:
        with tempfile.TemporaryDirectory() as folder:
            fp32 = float_graph(net.eval(), Path(folder))
            student = int8.Student(name=recipe.student.model, model=recipe.student.model, fp32=fp32, stride=net.stride)
            int8.check_kernels(student, net.channels, recipe.quantization, Path(folder))


def tile_step(stride: int, recipe: Recipe) -> int:
    """Return what the sides of a tile are multiples of, for a student of a stride and the teacher beside it."""
    if recipe.teacher is None or recipe.teacher.weights == "random":
        return stride
    return math.lcm(stride, networks.architecture(recipe.teacher, recipe.data.channels).stride)


def check_tiles(name: str, step: int, targets: Sequence[Target]) -> None:
    """Raise UnsupportedError for a tile that is no multiple of `step`, or that cannot be verified."""
    for target in targets:
        height, width = target.input.height, target.input.width
        if any(side is not None and side < SSIM_WINDOW for side in (height, width)):
            raise UnsupportedError(
                f"target '{target.name}': input {width}x{height} is too small to be verified; "
                f"SSIM needs {SSIM_WINDOW} pixels a side",
                remedy="set input.height and input.width, or --tile, higher",
            )
        if any(side is not None and side % step for side in (height, width)):
            raise UnsupportedError(
                f"target '{target.name}': input {width}x{height} is not a tile that '{name}' can be compiled for",
                remedy=f"set input.height and input.width, or --tile, to multiples of {step}",
            )


def check_onnx(name: str, targets: Sequence[Target]) -> None:
    """Raise UnsupportedError for a target that does not compile from an ONNX file, before any work for one."""
    for target in targets:
        if target.engine == "coreml":
            raise UnsupportedError(
                f"target '{target.name}' compiles from torch, and '{name}' is an ONNX file",
                remedy="name a run folder, a shipped model, or package.module:Class with --weights",
            )


def _export_teacher(opened: Run, recipe: Recipe) -> tuple[Path, Link] | None:
    """Make the stage `teacher`: the FP32 network that everything is compared with, as an ONNX file."""
    teacher = networks.from_recipe(recipe.teacher, recipe.data.channels) if recipe.teacher else None
    if teacher is None:
        return None
    net = teacher.net

    def work(out: Path) -> Mapping[str, object]:
        raw = export.export_onnx(
            net, channels=net.channels, takes_sigma=net.takes_sigma, stride=net.stride, out=out / "raw.onnx"
        )
        simplify.simplify(raw, out / "teacher.fp32.onnx", step=net.stride)
        raw.unlink()
        return {}

    stage = opened.stage(
        "teacher",
        number=7,
        inputs={"teacher": teacher.sha256},
        settings={},
        code=("models", *_SIMPLIFYING),
        packages=("torch", *_SIMPLIFYING_TOOLS),
        work=work,
    )
    return opened.file(stage, "teacher.fp32.onnx"), Link(kind="teacher", sha256=teacher.sha256, made_from=None)


def _bundle(
    opened: Run,
    recipe: Recipe,
    graph: _Graph,
    quantized: Path | None,
    teacher: tuple[Path, Link] | None,
    target: Target,
    evaluation: PictureSet,
) -> Stage:
    """Make the stage of one target: the backend's files, golden pictures, pages and the manifest."""
    golden = golden_pictures(evaluation, target)

    def work(out: Path) -> Mapping[str, object]:
        # A verdict on the bundle that was here is none on the one that comes.
        bundle.report_path(opened.root / f"bundles/{target.name}").unlink(missing_ok=True)
        built = backends.load(target.engine).build(_source(recipe, graph, quantized, target), target, out)
        _link(graph.fp32, out / "reference" / "student.fp32.onnx")
        if teacher:
            _link(teacher[0], out / "reference" / "teacher.fp32.onnx")
        ran = _write_golden(out, built, target, golden, recipe)
        manifest = _manifest(recipe, graph, quantized, teacher, target, built, golden, out, ran)
        pages.write(out, manifest, built.audit, own=not graph.model)
        dataclasses.replace(manifest, files=bundle.hashes(out)).write(out)
        return {"precision": built.precision, "golden_outputs": ran}

    inputs = {"simplified": sha256(graph.fp32)} | {p.name: p.sha256 for p in golden}
    if quantized:
        inputs["int8"] = sha256(quantized)
    if teacher:
        inputs["teacher"] = sha256(teacher[0])
    return opened.stage(
        f"bundles/{target.name}",
        number=0,
        inputs=inputs,
        settings=asdict(target)
        | {
            "stride": graph.stride,
            "noise": asdict(recipe.noise),
            "budgets": asdict(recipe.budgets),
            "quantization": asdict(recipe.quantization),
        },
        code=(
            "backends",
            "runners",
            "bundle",
            "report",
            "recipe",
            "pipeline/compile",
            "pipeline/golden",
            "pipeline/pages",
            "pipeline/templates",
            "models",
            "compress/fuse",
            "graph",
            "data/noise",
        ),
        packages=_ENGINE_PACKAGES[target.engine],
        work=work,
        again=lambda known: _waits_for_outputs(opened.root / known.folder, target),
    )


def _waits_for_outputs(path: Path, target: Target) -> bool:
    """Return whether a bundle was made where nothing could run it, and can be run here and now."""
    if any((path / "golden").glob("*.denoised.f32")):
        return False
    try:
        backends.load(target.engine).open_session(path, bundle.read(path).built, target)
    except (ToolMissingError, IncompleteError):
        return False
    log.info("bundles/%s: made again, as it can be run now", target.name)
    return True


def _source(recipe: Recipe, graph: _Graph, quantized: Path | None, target: Target) -> Source:
    def module() -> torch.nn.Module:
        assert graph.network is not None
        return fuse.fuse(graph.network.net, *networks.example(graph.network.net))

    return Source(
        name=identifier(graph.name),
        fp32_onnx=graph.fp32,
        int8_onnx=quantized,
        module=module,
        channels=graph.channels,
        takes_sigma=graph.takes_sigma,
        stride=graph.stride,
        calibration=int8.calibration(recipe, graph.stride) if target.precision == "int8" else (),
    )


def _write_golden(out: Path, built: Built, target: Target, golden: PictureSet, recipe: Recipe) -> str:
    """Write the golden pictures; return what denoised them, or why nothing did."""
    try:
        label, session = backends.load(target.engine).open_session(out, built, target)[0]
    except (ToolMissingError, IncompleteError) as error:
        label, session = f"not run: {error}", None
    write_golden(out, golden, recipe.noise, session)
    return label


def _manifest(
    recipe: Recipe,
    graph: _Graph,
    quantized: Path | None,
    teacher: tuple[Path, Link] | None,
    target: Target,
    built: Built,
    golden: PictureSet,
    out: Path,
    ran: str,
) -> Manifest:
    counted = cost.cost(loaded := checks.load_onnx(graph.fp32), GOLDEN_SIDE, GOLDEN_SIDE)
    field, unknown = _receptive_field(loaded, graph.stride)
    made = bundle.combined_sha256(bundle.artifact_files(out, built.files))
    return Manifest(
        edgekit=__version__,
        target=target,
        model=bundle.Model(
            name=graph.name,
            channels=graph.channels,
            takes_sigma=graph.takes_sigma,
            stride=graph.stride,
            parameters=counted.parameters,
            macs_256=counted.macs,
            halo_px=field.halo_px if field else None,
            global_ops=field.global_nodes if field else (),
            halo_unknown=unknown,
        ),
        budgets=dataclasses.replace(
            recipe.budgets,
            int8_drop_db=int8_drop_db(recipe.budgets, graph.model),
            int8_worst_db=int8_worst_db(recipe.budgets, graph.model),
        ),
        protocol=bundle.Protocol(
            noise="gaussian",
            sigma255=recipe.noise.evaluate,
            seeds=(recipe.noise.seed,),
            pictures=golden.name,
            files=tuple(p.name for p in golden),
            golden_outputs=ran,
            levels=int8.levels(recipe.noise) if built.precision == "int8" else (),
        ),
        built=built,
        chain=_chain(graph, quantized, teacher[1] if teacher else None, target, made),
        files={},
    )


def _chain(graph: _Graph, quantized: Path | None, teacher: Link | None, target: Target, made: str) -> tuple[Link, ...]:
    """Return the links from the teacher to the artifact, whose hash is `made`."""
    links = list(graph.links)
    if teacher is not None:
        taught = graph.taught_by == teacher.sha256
        links[0] = dataclasses.replace(links[0], made_from=teacher.sha256 if taught else None)
        links.insert(0, teacher)
    if quantized:
        links.append(Link(kind="int8", sha256=sha256(quantized), made_from=links[-1].sha256))
    # Core ML compiles the fused torch network; the others compile the last graph.
    origin = next(link for link in links if link.kind == "fused") if target.engine == "coreml" else links[-1]
    return (*links, Link(kind="artifact", sha256=made, made_from=origin.sha256))


def _receptive_field(model: onnx.ModelProto, stride: int) -> tuple[ReceptiveField | None, str]:
    """Return how far a graph looks; or None, and why no halo is known, and pictures are denoised in one piece."""
    try:
        field = receptive_field(model)
        field.aligned(stride)
        return field, ""
    except UnsupportedError as error:
        log.warning("no halo is known, so pictures larger than a tile are refused: %s", error)
        return None, str(error)


def float_graph(net: Denoiser, folder: Path) -> Path:
    """Return the file of the fused and simplified float graph of a network, written into `folder`.

    Raises:
        UnsupportedError: The network cannot be exported.
    """
    raw = export.export_onnx(
        fuse.fuse(net, *networks.example(net)),
        channels=net.channels,
        takes_sigma=net.takes_sigma,
        stride=net.stride,
        out=folder / "raw.onnx",
    )
    return simplify.simplify(raw, folder / "float.onnx", step=net.stride)


def float_model(net: Denoiser) -> onnx.ModelProto:
    """Return the fused and simplified float graph of a network; raises as `float_graph`."""
    with tempfile.TemporaryDirectory() as folder:
        return checks.load_onnx(float_graph(net, Path(folder)))


def default_recipe(name: str, channels: int, overrides: Sequence[str] = ()) -> Recipe:
    """Return the settings for a MODEL that no recipe made, with dotted overrides put in.

    Raises:
        InputError: Another number of channels than 1 or 3; an override that is wrong, or that only training heeds; a
            teacher that there is not.
    """
    if channels not in (1, 3):
        raise InputError(f"'{name}' takes {channels} channels", remedy="edgekit compiles networks for 1 or 3")
    allowed = "settings here: " + ", ".join(_OF_COMPILING)
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] in _OF_TRAINING:
            raise InputError(f"--set {override}: a MODEL is compiled as it is", remedy=allowed)
    recipe = Recipe(
        schema_version=1,
        name=name,
        description=f"Compile '{name}' as it is.",
        teacher=Model(model="teacher") if channels == 1 else None,
        student=Model(model=name),
        data=Data(channels=1 if channels == 1 else 3),
        quantization=Quantization(),
    )
    told = config.changed(recipe, overrides) if overrides else recipe
    if told.data.channels != channels:
        raise InputError(f"--set data.channels={told.data.channels}: '{name}' takes {channels}", remedy="leave it out")
    if overrides and told.teacher is not None:
        networks.from_recipe(told.teacher, channels)
    return told


def _check_pictures(recipe: Recipe, overrides: Sequence[str]) -> None:
    """Look at the user's pictures, and for leaks, before a run folder is made."""
    if any(override.startswith("data") for override in overrides):
        pictures.refuse_leaks(pictures.load(recipe.data))


def recipe_of(root: Path) -> Recipe:
    """Return the recipe of a run folder; raises as `run.read_stages`."""
    return config.checked(run.read_identity(root)["recipe"], Recipe, root / "run.json")


def _link(source: Path, to: Path) -> None:
    """Put a file into the bundle without a second copy on the disk, where the file system can."""
    to.parent.mkdir(exist_ok=True)
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)
