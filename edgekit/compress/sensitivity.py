"""Which layers an INT8 graph loses its dB in, and which it spends its time in: a table, a plot and their figures."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnx

from edgekit.compress.budget import Judge, Loss, layers
from edgekit.compress.placement import Placement, release
from edgekit.files import atomic_file, write_json
from edgekit.graph.cost import macs_by_node

log = logging.getLogger(__name__)
_SIDE = 256
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """One convolution or addition, or all additions of one resolution, as in `budget.Layer`.

    alone_udb: Loss in millionths of a dB when nothing else is rounded.
    gain_udb: How much less the whole INT8 graph loses when this is in float; below nothing where its error makes up for
        another's.
    macs_permille: Its share of the multiply-accumulates. time_us: In the engine, in INT8; None where not measured.
    """

    layer: str
    alone_udb: int
    gain_udb: int
    macs_permille: int
    time_us: int | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """The layers, those with the largest gain first, and the loss of the graph that is all in INT8.

    measured: Of which weights, when, on what and how, for the file.
    """

    placement: str
    loss: Loss
    rows: tuple[Sensitivity, ...]
    measured: Mapping[str, object] = field(default_factory=dict)


def sensitivity(
    quantized: onnx.ModelProto,
    floating: onnx.ModelProto,
    placement: tuple[str, Placement],
    judge: Judge,
    *,
    times_us: Mapping[str, int] | None = None,
    pictures: int = 4,
) -> Table:
    """Return what each layer of a QDQ graph costs in dB, and in time where that was measured.

    Args:
        quantized: The graph, all of it in INT8.
        floating: The float graph that it was made from.
        placement: Name and placement of the graph.
        judge: Measures.
        times_us: Node -> time in the engine.
        pictures: Of the judge's pictures, how many are looked at.
    """
    found = layers(quantized, floating, placement[1], judge, pictures=pictures)
    macs, every = macs_by_node(floating, _SIDE, _SIDE), [name for layer in found for name in layer.nodes]
    rows = []
    for layer in found:
        alone = release(quantized, set(every) - set(layer.nodes), placement[1], floating)
        timed = [times_us[name] for name in layer.nodes if name in times_us] if times_us else []
        rows.append(
            Sensitivity(
                layer=layer.name,
                alone_udb=round(judge.distance_udb(alone, pictures)),
                gain_udb=layer.harm_udb,
                macs_permille=round(1000 * layer.integer_macs / sum(macs.values())),
                time_us=sum(timed) if timed else None,
            )
        )
    rows.sort(key=lambda row: (-row.gain_udb, row.layer))
    return Table(placement=placement[0], loss=judge.loss(quantized), rows=tuple(rows))


def write(table: Table, folder: Path, title: str) -> tuple[Path, ...]:
    """Write `sensitivity.json`, `.md` and, where matplotlib is installed, `.png` into a folder and return them.

    Raises:
        InputError: The disk is full, or the folder cannot be written to.
    """
    record, page, plot = folder / "sensitivity.json", folder / "sensitivity.md", folder / "sensitivity.png"
    write_json(record, asdict(table))
    with atomic_file(page) as temporary:
        temporary.write_text(markdown(table, title), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no plot: matplotlib is not installed; run: pip install 'edgekit[plot]'")
        plot.unlink(missing_ok=True)
        return record, page
    with atomic_file(plot) as temporary:
        _plot(table.rows[:_SHOWN], title, temporary)
    return record, page, plot


def markdown(table: Table, title: str) -> str:
    """Return the table as a page."""
    lines = [
        f"# {title}: what INT8 costs, layer by layer ({table.placement})",
        "",
        f"All in INT8 it loses {table.loss.mean_mdb / 1000:.3f} dB, {table.loss.worst_mdb / 1000:.3f} on the worst "
        "picture.",
        "",
        "| layer | dB gained by float | dB lost alone in INT8 | MACs, % | INT8, ms |",
        "|---|---|---|---|---|",
    ]
    for row in table.rows:
        time = "" if row.time_us is None else f"{row.time_us / 1000:.2f}"
        layer = " ".join(row.layer.replace("|", "\\|").splitlines())
        lines.append(
            f"| {layer} | {row.gain_udb / 1e6:+.4f} | {row.alone_udb / 1e6:.4f} "
            f"| {row.macs_permille / 10:.1f} | {time} |"
        )
    return "\n".join(lines) + "\n"


def _plot(rows: Sequence[Sensitivity], title: str, path: Path) -> None:
    # Drawing is the one thing that needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.3 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh([p - 0.2 for p in places], [row.gain_udb / 1e6 for row in rows], 0.4, label="gained by float")
    axes.barh([p + 0.2 for p in places], [row.alone_udb / 1e6 for row in rows], 0.4, label="lost alone in INT8")
    axes.set_yticks(list(places), [row.layer for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("dB")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, format="png", metadata={"Software": None})
