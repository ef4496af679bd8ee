"""Where ONNX Runtime spends its time, node by node, from its own profile."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edgekit.graph.checks import SIGMA
from edgekit.graph.reference import feeds, session_options
from edgekit.graph.walk import producers

# What ONNX Runtime puts behind the names of nodes, or of the tensors that it names nodes after.
_BEHIND = re.compile(r"(_token_\d+|_nchwc|_nhwc|_fused)+$")
_KERNEL = "_kernel_time"


def node_times_us(
    model: onnx.ModelProto,
    open_file: Callable[[onnxruntime.SessionOptions], onnxruntime.InferenceSession],
    noisy: NDArray[np.float32],
    runs: int,
) -> dict[str, int]:
    """Return node of the file -> its shortest time of `runs` runs in microseconds, on one thread.

    A node that was fused counts with the one that it was fused into; what the engine adds, as transpositions, counts
    for none.

    Args:
        model: The file's graph.
        open_file: Opens the file with the options that it is given.
        noisy: Picture (1, c, h, w).
        runs: Of the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "profile"))
        session = open_file(options)
        given = feeds(noisy, 25 / 255, takes_sigma=SIGMA in {i.name for i in session.get_inputs()})
        for _ in range(runs):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    known, made_by = {node.name: node.name for node in model.graph.node}, producers(model)
    for node in model.graph.node:
        # A ReLU becomes part of the convolution before it, which then bears the name of the ReLU's output.
        owner = made_by.get(node.input[0], node) if node.op_type == "Relu" else node
        known |= dict.fromkeys(node.output, owner.name)
    shortest: dict[str, int] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_KERNEL):
            continue
        name = known.get(_BEHIND.sub("", event["name"].removesuffix(_KERNEL)))
        if name is not None:
            shortest[name] = min(int(event["dur"]), shortest.get(name, int(event["dur"])))
    return shortest
