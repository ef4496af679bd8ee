"""Denoises pictures by ONNX Runtime inside an arm64 root, one thread; see arm64.py beside this folder.

python onnxruntime_pictures.py MODEL NOISY DENOISED PICTURES SIGMA

NOISY holds pictures of 256 x 256 float32; PICTURES of them are denoised, from the first on and over again.
DENOISED is "-" where nothing shall be written. It needs numpy and onnxruntime, not edgekit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime

SHAPE = (1, 1, 256, 256)


def main(model: str, noisy: str, denoised: str, pictures: str, sigma: str) -> None:
    """Denoise the pictures."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = np.fromfile(noisy, "<f4").reshape(-1, *SHAPE)
    level = np.full((1, 1, 1, 1), float(sigma), np.float32)
    wanted = {value.name for value in session.get_inputs()}
    made = []
    for index in range(int(pictures)):
        inputs = {"noisy": given[index % len(given)], "sigma": level}
        made.append(session.run(None, {name: value for name, value in inputs.items() if name in wanted})[0])
    if denoised != "-":
        Path(denoised).write_bytes(np.stack(made).astype("<f4").tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
