"""Writes a network as ExecuTorch's INT8 for XNNPACK, in an environment of its own; see arm64.py beside this folder.

python executorch_int8.py NETWORK.pt2 CALIBRATION.npz MODEL.pte

NETWORK.pt2 is by torch.export; CALIBRATION.npz holds `noisy` (n, c, h, w) and `sigma` (n,). The quantizer has XNNPACK's
own settings, weights per channel. It needs executorch and torchao, not edgekit; stdout is what was delegated, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import executorch.version
import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from executorch.devtools.backend_debug import get_delegation_info
from executorch.exir import to_edge_transform_and_lower
from torchao import __version__ as torchao_version
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e


def main(network: str, calibration: str, model: str) -> None:
    """Quantize the network and write it."""
    torch.set_num_threads(1)
    shown = np.load(calibration)
    inputs = [
        (torch.from_numpy(noisy)[None], torch.full((1, 1, 1, 1), float(sigma)))
        for noisy, sigma in zip(shown["noisy"], shown["sigma"], strict=True)
    ]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.load(network).module(), quantizer)
    with torch.no_grad():
        for pair in inputs:
            prepared(*pair)
    exported = torch.export.export(convert_pt2e(prepared), inputs[0], strict=False)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    Path(model).write_bytes(lowered.to_executorch().buffer)
    told = get_delegation_info(lowered.exported_program().graph_module)
    facts = {
        "subgraphs": told.num_delegated_subgraphs,
        "nodes_delegated": told.num_delegated_nodes,
        "nodes_left": told.num_non_delegated_nodes,
        "tools": {
            "executorch": executorch.version.__version__,
            "torchao": torchao_version,
            "torch": torch.__version__,
        },
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
