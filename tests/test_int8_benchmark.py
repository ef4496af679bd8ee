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
from edgekit.pipeline import networks


@pytest.fixture(scope="module")
def int8() -> ModuleType:
    return tiny.script("benchmarks/int8.py")


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "nano.json"
    engines = {"onnx": {"row": 1}, "linux-x86_64": {"row": 2}}
    card = zoo.card("nano")
    made_alike = {"weights_sha256": card.sha256, "settings": [], "protocol": "for 8 s"}
    write_json(path, {**made_alike, "engines": engines, "host": asdict(host.describe())})
    return path


def test_rows_of_the_same_weights_and_processor_stay_unless_they_are_measured_now(int8: ModuleType, record: Path):
    assert int8.kept(record, "nano", ["onnx"], [], "for 8 s") == {"linux-x86_64": {"row": 2}}
    assert int8.kept(record, "base", ["onnx"], [], "for 8 s") == {}


def test_rows_of_other_settings_or_another_protocol_do_not_stay_under_the_new_ones(int8: ModuleType, record: Path):
    assert int8.kept(record, "nano", ["onnx"], ["budgets.int8_worst_db=0.1"], "for 8 s") == {}
    assert int8.kept(record, "nano", ["onnx"], [], "for 15 s") == {}


def test_students_are_those_whose_pictures_are_gray(int8: ModuleType):
    left_out = set(zoo.names()) - set(int8.students())
    assert left_out == {"teacher", *(name for name in zoo.names() if networks.shipped(name).net.channels == 3)}
    assert "base-color" in left_out


@pytest.mark.parametrize("changed", ["model", "features"])
def test_rows_of_another_processor_do_not_stay(int8: ModuleType, record: Path, changed: str):
    before = json.loads(record.read_text(encoding="utf-8"))
    cpu = before["host"]["cpu"]
    cpu[changed] = cpu[changed][:-1] if cpu[changed] else ["avx2"]
    record.write_text(json.dumps(before), encoding="utf-8")
    assert int8.kept(record, "nano", ["onnx"], [], "for 8 s") == {}


def test_rows_of_another_version_of_an_engine_do_not_stay_under_todays(int8: ModuleType, record: Path):
    before = json.loads(record.read_text(encoding="utf-8"))
    before["host"]["packages"]["onnxruntime"] = "1.1.0"
    record.write_text(json.dumps(before), encoding="utf-8")
    assert int8.kept(record, "nano", ["linux-x86_64"], [], "for 8 s") == {}


def test_rows_of_another_machine_alike_do_not_stay(int8: ModuleType, record: Path):
    before = json.loads(record.read_text(encoding="utf-8"))
    before["host"]["kernel"] += "-another"
    record.write_text(json.dumps(before), encoding="utf-8")
    assert int8.kept(record, "nano", ["onnx"], [], "for 8 s") == {}
