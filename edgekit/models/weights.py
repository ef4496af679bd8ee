"""Weights in safetensors files."""

from __future__ import annotations

import difflib
import struct
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeGuard

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgekit.errors import InputError, IntegrityError
from edgekit.files import atomic_file

AVERAGES = "ema/"  # before the names of the averaged weights in a checkpoint of training
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically to a safetensors file."""
    ready = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    with atomic_file(path) as temporary:
        save_file(ready, temporary, dict(metadata or {}))


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a torch checkpoint that holds tensors only.

    Of a checkpoint of edgekit's own training, these are the averaged weights.

    Raises:
        InputError: The file is missing, or is a pickle that holds more than tensors (it is not executed).
        IntegrityError: The file is truncated or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", remedy="name a .safetensors file of weights")
    if path.suffix.lower() in _PICKLES:
        return _read_checkpoint(path)
    try:
        tensors = dict(load_file(path))
    except safetensors.SafetensorError as error:
        raise IntegrityError(
            f"{path}: damaged or truncated weights: {error}", remedy="copy or train them again"
        ) from error
    return averages(tensors) or tensors


def averages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averaged weights of what a checkpoint of edgekit's training holds; nothing of another file."""
    return {name.removeprefix(AVERAGES): t for name, t in tensors.items() if name.startswith(AVERAGES)}


def load_into(net: nn.Module, path: Path) -> None:
    """Copy the weights of a file into a network of the same architecture; half-precision files are widened.

    Raises:
        InputError: The weights are of another architecture, or have other names; names the first parameter that
            differs.
        IntegrityError: The file is damaged, or a weight is not finite.
    """
    given, wanted = read(path), net.state_dict()
    for name, tensor in wanted.items():
        if name not in given:
            raise InputError(f"{path}: has no '{name}'", remedy=_other_names(given, wanted))
        if given[name].shape != tensor.shape:
            found, want = tuple(given[name].shape), tuple(tensor.shape)
            raise InputError(f"{path}: '{name}' is {found}, the network has {want}", remedy="name the matching model")
        if not torch.isfinite(given[name].float()).all():
            raise IntegrityError(
                f"{path}: '{name}' holds values that are not finite", remedy="use an earlier checkpoint"
            )
    if extra := sorted(set(given) - set(wanted)):
        raise InputError(f"{path}: '{extra[0]}' has no place in the network", remedy="name the matching model")
    net.load_state_dict({name: given[name].to(tensor.dtype) for name, tensor in wanted.items()})


def _other_names(given: Collection[str], wanted: Collection[str]) -> str:
    """Return what to do about weights of which a network misses some: their names may differ by a prefix alone."""
    missing = [name for name in wanted if name not in given]
    first, spare = missing[0], sorted(set(given) - set(wanted))
    for prefix in (key.removesuffix(first) for key in spare if key.endswith(f".{first}")):
        if all(prefix + name in given for name in missing):
            return f"it has them all behind '{prefix}': save them under names without it"
    for prefix in (first[: dot + 1] for dot, sign in enumerate(first) if sign == "."):
        if all(name.startswith(prefix) and name.removeprefix(prefix) in given for name in missing):
            return f"it has them all without '{prefix}': let the class inherit from the network that they are of"
    close = difflib.get_close_matches(first, spare, n=1, cutoff=0.5)
    nearest = f"the nearest there is '{close[0]}'; " if close else ""
    return f"{nearest}these weights are of another architecture or option"


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    import pickle

    damaged = IntegrityError(
        f"{path}: damaged or truncated checkpoint, or none at all", remedy="copy or train it again"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch says the same of a broken file and of one that names a class; a pickle begins with 0x80.
        if "GLOBAL" not in str(error) and path.read_bytes()[:1] != b"\x80":
            raise damaged from error
        raise InputError(
            f"{path}: holds more than tensors, and loading it could run code",
            remedy="save its state_dict() with safetensors and name that file",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, struct.error) as error:
        raise damaged from error
    if not _is_state_dict(loaded):
        held = loaded.items() if isinstance(loaded, dict) else ()
        if inside := [repr(key) for key, value in held if value and _is_state_dict(value)]:
            raise InputError(
                f"{path}: is not a state_dict, but holds one under {' and one under '.join(inside)}",
                remedy=f"take it out: torch.save(torch.load({str(path)!r})[{inside[0]}], 'weights.pth')",
            )
        raise InputError(f"{path}: is not a state_dict", remedy="save the network's state_dict()")
    return loaded


def _is_state_dict(loaded: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(loaded, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in loaded.items())
