"""Verdicts: what a limit asked for, what was measured, and what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from edgekit.errors import INCOMPLETE, LIMIT_FAILED, OK
from edgekit.target import STRICT

Verdict = Literal["pass", "fail", "incomplete"]
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One limit and how it was kept. limit and measured are written out with their units."""

    name: str
    limit: str
    measured: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the ledger; each is measured from its own file. None where nothing was measured.

    psnr_mdb: Thousandths of a dB. drop_mdb: PSNR lost since the row above that it was made from, in the
        mean; worst_drop_mdb: on the picture that loses most. ssim_e5: 1e-5.
    latency_us: Median of one picture or tile, by the protocol's threads where the engine takes them, else by one.
    how: What ran it, and what timed it where that is another engine.
    """

    name: str
    how: str
    sha256: str
    psnr_mdb: int | None = None
    drop_mdb: int | None = None
    worst_drop_mdb: int | None = None
    ssim_e5: int | None = None
    latency_us: int | None = None
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A latency of the FP32 teacher in PyTorch that `edgekit baseline` recorded, perhaps elsewhere: it decides nothing.

    threads: Of a CPU; 0 on a GPU.
    """

    teacher: str
    device: str
    height: int
    width: int
    arithmetic: str
    threads: int
    median_us: int
    date: str

    def how(self) -> str:
        """Return what ran the teacher, for a row."""
        threads = {0: "", 1: ", 1 thread"}.get(self.threads, f", {self.threads} threads")
        return f"PyTorch on {self.device}{threads}, {self.height}x{self.width}, recorded {self.date[:10]}"


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """In microseconds. p99: None of fewer than 100 runs."""

    __pydantic_config__: ClassVar = STRICT
    p10_us: int
    p50_us: int
    p90_us: int
    p99_us: int | None


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """What `edgekit bench` measured of this very artifact on a device.

    record: Name of the file. device, soc, system: As the device tells. runner: How it was reached.
    call: Of one tile, by one thread. megapixel: Of a megapixel delivered of a picture of `side` x `side` pixels, by
        `threads` threads; None where no such picture was timed. runs, picture_runs: Behind the two.
    first_us: The first call after loading.
    psnr_mdb: Of the golden pictures as the device denoised them. agreement_mdb: With the golden outputs, the least;
        None where the bundle has none.
    """

    record: str
    device: str
    soc: str
    system: str
    runner: str
    variant: str
    threads: int
    side: int
    call: Percentiles
    runs: int
    megapixel: Percentiles | None
    picture_runs: int
    first_us: int
    psnr_mdb: int
    agreement_mdb: int | None
    date: str

    def how(self) -> str:
        """Return what ran the artifact, for a row or a limit."""
        return f"{self.device}, {self.runner} (native)"


@dataclass(frozen=True, kw_only=True)
class FloatNode:
    """A convolution or matrix product that runs in float. macs_permille: Its share of all, in thousandths."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    op: str
    macs_permille: int


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an engine computes in integers, by its own account.

    integer_macs_permille: Share of the multiply-accumulates, in thousandths, rounded down.
    float_nodes: The products that run in float, those with the largest share first.
    float_ops_between: Operator -> how many of it the engine computes in float between two integer products.
    how: Where the account comes from, with the engine's version.
    """

    __pydantic_config__: ClassVar = STRICT
    integer_macs_permille: int
    float_nodes: tuple[FloatNode, ...] = ()
    float_ops_between: Mapping[str, int] = field(default_factory=dict)
    how: str

    def in_float(self, most: int = 4) -> str:
        """Return the products in float with their shares, the largest `most` by name and the others counted."""
        named = [f"{node.name} {node.macs_permille / 10:.1f} %" for node in self.float_nodes[:most]]
        if others := self.float_nodes[most:]:
            named.append(f"{len(others)} others {sum(node.macs_permille for node in others) / 10:.1f} %")
        return ", ".join(named) or "none"

    def lines(self) -> list[str]:
        """Return the account for a reader: the share, and what runs in float if anything does."""
        found = [f"{self.integer_macs_permille / 10:.1f} % of the multiply-accumulates in integers ({self.how})"]
        if self.float_nodes and self.integer_macs_permille:
            found.append(f"in float: {self.in_float()}")
        if self.float_ops_between:
            ops = sorted(self.float_ops_between.items(), key=lambda item: (-item[1], item[0]))
            counted = ", ".join(f"{count} {op}" for op, count in ops)
            found.append(f"in float between integer products: {counted}")
        return found


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `edgekit verify` found out about one bundle.

    audit: What runs in integers, asked of the engine here; as recorded where it does not run here; None if neither.
    devices: Where the artifact was measured, by records of `edgekit bench`.
    refused: Records that decide nothing, and why.
    notes: What must be known of the artifact, the bundle's own notes first.
    """

    target: str
    model: str
    verdict: Verdict
    limits: tuple[Limit, ...]
    rows: tuple[Row, ...]
    protocol: Mapping[str, object]
    speedup: Mapping[str, object] | None
    baselines: tuple[Recorded, ...]
    host: Mapping[str, object]
    date: str
    notes: tuple[str, ...] = ()
    audit: Audit | None = None
    devices: tuple[OnDevice, ...] = ()
    refused: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """Return the report for `report.json`."""
        return {"schema_version": SCHEMA_VERSION, "kind": "edgekit-report", **asdict(self)}


def overall(limits: Sequence[Limit]) -> Verdict:
    """Return `fail` if a limit failed, else `incomplete` if one was not decided, else `pass`."""
    found = {limit.verdict for limit in limits}
    return "fail" if "fail" in found else "incomplete" if "incomplete" in found else "pass"


def exit_code(verdicts: Sequence[Verdict], *, allow_unverified: bool = False) -> int:
    """Return the exit code for several verdicts; `allow_unverified` lets incomplete ones pass."""
    if "fail" in verdicts:
        return LIMIT_FAILED
    return INCOMPLETE if "incomplete" in verdicts and not allow_unverified else OK
