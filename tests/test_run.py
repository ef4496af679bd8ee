import errno
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import tree
from safetensors.numpy import save_file

from edgekit import run
from edgekit.errors import InputError, IntegrityError
from edgekit.files import atomic_file, atomic_folder, sha256, storage_errors, write_json
from edgekit.run import Run, Stage

IDENTITY = {"recipe": {"name": "tiny", "training": {"steps": 3, "sigma": (0.0, 55.0)}}}
HOLD = """
import sys, time
from pathlib import Path
from edgekit import run

def work(out):
    (out / "half.bin").write_bytes(b"half")
    print("holding", flush=True)
    time.sleep(60)

with run.open_run(Path(sys.argv[1]), {"recipe": {"name": "tiny"}}) as opened:
    opened.stage("slow", number=1, inputs={}, settings={}, code=(), packages=(), work=work)
"""


def make(opened: Run, made: list[str], *, name: str = "first", number: int = 1, **changes: object) -> Stage:
    """Make a stage of one file, whose text is its settings; note down that it was made."""
    given: dict[str, object] = {"inputs": {"data": "0123"}, "settings": {"size": 3}, "code": ("errors",)} | changes

    def work(out: Path) -> dict[str, object]:
        made.append(name)
        (out / "result.txt").write_text(json.dumps(given["settings"]), encoding="utf-8")
        (out / "inside").mkdir()
        (out / "inside" / "more.txt").write_text(name, encoding="utf-8")
        return {"bytes": 12}

    return opened.stage(name, number=number, packages=("click",), work=work, **given)


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Give another process that is in the middle of a stage in a run folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holding\n"
            yield process
        finally:
            process.kill()


def test_a_stage_is_made_once_and_then_reused(cwd):
    made: list[str] = []
    with run.open_run(cwd / "r", IDENTITY) as opened:
        first = make(opened, made)
    with run.open_run(cwd / "r", IDENTITY) as opened:
        assert make(opened, made) == first
        assert opened.reused == ["first"]
        assert opened.file(first, "result.txt").read_text(encoding="utf-8") == '{"size": 3}'
        assert opened.sha256(first, "inside/more.txt") == sha256(cwd / "r/01-first/inside/more.txt")
    assert made == ["first"]
    assert first.files.keys() == {"01-first/result.txt", "01-first/inside/more.txt"}


@pytest.mark.parametrize(
    "change",
    [{"inputs": {"data": "4567"}}, {"settings": {"size": 4}}, {"code": ("errors", "files")}],
    ids=["inputs", "settings", "code"],
)
def test_a_stage_is_made_again_when_what_made_it_changed(cwd, change):
    made: list[str] = []
    with run.open_run(cwd / "r", IDENTITY) as opened:
        first = make(opened, made)
        second = make(opened, made, **change)
        assert first.key != second.key
        assert make(opened, made, **change) == second
    assert made == ["first", "first"]


def test_a_stage_is_made_again_when_a_tool_has_another_version(cwd, monkeypatch):
    made: list[str] = []
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, made)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
        assert make(opened, made).tools == {"click": "99.0"}
    assert made == ["first", "first"]


@pytest.mark.parametrize(
    ("change", "warned"),
    [({}, False), ({"settings": {"size": 3, "threads": 2}}, True), ({"code": ("errors", "files")}, True)],
    ids=["nothing", "threads", "code"],
)
def test_a_lasting_stage_is_kept_where_only_where_and_how_it_was_made_is_another(cwd, caplog, change, warned):
    caplog.set_level(logging.WARNING, logger="edgekit")
    made: list[str] = []
    told = {"settings": {"size": 3, "threads": 1}, "lasting": ("threads",)}
    with run.open_run(cwd / "r", IDENTITY) as opened:
        first = make(opened, made, **told)
    with run.open_run(cwd / "r", IDENTITY) as opened:
        assert make(opened, made, **told | change) == first
    assert made == ["first"]
    told_so = f"first: made with other code, versions, threads or on another device; delete {cwd}/r/01-first to make it"
    assert any(text.startswith(told_so) for text in caplog.messages) is warned
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, made, **told | change | {"inputs": {"data": "4567"}})
        make(opened, made, **told | {"settings": {"size": 4, "threads": 1}})
    assert made == ["first"] * 3


def test_the_code_that_makes_a_stage_counts_with_its_templates(cwd, monkeypatch):
    shutil.copytree(Path(run.__file__).parent / "backends/tvm", cwd / "backends/tvm")
    monkeypatch.setattr(run, "__file__", str(cwd / "run.py"))
    hashed = run.code_sha256.__wrapped__(("backends/tvm",))
    template = cwd / "backends/tvm/c/library.c.j2"
    template.write_bytes(template.read_bytes() + b"\n")
    changed = run.code_sha256.__wrapped__(("backends/tvm",))
    assert changed != hashed
    (template.parent / "__pycache__").mkdir()
    (template.parent / "__pycache__" / "x.pyc").write_bytes(b"")
    assert run.code_sha256.__wrapped__(("backends/tvm",)) == changed


def test_a_stage_that_fails_leaves_nothing_and_is_made_the_next_time(cwd):
    def fail(out: Path) -> dict[str, object]:
        (out / "half.bin").write_bytes(b"half")
        raise InputError("no")

    made: list[str] = []
    with run.open_run(cwd / "r", IDENTITY) as opened, pytest.raises(InputError, match="no"):
        opened.stage("first", number=1, inputs={}, settings={}, code=(), packages=(), work=fail)
    assert sorted(p.name for p in (cwd / "r").iterdir()) == ["lock", "run.json"]
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, made)
    assert made == ["first"]


@pytest.mark.parametrize("step", ["old one half removed", "old one removed", "new one there"])
def test_a_stage_that_is_made_again_and_killed_anywhere_is_made_the_next_time(cwd, monkeypatch, step):
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    def half_removed(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (path / "drawn.bin").unlink()
            killed()

    def work(out: Path) -> dict[str, object]:
        (out / "drawn.bin").write_bytes(os.urandom(8))
        return {}

    def draw(opened: Run, *, again: bool = False) -> Stage:
        return opened.stage(
            "drawn", number=1, inputs={}, settings={}, code=(), packages=(), work=work, again=lambda known: again
        )

    write = Run._write
    with run.open_run(cwd / "r", IDENTITY) as opened:
        first = draw(opened)
    with run.open_run(cwd / "r", IDENTITY) as opened, monkeypatch.context() as patched:
        if step == "new one there":
            patched.setattr(Run, "_write", lambda self: killed() if self.stages() else write(self))
        elif step == "old one removed":
            patched.setattr(Path, "rename", killed)
        else:
            patched.setattr(shutil, "rmtree", half_removed)
        with pytest.raises(KeyboardInterrupt):
            draw(opened, again=True)
    with run.open_run(cwd / "r", IDENTITY) as opened:
        assert draw(opened).files != first.files
    assert [stage.name for stage in run.read_stages(cwd / "r")] == ["drawn"]


def test_a_stage_whose_folder_was_deleted_is_made_again(cwd):
    made: list[str] = []
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, made)
    shutil.rmtree(cwd / "r/01-first")
    assert run.read_stages(cwd / "r") == []
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, made)
    assert made == ["first", "first"]
    assert [s.name for s in run.read_stages(cwd / "r")] == ["first"]


@pytest.mark.parametrize(
    ("damage", "state"),
    [(lambda path: path.write_text("x", encoding="utf-8"), "changed"), (Path.unlink, "is missing")],
    ids=["changed", "missing"],
)
@pytest.mark.parametrize("file", ["result.txt", "inside/more.txt"])
def test_a_file_that_changed_is_refused_by_name(cwd, file, damage: Callable[[Path], object], state):
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, [])
    damage(cwd / "r/01-first" / file)
    with (
        run.open_run(cwd / "r", IDENTITY) as opened,
        pytest.raises(IntegrityError, match=rf"01-first/{file}: {state} since stage 'first' wrote it; restore it, or"),
    ):
        make(opened, [])
    with pytest.raises(IntegrityError, match=rf"{file}: {state}"):
        run.read_stages(cwd / "r")


def test_two_processes_do_not_share_a_folder(cwd):
    with held(cwd / "r") as process:
        with pytest.raises(InputError) as refused, run.open_run(cwd / "r", IDENTITY):
            pass
        assert f"r: is in use by process {process.pid}, since 20" in str(refused.value)
        assert process.poll() is None


def test_what_a_killed_process_left_is_swept_and_its_lock_is_gone(cwd):
    with held(cwd / "r") as process:
        leftovers = list((cwd / "r").glob(".01-slow.*.tmp/half.bin"))
        assert len(leftovers) == 1
        (cwd / "r" / ".run.json.77.tmp").write_text("{", encoding="utf-8")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert leftovers[0].exists()
    with run.open_run(cwd / "r", {"recipe": {"name": "tiny"}}):
        assert sorted(p.name for p in (cwd / "r").iterdir()) == ["lock", "run.json"]


def test_another_run_is_refused_with_the_setting_that_differs(cwd):
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, [])
    before = tree(cwd / "r")
    other = {"recipe": {"name": "tiny", "training": {"steps": 4, "sigma": (0.0, 55.0)}}}
    with pytest.raises(InputError) as refused, run.open_run(cwd / "r", other):
        pass
    assert "holds another run (recipe.training.steps is 3 there, 4 here)" in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert tree(cwd / "r") | {"lock": b""} == before | {"lock": b""}


def test_another_run_is_replaced_when_told_and_leaves_nothing_behind(cwd):
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, [], name="old")
    other = {"recipe": {"name": "other"}}
    with run.open_run(cwd / "r", other, overwrite=True) as opened:
        assert opened.stages() == {}
        make(opened, [], name="new")
    assert run.read_identity(cwd / "r") == other
    assert not (cwd / "r/01-old").exists()


def test_the_same_run_is_not_replaced_by_overwrite(cwd):
    made: list[str] = []
    for _ in range(2):
        with run.open_run(cwd / "r", IDENTITY, overwrite=True) as opened:
            make(opened, made)
    assert made == ["first"]


def test_a_folder_that_is_no_run_is_refused_and_nothing_in_it_is_touched(cwd):
    (cwd / "home/sub").mkdir(parents=True)
    for name in ("notes.txt", ".draft.tmp", "sub/.draft.tmp"):
        (cwd / "home" / name).write_text("mine", encoding="utf-8")
    before = tree(cwd / "home")
    with pytest.raises(InputError) as refused, run.open_run(cwd / "home", IDENTITY, overwrite=True):
        pass
    assert "home: is not a run folder, and not empty (found 'notes.txt')" in str(refused.value)
    assert tree(cwd / "home") == before


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_a_run_that_is_to_be_taken_as_it_is_must_be_there(cwd, there):
    if there:
        (cwd / "r").mkdir()
    with pytest.raises(InputError, match="is not a run folder"), run.open_run(cwd / "r", None):
        pass
    assert tree(cwd) == {}


def test_a_file_where_the_folder_should_be_is_refused(cwd):
    (cwd / "r").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="r: cannot be written: File exists"), run.open_run(cwd / "r", IDENTITY):
        pass


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "identity": {}, "stages": [{"name": "x"}]}', "\0"],
    ids=["empty", "cut", "list", "keys missing", "stage cut", "binary"],
)
def test_a_damaged_record_is_refused(cwd, text):
    with run.open_run(cwd / "r", IDENTITY):
        pass
    (cwd / "r/run.json").write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"run\.json: damaged record"), run.open_run(cwd / "r", IDENTITY):
        pass


def test_a_record_whose_files_are_no_table_is_refused(cwd):
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, [])
    path = cwd / "r/run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["stages"][0]["files"] = 3
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(IntegrityError, match="damaged record"):
        run.read_stages(cwd / "r")


def test_a_record_of_another_version_is_refused(cwd):
    with run.open_run(cwd / "r", IDENTITY):
        pass
    path = cwd / "r/run.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(InputError, match="written by another version of edgekit"):
        run.read_stages(cwd / "r")


def test_the_record_is_the_same_byte_for_byte_in_any_order_and_on_every_rerun(cwd):
    for folder, order in (("a", ("first", "second")), ("b", ("second", "first"))):
        with run.open_run(cwd / folder, IDENTITY) as opened:
            for name in order:
                make(opened, [], name=name, number=1 if name == "first" else 2)
    record = (cwd / "a/run.json").read_bytes()
    assert (cwd / "b/run.json").read_bytes() == record
    with run.open_run(cwd / "a", IDENTITY) as opened:
        make(opened, [])
    assert (cwd / "a/run.json").read_bytes() == record


def test_a_name_that_is_not_utf_8_survives_the_record(cwd):
    identity = {"model": os.fsdecode(b"caf\xe9.onnx")}
    for _ in range(2):
        with run.open_run(cwd / "r", identity):
            assert run.read_identity(cwd / "r") == identity


def test_dates_and_seconds_lie_beside_the_record(cwd):
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, [])
        opened.measure("training", {"images": 7})
    measured = json.loads((cwd / "r/measured.json").read_text(encoding="utf-8"))
    assert measured.keys() == {"first", "training"}
    assert measured["first"].keys() == {"date", "seconds"}
    assert measured["training"]["images"] == 7
    record = (cwd / "r/run.json").read_text(encoding="utf-8")
    assert "date" not in record
    assert "seconds" not in record


def test_a_damaged_table_of_measurements_is_named(cwd):
    with run.open_run(cwd / "r", IDENTITY) as opened:
        (cwd / "r/measured.json").write_text("{", encoding="utf-8")
        with pytest.raises(IntegrityError, match=r"measured\.json: damaged"):
            opened.measure("training", {})


def test_the_newest_run_is_the_one_that_was_used_last(cwd):
    with pytest.raises(InputError, match="there is no run in 'runs/'"):
        run.newest()
    for name in ("b", "a"):
        with run.open_run(run.RUNS / name, IDENTITY):
            pass
    assert run.newest() == run.RUNS / "a"
    with run.open_run(run.RUNS / "b", IDENTITY):
        pass
    assert run.newest() == run.RUNS / "b", "the one that was used last, though nothing was made"


def test_a_hidden_folder_is_no_run(cwd):
    with run.open_run(run.RUNS / ".kept", IDENTITY):
        pass
    assert not run.exists()
    with pytest.raises(InputError, match="there is no run in 'runs/'"):
        run.newest()


def test_a_file_elsewhere_that_cannot_be_read_is_not_taken_for_the_stages_folder(cwd):
    (cwd / "weights").mkdir()
    with run.open_run(cwd / "r", IDENTITY) as opened:
        with pytest.raises(IsADirectoryError) as refused:
            opened.stage(
                "first",
                number=1,
                inputs={},
                settings={},
                code=(),
                packages=(),
                work=lambda out: {"bytes": len((cwd / "weights").read_bytes())},
            )
        assert refused.value.filename == str(cwd / "weights")


PLACES = {
    "itself": "out",
    "in it": "out/a/b",
    "above it": ".",
    "its temporary": ".out.ab1.tmp/a",
    "none": None,
    "what rmtree names": "entry",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_what_cannot_be_written_is_told_of_the_place_itself(cwd, place):
    name = None if place is None else place if place == "entry" else str(cwd / place)
    with pytest.raises(InputError, match="out: cannot be written: Permission denied"), storage_errors(cwd / "out"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)


@pytest.mark.parametrize("place", ["output", "other/out", ".outer.ab1.tmp"])
def test_a_name_alike_is_another_place(cwd, place):
    with pytest.raises(PermissionError), storage_errors(cwd / "out"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cwd / place))


def test_a_full_disk_is_told_whatever_file_it_was(cwd):
    with pytest.raises(InputError, match="out: no space is left"), storage_errors(cwd / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cwd / "other"))


def test_files_of_a_run_may_be_read_as_widely_as_others(cwd):
    mask = os.umask(0o027)
    try:
        with run.open_run(cwd / "r", IDENTITY) as opened, atomic_folder(cwd / "r" / "x") as folder:
            make(opened, [])
            with atomic_file(folder / "w.safetensors") as temporary:
                save_file({}, temporary)
    finally:
        os.umask(mask)
    assert (cwd / "r/01-first").stat().st_mode & 0o777 == 0o750
    assert (cwd / "r/x/w.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("overwrite", [False, True], ids=["made again", "overwritten"])
def test_a_stage_that_somebody_moved_and_linked_is_replaced_and_what_was_moved_is_kept(cwd, overwrite):
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, [])
    before = tree((cwd / "r/01-first").rename(cwd / "moved"))
    (cwd / "r/01-first").symlink_to(cwd / "moved")
    identity = {"recipe": {"name": "other"}} if overwrite else IDENTITY
    with run.open_run(cwd / "r", identity, overwrite=overwrite) as opened:
        make(opened, [], inputs={"weights": "other"})
    assert not (cwd / "r/01-first").is_symlink()
    assert tree(cwd / "moved") == before


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing yet"])
def test_what_is_written_to_a_link_goes_to_where_it_leads(cwd, there):
    (cwd / "kept").mkdir()
    if there:
        (cwd / "kept/report.json").write_text("before", encoding="utf-8")
    (cwd / "link.json").symlink_to("kept/report.json")
    write_json(cwd / "link.json", {"a": 1})
    assert (cwd / "link.json").is_symlink()
    assert tree(cwd / "kept") == {"report.json": b'{\n  "a": 1\n}\n'}


def test_a_run_that_came_to_nothing_makes_room_for_another(cwd):
    with pytest.raises(InputError, match="no such model"), run.open_run(cwd / "r", {"recipe": {"model": "nanno"}}):
        raise InputError("no such model")
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, [])
    assert run.read_identity(cwd / "r")["recipe"]["name"] == "tiny"


def test_a_run_that_only_listed_its_pictures_makes_room_for_another(cwd):
    with run.open_run(cwd / "r", {"recipe": {"name": "wrong"}}) as opened:
        make(opened, [], name="pictures")
        (cwd / "r/02-student.state").mkdir()
    with run.open_run(cwd / "r", IDENTITY) as opened:
        assert opened.stages() == {}
    assert sorted(p.name for p in (cwd / "r").iterdir()) == ["lock", "run.json"]


@pytest.mark.parametrize("kept", ["02-student.state/checkpoint.safetensors", "notes.txt"])
def test_a_run_with_a_checkpoint_or_a_file_of_somebody_elses_makes_no_room(cwd, kept):
    with run.open_run(cwd / "r", {"recipe": {"name": "wrong"}}) as opened:
        make(opened, [], name="pictures")
        (cwd / "r" / kept).parent.mkdir(exist_ok=True)
        (cwd / "r" / kept).write_bytes(b"hours")
    with pytest.raises(InputError, match="holds another run"), run.open_run(cwd / "r", IDENTITY):
        pass
    assert (cwd / "r" / kept).read_bytes() == b"hours"


@pytest.mark.parametrize(
    "name", ["", "bundles/", "bundles/.", "bundles/../..", "../home", "/home", "bundles/a/b", "a\n"]
)
def test_a_stage_lies_in_a_folder_of_its_own_inside_the_run(cwd, name):
    (cwd / "home").mkdir()
    with run.open_run(cwd / "r", IDENTITY) as opened:
        make(opened, [], name="bundles/mine", number=0)
        before = tree(cwd)
        with pytest.raises(InputError, match="cannot be a folder of a run"):
            make(opened, [], name=name, number=0)
    assert tree(cwd) == before
