"""A loss or a gradient that is not finite stops the training; the batch and the last checkpoint are saved."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_table import tried
from safetensors.torch import load_file
from test_trainer import make_arguments, make_stars, recipe_from_nothing
from transformers import TrainerCallback

from spectrafm_hf.training.recipe import last_checkpoint
from spectrafm_hf.training.trainer import train


SCRIPTS = Path(__file__).parents[2] / "scripts"


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
            train(recipe_from_nothing(), arguments, make_stars(128, 1), make_stars(32, 2), callbacks=[Break()])
        batch = load_file(tmp_path / "step-5.safetensors")
        assert batch["flux"].shape[0] == 64 and torch.isfinite(batch["flux"]).all() and "labels" in batch
        last = last_checkpoint(tmp_path)
        assert last == str(tmp_path / "checkpoint-4")
        weights = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        # From there it goes on.
        arguments.resume_from_checkpoint = last
        trainer = train(recipe_from_nothing(), arguments, make_stars(128, 1), make_stars(32, 2))
        assert trainer.state.global_step == 12


def finite(checkpoint) -> bool:
    return all(torch.isfinite(weight).all() for weight in load_file(checkpoint / "model.safetensors").values())


def test_a_gradient_that_is_not_finite_is_not_applied_and_the_checkpoint_stays_valid(tmp_path):
    class Break(TrainerCallback):
        """The loss of the sixth step is finite, its gradient is not; a checkpoint would be saved after it."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                model.readout.mean.weight.register_hook(lambda gradient: gradient * float("nan"))

    arguments = make_arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=2, save_total_limit=1,
                               eval_strategy="no", load_best_model_at_end=False, per_device_train_batch_size=32,
                               gradient_accumulation_steps=2)  # fmt: skip
    with tried("gradient that is not a number", "the steps since the last checkpoint", 1):
        with pytest.raises(ValueError, match=r"norm of the gradient: .* step 5, got nan; .*step-5.safetensors"):
            train(recipe_from_nothing(), arguments, make_stars(128, 1), make_stars(32, 2), callbacks=[Break()])
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
        assert finite(tmp_path / "checkpoint-4")
        # Both batches of that step are there: which of them it was, a sum of gradients does not say.
        batch = load_file(tmp_path / "step-5.safetensors")
        assert batch["flux"].shape[0] == batch["flux.1"].shape[0] == 32
        arguments.resume_from_checkpoint = last_checkpoint(tmp_path)
        trainer = train(recipe_from_nothing(), arguments, make_stars(128, 1), make_stars(32, 2))
        assert trainer.state.global_step == 12


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Break(TrainerCallback):
        """As an optimizer may do, after a gradient that was finite."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                with torch.no_grad():
                    model.readout.mean.weight[0, 0] = float("inf")

    arguments = make_arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1,
                               eval_strategy="no", load_best_model_at_end=False)  # fmt: skip
    for save_steps in (2, 4):  # with the second, it is the end that would save them
        arguments.save_steps = save_steps
        with pytest.raises(ValueError, match="weights: expected a finite number at step 6"):
            train(recipe_from_nothing(), arguments, make_stars(128, 1), make_stars(32, 2), callbacks=[Break()])
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
        assert finite(tmp_path / "checkpoint-4") and not (tmp_path / "final").exists()


@pytest.mark.parametrize("script", ["train.py", "train_accelerate.py"])
def test_the_batch_of_a_gradient_that_overflows_is_saved_by_both_loops(tmp_path, script):
    run = runpy.run_path(str(SCRIPTS / script))["train"]
    stars, absurd = make_stars(128, 1), 1e21
    teff = np.array(stars["teff"])
    # In the second batch: the loss is about 1e36, which float32 holds, and its gradient is not.
    teff[torch.randperm(128, generator=torch.Generator().manual_seed(5))[100]] = absurd
    stars = stars.remove_columns("teff").add_column("teff", teff)
    arguments = make_arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=1, save_total_limit=1,
                               eval_strategy="no")  # fmt: skip
    with pytest.raises(ValueError, match=r"norm of the gradient: expected a finite number at step 1, got inf"):
        run(recipe_from_nothing(), arguments, stars, make_stars(32, 2))
    assert load_file(tmp_path / "step-1.safetensors")["labels"].nan_to_num().max() > 0.9 * absurd
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert finite(tmp_path / "checkpoint-1")
