"""What goes out into the world: model cards, uploads, ONNX, and the published checkpoint that comes in."""
