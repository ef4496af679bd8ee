"""Translations of torch operators that coremltools 9.0 has, and that fail where these do not."""

from __future__ import annotations

import numpy as np
from coremltools.converters.mil.frontend.torch import ops
from coremltools.converters.mil.frontend.torch.converter import TranscriptionContext
from coremltools.converters.mil.frontend.torch.internal_graph import InternalTorchIRNode
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
from coremltools.converters.mil.mil import Builder

_own_int = ops._int


def hardtanh(context: TranscriptionContext, node: InternalTorchIRNode) -> None:
    """Translate `nn.Hardtanh`, also with bounds that are integers, which coremltools' own refuses."""
    x, low, high = ops._get_inputs(context, node, expected=3)
    context.add(Builder.clip(x=x, alpha=float(low.val), beta=float(high.val), name=node.name))


def number(context: TranscriptionContext, node: InternalTorchIRNode) -> None:
    """Translate a number that the trace froze, such as `x.shape[2]`: coremltools' own fails on it with numpy 2.4."""
    (frozen,) = ops._get_inputs(context, node, expected=1)
    if frozen.val is None:
        _own_int(context, node)
    else:
        context.add(Builder.const(val=int(np.asarray(frozen.val).item()), name=node.name), node.name)


def register() -> None:
    """Have coremltools take these in place of its own."""
    register_torch_op(hardtanh, override=True)
    register_torch_op(number, torch_alias=["int"], override=True)
