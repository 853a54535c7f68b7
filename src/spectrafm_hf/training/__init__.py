"""From stars with labels to a checkpoint: recipes, the Trainer, fine-tuning, and baselines."""

from ..lazy import names_of


#: Names that version 0.1.0 had in one module `training`.
__getattr__ = names_of(
    __name__,
    {
        "recipe": ("Recipe", "calibrated_stars", "checkpoints_by_step", "last_checkpoint", "load_stars", "read_recipe"),
        "trainer": ("SpectraFMTrainer", "Task", "calibrate_errors", "make_compute_metrics", "set_up", "train"),
        "draws": ("Columns", "Draws"),
    },
)
