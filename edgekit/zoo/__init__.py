"""The weights that edgekit ships, each with a card that says how it was trained and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit import models
from edgekit.errors import InputError, IntegrityError, nearest
from edgekit.files import sha256

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A PSNR of the shipped file: on which pictures, at which sigma (0 to 255), the mean over pictures and seeds."""

    pictures: str
    sigma: int
    seeds: int
    psnr_mdb: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """Where shipped weights come from.

    model, options: What `models.create` needs. sha256: Of the weights file.
    trained: Data, noise, steps, batch, patch, seconds, device, precision, seed and teacher.
    """

    name: str
    model: str
    options: dict[str, models.Option]
    sha256: str
    parameters: int
    trained: dict[str, str | int | float]
    measured: tuple[Measured, ...]
    notes: tuple[str, ...]


def names() -> list[str]:
    """Return the names of the shipped weights, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def card(name: str) -> Card:
    """Return the card of shipped weights.

    Raises:
        InputError: No weights of that name are shipped. IntegrityError: The card is damaged.
    """
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        raise InputError(f"no weights are shipped for '{name}'; {nearest(name, names())}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        measured = tuple(Measured(**m) for m in raw["measured"])
        return Card(**(raw | {"measured": measured, "notes": tuple(raw["notes"])}))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: damaged card: {error}", remedy="reinstall edgekit") from error


def fitting(name: str, options: Mapping[str, models.Option]) -> Card:
    """Return the card of the weights `name` if they were trained with these options, else that of the variant that was.

    Args:
        name: Of shipped weights.
        options: Of the network; the weights of a variant have to agree in all others too, which are at their defaults.

    Raises:
        InputError: No weights of that name are shipped, an option is unknown, or none were trained with these.
    """
    named = card(name)
    defaults = models.options(named.model)
    have = defaults | named.options
    for key in options:
        if key not in defaults:
            raise InputError(f"model '{name}' has no option '{key}'; {nearest(key, defaults)}")
    differ = {key: value for key, value in options.items() if have[key] != value}
    if not differ:
        return named
    for variant in map(card, names()):
        if variant.model == name and defaults | variant.options == {**defaults, **options}:
            return variant
    trained = ", ".join(f"{key}={have[key]!r}" for key in differ)
    raise InputError(
        f"the shipped weights of '{name}' were trained with {trained}, not {', '.join(map(repr, differ.values()))}",
        remedy="name a file of weights, or set weights: random to train from scratch; a teacher may be left out",
    )


def weights(name: str) -> Path:
    """Return the path of shipped weights, whose bytes are those that the card tells of.

    Raises:
        InputError: No weights of that name are shipped. IntegrityError: The file is missing or changed.
    """
    path = _FOLDER / f"{name}.safetensors"
    wanted = card(name).sha256
    if not path.is_file() or sha256(path) != wanted:
        raise IntegrityError(f"{path}: is not the file that its card describes", remedy="reinstall edgekit")
    return path
