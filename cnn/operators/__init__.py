"""What each ONNX operator becomes: one function an operator, named after it."""
