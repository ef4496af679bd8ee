"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from edgekit.pipeline.comparison import Comparison, Written
    from edgekit.pipeline.distill import Distilled
    from edgekit.report import Report, Verdict
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
    psnr = "" if moment.psnr_db != moment.psnr_db else f"held out {moment.psnr_db:.2f} dB, "
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
    if result.kept == "start":
        why = result.harmed or "training did not better the starting weights, which were kept"
        _console().print(f"note: {why}", style="yellow", highlight=False)


def print_report(report: Report) -> None:
    """Print a verdict: the ledger, the recorded baselines, and every limit."""
    rows = [
        (
            row.name,
            row.how,
            "" if row.psnr_mdb is None else f"{row.psnr_mdb / 1000:.3f}",
            "" if row.drop_mdb is None else f"{row.drop_mdb / 1000:+.3f}",
            "" if row.ssim_e5 is None else f"{row.ssim_e5 / 1e5:.4f}",
            "" if row.latency_us is None else f"{row.latency_us / 1000:.2f}",
            "" if row.size_bytes is None else f"{row.size_bytes / 2**20:.2f}",
        )
        for row in report.rows
    ]
    rows += [
        (
            f"{r.teacher} FP32",
            f"{r.device}, {r.height}x{r.width}, recorded {r.date[:10]}",
            "",
            "",
            "",
            f"{r.median_us / 1000:.2f}",
            "",
        )
        for r in report.baselines
        if r.arithmetic == "float32"
    ]
    header = ("what", "how", "PSNR dB", "drop dB", "SSIM", "ms", "MiB")
    print_table(f"{report.target}: {report.model}", header, rows)
    limits = [(x.name, x.limit, x.measured, _coloured(x.verdict), x.reason) for x in report.limits]
    print_table("", ("limit", "asked", "measured", "verdict", "why"), limits)
    _console().print(Text(f"{report.target}: ") + _coloured(report.verdict) + Text("\n"))


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
