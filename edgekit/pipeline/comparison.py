"""The method table as files: Markdown to read, JSON to compute with, a plot to look at."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgekit.files import atomic_file, write_json
from edgekit.measure.latency import Ratio
from edgekit.pipeline import pages

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA_VERSION = 1
TABLE, RECORD, PLOT = "table.md", "comparison.json", "plot.png"
Arithmetic = Literal["", "float32", "float16", "int8", "int8-dynamic"]
_NONE = "–"
_COLOURS: dict[Arithmetic, str] = {
    "": "tab:gray",
    "float32": "tab:blue",
    "float16": "tab:green",
    "int8": "tab:orange",
    "int8-dynamic": "tab:red",
}
_ARITHMETIC: dict[Arithmetic, str] = {
    "": "",
    "float32": "FP32",
    "float16": "FP16",
    "int8": "INT8",
    "int8-dynamic": "dynamic INT8",
}
_NO_PLOT = "matplotlib is not installed; run: pip install 'edgekit[plot]'"
_MARKERS = {"onnxruntime": "o", "openvino": "s", "apache-tvm": "^"}
# Area in square points of the largest file on the plot; the others are in proportion.
_LARGEST_AREA = 2500.0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Quality at one noise level: thousandths of a dB, hundred-thousandths, and values that came out not finite."""

    sigma255: float
    psnr_mdb: int
    ssim_e5: int
    nonfinite_pixels: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in one engine. None where there is nothing to tell, as the parameters of non-local means.

    arithmetic: Empty for methods that are no network. engine: With its version.
    target: Whose artifact it is; empty for what no target made.
    pictures: Which of the comparison's picture sets it was measured on.
    figures: One for each noise level that it was measured at.
    parameters, macs_256: Of the float graph, multiply-accumulates for 256x256. integer_macs_permille: Share of them
        that the engine computes in integers, in thousandths.
    latency_us: Median for one picture of 256x256. reference_us: Of the reference, between this row's runs.
    speedup: How many times the reference's time is this row's, pair by pair; slowdown: The same the other way round,
        for thousandths say little of a small ratio.
    size_bytes: Of the files that an app ships. sha256: Of these files.
    reason: Why the row, or a part of it, was not run; empty where all of it was. notes: What a reader must know.
    """

    name: str
    arithmetic: Arithmetic
    engine: str
    pictures: str
    target: str = ""
    figures: tuple[Figure, ...] = ()
    parameters: int | None = None
    macs_256: int | None = None
    integer_macs_permille: int | None = None
    latency_us: int | None = None
    reference_us: int | None = None
    speedup: Ratio | None = None
    slowdown: Ratio | None = None
    size_bytes: int | None = None
    sha256: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name, arithmetic, engine and target in one line."""
        return ", ".join(part for part in (self.name, shown_arithmetic(self), self.engine, self.target) if part)

    def figure(self, sigma255: float) -> Figure | None:
        """Return the quality at a noise level; None if it was not measured."""
        return next((f for f in self.figures if f.sigma255 == sigma255), None)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A set of pictures that rows were measured on. sha256: `sets.digest`."""

    name: str
    sha256: str
    count: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The whole table and everything that its figures depend on.

    reference: Title of the row that the others' latency is measured against; empty where nothing could be timed.
    pairs: Runs of each row between runs of the reference, at least. seconds: Time for each row's runs.
    host: `host.describe`.
    """

    rows: tuple[Row, ...]
    pictures: tuple[Pictures, ...]
    sigmas: tuple[float, ...]
    seeds: tuple[int, ...]
    threads: int
    seconds: float
    pairs: int
    reference: str
    protocol: str
    host: Mapping[str, object]
    edgekit: str
    date: str

    def unfinished(self) -> list[Row]:
        """Return the rows that were not run, or not wholly."""
        return [row for row in self.rows if row.reason]


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where the files of a comparison lie. plot: None where none was drawn; no_plot then says why."""

    table: Path
    record: Path
    plot: Path | None
    no_plot: str


def write(comparison: Comparison, folder: Path) -> Written:
    """Write table.md, comparison.json and plot.png into a folder, each whole or not at all; older ones are replaced.

    Raises:
        InputError: The disk is full, or the folder cannot be written to.
    """
    plot = folder / PLOT
    no_plot = _why_no_plot(comparison)
    record = {"schema_version": SCHEMA_VERSION, "kind": "edgekit-comparison", **asdict(comparison)}
    write_json(folder / RECORD, record)
    with atomic_file(folder / TABLE) as temporary:
        temporary.write_text(markdown(comparison, no_plot), encoding="utf-8")
    if no_plot:
        # A picture of other figures must not stand beside this table.
        plot.unlink(missing_ok=True)
        return Written(table=folder / TABLE, record=folder / RECORD, plot=None, no_plot=no_plot)
    with atomic_file(plot) as temporary:
        draw(comparison, temporary)
    return Written(table=folder / TABLE, record=folder / RECORD, plot=plot, no_plot="")


def markdown(comparison: Comparison, no_plot: str = "") -> str:
    """Return the page `table.md`."""
    templates = pages.environment()
    templates.filters["cell"] = _escaped
    tables = [(p, [cells(row, comparison.sigmas) for row in _of(comparison, p)]) for p in comparison.pictures]
    page: str = templates.get_template("compare.md.j2").render(
        c=comparison, header=header(comparison.sigmas), tables=tables, plot=PLOT, no_plot=no_plot
    )
    return page


def header(sigmas: Sequence[float], *, brief: bool = False) -> list[str]:
    """Return the titles of the table's columns; brief is for a terminal's width."""
    quality = [title for s in sigmas for title in (f"PSNR dB, σ {s:g}", f"SSIM, σ {s:g}")]
    if brief:
        quality = [f"dB, σ {s:g}" for s in sigmas] + [f"SSIM, σ {s:g}" for s in sigmas]
    return ["method", "arithmetic", "engine", *quality, "params", "MACs 256²", "ms 256²", "speed", "bytes"]


def cells(row: Row, sigmas: Sequence[float], *, brief: bool = False) -> list[str]:
    """Return a row as text, in the order of `header`; a dash where there is no figure.

    Brief leaves out the versions of engines, and the engines of targets, the share of integers and the bounds of the
    speed.
    """
    found = [row.figure(s) for s in sigmas]
    db = [_NONE if f is None else f"{f.psnr_mdb / 1000:.2f}" for f in found]
    ssim = [_NONE if f is None else f"{f.ssim_e5 / 1e5:.4f}" for f in found]
    shown = _ARITHMETIC[row.arithmetic] if brief else shown_arithmetic(row)
    return [
        row.name,
        shown or _NONE,
        _engine(row, brief=brief) or _NONE,
        *(db + ssim if brief else [text for pair in zip(db, ssim, strict=True) for text in pair]),
        _NONE if row.parameters is None else f"{row.parameters:,}",
        _NONE if row.macs_256 is None else f"{row.macs_256 / 1e9:.2f} G",
        _NONE if row.latency_us is None else f"{row.latency_us / 1000:.1f}",
        _speed(row, brief=brief),
        "not run" if row.reason else _NONE if row.size_bytes is None else f"{row.size_bytes:,}",
    ]


def _engine(row: Row, *, brief: bool) -> str:
    if brief:
        return row.target or row.engine.split(" ")[0]
    return f"{row.engine} ({row.target})" if row.target else row.engine


def shown_arithmetic(row: Row) -> str:
    """Return FP32, INT8 or dynamic INT8, with the share of the multiply-accumulates that are computed in integers."""
    shown = _ARITHMETIC[row.arithmetic]
    return shown if row.integer_macs_permille is None else f"{shown} ({row.integer_macs_permille / 10:.1f} % of MACs)"


def draw(comparison: Comparison, path: Path) -> None:
    """Draw PSNR against latency, one panel for each set of pictures and noise level, as a PNG.

    The area of a disc is in proportion to the files' size, the marker in it is the engine's; methods without files are
    crosses.
    """
    from matplotlib.figure import Figure as Canvas

    panels = [(p, s) for p in comparison.pictures for s in comparison.sigmas]
    canvas = Canvas(figsize=(7.5 * len(panels), 5.5), layout="constrained")
    for axes, (pictures, sigma255) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, comparison, pictures, sigma255)
    canvas.savefig(path, format="png", dpi=120)


def _panel(axes: Axes, comparison: Comparison, pictures: Pictures, sigma255: float) -> None:
    rows = _of(comparison, pictures)
    noisy = [figure for row in rows if row.speedup is None and (figure := row.figure(sigma255))]
    title = f"{pictures.name}, σ {sigma255:g}" + "".join(f", noisy {f.psnr_mdb / 1000:.2f} dB" for f in noisy[:1])
    axes.set(xscale="log", title=title, ylabel="PSNR, dB")
    axes.set_xlabel(f"ms for 256x256 here: {comparison.reference} ({_reference_ms(comparison):.0f} ms) / speed", size=8)
    timed = [(row, ms, figure) for row in rows if (ms := _ms(row, comparison)) and (figure := row.figure(sigma255))]
    largest = max((row.size_bytes or 0 for row in comparison.rows), default=0)
    points = [(row, (ms, figure.psnr_mdb / 1000)) for row, ms, figure in timed]
    for row, place in points:
        colour, engine = _COLOURS[row.arithmetic], row.engine.split(" ")[0]
        if row.size_bytes is not None:
            axes.scatter(*place, s=_LARGEST_AREA * row.size_bytes / largest, color=colour, alpha=0.35, linewidths=0)
        axes.scatter(*place, s=12, marker="x" if row.size_bytes is None else _MARKERS.get(engine, "D"), color=colour)
    _join_and_name(axes, points)
    drawn = {row.arithmetic for row, _ in points}
    for arithmetic in (a for a in _COLOURS if a in drawn):
        axes.scatter([], [], color=_COLOURS[arithmetic], label=_ARITHMETIC[arithmetic] or "no network", s=30)
    for engine in sorted({row.engine.split(" ")[0] for row, _ in points if row.size_bytes is not None}):
        axes.scatter([], [], color="black", marker=_MARKERS.get(engine, "D"), label=engine, s=12)
    axes.margins(0.12, 0.2)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(title="area: bytes of the files", title_fontsize=7, fontsize=7, loc="lower right")


def _join_and_name(axes: Axes, points: Sequence[tuple[Row, tuple[float, float]]]) -> None:
    """Join the points of each method, which differ in arithmetic and engine, and name it at its fastest one."""
    methods: dict[str, list[tuple[float, float]]] = {}
    for row, place in points:
        methods.setdefault(row.name, []).append(place)
    by_time = sorted(methods.items(), key=lambda method: min(method[1]))
    for number, (name, places) in enumerate(by_time):
        fastest, *_ = ordered = sorted(places)
        axes.plot(*zip(*ordered, strict=True), color="black", alpha=0.25, linewidth=0.6)
        axes.annotate(
            name,
            fastest,
            # Neighbours in time get different heights.
            xytext=(-6, 12 + 13 * (number % 3)),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "alpha": 0.5},
        )


def _reference_ms(comparison: Comparison) -> float:
    """Return the median of the reference's times beside all rows."""
    return statistics.median(row.reference_us for row in comparison.rows if row.reference_us is not None) / 1000


def _ms(row: Row, comparison: Comparison) -> float | None:
    """Return a row's latency as if all had been measured at one moment: the machine's drift is not drawn."""
    if row.speedup is None or row.slowdown is None:
        return None
    slowdown = 1000 / row.speedup.ratio_e3 if row.speedup.ratio_e3 >= 1000 else row.slowdown.ratio_e3 / 1000
    return _reference_ms(comparison) * slowdown


def _why_no_plot(comparison: Comparison) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return _NO_PLOT
    return "" if any(row.latency_us is not None for row in comparison.rows) else "nothing could be timed"


def _of(comparison: Comparison, pictures: Pictures) -> list[Row]:
    return [row for row in comparison.rows if row.pictures == pictures.name]


def _speed(row: Row, *, brief: bool) -> str:
    """Return how many times as fast as the reference a row is, with the bounds; below 1 as a fraction."""
    fast, slow = row.speedup, row.slowdown
    if fast is None or slow is None:
        return _NONE
    bounds = f" ({_times(fast.low_e3, slow.high_e3)} to {_times(fast.high_e3, slow.low_e3)})"
    return _times(fast.ratio_e3, slow.ratio_e3) + ("" if brief else bounds)


def _times(fast_e3: int, slow_e3: int) -> str:
    return f"{_short(fast_e3)}x" if fast_e3 >= 1000 else f"1/{_short(slow_e3)}"


def _short(e3: int) -> str:
    return f"{e3 / 1000:.{0 if e3 >= 100_000 else 1 if e3 >= 10_000 else 2}f}"


def _escaped(text: str) -> str:
    """Return text that cannot end a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").splitlines())
