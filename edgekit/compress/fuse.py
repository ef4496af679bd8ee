"""Folding BatchNorm into the convolution before it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edgekit.errors import IntegrityError, UnsupportedError
from edgekit.graph.reference import relative_change

MOST_CHANGE = 1e-4
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def fuse(net: nn.Module, example_noisy: Tensor, example_sigma: Tensor | None) -> nn.Module:
    """Return a copy of the network in eval mode in which every BatchNorm is folded into its convolution.

    ```
    conv(w, b) ─ batchnorm(mean, var, gamma, beta) ─ [relu]   ->   conv(w', b') ─ identity ─ [relu]
    w' = w * gamma / sqrt(var + eps)      b' = (b - mean) * gamma / sqrt(var + eps) + beta
    ```
    A BatchNorm is folded only where a trace of the network shows that its input is the output of one convolution that
    is run once and read by nothing else. ReLU is left where it is: the engines fuse it into the convolution themselves.

    Args:
        net: Any network; it is not changed.
        example_noisy: A noisy picture (1, c, h, w) on which the copy is compared with the network.
        example_sigma: Its noise level (1, 1, 1, 1); None for a blind network.

    Raises:
        UnsupportedError: A BatchNorm that cannot be folded, by name, or a network that cannot be traced.
        IntegrityError: The output moved by more than 1e-4 of its largest value.
    """
    fused = copy.deepcopy(net).eval()
    norms = {name for name, module in fused.named_modules() if isinstance(module, _BatchNorm)}
    if not norms:
        return fused
    _fold(fused, _trace(fused, example_sigma is not None), norms)
    original = copy.deepcopy(net).eval()
    with torch.inference_mode():
        arguments = (example_noisy,) if example_sigma is None else (example_noisy, example_sigma)
        # Either may change its input in place.
        after, before = (run(*(tensor.clone() for tensor in arguments)).cpu().numpy() for run in (fused, original))
    change = relative_change(after, before)
    if not change <= MOST_CHANGE:
        raise IntegrityError(
            f"folding BatchNorm moved the output by {change:.2g} of its largest value; the bound is {MOST_CHANGE:g}",
            remedy="look for a convolution whose weights are also read elsewhere, or statistics near zero",
        )
    return fused


def settle_weights(net: nn.Module) -> None:
    """Make plain weights of those that are computed from others, in place: weight and spectral normalization.

    Not on a copy: copies of a module that torch parametrizes share its class, which is changed back with the first.
    """
    for module in net.modules():
        if parametrize.is_parametrized(module):
            for name in list(cast(nn.ModuleDict, module.parametrizations)):
                parametrize.remove_parametrizations(module, name)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)


def _trace(net: nn.Module, takes_sigma: bool) -> fx.Graph:
    """Return the graph of module calls.

    Raises:
        UnsupportedError: The network's Python code depends on the values of the picture.
    """
    try:
        absent = {} if takes_sigma or not _has_sigma(net) else {"sigma": None}
        return fx.Tracer().trace(net, concrete_args=absent)
    except (fx.proxy.TraceError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{type(net).__name__}: it has BatchNorm and cannot be traced: {str(error).splitlines()[0]}",
            remedy="write forward() without branches on tensors, or fold its BatchNorm yourself",
        ) from error


def _has_sigma(net: nn.Module) -> bool:
    code = net.forward.__code__
    return "sigma" in code.co_varnames[: code.co_argcount]


def _fold(net: nn.Module, graph: fx.Graph, norms: set[str]) -> None:
    """Fold every BatchNorm of `norms` in place, by the trace."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or str(node.target) not in norms:
            continue
        name, source = str(node.target), node.args[0] if node.args else node.kwargs["input"]
        norm, conv = cast(_BatchNorm, net.get_submodule(name)), _convolution(net, source)
        if conv is None:
            raise _refused(name, f"its input is {_described(net, source)}, not the output of a convolution")
        if len(source.users) > 1:
            raise _refused(name, f"the output of '{source.target}' is also read by {_others(source, node)}")
        if calls[name] > 1 or calls[str(source.target)] > 1:
            raise _refused(name, "it or its convolution is run more than once")
        if not norm.track_running_stats:
            raise _refused(name, "it has no running statistics (track_running_stats=False)")
        transposed = isinstance(conv, nn.ConvTranspose2d)
        if transposed and conv.groups > 1:
            raise _refused(name, f"its transposed convolution '{source.target}' has {conv.groups} groups")
        net.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm, transpose=transposed))
        net.set_submodule(name, nn.Identity())
    left = [name for name, module in net.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        raise _refused(left[0], "forward() does not run it")


def _convolution(net: nn.Module, node: object) -> nn.Conv2d | nn.ConvTranspose2d | None:
    """Return the convolution that a traced node runs, if it is one."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = net.get_submodule(str(node.target))
    return module if isinstance(module, _CONVOLUTIONS) else None


def _described(net: nn.Module, node: object) -> str:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return f"'{node.target}' ({type(net.get_submodule(str(node.target))).__name__})"
    return f"'{node}'"


def _others(source: fx.Node, norm: fx.Node) -> str:
    return ", ".join(
        f"'{user.target if user.op == 'call_module' else user.name}'" for user in source.users if user is not norm
    )


def _refused(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"BatchNorm '{name}' cannot be folded: {reason}",
        remedy="put each BatchNorm directly behind a convolution of its own, or train without it",
    )
