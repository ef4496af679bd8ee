"""Bundles: the folder that an app engineer gets, and the manifest that says what everything in it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from edgekit.errors import InputError, IntegrityError
from edgekit.files import json_sha256, sha256, write_json
from edgekit.recipe import Budgets, Sigma
from edgekit.report import Audit
from edgekit.target import STRICT, Bound, Check, Precision, Target

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
STRIDES = (1, 2, 4, 8, 16, 32)
_AGAIN = "restore the bundle, or compile it again"


@dataclass(frozen=True, kw_only=True)
class Link:
    """One step of the chain from the teacher to the artifact: a file's kind and hash, and the hash it was made from."""

    __pydantic_config__: ClassVar = STRICT
    kind: str
    sha256: str
    made_from: str | None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a manifest says of the student.

    macs_256: Of a picture of 256x256. halo_px: None where none is known; halo_unknown then says why.
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    channels: Annotated[int, Check(lambda channels: channels in (1, 3), "edgekit compiles for 1 channel or 3")]
    takes_sigma: bool
    stride: Annotated[int, Check(lambda stride: stride in STRIDES, f"a stride is one of {STRIDES}")]
    parameters: int
    macs_256: int
    halo_px: Annotated[int, Bound(least=0)] | None
    global_ops: tuple[str, ...]
    halo_unknown: str = ""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a manifest says that quality is measured.

    files: Names of the golden pictures. levels: Noise levels that the loss of an INT8 artifact is taken over besides.
    """

    __pydantic_config__: ClassVar = STRICT
    noise: Literal["gaussian"]
    sigma255: Sigma
    seeds: Annotated[tuple[Annotated[int, Bound(least=0, most=4000)], ...], Bound(entries=1)]
    pictures: str
    files: Annotated[tuple[str, ...], Bound(entries=1)]
    golden_outputs: str
    levels: tuple[Sigma, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a backend wrote.

    files: Role -> path relative to the bundle; the role `artifact` is what an app ships.
    precision: The arithmetic that the artifact really uses.
    tools: Name -> version of everything that had a hand in it.
    facts: Figures about the artifact that are the same on every rerun, named with their unit.
    notes: Sentences for the manifest and the README, such as what was left in float and why.
    audit: What ran in integers on the machine that compiled it; None where the engine gives no such account.
    """

    __pydantic_config__: ClassVar = STRICT
    files: Mapping[str, str]
    precision: Precision
    tools: Mapping[str, str]
    facts: Mapping[str, int | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    audit: Audit | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle is.

    budgets: Most dB that may be lost, those of INT8 resolved.
    chain: From the teacher to the artifact. files: Path -> sha256 of every other file of the bundle.
    """

    __pydantic_config__: ClassVar = STRICT
    edgekit: str
    target: Target
    model: Annotated[
        Model,
        Check(lambda model: model.halo_px is not None or bool(model.halo_unknown), "no halo, and no 'halo_unknown'"),
    ]
    budgets: Budgets
    protocol: Protocol
    built: Built
    chain: tuple[Link, ...]
    files: Mapping[str, str]

    def halo(self, height: int, width: int) -> int:
        """Return the halo of a tile in pixels, a multiple of the stride; all of it where no halo is known."""
        reach = max(height, width) if self.model.halo_px is None else self.model.halo_px
        return -(-reach // self.model.stride) * self.model.stride

    def write(self, bundle: Path) -> None:
        """Write `manifest.json`; it has no `halo_unknown` where the halo is known."""
        whole = asdict(self)
        if not self.model.halo_unknown:
            del whole["model"]["halo_unknown"]
        write_json(bundle / MANIFEST, {"schema_version": SCHEMA_VERSION, "kind": "edgekit-bundle", **whole})


def artifact_files(bundle: Path, roles: Mapping[str, str]) -> list[Path]:
    """Return what an app ships: the file or folder `artifact`, and `weights` where they are a file of their own."""
    return [bundle / roles[role] for role in ("artifact", "weights") if role in roles]


def combined_sha256(files: Sequence[Path]) -> str:
    """Return the hash of the one file or folder, or of several ones' hashes in their order."""
    found = [sha256(path) for path in files]
    return found[0] if len(found) == 1 else json_sha256(found)


def report_path(bundle: str | Path) -> Path:
    """Return where the report on a bundle lies: beside it, for the bundle itself is never written to."""
    path = Path(bundle).resolve()
    return path.with_name(f"{path.name}.report.json")


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
    from edgekit import config  # reads with pydantic, which a borrowed machine that records a baseline does not have

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
    for name in manifest.protocol.files:
        if f"golden/{name}.png" not in manifest.files:
            raise IntegrityError(f"{path}: 'protocol.files': there is no golden/{name}.png", remedy=_AGAIN)
    for role, name in {"artifact": "", **manifest.built.files}.items():
        if not any(file == name or file.startswith(f"{name}/") for file in manifest.files):
            raise IntegrityError(f"{path}: 'built.files.{role}': there is no {name or 'such file'}", remedy=_AGAIN)
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
