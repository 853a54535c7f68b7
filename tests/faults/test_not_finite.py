"""A loss that is no number stops the training, and leaves what is needed to see why and to go on."""

import pytest
import torch
from fault_table import tried
from safetensors.torch import load_file
from test_training import make_arguments, make_recipe, make_stars
from transformers import TrainerCallback

from spectrafm_hf.training import last_checkpoint, train


def test_a_loss_that_is_not_finite_stops_the_training_with_its_batch_saved(tmp_path):
    class Break(TrainerCallback):
        """A weight that a step has made too large, after the checkpoint of step 4."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                with torch.no_grad():
                    model.readout.mean.weight.fill_(1e38)

    arguments = make_arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=2, eval_strategy="no",
                               load_best_model_at_end=False)  # fmt: skip
    with tried("loss that is not a number", "the steps since the last checkpoint", 1):
        with pytest.raises(ValueError, match=r"loss: expected a finite number at step 5, got .*step-5.safetensors"):
            train(make_recipe(), arguments, make_stars(128, 1), make_stars(32, 2), callbacks=[Break()])
        batch = load_file(tmp_path / "step-5.safetensors")
        assert batch["flux"].shape[0] == 64 and torch.isfinite(batch["flux"]).all() and "labels" in batch
        last = last_checkpoint(tmp_path)
        assert last == str(tmp_path / "checkpoint-4")
        weights = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        # From there it goes on.
        arguments.resume_from_checkpoint = last
        trainer = train(make_recipe(), arguments, make_stars(128, 1), make_stars(32, 2))
        assert trainer.state.global_step == 12
