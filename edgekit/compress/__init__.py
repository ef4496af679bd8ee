"""From a trained network to the files that engines compile: fuse, export, simplify, quantize."""
