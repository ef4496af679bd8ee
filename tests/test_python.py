"""docs/python.md is true: its programs run, with a small recipe in place of the shipped one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from edgekit import bundle, recipe, target
from edgekit.errors import InputError
from edgekit.pipeline import compile as compiling
from edgekit.pipeline import denoise, distill, plan, verify, whole

TEXT = Path(__file__).parent.parent.joinpath("docs/python.md").read_text(encoding="utf-8")


def test_the_programs_of_the_page_run(tiny, capsys):
    assert '"quickstart", overrides=("training.steps=100",)' in TEXT
    first, second = (
        block.replace('"quickstart", overrides=("training.steps=100",)', f'"{tiny}", overrides=("training.steps=2",)')
        for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    )
    names: dict[str, object] = {}
    exec(compile(first, "docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert re.search(r"^student \d\d\.\d\d dB, noisy \d\d\.\d\d dB\nlinux-x86_64 (pass|fail|incomplete)\n", said)
    assert "\n  int8_drop_db: " in said
    exec(compile(second, "docs/python.md", "exec"), names)
    assert names["denoised"].shape == names["noisy"].shape == (1, 1, 300, 451)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_be_of_either_kind(tiny, leaves, kind):
    settings, wanted = recipe.load(kind(tiny)), target.load("onnx")
    assert [step.state for step in plan.plan(settings, [wanted], kind("made"))][:2] == ["to do", "to do"]
    assert distill.distill(settings, kind("made")).folder == Path("made")
    path = compiling.compile_model(kind("made"), [wanted]).bundles["onnx"]
    report = verify.verify(kind(path), settings=verify.Settings(seconds=0.1), records=[])
    assert verify.write(report, kind("report.json")).is_file()
    assert bundle.report_path(kind(path)).name == "onnx.report.json"
    picture = next(leaves.iterdir())
    opened = denoise.open_model(kind(path))
    assert denoise.denoise_file(opened, kind(picture), kind("out.png"), sigma255=25).is_file()
    found = whole.run_recipe(settings, [wanted], kind("made"), settings=verify.Settings(seconds=0.1))
    assert found.compiled.bundles["onnx"] == path


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param((1, 1, 40, 40), np.uint8, id="bytes"),
        pytest.param((1, 1, 40, 40), np.float64, id="float64"),
        pytest.param((1, 3, 40, 40), np.float32, id="colour"),
        pytest.param((2, 1, 40, 40), np.float32, id="two"),
        pytest.param((40, 40), np.float32, id="a plane"),
        pytest.param((1, 1, 0, 40), np.float32, id="none"),
    ],
)
@pytest.mark.parametrize("tile", [None, (32, 32)], ids=["any size", "tiles"])
def test_what_is_no_picture_in_float32_is_refused_and_not_denoised_otherwise(tile, shape, kind):
    opened = dataclasses.replace(denoise.open_model("nano"), tile=tile)
    with pytest.raises(InputError, match=r"not as \(1, 1, h, w\) in float32"):
        opened(np.zeros(shape, kind), 25 / 255)
