"""The command line. Commands import what they need when they run, so that `--help` is quick."""

# ruff: noqa: D301 (the backspace is click's mark for lines that it shall not wrap)

from __future__ import annotations

import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import click

from edgekit import __version__
from edgekit.errors import INTERRUPTED, EdgekitError, InputError, is_out_of_memory

if TYPE_CHECKING:
    from edgekit.config import Kind
    from edgekit.pipeline.comparison import Comparison, Written
    from edgekit.pipeline.compile import Compiled
    from edgekit.pipeline.distill import Distilled
    from edgekit.pipeline.measurement import Measurement
    from edgekit.pipeline.plan import Step
    from edgekit.recipe import Recipe
    from edgekit.report import Report
    from edgekit.target import Target
    from edgekit.training.loop import Moment

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger("edgekit")
JSON_SCHEMA_VERSION = 1
BROKEN_PIPE = 141  # as the shell has it for a program that SIGPIPE ended


class _Terminated(KeyboardInterrupt):
    """Another program asked this one to end; what it began, here or on a device, is tidied up as for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number  # as the shell has it for a program that this signal ended


class _Ordered(click.Group):
    """Lists the commands in the order of the way through."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


class _Finite(click.FloatRange):
    """A range of numbers that `nan` and `inf` do not lie in."""

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found


@click.group(cls=_Ordered, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, prog_name="edgekit")
@click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but results and errors.")
def cli(verbose: bool, quiet: bool) -> None:
    """Take a heavy image denoiser, put it on a phone, and prove that it still works.

    The way through: recipe -> run folder -> target -> artifact -> verdict.

    \b
    edgekit run quickstart -t android-arm64 -t linux-x86_64 -t ios-arm64
    """
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    log.setLevel(level)


def _recipe_argument(command: Callable[P, R]) -> Callable[P, R]:
    return click.argument("recipe_name", metavar="[RECIPE]", default="quickstart")(command)


def _settings_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option(
        "--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Change a setting of the recipe; dotted name."
    )(command)


def _model_settings_option(what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    text = f"Setting of a MODEL, as a recipe has it: {what}; dotted name."
    return click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help=text)


def _targets_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option(
        "-t",
        "--target",
        "targets",
        multiple=True,
        metavar="TARGET",
        default=("onnx",),
        show_default=True,
        help="A name of `edgekit targets`, or a YAML file; may be given several times.",
    )(command)


def _shipped_argument(command: Callable[P, R]) -> Callable[P, R]:
    return click.argument("name", metavar="[NAME]", required=False)(command)


def _output_option(text: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    return click.option("-o", "--output", type=click.Path(path_type=Path), help=text)


def _json_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(command)


def _overwrite_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option("--overwrite", is_flag=True, help="Replace another run that is in the folder.")(command)


def _dry_run_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")(command)


def _unverified_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option(
        "--allow-unverified", is_flag=True, help="Exit with 0 when a limit could not be decided here (else 7)."
    )(command)


@cli.command()
@_recipe_argument
@_output_option("Run folder [default: runs/<recipe>].")
@_settings_option
@_overwrite_option
@_dry_run_option
@_json_option
def distill(
    recipe_name: str, output: Path | None, overrides: tuple[str, ...], overwrite: bool, dry_run: bool, as_json: bool
) -> None:
    """Train the recipe's student from its teacher, in a run folder that goes on where it stopped.

    RECIPE is a name of `edgekit recipes`, or a YAML file.

    \b
    edgekit distill
    edgekit distill quickstart --set training.steps=2000 --set training.max_minutes=0 -o runs/longer
    """
    _distill(recipe_name, output, overrides, overwrite=overwrite, dry_run=dry_run, as_json=as_json, alone=False)


@cli.command()
@_recipe_argument
@_output_option("Run folder [default: runs/<recipe>].")
@_settings_option
@_overwrite_option
@_dry_run_option
@_json_option
def train(
    recipe_name: str, output: Path | None, overrides: tuple[str, ...], overwrite: bool, dry_run: bool, as_json: bool
) -> None:
    """Train the recipe's network on clean pictures alone: a teacher, or a student without one.

    RECIPE is a name of `edgekit recipes`, or a YAML file.

    \b
    edgekit train teacher-unet --set training.steps=0 --set training.max_minutes=20
    """
    _distill(recipe_name, output, overrides, overwrite=overwrite, dry_run=dry_run, as_json=as_json, alone=True)


def _distill(
    name: str,
    output: Path | None,
    overrides: tuple[str, ...],
    *,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    alone: bool,
) -> None:
    from edgekit import recipe

    loaded = recipe.load(name, overrides)
    if dry_run:
        from edgekit.pipeline import plan as planning

        _print_steps(planning.plan_training(loaded, output, alone=alone, overwrite=overwrite), as_json)
        return
    from edgekit.pipeline import distill as distilling

    with _progress() as progress:
        result = distilling.distill(loaded, output, overwrite=overwrite, progress=progress, alone=alone)
    _emit(result, as_json, lambda: _print_distilled(result))


@cli.command("compile")
@click.argument("model", metavar="[RUN|MODEL]", required=False)
@_targets_option
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of a package.module:Class.")
@click.option(
    "--tile",
    metavar="PIXELS",
    type=click.IntRange(8, 4096),
    help="Side of the square tile, for targets that have a fixed one [default: the target's].",
)
@_output_option("Run folder of a MODEL [default: runs/<model>].")
@_model_settings_option("pictures, noise, quantization, budgets, teacher")
@_overwrite_option
@_dry_run_option
@_json_option
def compile_(
    model: str | None,
    targets: tuple[str, ...],
    weights: Path | None,
    tile: int | None,
    output: Path | None,
    overrides: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compile a run's student (the newest run unless told), a shipped model, an ONNX file or a torch class.

    Where nothing is named and there is no run, the student is the one that the target names (`edgekit targets`).

    \b
    edgekit compile --target android-arm64
    edgekit compile nano -t linux-x86_64 -o runs/nano
    edgekit compile nano -t linux-arm64 --tile 256
    edgekit compile mynet:Net --weights net.safetensors -t onnx
    edgekit compile mynet.onnx -t onnx --set data.calibration=photos --set budgets.int8_drop_db=0.03
    """
    from edgekit import target

    wanted = [target.load(t) if tile is None else target.load(t).with_tile(tile) for t in targets]
    if dry_run:
        from edgekit.pipeline import plan as planning

        named = planning.check_model(
            model, wanted, weights=weights, overrides=overrides, folder=output, overwrite=overwrite
        )
        _emit(wanted, as_json, lambda: _say_targets(named, [t.name for t in wanted]))
        return
    from edgekit.pipeline import compile as compiling

    result = compiling.compile_model(
        model, wanted, weights=weights, overrides=overrides, folder=output, overwrite=overwrite
    )
    _emit(result, as_json, lambda: _print_compiled(result))


@cli.command()
@click.argument("bundle", metavar="[BUNDLE|RUN]", type=click.Path(path_type=Path), required=False)
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="While timed, of engines that take them."
)
@click.option("--seconds", default=12.0, show_default=True, type=_Finite(1), help="Time for the interleaved runs.")
@click.option(
    "--bench",
    "records",
    multiple=True,
    metavar="RECORD",
    type=click.Path(path_type=Path),
    help="Record of `edgekit bench`, of one bundle; repeatable [default: <bundle>.bench.*.json].",
)
@_output_option("Report file, of one bundle [default: <bundle>.report.json].")
@_unverified_option
@_json_option
@click.pass_context
def verify(
    context: click.Context,
    bundle: Path | None,
    threads: int,
    seconds: float,
    records: tuple[Path, ...],
    output: Path | None,
    allow_unverified: bool,
    as_json: bool,
) -> None:
    """Run a bundle's artifact (all bundles of a run; the newest run unless told) and decide.

    Exits with 0 when every limit is kept, 3 when one failed, 7 when one could not be decided here. What a device took,
    as `edgekit bench` recorded it of the same artifact, counts.

    \b
    edgekit verify
    edgekit verify runs/quickstart/bundles/linux-x86_64
    edgekit verify runs/nano/bundles/android-arm64 --bench results/devices/nano-pixel7.json
    """
    from edgekit import bundle as bundles
    from edgekit import run
    from edgekit.pipeline import verify as verifying

    paths = verifying.bundles_of(bundle or run.newest())
    if output is not None and len(paths) > 1:
        raise InputError(f"-o {output}: there are {len(paths)} bundles", remedy="name one bundle, or leave -o out")
    if records and len(paths) > 1:
        raise InputError(f"--bench {records[0]}: there are {len(paths)} bundles", remedy="name the one it is of")
    settings = verifying.Settings(threads=threads, seconds=seconds)
    reports = []
    for path in paths:
        to = _place(output or bundles.report_path(path), path)
        report = verifying.verify(path, settings=settings, records=records or None)
        verifying.write(report, to)
        reports.append(report)
    _emit([r.as_json() for r in reports], as_json, lambda: _print_reports(reports))
    _exit_with(context, reports, allow_unverified)


@cli.command()
@_recipe_argument
@_targets_option
@_output_option("Run folder [default: runs/<recipe>].")
@_settings_option
@_overwrite_option
@_dry_run_option
@_unverified_option
@_json_option
@click.pass_context
def run(
    context: click.Context,
    recipe_name: str,
    targets: tuple[str, ...],
    output: Path | None,
    overrides: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    allow_unverified: bool,
    as_json: bool,
) -> None:
    """Distil, compile and verify in one.

    RECIPE is a name of `edgekit recipes`, or a YAML file.

    \b
    edgekit run quickstart -t android-arm64 -t linux-x86_64 -t ios-arm64
    """
    from edgekit import recipe, target

    loaded, wanted = recipe.load(recipe_name, overrides), [target.load(t) for t in targets]
    if dry_run:
        _show_plan(loaded, wanted, output, as_json, overwrite=overwrite)
        return
    from edgekit.pipeline import whole

    with _progress() as progress:
        result = whole.run_recipe(loaded, wanted, output, overwrite=overwrite, progress=progress)

    def show() -> None:
        _print_distilled(result.distilled)
        _print_reports(result.reports)

    _emit(
        {
            "distilled": result.distilled,
            "compiled": result.compiled,
            "reports": [r.as_json() for r in result.reports],
        },
        as_json,
        show,
    )
    _exit_with(context, result.reports, allow_unverified)


@cli.command()
@click.argument("model", default="teacher")
@click.option("--seconds", default=10.0, show_default=True, type=_Finite(0.1), help="For each shape and arithmetic.")
@_output_option("Record [default: results/baselines/<model>-<device>.json; of a run's student with its hash].")
@_json_option
def baseline(model: str, seconds: float, output: Path | None, as_json: bool) -> None:
    """Record the FP32 teacher on this machine's GPU, or its CPU; `verify` prints the record beside its own rows.

    \b
    edgekit baseline
    """
    from edgekit import target
    from edgekit.data import sets
    from edgekit.pipeline import baseline as measuring
    from edgekit.pipeline import networks
    from edgekit.pipeline.golden import golden_pictures

    _place(output or measuring.FOLDER / f"{Path(model).name}.json")
    network = networks.from_run(Path(model)) if networks.is_run(model) else networks.shipped(model)
    evaluation = sets.embedded("evaluation", channels=3 if network.net.channels == 3 else 1)
    golden = [golden_pictures(evaluation, target.load(t)) for t in target.names()]
    unique = {sets.digest(g): g for g in (evaluation, *golden)}
    record = measuring.measure(network, list(unique.values()), seconds=seconds)
    path = measuring.write(record, output)

    def show() -> None:
        _table(
            f"{record.teacher} on {record.device} {record.driver}",
            ("shape", "arithmetic", "median ms", "p10", "p90", "runs"),
            [
                (
                    f"{x.height}x{x.width}",
                    x.arithmetic,
                    *(f"{t / 1000:.2f}" for t in (x.median_us, x.p10_us, x.p90_us)),
                    str(x.runs),
                )
                for x in record.latencies
            ],
        )
        click.echo(path)

    _emit(record, as_json, show)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--device",
    required=True,
    metavar="DEVICE",
    help="local, qemu:CPU, adb:SERIAL (adb alone where one is connected), or ssh:HOST.",
)
@click.option("--runs", default=20, show_default=True, type=click.IntRange(1), help="Timed runs, at least.")
@click.option("--seconds", default=10, show_default=True, type=click.IntRange(0, 3600), help="Time for the timed runs.")
@click.option(
    "--side",
    default=1024,
    show_default=True,
    type=click.IntRange(1, 16384),
    help="Of the square picture whose tiles are timed together.",
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64), help="That work on that picture.")
@click.option(
    "--without",
    multiple=True,
    metavar="FEATURE",
    help="Hide a feature of the processor, as asimddp, for a lesser variant; `verify` counts no such record.",
)
@click.option("--no-instructions", is_flag=True, help="Do not count instructions on an emulated core.")
@click.option(
    "--timeout", default=3600, show_default=True, type=click.IntRange(1), help="Seconds that the device may take."
)
@_output_option("Record [default: <bundle>.bench.<device>.json, which `verify` reads; with --without another name].")
@_json_option
def bench(
    bundle: Path,
    device: str,
    runs: int,
    seconds: int,
    side: int,
    threads: int,
    without: tuple[str, ...],
    no_instructions: bool,
    timeout: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Time a bundle's artifact on the device that it is for, and judge its pictures; see docs/devices.md.

    Emulated time is not a latency: on an emulated core the instructions are counted.

    \b
    edgekit bench runs/nano/bundles/android-arm64 --device adb
    edgekit bench runs/nano/bundles/android-arm64 --device qemu:cortex-a76
    edgekit bench runs/nano/bundles/linux-arm64 --device ssh:pi@raspberrypi
    """
    from edgekit.pipeline import bench as benching
    from edgekit.pipeline import measurement
    from edgekit.pipeline import verify as verifying

    paths = verifying.bundles_of(bundle)
    if len(paths) > 1:
        names = ", ".join(str(path) for path in paths)
        raise InputError(f"{bundle}: has {len(paths)} bundles", remedy=f"name one: {names}")
    # The record is named after the device, which is asked for its name on the way.
    _place(output or paths[0].resolve().with_name(f"{paths[0].resolve().name}.bench.json"), paths[0])
    settings = benching.Settings(
        runs=runs,
        seconds=seconds,
        side=side,
        threads=threads,
        without=without,
        count_instructions=not no_instructions,
        timeout_s=timeout,
    )
    measured = benching.bench(paths[0], device, settings=settings)
    written = measurement.write(measured, output or measurement.default_path(paths[0], measured))
    _emit(measured.as_json(), as_json, lambda: _print_measurement(measured, written))


@cli.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="Folder of clean pictures [default: the embedded evaluation pictures].",
)
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    default=("onnx", "linux-x86_64"),
    show_default=True,
    help="Each student has a row of its artifact for it; may be given several times.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME=FILE",
    help="ONNX file of another's network, run as it is; NAME@25=FILE for one noise level only. Several may be given.",
)
@click.option(
    "--sigma",
    "sigmas",
    multiple=True,
    default=(25.0,),
    show_default=True,
    type=_Finite(0, 255, min_open=True),
    help="Noise level, up to 255; may be given several times.",
)
@click.option(
    "--seeds", default=1, show_default=True, type=click.IntRange(1, 4000), help="Draws of noise for each picture."
)
@click.option(
    "--seconds", default=5.0, show_default=True, type=_Finite(0.1), help="For each row's runs beside the reference."
)
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of every method that can be told."
)
@click.option(
    "--without", multiple=True, type=click.Choice(["nlm", "bm3d"]), help="Leave out a slow method; BM3D takes seconds."
)
@click.option(
    "--dynamic", is_flag=True, help="A row of dynamic INT8 for each student: slower than float, and less exact."
)
@_output_option("Folder of table.md, comparison.json and plot.png [default: comparison].")
@_dry_run_option
@_json_option
def compare(
    models: tuple[str, ...],
    pictures: Path | None,
    targets: tuple[str, ...],
    peers: tuple[str, ...],
    sigmas: tuple[float, ...],
    seeds: int,
    seconds: float,
    threads: int,
    without: tuple[str, ...],
    dynamic: bool,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compare methods on clean pictures: noisy, NLM, BM3D, peers, and networks in FP32 and INT8.

    A MODEL is a shipped name, a run folder or an ONNX file; unless told, what ships but the variants of base.

    \b
    edgekit compare
    edgekit compare teacher nano --pictures photos --sigma 15 --sigma 25 --seeds 3
    edgekit compare base --peer DnCNN@25=dncnn.onnx -o comparison
    edgekit compare control -t linux-x86_64 -t linux-x86_64-vnni
    """
    from edgekit import target
    from edgekit.pipeline import compare as comparing

    settings = comparing.Settings(
        sigmas=sigmas, seeds=seeds, seconds=seconds, threads=threads, without=without, dynamic=dynamic
    )
    planned = comparing.plan(
        models,
        targets=[target.load(name) for name in targets],
        peers=[comparing.parse_peer(peer) for peer in peers],
        pictures=pictures,
        settings=settings,
        folder=output or Path("comparison"),
    )
    if dry_run:
        rows = [entry.empty() for entry in planned.entries]
        shown = [(row.title, row.pictures, row.reason or "to do") for row in rows]
        named = [dict(zip(("row", "pictures", "state"), line, strict=True)) for line in shown]
        _emit(named, as_json, lambda: _table("", ("row", "pictures", "state"), shown))
        return
    from edgekit.pipeline import comparison

    found = comparing.compare(planned)
    written = comparison.write(found, planned.folder)
    _emit({"comparison": found, "files": written}, as_json, lambda: _print_comparison(found, written))


@cli.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "-m",
    "--model",
    default="nano",
    show_default=True,
    help="Bundle, run folder, shipped name, ONNX file or torch class.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of a package.module:Class.")
@click.option("--sigma", default=25.0, show_default=True, type=_Finite(0, 255), help="Noise level, 0 to 255.")
@click.option("--add-noise", is_flag=True, help="Add this noise first, to try the model on a clean picture.")
@_output_option("Result [default: <image>.denoised.png].")
@_json_option
def denoise(
    image: Path, model: str, weights: Path | None, sigma: float, add_noise: bool, output: Path | None, as_json: bool
) -> None:
    """Denoise one picture. A MODEL for gray makes a picture in colour gray: for colour, -m base-color.

    \b
    edgekit denoise photo.png --sigma 15
    edgekit denoise photo.png -m base-color
    edgekit denoise photo.png -m runs/quickstart/bundles/linux-x86_64
    """
    if not image.is_file():
        raise InputError(f"{image}: {'is not a file' if image.exists() else 'no such picture'}")
    from edgekit.data import photos
    from edgekit.pipeline import denoise as denoising

    to = _place(output or image.with_name(f"{image.stem}.denoised.png"))
    if to.exists() and to.samefile(image):
        raise InputError(f"{to}: is the noisy picture itself", remedy="choose another place with -o")
    opened = denoising.open_model(model, weights=weights)
    path = denoising.denoise_file(opened, image, to, sigma255=sigma, add_noise=add_noise)
    if opened.channels == 1 and photos.has_colour(image):
        log.warning("note: '%s' is for gray, so the result is gray; for colour: -m base-color", model)
    _emit({"output": str(path), "how": opened.how}, as_json, lambda: click.echo(path))


@cli.command()
@click.argument("model")
@click.option("-t", "--target", "target_name", metavar="TARGET", help="Leave out what this target does not mind.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Option of the network.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of a package.module:Class; not needed.")
@_json_option
def lint(model: str, target_name: str | None, options: tuple[str, ...], weights: Path | None, as_json: bool) -> None:
    """Say what will hurt in a network, with what it was measured to cost, before anything is trained.

    \b
    edgekit lint base --option activation=hardswish --option se=true -t linux-x86_64
    edgekit lint my_package.nets:Denoiser
    """
    from edgekit import config, target
    from edgekit.pipeline import lint as linting

    chosen = target.load(target_name) if target_name else None
    findings = linting.lint(model, chosen, options=config.options(options), weights=weights)
    rows = [(f.rule, f.what, f.cost, f.advice) for f in findings]
    nothing = f"{model}: nothing found that would hurt" + (f" on {target_name}" if target_name else "")
    _emit(
        findings,
        as_json,
        lambda: _table("", ("rule", "what", "measured", "advice"), rows) if rows else click.echo(nothing),
    )


@cli.command()
@click.argument("model")
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime", "openvino"]),
    default="openvino",
    show_default=True,
    help="Timed here.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="Weights of a package.module:Class.")
@_output_option("Folder of the table and the plot [default: sensitivity/<model>-<engine>].")
@_model_settings_option("calibration pictures, noise, quantization")
@_json_option
def sensitivity(
    model: str,
    engine: Literal["onnxruntime", "openvino"],
    weights: Path | None,
    output: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure what each layer of a network costs in INT8: dB on held-out pictures, milliseconds on this machine.

    \b
    edgekit sensitivity nano --engine onnxruntime
    edgekit sensitivity mynet.onnx --set data.calibration=photos
    """
    from edgekit.compress.sensitivity import markdown, write
    from edgekit.pipeline import sensitivity as measuring

    _place((output or Path("sensitivity") / "table") / "sensitivity.json")
    name, found = measuring.of_model(model, engine, weights=weights, overrides=overrides)
    files = write(found, output or Path("sensitivity") / f"{name}-{engine}", name)
    _emit(
        {"table": found, "files": files},
        as_json,
        lambda: click.echo(f"{markdown(found, name)}\n{files[0].parent}"),
    )


@cli.command()
@_recipe_argument
@_targets_option
@_output_option("Run folder [default: runs/<recipe>].")
@_settings_option
@_json_option
def plan(
    recipe_name: str, targets: tuple[str, ...], output: Path | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Show what a run would do.

    RECIPE is a name of `edgekit recipes`, or a YAML file.

    \b
    edgekit plan quickstart -t android-arm64
    """
    from edgekit import recipe, target

    _show_plan(recipe.load(recipe_name, overrides), [target.load(t) for t in targets], output, as_json)


@cli.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Show which engines and tools are here, and what to install for the others.

    \b
    edgekit doctor
    """
    from edgekit.pipeline import doctor as examining

    findings = examining.examine()
    rows = [(f.name, "yes" if f.found else "no", f.detail, f.fix) for f in findings]
    _emit(findings, as_json, lambda: _table("", ("what", "here", "detail", "to install"), rows))


@cli.command()
@_shipped_argument
@_json_option
def targets(name: str | None, as_json: bool) -> None:
    """List the shipped targets, or print the file of one, to write one of your own from.

    \b
    edgekit targets
    edgekit targets android-arm64 > mine.yaml
    """
    from edgekit import target

    if name is not None:
        _print_shipped(name, "target", as_json)
        return
    loaded = [target.load(name) for name in target.names()]
    rows = [(t.name, t.engine, t.precision, t.runner.kind, t.student or "-", t.description) for t in loaded]
    heads = ("target", "engine", "precision", "runner", "student", "description")
    _emit(loaded, as_json, lambda: _table("", heads, rows))


@cli.command()
@_shipped_argument
@_json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the shipped recipes, or print the file of one, to write one of your own from.

    \b
    edgekit recipes
    edgekit recipes student-small > mine.yaml
    """
    from edgekit import recipe

    if name is not None:
        _print_shipped(name, "recipe", as_json)
        return
    loaded = [recipe.load(name) for name in recipe.names()]
    rows = [(r.name, r.student.model, r.teacher.model if r.teacher else "-", r.description) for r in loaded]
    _emit(loaded, as_json, lambda: _table("", ("recipe", "student", "teacher", "description"), rows))


@cli.command()
@_json_option
def models(as_json: bool) -> None:
    """List the networks, and what the shipped weights reach.

    \b
    edgekit models
    """
    from edgekit import models as networks
    from edgekit import zoo

    cards = {name: zoo.card(name) for name in zoo.names()}
    rows, named = [], []
    variants = {name: [n for n, card in cards.items() if card.model == name != n] for name in networks.names()}
    for name in [each for network in networks.names() for each in (network, *variants[network])]:
        measured = cards[name].measured if name in cards else ()
        psnr_mdb = {m.pictures: m.psnr_mdb for m in measured if m.sigma == 25}
        count = cards[name].parameters if name in cards else networks.parameter_count(networks.create(name))
        named.append({"name": name, "parameters": count, "shipped": name in cards, "sigma_25_psnr_mdb": psnr_mdb})
        figures = "; ".join(f"{mdb / 1000:.2f} dB on {pictures}" for pictures, mdb in psnr_mdb.items())
        rows.append((name, f"{count:,}", "yes" if name in cards else "no", figures))
    draws = max(m.seeds for card in cards.values() for m in card.measured)
    header = ("model", "parameters", "weights shipped", f"PSNR at sigma 25, mean of {draws} draws of the noise")
    _emit(named, as_json, lambda: _table("", header, rows))


@cli.command()
@click.argument("kind", type=click.Choice(["recipe", "target"]))
def schema(kind: str) -> None:
    """Print the JSON Schema of a recipe or a target, for an editor.

    \b
    edgekit schema recipe > recipe.schema.json
    """
    from edgekit import config
    from edgekit.recipe import Recipe
    from edgekit.target import Target

    found = config.json_schema(Recipe) if kind == "recipe" else config.json_schema(Target)
    click.echo(json.dumps(found, indent=2))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the lines that switch on completion in a shell.

    \b
    edgekit completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "edgekit", "_EDGEKIT_COMPLETE").source())


def main() -> None:
    """Run the command line; a failure is one line on stderr (click's own, of usage, a few) and its exit code."""
    try:
        _heed_termination()
        code = cli.main(prog_name="edgekit", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        code = _interrupted(error)
    except click.ClickException as error:
        error.show()
        code = 2
    except EdgekitError as error:
        code = _failed(error)
    except OSError as error:
        code = _failed(_refused(error))
    except Exception as error:
        # Any other error is a defect of edgekit's own, and keeps its traceback.
        if not is_out_of_memory(error):
            raise
        code = _failed(InputError("memory ran out", remedy="take smaller pictures, a smaller model or more memory"))
    except SystemExit as error:
        # So click and rich leave when nobody reads stdout any more; a verdict that was not read did not pass.
        code = BROKEN_PIPE if error.code == 1 else error.code
    sys.exit(code if isinstance(code, int) else 0)


def _heed_termination() -> None:
    """Let SIGTERM, and the end of the terminal unless `nohup` has it ignored, end a command as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated(number)


def _interrupted(error: BaseException) -> int:
    """Say that a command was interrupted, and return its exit code; click has its own error around the real one."""
    click.echo("interrupted; start the same command again to go on", err=True)
    # Not its __cause__, which click 8.1.0 does not name.
    cause = error.__context__ if isinstance(error, click.exceptions.Abort) else error
    return cause.exit_code if isinstance(cause, _Terminated) else INTERRUPTED


def _refused(error: OSError) -> InputError:
    """Return what the system refused as a clear line, or raise it again where it is a defect of edgekit's own."""
    from edgekit import files

    if error.errno in files.NO_SPACE:
        return InputError("no space is left on the disk", remedy="free some and start the same command again")
    if error.errno in files.REFUSED and error.filename:
        return InputError(
            f"{error.filename}: {error.strerror}", remedy="name another file, or allow access to this one"
        )
    raise error


def _failed(error: EdgekitError) -> int:
    if log.isEnabledFor(logging.DEBUG):
        log.exception("traceback")
    click.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
    return error.exit_code


def _place(path: Path, bundle: Path | None = None) -> Path:
    """Return where a result goes, after a look at whether it can go there, before anything is measured.

    Raises:
        InputError: It cannot be written there, or lies in the bundle that it is about.
    """
    from edgekit import files

    if bundle is not None and bundle.resolve() in path.resolve().parents:
        raise InputError(
            f"{path}: lies in the bundle {bundle}, which is never written to", remedy="choose another place with -o"
        )
    files.refuse_unwritable(path)
    return path


def _emit(result: object, as_json: bool, show: Callable[[], object]) -> None:
    """Print a result for a person, or as JSON for a program."""
    if not as_json:
        show()
        return
    plain = _plain(result)
    body = plain if isinstance(plain, dict) else {"items": plain}
    click.echo(json.dumps({"schema_version": JSON_SCHEMA_VERSION, **body}, indent=2, default=str))


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value


def _show_plan(
    loaded: Recipe, wanted: Sequence[Target], output: Path | None, as_json: bool, *, overwrite: bool = False
) -> None:
    from edgekit.pipeline import plan as planning

    _print_steps(planning.plan(loaded, wanted, output, overwrite=overwrite), as_json)


def _print_steps(steps: Sequence[Step], as_json: bool) -> None:
    _emit(steps, as_json, lambda: _table("", ("step", "what", "state"), [(s.name, s.what, s.state) for s in steps]))


def _print_shipped(name: str, kind: Kind, as_json: bool) -> None:
    from edgekit import config, recipe, target

    path = config.shipped_file(name, kind)
    loaded = target.load(name) if kind == "target" else recipe.load(name)
    _emit(loaded, as_json, lambda: click.echo(path.read_text(encoding="utf-8"), nl=False))


def _say_targets(model: str, names: list[str]) -> None:
    click.echo(f"would compile {model} for {', '.join(names)}")


def _exit_with(context: click.Context, reports: Sequence[Report], allow_unverified: bool) -> None:
    from edgekit import report

    context.exit(report.exit_code([r.verdict for r in reports], allow_unverified=allow_unverified))


def _progress() -> AbstractContextManager[Callable[[Moment], None]]:
    from edgekit.display import training_progress

    return training_progress()


def _print_distilled(result: Distilled) -> None:
    from edgekit.display import print_distilled

    print_distilled(result)


def _print_compiled(result: Compiled) -> None:
    for name, path in result.bundles.items():
        click.echo(f"{name}: {path}")
        if found := result.audits.get(name):
            click.echo("".join(f"  {line}\n" for line in found.lines()), nl=False)


def _print_reports(reports: Sequence[Report]) -> None:
    from edgekit.display import print_report

    for report in reports:
        print_report(report)


def _print_comparison(found: Comparison, written: Written) -> None:
    from edgekit.display import print_comparison

    print_comparison(found, written)


def _print_measurement(measured: Measurement, written: Path | None) -> None:
    from edgekit.display import print_measurement

    print_measurement(measured, written)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from edgekit.display import print_table

    print_table(title, header, rows)
