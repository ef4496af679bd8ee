"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from edgekit.pipeline.comparison import Comparison, Written
    from edgekit.pipeline.distill import Distilled
    from edgekit.pipeline.measurement import Latency, Measurement
    from edgekit.report import OnDevice, Percentiles, Report, Verdict
    from edgekit.training.loop import Moment

log = logging.getLogger("edgekit")
_LINE_SECONDS = 10.0
_COLOURS = {"pass": "green", "fail": "red", "incomplete": "yellow"}


@contextmanager
def training_progress() -> Iterator[Callable[[Moment], None]]:
    """Give a function that shows where training stands: a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if log.level > logging.INFO:
        yield lambda moment: None
        return
    if not console.is_terminal:
        yield _lines()
        return
    with Progress(TextColumn("training"), BarColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda moment: bar.update(task, completed=moment.done, description=_describe(moment))


def _lines() -> Callable[[Moment], None]:
    shown_at = 0.0

    def show(moment: Moment) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at >= _LINE_SECONDS or moment.done >= 1:
            shown_at = time.monotonic()
            log.info("training: %s", _describe(moment))

    return show


def _describe(moment: Moment) -> str:
    step = f"step {moment.step}/{moment.steps}" if moment.steps else f"step {moment.step}"
    psnr = "" if math.isnan(moment.psnr_db) else f"held out {moment.psnr_db:.2f} dB, "
    left = f"{int(moment.seconds_left) // 60}:{int(moment.seconds_left) % 60:02d} left"
    return f"{step}, loss {moment.loss:.4f}, {psnr}{moment.images_per_second:.0f} images/s, {left}"


def print_distilled(result: Distilled) -> None:
    """Print what the student came to."""
    rows: list[tuple[str, int | None]] = [("noisy input", result.noisy_mdb), ("non-local means", result.nlm_mdb)]
    rows += [("starting weights", result.start_mdb), ("student", result.student_mdb), ("teacher", result.teacher_mdb)]
    shown = [(name, f"{mdb / 1000:.3f}") for name, mdb in rows if mdb is not None]
    print_table(f"{result.folder}: evaluation pictures", ("what", "PSNR dB"), shown)
    if result.teacher_refused:
        _console().print(Text(f"note: {result.teacher_refused}", style="yellow"), soft_wrap=True)
    if result.ended_by == "time" and result.steps_asked:
        said = f"the time limit ended training after {result.steps} of {result.steps_asked} steps, at a rate that had"
        remedy = "set training.max_minutes higher, or training.steps=0 to let the rate follow time"
        _console().print(Text(f"note: {said} not fallen to its end; {remedy}", style="yellow"), soft_wrap=True)
    if result.kept == "start":
        why = result.harmed or "training did not better the starting weights, which were kept"
        _console().print(Text(f"note: {why}", style="yellow"), soft_wrap=True)


def print_report(report: Report) -> None:
    """Print a verdict: the ledger, the recorded baselines, every limit, and what must be known of the artifact."""
    rows = [
        (
            row.name,
            row.how,
            "" if row.psnr_mdb is None else f"{row.psnr_mdb / 1000:.3f}",
            "" if row.drop_mdb is None else f"{row.drop_mdb / 1000:+.3f}",
            "" if row.worst_drop_mdb is None else f"{row.worst_drop_mdb / 1000:+.3f}",
            "" if row.ssim_e5 is None else f"{row.ssim_e5 / 1e5:.4f}",
            "" if row.latency_us is None else f"{row.latency_us / 1000:.2f}",
            "" if row.size_bytes is None else f"{row.size_bytes / 2**20:.2f}",
        )
        for row in report.rows
    ]
    rows += [
        (
            f"{r.teacher} FP32",
            r.how(),
            "",
            "",
            "",
            "",
            f"{r.median_us / 1000:.2f}",
            "",
        )
        for r in report.baselines
        if r.arithmetic == "float32"
    ]
    header = ("what", "how", "PSNR dB", "drop dB", "worst", "SSIM", "ms", "MiB")
    print_table(f"{report.target}: {report.model}", header, rows)
    if timed := [row for device in report.devices for row in _device_rows(device)]:
        columns = ("device", "what", "threads", "p50 ms", "p10", "p90", "p99", "runs")
        print_table("measured on devices", columns, timed)
    for reason in report.refused:
        _console().print(Text(f"not counted: {reason}", style="yellow"), soft_wrap=True)
    limits = [(x.name, x.limit, x.measured, _coloured(x.verdict), x.reason) for x in report.limits]
    print_table("", ("limit", "asked", "measured", "verdict", "why"), limits)
    if report.audit is not None:
        _console().print(Text("\n".join(report.audit.lines())), soft_wrap=True)
    for note in report.notes:
        _console().print(Text(f"note: {note}"), soft_wrap=True)
    _console().print(Text(f"{report.target}: ") + _coloured(report.verdict) + Text("\n"))


def _device_rows(device: OnDevice) -> list[tuple[str, ...]]:
    """Return the lines on one device: its tile, and its megapixel where that was timed."""
    place = ", ".join(part for part in (device.device, device.soc, device.system, device.variant) if part)
    rows = [(place, "one tile", "1", *_figures(device.call), str(device.runs))]
    if device.megapixel is not None:
        what = f"a megapixel of {device.side}x{device.side}"
        rows.append(("", what, str(device.threads), *_figures(device.megapixel), str(device.picture_runs)))
    return rows


def _figures(found: Percentiles) -> tuple[str, ...]:
    times = (found.p50_us, found.p10_us, found.p90_us, found.p99_us)
    return tuple("" if time_us is None else f"{time_us / 1000:.2f}" for time_us in times)


def print_comparison(found: Comparison, written: Written) -> None:
    """Print the method table, one for each set of pictures, what was not run and why, and where the files lie."""
    from edgekit.pipeline.comparison import cells, header

    for pictures in found.pictures:
        rows = [cells(row, found.sigmas, brief=True) for row in found.rows if row.pictures == pictures.name]
        print_table(f"{pictures.name}: {pictures.count} pictures", header(found.sigmas, brief=True), rows)
    for row in found.unfinished():
        _console().print(Text(f"not run: {row.title}: {row.reason}", style="yellow"), soft_wrap=True)
    if written.no_plot:
        _console().print(Text(f"no plot: {written.no_plot}", style="yellow"), soft_wrap=True)
    for path in (written.table, written.record, written.plot):
        if path is not None:
            _console().print(Text(str(path)), soft_wrap=True)


def print_measurement(measured: Measurement, written: Path | None = None) -> None:
    """Print what an artifact does on a device, what it costs, and where the record lies."""
    shape, quality, cost = measured.shape, measured.quality, measured.cost
    agreement = "no golden outputs" if quality.agreement_mdb is None else f"{quality.agreement_mdb / 1000:.1f} dB"
    psnr = f"{quality.psnr_mdb / 1000:.3f} dB, {quality.pictures} golden pictures at noise level {quality.sigma255:g}"
    rows = [
        ("device", _device(measured)),
        ("features", ", ".join(measured.features) or "not told"),
        ("variant", f"{measured.variant}, {measured.precision}"),
        ("one call", f"{shape.width}x{shape.height} pixels, halo {shape.halo}"),
        *_latency_rows(measured.latency),
        ("PSNR", psnr),
        ("agreement with golden outputs", agreement),
        ("MACs of a call", f"{cost.macs:,}"),
        ("file", f"{cost.artifact_bytes:,} bytes"),
    ]
    if measured.emulated_us is not None:
        rows.insert(4, ("time of a call", f"{measured.emulated_us / 1e6:.2f} s, emulated, not a latency"))
    if cost.arena_bytes is not None:
        rows.append(("arena", f"{cost.arena_bytes:,} bytes"))
    if cost.peak_memory_kib is not None:
        rows.append(("peak memory of the program", f"{cost.peak_memory_kib / 1024:.1f} MiB"))
    found = cost.instructions
    counted = f"{found.per_call:,} ({found.cpu}, one thread)" if found else f"not counted: {cost.instructions_reason}"
    rows.append(("instructions of a call", counted))
    print_table(f"{measured.target}: {measured.model}", ("what", "measured"), rows)
    if written is not None:
        _console().print(Text(str(written)), soft_wrap=True)


def _device(measured: Measurement) -> str:
    facts = measured.before
    heat = [f"{t / 1000:.0f} C" for t in (facts.temperature_mc, measured.after.temperature_mc) if t is not None]
    parts = (facts.model, facts.soc, facts.cpu, facts.system, " to ".join(heat), f"by {measured.device}")
    return ", ".join(part for part in parts if part)


def _latency_rows(latency: Latency | None) -> list[tuple[str, str]]:
    if latency is None:
        return []
    rows = [(f"latency of a call, 1 thread, {latency.runs} runs", _percentiles(latency.call))]
    if latency.megapixel is not None:
        threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
        how = f"{latency.side}x{latency.side}, {threads}, {latency.picture_runs} runs"
        rows.append((f"latency of a delivered megapixel, {how}", _percentiles(latency.megapixel)))
    loaded = "" if latency.load_us is None else f"loaded in {latency.load_us / 1000:.2f} ms, "
    return [*rows, ("first call", f"{loaded}{latency.first_us / 1000:.2f} ms")]


def _percentiles(found: Percentiles) -> str:
    shown = f"p50 {found.p50_us / 1000:.2f} ms, p10 {found.p10_us / 1000:.2f}, p90 {found.p90_us / 1000:.2f}"
    return shown if found.p99_us is None else f"{shown}, p99 {found.p99_us / 1000:.2f}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """Print a table on stdout; text is shown as it is, brackets too."""
    table = Table(*header, box=box.SIMPLE_HEAD, show_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console = _console()
    if title:
        console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(table)


def _coloured(verdict: Verdict) -> Text:
    return Text(verdict, style=_COLOURS[verdict])


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)
