"""What goes out into the world: model cards, uploads, ONNX, and the published checkpoint that comes in."""

from ..lazy import names_of


#: What version 0.1.0 had in one module of this name.
__getattr__ = names_of(
    __name__,
    {"upload": ("checkpoint_upload", "dataset_upload", "preview", "push", "push_checkpoint", "push_dataset")},
)
