"""What can be said of an ONNX graph without an engine: is it valid, what does it cost, how far does it look."""
