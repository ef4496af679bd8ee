"""The Core ML backend: ML Program packages for iOS, made from torch and verified off a Mac by reference evaluation."""

from __future__ import annotations

from pathlib import Path

from edgekit.backends import Session
from edgekit.backends.coreml import engine, translations
from edgekit.backends.coreml.convert import build, check
from edgekit.backends.coreml.session import NativeSession, ReferenceSession
from edgekit.backends.coreml.structure import check_structure
from edgekit.bundle import Built
from edgekit.errors import IncompleteError
from edgekit.report import Audit
from edgekit.target import Target

__all__ = ["audit", "build", "check", "check_structure", "open_session"]

translations.register()


def audit(bundle: Path, built: Built, target: Target) -> Audit:
    """Return that nothing runs in integers: `build` makes float packages only, and says so of INT8."""
    return Audit(integer_macs_permille=0, how=f"{target.precision}; edgekit makes no integer package for Core ML")


def open_session(bundle: Path, built: Built, target: Target, *, threads: int = 1) -> list[tuple[str, Session]]:
    """Return the package, checked by `check_structure` and opened in every way that this machine has.

    The runner `reference` gives the reference evaluation, and Core ML too on a Mac; `local` gives Core ML alone.
    `threads` is not used: the reference is never timed, and Core ML chooses its own.

    Raises:
        IntegrityError: The package is damaged (exit code 6).
        UnsupportedError: The package has an operator without a reference, or the runner is `qemu` (exit code 4).
        IncompleteError: The runner is `local` and this is no Mac (exit code 7).
    """
    check(target)
    package = check_structure(bundle / built.files["artifact"])
    sessions: list[tuple[str, Session]] = []
    if engine.ON_A_MAC:
        sessions.append(("coreml", NativeSession(package)))
    if target.runner.kind == "reference":
        sessions.append(("reference evaluation", ReferenceSession(package)))
    if not sessions:
        raise IncompleteError(
            f"target '{target.name}': the runner 'local' needs a Mac", remedy="set 'runner: {kind: reference}'"
        )
    return sessions
