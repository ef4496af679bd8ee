import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import LIMITS, write_target

from edgekit import config, recipe, target
from edgekit.data.noise import add_gaussian
from edgekit.errors import InputError, IntegrityError
from edgekit.recipe import Recipe
from edgekit.target import Target

NAMES = "a folder is called like it: use letters, digits, '-', '_' and '.', a letter or digit first"


def refusal(path: Path, *overrides: str) -> str:
    """Return what loading a recipe is refused with, without the path in front."""
    with pytest.raises(InputError) as refused:
        recipe.load(path, overrides)
    message = str(refused.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}:")


def line_of(path: Path, text: str) -> int:
    """Return the last line of a file that holds a text."""
    return [n for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1) if text in line][-1]


def replaced(path: Path, old: str, new: str) -> Path:
    """Return the file, with a text in it replaced."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe.names())
def test_a_shipped_recipe_loads_and_bears_its_own_name(name):
    assert recipe.load(name).name == name


@pytest.mark.parametrize("name", target.names())
def test_a_shipped_target_loads_and_bears_its_own_name(name):
    assert target.load(name).name == name


def test_there_are_shipped_recipes_and_targets():
    assert "quickstart" in recipe.names()
    assert {"android-arm64", "ios-arm64", "linux-x86_64", "onnx"} <= set(target.names())


def test_a_recipe_is_what_its_file_says(tiny):
    loaded = recipe.load(tiny)
    assert (loaded.name, loaded.training.steps, loaded.training.precision) == ("tiny", 3, "float32")
    assert loaded.noise == recipe.Noise()


def test_a_name_that_is_not_shipped_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match="unknown target 'android-arm46'; did you mean 'android-arm64'"):
        target.load("android-arm46")


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
    [
        ("  steps: 3", "  stpes: 3", "stpes", "unknown key 'training.stpes'; did you mean 'steps'?"),
        ("budgets:", "bugdets:", "bugdets", "unknown key 'bugdets'; did you mean 'budgets'?"),
        ("model: nano\ndata", "modle: nano\ndata", "modle", "unknown key 'student.modle'; did you mean 'model'?"),
        ("  steps: 3", "  steps: many", " steps:", "'training.steps' is 'many'; expected a valid integer"),
        ("  steps: 3", "  steps: 3.5", " steps:", "'training.steps' is 3.5; expected a valid integer"),
        ("  steps: 3", "  steps: yes", " steps:", "'training.steps' is 'yes'; expected a valid integer"),
        ("  steps: 3", "  steps: true", " steps:", "'training.steps' is True; expected a valid integer"),
        ("  steps: 3", "  steps:", " steps:", "'training.steps' is None; expected a valid integer"),
        ("  steps: 3", "  steps: -1", " steps:", "'training.steps' is -1; expected greater than or equal to 0"),
        ("  batch: 2", "  batch: 0", "batch", "'training.batch' is 0; expected greater than or equal to 1"),
        ("  batch: 2", "  clip_norm: .inf", "clip_norm", "'training.clip_norm' is 'Infinity'; expected a valid number"),
        ("  batch: 2", "  clip_norm: .nan", "clip_norm", "'training.clip_norm' is 'NaN'; expected a valid number"),
        ("float32", "float16", "precision", "'training.precision' is 'float16'; expected 'bf16' or 'float32'"),
        ("schema_version: 1", "schema_version: 2", "schema_version", "'schema_version' is 2; expected 1"),
        ("\nname: tiny", "", "schema_version", "key 'name' is missing; add it"),
        ("name: tiny", "name: ../evil", "name:", f"'name' is '../evil'; {NAMES}"),
        (
            "budgets:",
            "noise:\n  train: [55, 0]\nbudgets:",
            "train: [55",
            "'noise.train' is [55, 0]; give the lower noise level first",
        ),
        ("  warmup_steps: 1", "  steps: 5", "steps: 5", "key 'steps' stands here a second time; remove one"),
        ("  steps: 3", "  steps: [3", "batch", "broken YAML: expected ',' or ']', but got ':'"),
        ("  steps: 3", "\tsteps: 3", "\tsteps", "broken YAML: found character '\\t' that cannot start any token"),
    ],
    ids=lambda value: value.strip(),
)
def test_what_is_wrong_is_told_with_its_line_and_what_is_meant(tiny, old, new, line, told):
    replaced(tiny, old, new)
    assert refusal(tiny) == f"{line_of(tiny, line)}: {told}"


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
    [
        (
            "  batch: 2",
            "  batch: 9999999999",
            "batch:",
            "'training.batch' is 9999999999; expected less than or equal to",
        ),
        ("  batch: 2", f"  batch: {10**20}", "batch:", f"'training.batch' is {10**20}; expected less than or equal to"),
        ("  batch: 2", "  3: 4", "  3: 4", "unknown key 'training.3'; "),
        ("budgets:", "null: 3\nbudgets:", "null: 3", "unknown key 'null'; "),
        ("budgets:", "true: 3\nbudgets:", "true: 3", "unknown key 'true'; "),
        ("  evaluation_pictures: 2", "  calibration: ''", "calibration: ''", "'data.calibration' is ''; name a folder"),
    ],
    ids=lambda value: value.strip(),
)
def test_a_number_without_an_end_or_a_key_or_folder_without_a_name_is_told_with_its_line(tiny, old, new, line, told):
    replaced(tiny, old, new)
    assert refusal(tiny).startswith(f"{line_of(tiny, line)}: {told}")


@pytest.mark.parametrize(
    ("old", "new", "override", "told"),
    [
        ("  calibration_pictures: 8\n  change_basis: false", "", "quantization.mode=static", ""),
        (
            "quantization:\n  calibration_pictures: 8\n  change_basis: false",
            "quantization: nonsense",
            "quantization.mode=static",
            "'quantization' is 'nonsense'",
        ),
        ("student:\n  model: nano", "student: nano", "student.weights=random", "'student' is 'nano'"),
        ("budgets:", "noise: [1, 2]\nbudgets:", "noise.seed=7", "'noise' is [1, 2]"),
        ("  calibration_pictures: 8", "  qat: 5", "quantization.qat.steps=7", "'quantization.qat' is 5"),
    ],
    ids=lambda value: value.strip(),
)
def test_what_stands_in_place_of_a_section_is_not_dropped_for_an_override(tiny, old, new, override, told):
    replaced(tiny, old, new)
    if not told:
        assert recipe.load(tiny, (override,)).quantization == recipe.Quantization()
        return
    assert (
        refusal(tiny, override) == f"--set {override}: {told}, which holds no settings; mend it, or set it as a whole"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "1: expected settings as 'key: value' lines"),
        ("- a\n- b\n", "1: expected settings as 'key: value' lines"),
        ("name: a\n---\nname: b\n", "2: broken YAML: but found another document"),
        ("? [a, b]\n: 1\n", " holds what a settings file cannot: keys must be"),
        (f"a: {'[' * 500}{']' * 500}\n", " broken YAML: maximum recursion depth"),
        (f"a: {'9' * 5000}\n", " broken YAML: Exceeds the limit"),
        ("a: \0\n", " broken YAML: unacceptable character"),
    ],
    ids=["empty", "list", "two documents", "list as key", "too deep", "too long a number", "binary"],
)
def test_a_file_that_holds_no_settings_is_refused(cwd, text, told):
    path = cwd / "x.yaml"
    path.write_text(text, encoding="utf-8")
    assert refusal(path).startswith(told)


def test_a_file_that_is_missing_or_no_text_is_refused(cwd):
    assert refusal(cwd / "none.yaml") == " no such file"
    (cwd / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    assert "cannot be read as text" in refusal(cwd / "picture.yaml")
    (cwd / "folder.yaml").mkdir()
    assert "cannot be read as text" in refusal(cwd / "folder.yaml")


def test_an_option_that_may_be_of_several_types_names_them_all(tiny):
    told = refusal(tiny, "student.options.sigma_map=1.5")
    assert told.endswith("is 1.5; expected a valid boolean or a valid integer or a valid string")


@pytest.mark.parametrize(
    ("override", "of"),
    [
        ("training.steps=7", lambda r: r.training.steps == 7),
        ("noise.train=[1, 30]", lambda r: r.noise.train == (1.0, 30.0)),
        ("teacher=null", lambda r: r.teacher is None),
        ("student.options.activation=hardswish", lambda r: r.student.options == {"activation": "hardswish"}),
        ("training.peak_rate=1e-4", lambda r: r.training.peak_rate == 1e-4),
        ("description=a=b", lambda r: r.description == "a=b"),
    ],
    ids=["number", "list, new section", "nothing", "new option", "exponent", "equals sign"],
)
def test_an_override_changes_one_setting(tiny, override, of):
    assert not of(recipe.load(tiny))
    changed = recipe.load(tiny, (override,))
    assert of(changed)
    section = override.split("=")[0].split(".")[0]
    assert dataclasses.replace(changed, **{section: getattr(recipe.load(tiny), section)}) == recipe.load(tiny)


@pytest.mark.parametrize("key", ["int", "float", "str", "bool", "a[0]"])
def test_an_unknown_key_that_is_called_like_a_type_is_told_like_any_other(tiny, key):
    assert f"--set {key}=3: unknown key '{key}'; " in refusal(tiny, f"{key}=3")
    assert f"unknown key 'training.{key}'; " in refusal(tiny, f"training.{key}=3")
    with tiny.open("a", encoding="utf-8") as file:
        file.write(f'"{key}": 3\n')
    assert f"unknown key '{key}'; " in refusal(tiny)


def test_an_override_changes_one_place_of_what_an_alias_puts_in_two(cwd):
    (cwd / "two.yaml").write_text(
        "schema_version: 1\nname: two\ndescription: d\n"
        "teacher: &net\n  model: base\n  options: {width: 8}\nstudent: *net\n"
    )
    loaded = recipe.load(cwd / "two.yaml", ("student.model=nano", "student.options.width=16"))
    assert loaded.teacher == recipe.Model(model="base", options={"width": 8})
    assert loaded.student == recipe.Model(model="nano", options={"width": 16})


def test_the_last_of_several_overrides_wins(tiny):
    assert recipe.load(tiny, ("training.steps=7", "training.steps=8")).training.steps == 8


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.stpes=7", "unknown key 'training.stpes'; did you mean 'steps'?"),
        ("noise.sede=7", "unknown key 'noise.sede'; did you mean 'seed'?"),
        ("student.optoins.x=7", "unknown key 'student.optoins'; did you mean 'options'?"),
        ("noise.seed=often", "'noise.seed' is 'often'; expected a valid integer"),
        ("data.train=photos", "'data.train' is 'photos'; expected a list: write '[photos]'"),
        ("quantization.keep_float=head", "'quantization.keep_float' is 'head'; expected a list: write '[head]'"),
        ("data.train={a: b}", "'data.train' is {'a': 'b'}; expected a valid array"),
        ("data.train=[1]", "'data.train.0' is 1; expected a valid string"),
        ("noise.train=[1, 2, 3]", "'noise.train' is [1, 2, 3]; Tuple should have at most 2 items"),
        ("data.train=[]", "'data.train' is []; Tuple should have at least 1 item"),
        ("noise.train=[55, 0]", "'noise.train' is [55, 0]; give the lower noise level first"),
        ("noise.train=[0, 0.2]", "'noise.train' is [0, 0.2]; noise levels are on the scale of 0 to 255"),
        (
            "noise.train=[60, 99]",
            "'noise' is {'train': [60, 99]}; give as `evaluate`, which is 25 unless told, a noise",
        ),
        (
            "noise.evaluate=56",
            "'noise' is {'evaluate': 56}; give as `evaluate`, which is 25 unless told, a noise level",
        ),
        ("noise.seed=4001", "'noise.seed' is 4001; expected less than or equal to 4000"),
        ("noise.seed=-1", "'noise.seed' is -1; expected greater than or equal to 0"),
        ("training.steps=", "'training.steps' is None; expected a valid integer"),
        ("name.x=1", "'name' is 'tiny', which holds no settings; mend it, or set it as a whole"),
        ("data.train=['']", "'data.train.0' is ''; name a folder, or embedded"),
        ("data.evaluation=''", "'data.evaluation' is ''; name a folder, or embedded"),
        ("training.steps=[", "the value is not YAML"),
        ("training.steps", "expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("training..steps=3", "expected NAME=VALUE"),
    ],
    ids=lambda value: value,
)
def test_a_wrong_override_is_named(tiny, override, told):
    assert refusal(tiny, "training.batch=2", override).startswith(f"--set {override}: {told}")


@pytest.mark.parametrize("name", ["../evil", "/tmp/x", "a/b/c", "a/b", ".hid", "..", "", "a b", "-o"])
def test_a_name_that_is_no_folders_is_refused(tiny, name):
    assert refusal(tiny, f"name={name!r}") == f"--set name={name!r}: 'name' is {name!r}; {NAMES}"


@pytest.mark.parametrize("name", ["tiny", "Tiny-2.0_b", "9", "größer"])
def test_a_name_that_is_a_folders_is_taken(tiny, name):
    assert recipe.load(tiny, (f"name={name!r}",)).name == name


def test_noise_takes_the_largest_seed_that_a_recipe_may_have(tiny):
    seed = recipe.load(tiny, ("noise.seed=4000",)).noise.seed
    assert add_gaussian(np.zeros((1, 8, 8), np.uint8), 25.0, index=1_000_000, seed=seed).std() > 0


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
    [
        ("name: mine", "name: my phone", "name", f"'name' is 'my phone'; {NAMES}"),
        (
            "runner:",
            "input: {height: -64, width: -64}\nrunner:",
            "input",
            "'input.height' is -64; expected greater than",
        ),
        (
            "runner:",
            "input: {height: 0, width: 0}\nrunner:",
            "input",
            "'input.height' is 0; expected greater than or eq",
        ),
        ("runner:", "input: {height: 64}\nrunner:", "input", "'input' is {'height': 64}; give both height and width"),
        ("runner:", "input: {width: 64}\nrunner:", "input", "'input' is {'width': 64}; give both height and width"),
        ("kind: local", "kind: qemu", "runner", "'runner' is {'kind': 'qemu'}; qemu needs cpus, such as [cortex-a76]"),
        (
            "kind: local",
            "kind: qemu\n  cpus: []",
            "runner",
            "'runner' is {'kind': 'qemu', 'cpus': []}; qemu needs cpus",
        ),
        (
            "size_mib: 8.0",
            "min_integer_macs: 95",
            "min_integer_macs",
            "'limits.min_integer_macs' is 95; expected less than or equal to 1",
        ),
        (
            "size_mib: 8.0",
            "size_mib: 0",
            "size_mib",
            "'limits.size_mib' is 0; expected greater than 0",
        ),
    ],
    ids=[
        "no folder's name",
        "negative",
        "nought",
        "height alone",
        "width alone",
        "qemu",
        "qemu of no core",
        "a share in percent",
        "nothing at all",
    ],
)
def test_a_target_that_cannot_be_is_refused_with_its_line(cwd, old, new, line, told):
    path = replaced(write_target(cwd / "mine.yaml", "mine", LIMITS["kept"]), old, new)
    with pytest.raises(InputError) as refused:
        target.load(path)
    assert str(refused.value).startswith(f"{path}:{line_of(path, line)}: {told}")


def test_an_error_in_the_file_is_not_blamed_on_an_override(tiny):
    replaced(tiny, "  steps: 3", "  steps: many")
    assert refusal(tiny, "training.batch=4").startswith(f"{line_of(tiny, ' steps:')}: 'training.steps' is 'many'")


def test_a_value_that_edgekit_wrote_and_someone_changed_is_damaged(cwd):
    with pytest.raises(IntegrityError, match=r"x\.json: 'engine': Input should be"):
        config.checked({**dataclasses.asdict(target.load("onnx")), "engine": "abacus"}, Target, cwd / "x.json")


@pytest.mark.parametrize("kind", [Recipe, Target], ids=["recipe", "target"])
def test_the_json_schema_knows_every_key_and_no_other(kind):
    schema = config.json_schema(kind)
    assert set(schema["properties"]) == {f.name for f in dataclasses.fields(kind)}
    assert schema["additionalProperties"] is False
    assert "schema_version" in schema["required"]
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False


def test_the_json_schema_has_the_bounds():
    assert config.json_schema(Recipe)["$defs"]["Training"]["properties"]["batch"]["minimum"] == 1
