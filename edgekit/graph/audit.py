"""The integer audit: what of a network an engine computes in integers, and what in float around them.

An engine's account of its own plan comes in, as `Executed` operators; nothing here trusts what was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgekit.report import Audit, FloatNode

Arithmetic = Literal["integer", "float"]


@dataclass(frozen=True, kw_only=True)
class Executed:
    """One operator of an engine's plan.

    op: Its type, as the source graph calls it where the engine still knows.
    arithmetic: `integer` where it reads and writes integers only. multiplies: Whether it is a product with weights.
    inputs, outputs: Names of its tensors.
    """

    op: str
    arithmetic: Arithmetic
    multiplies: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A convolution or matrix product of the artifact. macs: For 256x256 pixels. integer: As the engine runs it."""

    name: str
    op: str
    macs: int
    integer: bool


def audit(weighted: Sequence[Weighted], plan: Sequence[Executed], how: str) -> Audit:
    """Return the account of an artifact.

    Args:
        weighted: Everything in the artifact that multiplies and accumulates.
        plan: What the engine executes, in its order.
        how: Where both come from.
    """
    total = max(1, sum(node.macs for node in weighted))
    left = sorted((node for node in weighted if not node.integer), key=lambda node: (-node.macs, node.name))
    return Audit(
        integer_macs_permille=1000 * sum(node.macs for node in weighted if node.integer) // total,
        float_nodes=tuple(
            FloatNode(name=node.name, op=node.op, macs_permille=round(1000 * node.macs / total)) for node in left
        ),
        float_ops_between=dict(float_between(plan)),
        how=how,
    )


def float_between(plan: Sequence[Executed]) -> Mapping[str, int]:
    """Return how many operators of each type are computed in float between two integer products.

    Between is what depends on one and what another depends on; these cost INT8 its speed, for the pictures' planes are
    widened to float before them and rounded again behind.
    """
    behind = _reached(plan)
    before = _reached([replace(n, inputs=n.outputs, outputs=n.inputs) for n in reversed(plan)])
    return Counter(
        node.op
        for node in plan
        if node.arithmetic == "float"
        and not node.multiplies
        and not behind.isdisjoint(node.inputs)
        and not before.isdisjoint(node.outputs)
    )


def _reached(plan: Sequence[Executed]) -> set[str]:
    """Return the edges that depend on an integer product."""
    reached: set[str] = set()
    for node in plan:
        if (node.multiplies and node.arithmetic == "integer") or not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
    return reached
