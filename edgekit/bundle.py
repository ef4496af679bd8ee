"""Bundles: the folder that an app engineer gets, and the manifest that says what everything in it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from edgekit import config
from edgekit.errors import InputError, IntegrityError
from edgekit.files import json_sha256, sha256, write_json
from edgekit.target import STRICT, Bound, Check

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_AGAIN = "restore the bundle, or compile it again"


@dataclass(frozen=True, kw_only=True)
class Link:
    """One step of the chain from the teacher to the artifact: a file's kind and hash, and the hash it was made from."""

    __pydantic_config__: ClassVar = STRICT
    kind: str
    sha256: str
    made_from: str | None


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What a manifest says of the student.

    macs_256: Of a picture of 256x256. halo_px: None where none is known; halo_unknown then says why.
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    channels: Literal[1, 3]
    takes_sigma: bool
    stride: Literal[1, 2, 4, 8, 16, 32]
    parameters: int
    macs_256: int
    halo_px: Annotated[int, Bound(least=0)] | None
    global_ops: tuple[str, ...]
    halo_unknown: str = ""


@dataclass(frozen=True, kw_only=True)
class _Protocol:
    """How a manifest says that quality is measured. files: Names of the golden pictures."""

    __pydantic_config__: ClassVar = STRICT
    noise: Literal["gaussian"]
    sigma255: Annotated[float, Bound(least=0.0, most=255.0)]
    seeds: Annotated[tuple[Annotated[int, Bound(least=0, most=4000)], ...], Bound(entries=1)]
    pictures: str
    files: Annotated[tuple[str, ...], Bound(entries=1)]
    golden_outputs: str


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The parts of a manifest that are checked beyond its own types, and kept as they were written."""

    __pydantic_config__: ClassVar = STRICT
    model: Annotated[
        _Model,
        Check(lambda model: model.halo_px is not None or bool(model.halo_unknown), "no halo, and no 'halo_unknown'"),
    ]
    protocol: _Protocol


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle is.

    target: The resolved target. model: As `_Model`. protocol: As `_Protocol`.
    budgets: Most dB that may be lost. built: What the backend wrote.
    chain: From the teacher to the artifact. files: Path -> sha256 of every other file of the bundle.
    """

    __pydantic_config__: ClassVar = STRICT
    edgekit: str
    target: dict[str, object]
    model: dict[str, object]
    budgets: dict[str, float | None]
    protocol: dict[str, object]
    built: dict[str, object]
    chain: tuple[Link, ...]
    files: dict[str, str]

    def halo(self, height: int, width: int) -> int:
        """Return the halo of a tile in pixels, a multiple of the stride; all of it where no halo is known."""
        stride, known = int(str(self.model["stride"])), self.model["halo_px"]
        reach = max(height, width) if known is None else int(str(known))
        return -(-reach // stride) * stride

    def write(self, bundle: Path) -> None:
        """Write `manifest.json`."""
        write_json(bundle / MANIFEST, {"schema_version": SCHEMA_VERSION, "kind": "edgekit-bundle", **asdict(self)})


def artifact_files(bundle: Path, roles: Mapping[str, str]) -> list[Path]:
    """Return what an app ships: the file or folder `artifact`, and `weights` where they are a file of their own."""
    return [bundle / roles[role] for role in ("artifact", "weights") if role in roles]


def combined_sha256(files: Sequence[Path]) -> str:
    """Return the hash of the one file or folder, or of several ones' hashes in their order."""
    found = [sha256(path) for path in files]
    return found[0] if len(found) == 1 else json_sha256(found)


def hashes(bundle: Path) -> dict[str, str]:
    """Return path -> sha256 of every file of a bundle but the manifest, sorted."""
    files = sorted(p for p in bundle.rglob("*") if p.is_file() and p != bundle / MANIFEST)
    return {p.relative_to(bundle).as_posix(): sha256(p) for p in files}


def read(bundle: Path) -> Manifest:
    """Return the manifest of a bundle whose files are all what they were when it was written.

    Raises:
        InputError: The folder is no bundle.
        IntegrityError: The manifest is damaged, or a file changed, is missing or was added.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{bundle}: is not a bundle (it has no {MANIFEST})", remedy="make one: edgekit compile --target T"
        )
    try:
        raw = dict(json.loads(path.read_text(encoding="utf-8")))
        if raw.pop("schema_version") != SCHEMA_VERSION or raw.pop("kind") != "edgekit-bundle":
            raise InputError(f"{path}: was written by another version of edgekit", remedy="compile it again")
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: damaged manifest: {error}", remedy="compile the bundle again") from error
    manifest = config.checked(raw, Manifest, path)
    parts = config.checked({"model": manifest.model, "protocol": manifest.protocol}, _Parts, path)
    for name in parts.protocol.files:
        if f"golden/{name}.png" not in manifest.files:
            raise IntegrityError(f"{path}: 'protocol.files': there is no golden/{name}.png", remedy=_AGAIN)
    _check(bundle, manifest.files)
    return manifest


def _check(bundle: Path, recorded: Mapping[str, str]) -> None:
    found = hashes(bundle)
    for name in sorted(set(recorded) | set(found)):
        if found.get(name) != recorded.get(name):
            state = (
                "is missing" if name not in found else "is not in the manifest" if name not in recorded else "changed"
            )
            raise IntegrityError(f"{bundle / name}: {state}", remedy=_AGAIN)
