"""The networks by name. A new one is a file and a row of `_BUILDERS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial

from edgekit.errors import InputError, nearest
from edgekit.models.denoiser import Denoiser
from edgekit.models.mobile import MobileUnet
from edgekit.models.plain import DnCnn, PlainUnet
from edgekit.models.unet import UnetA, UnetB

Option = bool | int | str

_BUILDERS: dict[str, Callable[..., Denoiser]] = {
    "teacher": UnetB,
    "teacher-a": UnetA,
    "nano": partial(MobileUnet, widths=(16, 32, 48), encoder=(2, 1, 1), decoder=(2, 1), expansion=2),
    "small": partial(MobileUnet, widths=(32, 48, 64), encoder=(2, 2, 3), decoder=(2, 2), expansion=3),
    "base": partial(MobileUnet, widths=(32, 64, 96), encoder=(2, 3, 4), decoder=(2, 3), expansion=3),
    "large": partial(MobileUnet, widths=(48, 80, 168), encoder=(3, 4, 5), decoder=(3, 4), expansion=3),
    "control": PlainUnet,
    "dncnn": DnCnn,
}
_VALUES: dict[str, tuple[Option, ...]] = {"activation": ("relu", "hardswish"), "channels": (1, 3)}
_LEAST = {"depth": 2, "blocks": 1}
_SHAPE = {"widths", "encoder", "decoder", "expansion"}


def names() -> list[str]:
    """Return the names of the networks."""
    return list(_BUILDERS)


def options(name: str) -> dict[str, Option]:
    """Return the options of a network with their defaults."""
    parameters = inspect.signature(_builder(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _SHAPE}


def create(name: str, given: Mapping[str, Option] | None = None) -> Denoiser:
    """Return a new network with random weights (torch's global generator).

    Args:
        name: One of `names()`.
        given: Options that differ from the defaults, see `options()`.

    Raises:
        InputError: Unknown name or option, or a value of the wrong type or that the option does not know.
    """
    known = options(name)
    for key, value in (given or {}).items():
        if key not in known:
            raise InputError(f"model '{name}' has no option '{key}'; {nearest(key, known)}")
        if type(value) is not type(known[key]):
            raise InputError(f"model '{name}': option '{key}' is {value!r}, expected {type(known[key]).__name__}")
        if key in _VALUES and value not in _VALUES[key]:
            choices = ", ".join(str(v) for v in _VALUES[key])
            raise InputError(f"model '{name}': option '{key}' is {value!r}; known: {choices}")
        if isinstance(value, int) and value < _LEAST.get(key, value):
            raise InputError(f"model '{name}': option '{key}' is {value}; the least is {_LEAST[key]}")
    return _builder(name)(**(given or {}))


def parameter_count(net: Denoiser) -> int:
    """Return the number of learned parameters."""
    return sum(p.numel() for p in net.parameters())


def _builder(name: str) -> Callable[..., Denoiser]:
    if name not in _BUILDERS:
        raise InputError(f"unknown model '{name}'; {nearest(name, _BUILDERS)}")
    return _BUILDERS[name]
