"""A folder of this machine that stands for a runner's own: for what runs here, natively or emulated."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from edgekit.errors import IncompleteError
from edgekit.files import atomic_file


class Folder:
    """A temporary folder that goes when it is closed or forgotten."""

    def __init__(self) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="edgekit-run-")

    def push(self, file: Path) -> str:
        """Copy a file into the folder, with its permissions; return its path."""
        return str(shutil.copy(file, self._kept.name))

    def path(self, name: str) -> str:
        """Return the path of a file in the folder."""
        return str(Path(self._kept.name) / name)

    def pull(self, name: str, to: Path) -> None:
        """Copy a file of the folder to `to`, whole or not at all.

        Raises:
            IncompleteError: There is no such file.
        """
        if not Path(self.path(name)).is_file():
            raise IncompleteError(f"{name}: the program did not write it")
        with atomic_file(to) as temporary:
            shutil.copyfile(self.path(name), temporary)

    def close(self) -> None:
        """Remove the folder."""
        self._kept.cleanup()
