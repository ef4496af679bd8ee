"""What a MODEL on the command line stands for: a shipped name, a run folder, an ONNX file, or a torch class."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit import bundle, models, recipe, run, zoo
from edgekit.errors import EdgekitError, InputError, nearest
from edgekit.files import sha256, write_json
from edgekit.models import weights
from edgekit.models.denoiser import Denoiser

Array = NDArray[np.float32]
WEIGHTS = "student.safetensors"
_DESCRIPTION = "network.json"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A torch network with its weights, in eval mode. model: Its name among `models`, empty for a user's own class.

    sha256: Of the weights file.
    """

    name: str
    model: str
    net: Denoiser
    options: Mapping[str, models.Option]
    weights: Path
    sha256: str


class Foreign(Denoiser):
    """A user's own network behind edgekit's interface; it is called with `sigma` only if its forward takes it."""

    def __init__(self, net: nn.Module, *, channels: int, stride: int, takes_sigma: bool) -> None:
        super().__init__()
        self.net, self.channels, self.stride, self.takes_sigma = net, channels, stride, takes_sigma

    def forward(self, noisy: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Return the denoised pictures, shaped as `noisy`."""
        denoised: Tensor = self.net(noisy, sigma) if self.takes_sigma else self.net(noisy)
        return denoised

    def noise(self, noisy: Tensor, sigma: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return what the network takes away from the picture."""
        return noisy - self.forward(noisy, sigma), None


def from_recipe(wanted: recipe.Model, channels: int) -> Network | None:
    """Return the network of a recipe with its weights; None when the recipe asks for random ones.

    Raises:
        InputError: Unknown name or option, or weights of another architecture.
    """
    if wanted.weights == "random":
        return None
    options = wanted.options_for(channels)
    if wanted.weights == "shipped":
        return shipped(wanted.model, options)
    return _load(wanted.model, wanted.model, options, Path(wanted.weights))


def architecture(wanted: recipe.Model, channels: int) -> Denoiser:
    """Return the network of a recipe with random weights, whatever weights it is to have.

    Raises:
        InputError: Unknown name or option, shipped weights that were trained with others, or a network for other
            pictures.
    """
    model, options = wanted.model, wanted.options_for(channels)
    if wanted.weights == "shipped":
        shipped_for = zoo.fitting(model, options)
        model, options = shipped_for.model, dict(shipped_for.options)
    made = models.create(model, options)
    if made.channels != channels:
        raise InputError(
            f"'{wanted.model}' takes {made.channels} channels, data.channels is {channels}",
            remedy="set data.channels, and leave the option 'channels' of the network out",
        )
    return made


def shipped(name: str, options: Mapping[str, models.Option] | None = None) -> Network:
    """Return a network with the weights that edgekit ships for it, or for its variant with these options.

    Raises:
        InputError: None are shipped, or they were trained with other options.
    """
    card = zoo.fitting(name, options or {})
    return _load(card.name, card.model, card.options, zoo.weights(card.name))


def from_run(folder: Path) -> Network:
    """Return the student of a run folder.

    Raises:
        InputError: The folder is no run, or its student is not finished.
    """
    for stage in run.read_stages(folder):
        if stage.name == "student":
            made = read_description(folder / stage.folder)
            return _load(made.model, made.model, made.options, folder / stage.folder / WEIGHTS)
    if "compiles" in run.read_identity(folder):
        raise InputError(
            f"{folder}: holds bundles of a network, not the network", remedy="name the network itself again"
        )
    raise InputError(f"{folder}: its student is not finished", remedy="start the same edgekit distill again")


def is_run(what: str) -> bool:
    """Return whether a MODEL is a folder; a shipped name is none where a folder has it too (`./nano` names that)."""
    return what not in zoo.names() and Path(what).is_dir()


def named(what: str, path: Path | None = None) -> Network:
    """Return the network of a run folder, a shipped name, or `package.module:Class` with the weights at `path`.

    Raises:
        InputError: It is none of these; else as `from_run` and `from_class`.
    """
    if is_run(what):
        return from_run(Path(what))
    return from_class(what, path) if ":" in what else shipped(card(what).name)


def card(what: str) -> zoo.Card:
    """Return the card of a shipped MODEL.

    Raises:
        InputError: It is none, and nothing else that a MODEL may be.
    """
    if what not in (known := zoo.names()):
        raise InputError(
            f"'{what}' is no model with shipped weights, no run folder, no ONNX file and no package.module:Class",
            remedy=nearest(what, known),
        )
    return zoo.card(what)


def refuse_ignored(
    what: str | None,
    *,
    weights: Path | None = None,
    options: Mapping[str, models.Option] | None = None,
    folder: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Refuse what only another kind of MODEL heeds; None is the newest run, or the targets' student where none is.

    Raises:
        InputError: Weights, options, a folder or leave to overwrite that would be ignored.
    """
    of_run = is_run(what) if what is not None else run.exists()
    is_class = what is not None and ":" in what and not of_run and not what.endswith(".onnx")
    shown = f"'{what}'" if what is not None else "the newest run" if of_run else "the targets' student"
    if weights is not None and not is_class:
        raise InputError(f"--weights {weights}: {shown} has its own", remedy="leave --weights out; a class takes them")
    if options and (of_run or is_class or (what or "").endswith(".onnx")):
        raise InputError(
            f"--option {next(iter(options))}: {shown} is what it is",
            remedy="options are for a name of: edgekit models",
        )
    if of_run and (folder is not None or overwrite):
        given = f"-o {folder}" if folder is not None else "--overwrite"
        raise InputError(f"{given}: {shown} keeps its bundles in itself", remedy=f"leave {given} out, or name a MODEL")


def told_of_harm(name: str, denoised_mdb: int, noisy_mdb: int, sigma255: float) -> str:
    """Return a line on a network that makes pictures worse, and on what it may be; empty where it makes them better."""
    if denoised_mdb > noisy_mdb:
        return ""
    found = f"{denoised_mdb / 1000:.2f} dB from {noisy_mdb / 1000:.2f} at noise level {sigma255:g}"
    return (
        f"'{name}' makes pictures worse in FP32: {found}; does it give the noise and not the picture, expect sigma on "
        "0..255 or pixels in [-1, 1], or are its weights not those of its training?"
    )


def describe(folder: Path, model: str, options: Mapping[str, models.Option]) -> None:
    """Write which network the weights in a folder belong to."""
    write_json(folder / _DESCRIPTION, {"model": model, "options": dict(options)})


def read_description(folder: Path) -> recipe.Model:
    """Return which network the weights in a folder belong to."""
    return recipe.Model(**json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8")))


def from_class(name: str, path: Path | None) -> Network:
    """Return the network of `package.module:Class`, made without arguments, with the weights of a file.

    Raises:
        InputError: No such class, one that cannot be made, no weights, or weights that do not fit.
    """
    made = _made(name)
    if path is None:
        raise InputError(f"'{name}' needs its weights", remedy="add --weights FILE.safetensors")
    weights.load_into(made, path)
    net = _behind_interface(name, made)
    label = name.partition(":")[2].lower()
    return Network(name=label, model="", net=net, options={}, weights=path, sha256=sha256(path))


def untrained(name: str) -> Denoiser:
    """Return the network of `package.module:Class` as its constructor leaves it.

    Raises:
        InputError: No such class, or one that cannot be made.
    """
    return _behind_interface(name, _made(name))


def example(net: Denoiser) -> tuple[Tensor, Tensor | None]:
    """Return random pictures (1, c, h, w) of eight strides a side, and a noise level where the network takes one."""
    side = 8 * net.stride
    noisy = torch.rand(1, net.channels, side, side, generator=torch.Generator().manual_seed(0))
    return noisy, torch.full((1, 1, 1, 1), 25 / 255) if net.takes_sigma else None


def _made(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InputError(f"'{name}' names no class", remedy="give package.module:Class")
    if module.endswith(".py"):
        raise InputError(
            f"'{name}' names a file, not a module", remedy=f"give {Path(module).stem}:{attribute}, in the file's folder"
        )
    # The console script's own folder stands on the path, not the one that the user's network lies in.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    with _users_code(f"'{name}' cannot be made", "name an importable class without arguments"):
        made = getattr(importlib.import_module(module), attribute)()
    if not isinstance(made, nn.Module):
        raise InputError(f"'{name}' is a {type(made).__name__}, not a torch.nn.Module")
    return made


@contextmanager
def _users_code(told: str, remedy: str) -> Iterator[None]:
    """Turn whatever a user's own code raises, or leaves with, into an InputError."""
    try:
        yield
    except EdgekitError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{told}: {type(error).__name__}: {error}", remedy=remedy) from error


def _behind_interface(name: str, made: nn.Module) -> Denoiser:
    """Return a user's network in eval mode, after it has denoised a picture."""
    from edgekit.compress import fuse  # imports onnx, which a borrowed machine that records a baseline does not have

    remedy = "forward(noisy), or forward(noisy, sigma), takes (n, channels, h, w); set the class's channels and stride"
    with _users_code(f"'{name}' denoises no picture", remedy), torch.no_grad():
        net = (made if isinstance(made, Denoiser) else _adapt(made)).eval()
        fuse.settle_weights(net)
        if net.stride not in bundle.STRIDES:
            raise InputError(f"'{name}' has a stride of {net.stride}", remedy=f"set it to one of {bundle.STRIDES}")
        given = [value for value in example(net) if value is not None]
        denoised = net(*given)
        if not isinstance(denoised, Tensor) or denoised.shape != given[0].shape:
            came = tuple(denoised.shape) if isinstance(denoised, Tensor) else f"a {type(denoised).__name__}"
            raise InputError(f"'{name}' gives {came} for a picture {tuple(given[0].shape)}", remedy=remedy)
    return net


def _adapt(made: nn.Module) -> Foreign:
    planes = [m.in_channels for m in made.modules() if isinstance(m, nn.Conv2d)]
    return Foreign(
        made,
        channels=int(getattr(made, "channels", planes[0] if planes and planes[0] in (1, 3) else 1)),
        stride=int(getattr(made, "stride", 16)),
        takes_sigma=bool(getattr(made, "takes_sigma", _takes_sigma(made))),
    )


def _takes_sigma(made: nn.Module) -> bool:
    """Return whether forward wants a noise level: it names `sigma`, or cannot do without a second argument."""
    more = list(inspect.signature(made.forward).parameters.values())[1:]
    wanted = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in wanted and (p.name == "sigma" or p.default is p.empty) for p in more)


def _load(name: str, model: str, options: Mapping[str, models.Option], path: Path) -> Network:
    net = models.create(model, options)
    weights.load_into(net, path)
    return Network(name=name, model=model, net=net.eval(), options=dict(options), weights=path, sha256=sha256(path))


def as_function(net: Denoiser) -> Callable[[Array, float], Array]:
    """Return a network, wherever it lies, as a function of arrays: noisy (1, c, h, w), sigma on the scale [0, 1]."""

    @torch.no_grad()
    def denoise(noisy: Array, sigma: float) -> Array:
        device = next(net.parameters()).device
        level = torch.full((1, 1, 1, 1), sigma, device=device) if net.takes_sigma else None
        # A copy: a network may change its input in place.
        denoised: Array = net(torch.tensor(noisy, device=device), level).cpu().numpy()
        return denoised

    return denoise
