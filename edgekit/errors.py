"""The errors that edgekit raises, each with its exit code.

EdgekitError                 1  internal: a defect of edgekit's own
├── InputError               2  usage, configuration or input (a recipe, a picture, a folder, a full disk or memory)
├── LimitError               3  a limit that cannot be kept whatever is tried
├── UnsupportedError         4  an operator, model or precision that the engine or target does not take
├── ToolMissingError         5  an engine or tool that is not installed, or is installed and broken
├── IntegrityError           6  a file that is damaged, or whose bytes changed since they were recorded
└── IncompleteError          7  something that the target requires could not be run here

A limit that an artifact fails is a verdict, not an error: `verify` then exits with LIMIT_FAILED (3).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

OK = 0
LIMIT_FAILED = 3
INCOMPLETE = 7
INTERRUPTED = 130
# In the words of torch, on a CPU and a GPU, and of ONNX Runtime, whose errors have no narrower class than Exception.
_OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator: can't allocate memory|(CUDA|HIP|XPU|MPS backend) out of memory|CUDA error: out of memory|"
    "CU(DNN|BLAS)_STATUS_ALLOC_FAILED|Failed to allocate memory for requested buffer"
)


class EdgekitError(Exception):
    """A failure that edgekit explains in one line: what, where, and what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        """Join the message and what to do about it.

        Args:
            message: The file and line where they are known, the thing, and the value found.
            remedy: What the reader can do now.
        """
        super().__init__(message if remedy is None else f"{message}; {remedy}")


class InputError(EdgekitError):
    """The command, the configuration or an input file is wrong."""

    exit_code = 2


class LimitError(EdgekitError):
    """A limit cannot be kept, so that there is no artifact to give a verdict on."""

    exit_code = LIMIT_FAILED


class UnsupportedError(EdgekitError):
    """The engine or the target does not take this operator, model or precision."""

    exit_code = 4


class ToolMissingError(EdgekitError):
    """An engine or a tool is not installed, or is installed and broken."""

    exit_code = 5


class IntegrityError(EdgekitError):
    """A file is damaged, or is not the one that was recorded."""

    exit_code = 6


class IncompleteError(EdgekitError):
    """Something that was asked for could not be run on this machine."""

    exit_code = INCOMPLETE


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the closest known name, else the list of known names."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of Python, torch or ONNX Runtime says that memory ran out."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None
