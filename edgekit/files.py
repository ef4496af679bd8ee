"""Files that are written whole or not at all, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edgekit.errors import EdgekitError, InputError

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EIO,
    }
)
# Rust's, C++'s and numpy's words for a full disk, which come without a number.
_NO_SPACE_TEXT = re.compile(
    "|".join((*(re.escape(os.strerror(number)) for number in sorted(NO_SPACE)), r"\d requested and \d+ written"))
)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one clear line; nothing that was there before is lost.

    Raises:
        InputError: The disk or the quota is full, or the folder cannot be written to.
        OSError: What is refused is another file, which the error names.
    """
    try:
        yield
    except EdgekitError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in NO_SPACE or _NO_SPACE_TEXT.search(str(error)):
            free = shutil.disk_usage(_existing(path)).free // 2**20
            raise InputError(
                f"{path}: no space is left on the disk for it ({free} MiB free without it)",
                remedy="free some and start the same command again, it goes on where it stopped",
            ) from error
        if isinstance(error, OSError) and (number in REFUSED or _takes_nothing(error)) and _is_of(error, path):
            raise InputError(
                f"{path}: cannot be written: {error.strerror}", remedy="choose another place with -o"
            ) from error
        raise


def refuse_unwritable(path: Path) -> None:
    """Refuse a place that no file can be written to, before anything is measured for it; makes nothing.

    Raises:
        InputError: A folder, a device or a pipe is there, or the folder that it would lie in takes no files.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            raise InputError(
                f"{path}: is a device or a pipe", remedy="name a file, which is written whole or not at all"
            )
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=_existing(path.parent)):
            pass
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise InputError(
            f"{path}: cannot be written: {error.strerror}", remedy="choose another place with -o"
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which replaces `path` when the block ends without an error.

    Of a link the file that it leads to is replaced, as if it were written into.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    with storage_errors(path):
        refuse_unwritable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which replaces `path` when the block ends without an error.

    Of a link to a folder the link is replaced.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object atomically, with sorted keys, so that equal values give equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_file(path) as temporary:
        # What is no Unicode in the name of a file becomes JSON's own escape of it.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's files with their names, in hexadecimal."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_of(error: OSError, path: Path) -> bool:
    """Return whether an error is of `path`, of a folder above or below, of a temporary beside it, or names no file."""
    if not isinstance(error.filename, str | Path):
        return True
    # shutil.rmtree names what lies in a folder without the folder.
    if not Path(error.filename).parent.parts and not os.path.lexists(error.filename):
        return True
    temporary = re.compile(rf"\.{re.escape(path.name)}\..*\.tmp")
    for place in (os.path.abspath, os.path.realpath):
        here, there = Path(place(path)), Path(place(error.filename))
        if there == here or there in here.parents or here in there.parents:
            return True
        if any(p.parent == here.parent and temporary.fullmatch(p.name) for p in (there, *there.parents)):
            return True
    return False


def _takes_nothing(error: OSError) -> bool:
    """Return whether a folder that is there takes nothing new, as /proc: the system says that the new thing is not."""
    return error.errno == errno.ENOENT and error.filename is not None and Path(error.filename).parent.is_dir()


def _umask() -> int:
    """Return the bits that new files shall not have; temporary files and safetensors' are the owner's alone."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
