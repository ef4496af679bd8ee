"""The arm64 benchmark: its tables in the docs, and what it tells engines of the emulated core."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest
import tiny

from edgekit.measure import host

pytest.importorskip("tvm")
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.backend


@pytest.fixture(scope="module")
def arm64() -> ModuleType:
    return tiny.script("benchmarks/arm64.py")


@pytest.mark.parametrize("table", ["table_of_instructions", "table_of_quality"])
def test_the_docs_hold_the_tables_of_the_records(arm64: ModuleType, table: str) -> None:
    made = getattr(arm64, table)(arm64.RESULTS)
    assert made.count("\n") > 2, "no records"
    assert made in (ROOT / "docs" / "tvm.md").read_text(encoding="utf-8"), "paste what benchmarks/arm64.py prints"


def test_another_record_makes_another_table(arm64: ModuleType, tmp_path: Path) -> None:
    records = [Path(shutil.copy(record, tmp_path)) for record in arm64.RESULTS.glob("*-quality.json")]
    docs = (ROOT / "docs" / "tvm.md").read_text(encoding="utf-8")
    assert arm64.table_of_quality(tmp_path) in docs
    records[0].write_text(records[0].read_text().replace('"psnr_mdb": 2', '"psnr_mdb": 3'))
    assert arm64.table_of_quality(tmp_path) not in docs


@pytest.mark.parametrize(("cpu", "dot_product"), [("cortex-a53", False), ("cortex-a72", False), ("cortex-a76", True)])
def test_a_core_is_described_as_linux_does_it(arm64: ModuleType, tmp_path: Path, cpu: str, dot_product: bool) -> None:
    arm64.describe_core(tmp_path, cpu)
    found = host.parse_cpuinfo((tmp_path / "proc" / "cpuinfo").read_text())
    assert found.model.startswith("implementer 0x41 part 0xd0")
    assert ("asimddp" in found.features) == dot_product
    assert "asimd" in found.features
