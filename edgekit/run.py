"""Run folders: numbered stages that are written whole, re-used while nothing that made them changed, and locked."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgekit import __version__
from edgekit.errors import InputError, IntegrityError
from edgekit.files import atomic_folder, json_sha256, sha256, storage_errors, write_json

log = logging.getLogger(__name__)
RUNS = Path("runs")
_RECORD, _MEASURED, _LOCK = "run.json", "measured.json", "lock"
_SCHEMA_VERSION = 1
_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
# Made again in moments; whoever gives the run other settings after an error has lost nothing with it.
_CHEAP = ("pictures",)
Facts = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One finished stage.

    key: Hash of everything that decides its result: inputs, settings, edgekit's code, versions of the tools.
    inputs: What it was made from: label -> sha256. files: Path relative to the run folder -> sha256.
    facts: Figures that are the same on every rerun.
    """

    name: str
    folder: str
    key: str
    inputs: dict[str, str]
    settings: dict[str, object]
    tools: dict[str, str]
    files: dict[str, str]
    facts: dict[str, object]


class Run:
    """An open, locked run folder."""

    def __init__(self, root: Path, identity: Mapping[str, object], stages: Sequence[Stage] = ()) -> None:
        self.root = root
        self._identity = dict(identity)
        self._stages = {stage.name: stage for stage in stages}
        self.reused: list[str] = []

    def stage(
        self,
        name: str,
        *,
        number: int,
        inputs: Mapping[str, str],
        settings: Mapping[str, object],
        code: Sequence[str],
        packages: Sequence[str],
        work: Callable[[Path], Facts],
        again: Callable[[Stage], bool] = lambda known: False,
        lasting: Collection[str] | None = None,
    ) -> Stage:
        """Return a stage's record; `work` fills its folder if it is not there already, made from the same things.

        Args:
            name: Name of the stage.
            number: Its place in the folder's order; 0 for a folder without one.
            inputs: Label -> sha256 of what it is made from.
            settings: Everything else that decides the result.
            code: Sub-packages or modules of edgekit whose source decides the result.
            packages: Distributions whose version decides the result.
            work: Writes the stage's files into the folder that it is given, and returns the stage's facts.
            again: Whether a stage that is there is to be made again all the same.
            lasting: Of a stage that took hours, which settings only say where it was made: where these, the code or the
                versions are others, it is re-used all the same, with a warning. None for a stage that is made again.

        Raises:
            InputError: The name is no folder's; a target's may come from anywhere, and what lies there is replaced.
            IntegrityError: A file of the stage changed since it was written.
        """
        if not _NAME.fullmatch(name):
            raise InputError(f"'{name}' cannot be a folder of a run", remedy="use letters, digits, '-', '_' and '.'")
        tools = versions(packages)
        key = json_sha256([name, dict(inputs), dict(settings), code_sha256(tuple(code)), tools])
        known = self._stages.get(name)
        lasts = lasting is not None and known is not None and _is_of(known, inputs, settings, lasting)
        if known and (known.key == key or lasts) and (self.root / known.folder).is_dir():
            _check(self.root, known)
            if not again(known):
                self.reused.append(name)
                log.info("%s: re-used", name)
                if known.key != key:
                    log.warning(
                        "%s: made with other code, versions, threads or on another device; delete %s to make it again",
                        name,
                        self.root / known.folder,
                    )
                return known
        folder = f"{number:02d}-{name}" if number else name
        began = time.monotonic()
        log.info("%s ...", name)
        with atomic_folder(self.root / folder) as temporary:
            facts = work(temporary)
            files = {
                f"{folder}/{p.relative_to(temporary).as_posix()}": sha256(p)
                for p in sorted(temporary.rglob("*"))
                if p.is_file()
            }
            if self._stages.pop(name, None):
                # Who is killed before the new record is written has a stage to make again, and not one that changed.
                self._write()
        stage = Stage(
            name=name,
            folder=folder,
            key=key,
            inputs=dict(inputs),
            settings=dict(settings),
            tools=tools,
            files=files,
            facts=dict(facts),
        )
        self._stages[name] = stage
        self._write()
        self.measure(name, {"seconds": round(time.monotonic() - began, 3)})
        return stage

    def file(self, stage: Stage, name: str) -> Path:
        """Return the path of a file of a stage."""
        return self.root / stage.folder / name

    def sha256(self, stage: Stage, name: str) -> str:
        """Return the recorded hash of a file of a stage."""
        return stage.files[f"{stage.folder}/{name}"]

    def measure(self, name: str, figures: Mapping[str, object]) -> None:
        """Record what differs from run to run (dates, seconds) beside the run, not in its record."""
        path = self.root / _MEASURED
        try:
            known = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise IntegrityError(f"{path}: damaged: {error}", remedy="delete it; it decides nothing") from error
        stamp = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write_json(path, known | {name: stamp | dict(figures)})

    def stages(self) -> Mapping[str, Stage]:
        """Return the finished stages by name."""
        return dict(self._stages)

    def _write(self) -> None:
        stages = [dataclasses.asdict(s) for s in sorted(self._stages.values(), key=lambda s: s.folder)]
        write_json(
            self.root / _RECORD,
            {"schema_version": _SCHEMA_VERSION, "edgekit": __version__, "identity": self._identity, "stages": stages},
        )


def folder_of(name: str, told: str | Path | None) -> Path:
    """Return where a run lies: the folder that was told, else `runs/<name>`."""
    return RUNS / name if told is None else Path(told)


@contextmanager
def open_run(root: Path, identity: Mapping[str, object] | None, *, overwrite: bool = False) -> Iterator[Run]:
    """Open a run folder for writing and hold its lock.

    Args:
        root: The folder; made if it is missing.
        identity: What the run is (its resolved recipe); None takes the folder's own.
        overwrite: Replace another run that is there.

    Raises:
        InputError: The folder is held by another process, belongs to another run, or is no run folder; the last is
            found out before anything is written to it.
        IntegrityError: The run's record is damaged.
    """
    if identity is None:
        _read(root)
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(root)
    with lock(root):
        _sweep(root)
        if (root / _RECORD).exists():
            if identity is None or holds(root, identity, overwrite=overwrite):
                yield Run(root, *_read(root))
                return
            _empty(root)
        run = Run(root, identity or {})
        run._write()
        yield run


def holds(root: Path, identity: Mapping[str, object], *, overwrite: bool = False) -> bool:
    """Return whether a folder holds this run, so that it would go on; else it would begin. Nothing is written.

    Args:
        root: The folder, which need not be there.
        identity: What the run is.
        overwrite: Whether another run may be replaced.

    Raises:
        InputError: The folder belongs to another run, or is no run folder. IntegrityError: Its record is damaged.
    """
    if root.is_dir():
        _refuse_strangers(root)
    if not (root / _RECORD).exists():
        return False
    recorded, stages = _read(root)
    if recorded == json.loads(json.dumps(identity)):
        return True
    if not overwrite and _is_worth_keeping(root, stages):
        raise InputError(
            f"{root}: holds another run ({_difference(recorded, identity)})",
            remedy="choose another folder with -o, or replace it with --overwrite",
        )
    return False


def read_stages(root: Path, *, check: bool = True) -> list[Stage]:
    """Return the finished stages of a run folder, in their order; one whose folder was deleted is not finished.

    Args:
        root: The run folder.
        check: Compare every file with its record; without it, what is returned may not be used, only shown.

    Raises:
        InputError: The folder is no run folder.
        IntegrityError: Its record is damaged, or a file of a stage changed or is missing.
    """
    stages = [stage for stage in _read(root)[1] if (root / stage.folder).is_dir()]
    for stage in stages if check else ():
        _check(root, stage)
    return stages


def read_identity(root: Path) -> dict[str, object]:
    """Return what a run is: its resolved recipe, or the model that it compiles; raises as `read_stages`."""
    return _read(root)[0]


def _read(root: Path) -> tuple[dict[str, object], list[Stage]]:
    path = root / _RECORD
    if not path.is_file():
        raise InputError(f"{root}: is not a run folder (it has no {_RECORD})", remedy="start one: edgekit distill")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema_version"] != _SCHEMA_VERSION:
            raise InputError(f"{path}: was written by another version of edgekit", remedy="choose another folder")
        return dict(record["identity"]), [
            Stage(**(stage | {"files": dict(stage["files"])})) for stage in record["stages"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path}: damaged record: {error}", remedy="start the run again in another folder"
        ) from error


def exists() -> bool:
    """Return whether there is any run folder below `runs/`."""
    return any(RUNS.glob(f"[!.]*/{_RECORD}"))


def newest() -> Path:
    """Return the run folder below `runs/` that a command worked in last.

    Raises:
        InputError: There is none.
    """
    # Whoever works in a run writes its lock, also where all was there already.
    records = sorted(RUNS.glob(f"[!.]*/{_RECORD}"), key=lambda p: max(f.stat().st_mtime_ns for f in _kept(p)))
    if not records:
        raise InputError(f"there is no run in '{RUNS}/'", remedy="start one: edgekit distill")
    return records[-1].parent


def _kept(record: Path) -> list[Path]:
    """Return a run's record and, where there is one, its lock."""
    return [path for path in (record, record.with_name(_LOCK)) if path.exists()]


@cache
def code_sha256(modules: tuple[str, ...]) -> str:
    """Return the hash of the source of sub-packages or modules of edgekit, such as ('models', 'training')."""
    package = Path(__file__).parent
    files: list[Path] = []
    for module in modules:
        path = package / module
        # Templates and C sources decide what is written as much as Python does.
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.parent.name != "__pycache__")
        files += inside if path.is_dir() else [path.with_suffix(".py")]
    return json_sha256([sha256(f) for f in files])


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution; one that is missing is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back even when the process is killed."""
    path = root / _LOCK
    with storage_errors(path):
        handle = path.open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise InputError(
                f"{root}: is in use by {owner}", remedy="wait for it, or choose another folder with -o"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        handle.flush()
        yield


def _difference(recorded: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """Return the first setting that differs, as `training.steps is 100 there, 200 here`."""
    there, here = _flat(recorded), _flat(json.loads(json.dumps(wanted)))
    for name in sorted(set(there) | set(here)):
        if there.get(name) != here.get(name):
            return f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
    return "same settings"


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _is_of(
    stage: Stage, inputs: Mapping[str, str], settings: Mapping[str, object], apart_from: Collection[str]
) -> bool:
    """Return whether a stage was made from these inputs and settings, apart from some settings by their names."""

    def decides(from_: Mapping[str, str], by: Mapping[str, object]) -> str:
        return json_sha256([dict(from_), {name: value for name, value in by.items() if name not in apart_from}])

    return decides(stage.inputs, stage.settings) == decides(inputs, settings)


def _check(root: Path, stage: Stage) -> None:
    for name, recorded in stage.files.items():
        path = root / name
        if not path.is_file() or sha256(path) != recorded:
            state = "changed" if path.is_file() else "is missing"
            raise IntegrityError(
                f"{path}: {state} since stage '{stage.name}' wrote it",
                remedy=f"restore it, or delete {root / stage.folder} to make it again",
            )


def _refuse_strangers(root: Path) -> None:
    """Raise InputError for a folder that holds something and is no run; what a killed process left does not count."""
    strangers = sorted(p.name for p in root.iterdir() if p.name != _LOCK and not p.match(".*.tmp"))
    if strangers and _RECORD not in strangers:
        raise InputError(
            f"{root}: is not a run folder, and not empty (found '{strangers[0]}')",
            remedy="choose another folder with -o",
        )


def _sweep(root: Path) -> None:
    """Remove what a killed process left half written."""
    for path in (*root.glob(".*.tmp"), *root.glob("*/.*.tmp")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            # Gone already where it lay in a folder that was itself half written.
            path.unlink(missing_ok=True)


def _is_worth_keeping(root: Path, stages: Sequence[Stage]) -> bool:
    """Return whether a run holds a stage that took time, a checkpoint, or a file of somebody else's.

    One that came to nothing, as with a misspelt model or a patch of a wrong size, is in nobody's way.
    """
    if any(stage.name not in _CHEAP for stage in stages):
        return True
    ours = {_RECORD, _MEASURED, _LOCK, *(stage.folder for stage in stages)}
    others = [path for path in root.iterdir() if path.name not in ours]
    return any(p.is_file() for path in others for p in (path, *path.rglob("*")))


def _empty(root: Path) -> None:
    # The record goes last: without it, what is left would be nobody's.
    for path in sorted(root.iterdir(), key=lambda p: p.name == _RECORD):
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
