"""benchmarks/int8.py: which rows of an earlier record stay."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import tiny

from edgekit import zoo
from edgekit.files import write_json
from edgekit.measure import host


@pytest.fixture(scope="module")
def int8() -> ModuleType:
    return tiny.script("benchmarks/int8.py")


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "nano.json"
    engines = {"onnx": {"row": 1}, "linux-x86_64": {"row": 2}}
    card = zoo.card("nano")
    write_json(path, {"weights_sha256": card.sha256, "engines": engines, "host": asdict(host.describe())})
    return path


def test_rows_of_the_same_weights_and_processor_stay_unless_they_are_measured_now(int8: ModuleType, record: Path):
    assert int8.kept(record, "nano", ["onnx"]) == {"linux-x86_64": {"row": 2}}
    assert int8.kept(record, "base", ["onnx"]) == {}


@pytest.mark.parametrize("changed", ["model", "features"])
def test_rows_of_another_processor_do_not_stay(int8: ModuleType, record: Path, changed: str):
    before = json.loads(record.read_text(encoding="utf-8"))
    cpu = before["host"]["cpu"]
    cpu[changed] = cpu[changed][:-1] if cpu[changed] else ["avx2"]
    record.write_text(json.dumps(before), encoding="utf-8")
    assert int8.kept(record, "nano", ["onnx"]) == {}
