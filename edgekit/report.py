"""Verdicts: what a limit asked for, what was measured, and what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from edgekit.errors import INCOMPLETE, LIMIT_FAILED, OK

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

    psnr_mdb: Thousandths of a dB. drop_mdb: PSNR lost since the row above that it was made from. ssim_e5: 1e-5.
    latency_us: Median, one picture of the stated shape, one thread. how: What ran it.
    """

    name: str
    how: str
    sha256: str
    psnr_mdb: int | None = None
    drop_mdb: int | None = None
    ssim_e5: int | None = None
    latency_us: int | None = None
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A latency of the FP32 teacher that `edgekit baseline` recorded, perhaps elsewhere: it decides nothing."""

    teacher: str
    device: str
    height: int
    width: int
    arithmetic: str
    median_us: int
    date: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `edgekit verify` found out about one bundle."""

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
