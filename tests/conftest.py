"""What the tests of the contracts share: a few small pictures, a tiny recipe, a finished run, and the command line."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from board import Board
from devices import adb_server, board, connected
from phone import Phone
from PIL import Image

from edgekit import cli, recipe, target
from edgekit.data.synthetic import dead_leaves

RECIPE = """\
schema_version: 1
name: tiny
description: A few steps on a few small pictures.
teacher:
  model: nano
student:
  model: nano
data:
  train: [{pictures}]
  evaluation: {pictures}
  evaluation_pictures: 2
training:
  steps: 3
  batch: 2
  patch: 32
  warmup_steps: 1
  precision: float32
quantization:
  calibration_pictures: 8
  change_basis: false
budgets:
  student_drop_db: 3.0
  int8_drop_db: 3.0
"""
TARGET = """\
schema_version: 1
name: {name}
description: A test.
engine: onnxruntime
precision: int8
runner:
  kind: local
limits:
  {limit}
"""
LIMITS = {"kept": "size_mib: 8.0", "broken": "size_mib: 0.001", "undecided": "peak_memory_mib: 64.0"}


STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl-C and a hangup reach the commands under test: a background job ignores them, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Where no test's output goes: nothing is caught yet.
    config.stash[STDERR] = os.dup(2)


@pytest.fixture(autouse=True)
def _crashes_are_told(pytestconfig: pytest.Config) -> None:
    """TVM's own handler for crashes, once imported, writes to what a test prints, which is lost with the process."""
    faulthandler.disable()
    faulthandler.enable(pytestconfig.stash[STDERR])


@dataclass(frozen=True, kw_only=True)
class Called:
    """What a command came to."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *words: str) -> str:
        """Return the one line that says what is wrong, where, and what to do; the command must have ended with it."""
        assert self.code == code, (self.code, self.err)
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        for word in words:
            assert word in lines[0]
        return lines[0]


Call = Callable[..., Called]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return a function that runs a command in this process, as its entry point does."""

    def run(*arguments: str | Path) -> Called:
        monkeypatch.setattr(sys, "argv", ["edgekit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return Called(code=left.value.code, out=out, err=err)

    return run


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of a process of its own."""
    return [sys.executable, "-c", "from edgekit.cli import main; main()", *map(str, arguments)]


def call_process(*arguments: str | Path, python_path: Path | None = None) -> Called:
    """Run a command in a process of its own, with a folder in front of its import path."""
    environment = os.environ | ({"PYTHONPATH": str(python_path)} if python_path else {})
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
    )
    return Called(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that the test stands in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def leaves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 70 pictures, of which calibration gets the 8 that it needs."""
    folder = tmp_path_factory.mktemp("pictures") / "leaves"
    folder.mkdir()
    for seed in range(70):
        Image.fromarray(dead_leaves(seed, 64, 64 + 8 * (seed % 5), 1)[0]).save(folder / f"leaves-{seed}.png")
    return folder


@pytest.fixture
def tiny(cwd: Path, leaves: Path) -> Path:
    """Return the tiny recipe's file, in the folder that the test stands in."""
    return write_recipe(cwd / "tiny.yaml", leaves)


def write_recipe(path: Path, pictures: Path) -> Path:
    path.write_text(RECIPE.format(pictures=pictures), encoding="utf-8")
    return path


def write_target(path: Path, name: str, limit: str) -> Path:
    path.write_text(TARGET.format(name=name, limit=limit), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(leaves: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with three bundles, one for each of `LIMITS`; copy it before you change it."""
    from edgekit.pipeline import compile as compiling
    from edgekit.pipeline import distill

    folder = tmp_path_factory.mktemp("finished")
    root = folder / "run"
    distill.distill(recipe.load(write_recipe(folder / "tiny.yaml", leaves)), root)
    targets = [target.load(write_target(folder / f"{name}.yaml", name, limit)) for name, limit in LIMITS.items()]
    compiling.compile_model(str(root), targets)
    return root


def tree(folder: Path) -> dict[str, bytes]:
    """Return path -> bytes of every file of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch use one thread, so that its sums are the same on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Devices


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run an adb server of the tests' own."""
    with adb_server(tmp_path_factory.mktemp("adb")):
        yield


@pytest.fixture
def phone(server: None, tmp_path: Path) -> Iterator[Phone]:
    """Return a phone that adb is connected to."""
    with connected(tmp_path) as opened:
        yield opened


@pytest.fixture
def sshed(tmp_path: Path) -> Iterator[Board]:
    """Return a board that ssh can reach."""
    with board(tmp_path) as opened:
        yield opened
