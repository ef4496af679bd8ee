"""Channels of one tensor made alike in range, so that one scale for all of them wastes fewer of the 256 steps.

```
conv(W1, b1) ─ relu ─ conv(W2)   ->   conv(s W1, s b1) ─ relu ─ conv(W2 / s)        s > 0, one for each channel
```
Cross-layer equalization (Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019),
on measured ranges. The function that the graph computes stays the same. Channels that meet in an addition, become
one in DepthToSpace, or go through Concat, Resize or MaxPool, share their factor; depthwise convolutions pass none on,
and having one weight scale for each channel they take any factor for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekit.errors import IntegrityError
from edgekit.graph.checks import DENOISED, NOISY
from edgekit.graph.reference import Reference, probe, relative_change
from edgekit.graph.walk import attribute, copied, group_count, initializers, is_noise_level

Peaks = Mapping[str, NDArray[np.float64]]
Channel = tuple[str, int]

# Beyond this, a channel that was silent on the calibration pictures would shout on another.
MOST = 64.0
MOST_CHANGE = 1e-4
_FIXED: Channel = ("", 0)
_LEAST_PEAK = 1e-6
_SAME_CHANNELS = frozenset({"Add", "MaxPool", "Relu", "Resize"})


def equalize(model: onnx.ModelProto, peaks: Peaks) -> onnx.ModelProto:
    """Return a graph that computes the same with channels that are alike in range.

    The factor of a channel is the root of how much it could grow until it is the tensor's largest, times the root of
    how large the weights are that read it, so that neither activations nor weights pay for the other.

    Args:
        model: A checked float graph. It is not changed.
        peaks: Tensor -> largest magnitude of each channel.

    Raises:
        IntegrityError: The output moved by more than 1e-4 of its largest value.
    """
    groups = _grouped(model, peaks)
    factors = _factors(model, peaks, groups)
    scaled = _scaled(model, {t: np.array([factors[groups[t, c]] for c in range(len(p))]) for t, p in peaks.items()})
    channels = len(peaks[NOISY])
    noisy = probe(64, 96, channels, seed=0)
    change = relative_change(Reference(scaled)(noisy, 25 / 255), Reference(model)(noisy, 25 / 255))
    if not change <= MOST_CHANGE:
        raise IntegrityError(
            f"equalizing the channels moved the output by {change:.2g} of its largest value; "
            f"at most {MOST_CHANGE:g} is right",
            remedy="set quantization.equalize=false",
        )
    return scaled


class _Ties:
    """Channels that share their factor; whatever is tied to a fixed channel is fixed."""

    def __init__(self) -> None:
        self._above: dict[Channel, Channel] = {}

    def top(self, channel: Channel) -> Channel:
        """Return the channel that stands for all that a channel is tied to."""
        while (above := self._above.get(channel, channel)) != channel:
            channel = above
        return channel

    def tie(self, one: Channel, other: Channel) -> None:
        """Have two channels, and all that is tied to them, share their factor."""
        one, other = self.top(one), self.top(other)
        if one != other:
            one, other = (other, one) if other == _FIXED else (one, other)
            self._above[other] = one


def _grouped(model: onnx.ModelProto, peaks: Peaks) -> dict[Channel, Channel]:
    """Return channel -> the channel that stands for all that share its factor; `_FIXED` for those that keep theirs."""
    ties, stored = _Ties(), initializers(model)
    for node in model.graph.node:
        if node.op_type != "Conv" and not is_noise_level(node, stored):
            for one, other in _alike(node, peaks):
                ties.tie(one, other)
    for channel in _channels((NOISY, DENOISED), peaks):
        ties.tie(_FIXED, channel)
    return {channel: ties.top(channel) for channel in _channels(peaks, peaks)}


def _alike(node: onnx.NodeProto, peaks: Peaks) -> Iterator[tuple[Channel, Channel]]:
    """Give the pairs of channels that share their factor because of what a node computes."""
    result = node.output[0]
    reads = tuple(node.input[:1]) if node.op_type in ("MaxPool", "Resize") else tuple(node.input)
    counts = [len(peaks.get(name, ())) for name in (*reads, result)]
    given = list(_channels(reads, peaks))
    if node.op_type in _SAME_CHANNELS and len(set(counts)) == 1:
        yield from ((channel, (result, channel[1])) for channel in given)
    elif node.op_type == "Concat" and all(counts) and sum(counts[:-1]) == counts[-1]:
        yield from zip(given, _channels((result,), peaks), strict=True)
    elif node.op_type == "DepthToSpace" and attribute(node, "mode") == b"CRD" and result in peaks:
        squares = attribute(node, "blocksize") ** 2
        yield from ((channel, (result, channel[1] // squares)) for channel in given)
    else:
        yield from ((_FIXED, channel) for channel in _channels((*node.input, *node.output), peaks))


def _channels(tensors: Iterable[str], peaks: Peaks) -> Iterator[Channel]:
    """Give the channels of those tensors that have any."""
    return ((name, channel) for name in tensors for channel in range(len(peaks.get(name, ()))))


def _factors(model: onnx.ModelProto, peaks: Peaks, groups: Mapping[Channel, Channel]) -> dict[Channel, float]:
    """Return the factor of each group."""
    loudest: dict[Channel, float] = {}
    for (name, channel), group in groups.items():
        loudest[group] = max(loudest.get(group, _LEAST_PEAK), float(peaks[name][channel]))
    # What a group could grow to: the largest channel of any tensor that it is in.
    room: dict[Channel, float] = {}
    for name, peak in peaks.items():
        members = {groups[name, c] for c in range(len(peak))}
        largest = max(loudest[group] for group in members)
        for group in members:
            room[group] = max(room.get(group, 0.0), largest)
    read = _weights_reading(model, peaks, groups)
    return {
        group: 1.0
        if group == _FIXED
        else min(max((room[group] / loudest[group] * read.get(group, 1.0)) ** 0.5, 1 / MOST), MOST)
        for group in loudest
    }


def _weights_reading(model: onnx.ModelProto, peaks: Peaks, groups: Mapping[Channel, Channel]) -> dict[Channel, float]:
    """Return group -> the largest weight that reads it, as a share of its output channel's largest."""
    stored, read = initializers(model), dict[Channel, float]()
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[0] not in peaks or _is_depthwise(node, stored):
            continue
        weights = np.abs(numpy_helper.to_array(stored[node.input[1]]))
        shares = (weights / np.maximum(weights.max(axis=(1, 2, 3), keepdims=True), _LEAST_PEAK)).max(axis=(2, 3))
        for channel, share in enumerate(shares.reshape(group_count(node), -1, shares.shape[1]).max(axis=1).ravel()):
            group = groups.get((node.input[0], channel), _FIXED)
            read[group] = max(read.get(group, 1e-3), float(share))
    return read


def _scaled(model: onnx.ModelProto, factors: Mapping[str, NDArray[np.float64]]) -> onnx.ModelProto:
    """Return the graph whose tensors are larger by the factors of their channels."""
    scaled = copied(model)
    stored = initializers(scaled)

    def multiply(index: int, node: onnx.NodeProto, by: NDArray[np.float64]) -> None:
        tensor = stored[node.input[index]]
        tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * by).astype(np.float32), tensor.name))

    for node in scaled.graph.node:
        if node.op_type == "Conv" and not factors.keys().isdisjoint((node.input[0], node.output[0])):
            # A convolution may write the output itself, or read the noise level: they keep their scale, without peaks.
            outputs, inputs = stored[node.input[1]].dims[:2]
            results = factors.get(node.output[0], np.ones(outputs))
            # What the output channels of each group read, all those of a group alike.
            reads = factors.get(node.input[0], np.ones(group_count(node) * inputs)).reshape(group_count(node), -1)
            by = results[:, None] / np.repeat(reads, len(results) // len(reads), axis=0)
            multiply(1, node, by[:, :, None, None])
            if len(node.input) > 2:
                multiply(2, node, results)
        elif is_noise_level(node, stored):
            multiply(1, node, factors[node.output[0]][None, :, None, None])
    return scaled


def _is_depthwise(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether each output channel reads one of several input channels."""
    return group_count(node) > 1 and stored[node.input[1]].dims[1] == 1
