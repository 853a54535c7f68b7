# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Train a checkpoint from a recipe and a data set, with the Trainer of transformers."""

import contextlib
import csv
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..checkpoints import save_checkpoint
from ..data.mixture import Mixture
from ..data.streaming import StreamedStars
from ..files import complete_file, only_writer
from ..inference.prediction import is_out_of_memory
from ..inference.training_range import TrainingRange
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from .calibration import calibrate_errors, make_compute_metrics
from .collator import SpectraFMCollator
from .draws import Columns, Draws
from .optimization import Ema, MuonWithAdamW, split_parameters
from .preparation import freeze, prepare_checkpoint, prepare_model, rung_of
from .recipe import AUGMENTATIONS, Recipe
from .throughput import Throughput, number_of_stars


logger = logging.getLogger(__name__)

#: Stars of each instrument for measuring the standardisation.
MEASURED_STARS = 40_000
#: Maximum number of their pixels in a stream: 1 GB in memory, 4,000 APOGEE spectra.
MEASURED_PIXELS = 30_000_000


@contextlib.contextmanager
def _saving(folder: str | Path) -> Iterator[None]:
    """Raise OSError for errors of safetensors and torch, which raise others if a disk is full."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{folder}: cannot be written ({' '.join(str(error).split())[:200]})") from error


@dataclass
class Task:
    """A recipe ready for training, with any training loop."""

    model: Any  # SpectraFMForPrediction
    tokenizer: SpectraFMTokenizer
    training_range: TrainingRange | None
    train_stars: Any
    validation_stars: Any  # one set, or several by name
    draws: Draws
    train_collator: SpectraFMCollator
    collator: SpectraFMCollator  # without augmentation, for validation
    rung: int | None = None  # the rung of all stars, for a model on evidence

    def save(self, folder: Path) -> SpectraFMForPrediction:
        """Save the model, its tokenizer and training range."""
        with _saving(folder):
            save_checkpoint(self.model, self.tokenizer, folder)
        if self.training_range is not None:
            self.training_range.save(folder)
        return self.model


def set_up(
    recipe: Recipe,
    args: TrainingArguments,
    train_set,
    validation_set,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> Task:
    """Model, stars and collators of a recipe; parameters as in [`train`]."""
    if recipe.early_stopping_patience and not args.load_best_model_at_end:
        raise ValueError("early_stopping_patience: expected load_best_model_at_end: true with it, got false")
    torch.manual_seed(args.seed)
    if samples is not None:
        samples = list(samples)
    elif isinstance(train_set, Mixture):
        generator = np.random.default_rng([args.seed, 1])
        samples = [source.draw(MEASURED_STARS // 10, generator) for source in train_set.sources]
    elif isinstance(train_set, StreamedStars):
        most = MEASURED_PIXELS // max(train_set.first(1)["flux"].size, 1)
        samples = [train_set.first(max(min(MEASURED_STARS, most), 1))]
    else:
        samples = [train_set.with_format("numpy")[:MEASURED_STARS]]
    prepare = prepare_checkpoint if recipe.checkpoint else prepare_model
    model, tokenizer, training_range = prepare(recipe, samples)
    freeze(model, recipe.freeze)
    batch_size = args.per_device_train_batch_size * args.world_size
    if isinstance(train_set, StreamedStars):
        train_set.set_batch_size(batch_size)
    draws = Draws(len(train_set), batch_size)
    # Mixtures and streams shuffle their stars themselves.
    in_order = isinstance(train_set, Mixture | StreamedStars)
    train_stars = train_set if in_order else Columns(train_set, draws.epoch_length, args.seed)
    several = isinstance(validation_set, Mapping)
    augmentation = {name: getattr(recipe, name) for name in AUGMENTATIONS}
    return Task(
        model=model,
        tokenizer=tokenizer,
        training_range=training_range,
        train_stars=train_stars,
        validation_stars=(
            {name: Columns(stars) for name, stars in validation_set.items()} if several else Columns(validation_set)
        ),
        draws=draws,
        train_collator=SpectraFMCollator(
            tokenizer, recipe.labels, recipe.scalars, seed=args.seed, batch_size=batch_size, **augmentation
        ),
        collator=SpectraFMCollator(
            tokenizer,
            recipe.labels,
            recipe.scalars,
            # A model trained without errors is also evaluated without them.
            error_dropout=float(recipe.error_dropout == 1.0),
        ),
        rung=rung_of(tokenizer, samples),
    )


def make_optimizer(model: nn.Module, recipe: Recipe, args: TrainingArguments) -> MuonWithAdamW:
    """Optimizer of the parameters that are not frozen."""
    muon, decayed, plain = split_parameters(model)
    if not recipe.muon_learning_rate:
        muon, decayed = [], [*muon, *decayed]
    return MuonWithAdamW(
        {"params": muon, "lr": recipe.muon_learning_rate, "weight_decay": recipe.muon_weight_decay},
        [
            {"params": decayed, "lr": args.learning_rate, "weight_decay": args.weight_decay},
            {"params": plain, "lr": args.learning_rate, "weight_decay": 0.0},
        ],
        betas=(args.adam_beta1, args.adam_beta2),
    )


def seed_step(seed: int, step: int, process: int):
    """
    Seed torch for one step of the optimizer. So dropout depends on these three numbers only, and is the same in a
    resumed run.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0] >> 1))


def count_known(batches: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Number of known labels, which enter the loss."""
    return torch.stack([(~batch["labels"].isnan()).sum() for batch in batches]).sum().to(device)


def share_of_step(
    loss: torch.Tensor, batch: Mapping[str, torch.Tensor], n_known: torch.Tensor, n_batches: int
) -> torch.Tensor:
    """
    Contribution of a batch to the loss of its step. The loss of a batch is the mean over its known labels, that of a
    step the mean over all known labels: the mean of the contributions of `n_batches`, in all processes.
    """
    return loss * (count_known([batch], loss.device) * n_batches / n_known.clamp(min=1))


def demand_finite(
    number: torch.Tensor, batches: Sequence[Mapping[str, torch.Tensor]], args: TrainingArguments, step: int, name: str
) -> None:
    """
    Stop if the loss, the norm of the gradient or the weights are not finite: these weights are useless, those of the
    last checkpoint are not.

    Parameters
    ----------
    number : torch.Tensor
        The loss, norm or sum to check.
    batches : sequence of batches
        The batches of this step. Tensors of the second batch are saved as `flux.1` etc.

    Raises
    ------
    ValueError
        With the file of the saved batches, `step-<number>.safetensors` in the output folder, with `-process-<number>`
        for all processes but the first.
    """
    if not torch.isfinite(number):
        process = f"-process-{args.process_index}" if args.process_index else ""
        path = Path(args.output_dir or "runs") / f"step-{step}{process}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{key}.{i}" if i else key: value.contiguous().cpu()
            for i, batch in enumerate(batches)
            for key, value in batch.items()
        }
        with complete_file(path) as temporary:
            save_file(tensors, temporary)
        raise ValueError(
            f"{name}: expected a finite number at step {step}, got {number.item()}; the batch is in {path}"
        )


def sum_of_zeros(model: nn.Module) -> torch.Tensor:
    """0 where all weights are finite, NaN elsewhere."""
    return cast(torch.Tensor, sum((0.0 * parameter.detach()).sum() for parameter in model.parameters()))


EMA_FILE = "ema.safetensors"


class StepCallback(TrainerCallback):
    """Seeds of steps, order of the stars in epochs, and running mean of the weights."""

    def __init__(self, draws: Draws, ema: Ema | None):
        self.draws = draws
        self.ema = ema

    def on_train_begin(self, args, state, control, **kwargs):
        if self.ema is not None and args.resume_from_checkpoint:
            self.ema.load_state_dict(load_file(Path(args.resume_from_checkpoint, EMA_FILE)))

    def on_epoch_begin(self, args, state, control, **kwargs):
        # The Trainer does not set the epoch of a sampler that is wrapped twice, for sharing and for resuming.
        self.draws.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        seed_step(args.seed, state.global_step, args.process_index)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.ema is not None:
            self.ema.update(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.ema is not None:
            if args.load_best_model_at_end and state.best_model_checkpoint:
                self.ema.load_state_dict(load_file(Path(state.best_model_checkpoint, EMA_FILE)))
            self.ema.swap(model)


class SpectraFMTrainer(Trainer):
    """The Trainer with Muon for hidden matrices, and with evaluation on the running mean of the weights."""

    def __init__(self, recipe: Recipe, task: Task, args: TrainingArguments):
        super().__init__(
            model=task.model,
            args=args,
            train_dataset=task.train_stars,
            eval_dataset=task.validation_stars,
            data_collator=task.collator,
            compute_metrics=make_compute_metrics(task.model.config, recipe.labels),
        )
        self.model_accepts_loss_kwargs = False  # known labels are counted here
        self.recipe = recipe
        self.task = task
        self.throughput = Throughput()
        self.batches: list[Any] = []  # of the current step
        self.most = 0  # stars that fit into memory; 0: a full batch
        self.ema = Ema(recipe.ema_decay, task.model) if recipe.ema_decay else None
        self.add_callback(StepCallback(task.draws, self.ema))

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.recipe, self.args)
        return self.optimizer

    def get_train_dataloader(self):
        plain, self.data_collator = self.data_collator, self.task.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _get_train_sampler(self, train_dataset=None):
        return self.task.draws

    def get_batch_samples(self, *args, **kwargs):
        self.batches, _ = super().get_batch_samples(*args, **kwargs)
        n_known = count_known(self.batches, self.args.device) if self.batches else None
        # Summed over all processes here, as the Trainer would count NaN as a known label.
        return self.batches, n_known if n_known is None else self.accelerator.reduce(n_known, "sum")

    def training_step(self, model, inputs, *args, **kwargs):
        batches = [inputs]
        while True:
            try:
                for batch in batches:
                    loss = self._in_parts(model, batch, *args, **kwargs)
                break
            except (RuntimeError, MemoryError) as error:
                n_stars = min(self.most or number_of_stars(inputs), number_of_stars(inputs))
                # With several processes the step cannot be repeated: gradients are already exchanged.
                if not is_out_of_memory(error) or n_stars == 1 or self.args.world_size > 1:
                    raise
                self.most = n_stars // 2
            logger.warning(f"out of memory with {n_stars} stars in a batch: {self.most} from now on")
            # An interrupted backward pass has changed the gradients of this step.
            model.zero_grad()
            batches = self.batches[: [id(batch) for batch in self.batches].index(id(inputs)) + 1]
        self._demand_finite(loss, "loss", [inputs])
        return loss

    def _in_parts(self, model, inputs, *args, **kwargs):
        """A step in parts that fit into memory, with the same gradient."""
        most = self.most or number_of_stars(inputs)
        loss = torch.zeros((), device=self.args.device)
        for start in range(0, number_of_stars(inputs), most):
            part = {name: value[start : start + most] for name, value in inputs.items()}
            with self.throughput.batch(part):
                loss = loss + super().training_step(model, part, *args, **kwargs)
        return loss

    def _demand_finite(self, number, name, batches=None):
        demand_finite(number, batches or self.batches, self.args, self.state.global_step, name)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Half precision sometimes has such gradients; its scaler skips these steps.
        if self.accelerator.scaler is None:
            self._demand_finite(torch.as_tensor(grad_norm), "norm of the gradient")
        return grad_norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs)
        if not model.training:
            return loss
        return share_of_step(loss, inputs, num_items_in_batch, len(self.batches) * self.args.world_size)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        # The Trainer evaluates several sets by recursive calls with their names.
        outermost = not isinstance(eval_dataset, str)
        mean = self.ema.in_place_of(self.model) if self.ema is not None and outermost and self.is_in_train else None
        with self.throughput.paused(), mean or contextlib.nullcontext():
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if outermost and "eval_loss" not in metrics:
            metrics["eval_loss"] = float(np.mean([value for name, value in metrics.items() if name.endswith("_loss")]))
            self.log({"eval_loss": metrics["eval_loss"]})
        return metrics

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        # With eval_on_start, step 0 is a candidate for the best model; a resumed run has evaluated it before.
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if self.args.load_best_model_at_end and self.state.global_step == 0:
            self._determine_best_metric(metrics, trial)
            # The Trainer does not set this for step 0.
            self.state.best_model_checkpoint = str(Path(self._get_output_dir(trial=trial), "checkpoint-0"))
            self._save_checkpoint(self.model, trial)
        return metrics

    def _determine_best_metric(self, metrics, trial):
        # The callback of transformers ignores the mean of several sets, and loses its state in a resumed run.
        is_best = super()._determine_best_metric(metrics, trial)
        best = self.state.best_global_step or 0
        worse = {entry["step"] for entry in self.state.log_history if "eval_loss" in entry and entry["step"] > best}
        if 0 < self.recipe.early_stopping_patience <= len(worse):
            self.control.should_training_stop = True
        return is_best

    def _save_checkpoint(self, model, trial):
        self._demand_finite(sum_of_zeros(model), "weights")
        # Saved first, as trainer_state.json, written last, marks a complete checkpoint: see `last_checkpoint`.
        if self.ema is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            with _saving(folder):
                save_file(self.ema.state_dict(), folder / EMA_FILE)
        with self.throughput.paused(), _saving(self._get_output_dir(trial=trial)):
            super()._save_checkpoint(model, trial)


def train(
    recipe: Recipe,
    args: TrainingArguments,
    train_set,
    validation_set,
    callbacks: Sequence[TrainerCallback] = (),
    samples: Sequence[Mapping[str, Any]] | None = None,
    *,
    quiet: bool = False,
) -> SpectraFMTrainer:
    """
    Train the model of a recipe and save it, with tokenizer and training range, into `args.output_dir`.

    Parameters
    ----------
    train_set : datasets.Dataset, Mixture or StreamedStars
        In the project's schema.
    validation_set : datasets.Dataset, or mapping of name to data set or to columns
        In the same schema; several sets are evaluated separately.
    callbacks : sequence of transformers.TrainerCallback
    samples : sequence of mappings, optional
        Stars for measuring the standardisation, as in [`prepare_model`]. Default: the first stars.
    quiet : bool
        Do not print the log or show progress bars of the Trainer.

    Raises
    ------
    ValueError
        If another process trains into that folder, or the recipe does not match the data.
    OSError
        If a process that makes batches (`dataloader_num_workers`) is killed.
    """
    with only_writer(args.output_dir or "runs") if args.should_save else contextlib.nullcontext():
        task = set_up(recipe, args, train_set, validation_set, samples)
        args.disable_tqdm = args.disable_tqdm or quiet
        args.remove_unused_columns = False  # the collator reads columns that `forward` does not name
        args.label_names = ["labels", "label_errors"]
        trainer = SpectraFMTrainer(recipe, task, args)
        if quiet:
            trainer.remove_callback(PrinterCallback)
        for callback in callbacks:
            trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        except pickle.UnpicklingError as error:  # torch refuses what could run code
            reason = str(error).partition("\n")[0]
            folder = args.resume_from_checkpoint
            raise ValueError(f"resume_from_checkpoint: expected numbers in {folder}, got {reason}") from error
        except (RuntimeError, ConnectionError, EOFError) as error:  # depends on which process notices first
            lost = not isinstance(error, RuntimeError) and args.dataloader_num_workers > 0
            if not lost and "DataLoader worker" not in str(error):
                raise
            cause = " ".join(str(error).split())
            raise OSError(
                f"{args.output_dir}: a data loading process ended ({cause}); the training resumes from its last "
                "checkpoint with --resume_from_checkpoint last"
            ) from error
        demand_finite(sum_of_zeros(task.model), trainer.batches, args, trainer.state.global_step, "weights")
        trainer.log(trainer.throughput.report(args.world_size))
        stars = task.validation_stars
        answers = [
            cast(Any, trainer.predict(part)) for part in (stars.values() if isinstance(stars, dict) else [stars])
        ]
        mean, log_variance = (np.concatenate([answer.predictions[i] for answer in answers]) for i in (0, 1))
        truth = tuple(np.concatenate([answer.label_ids[i] for answer in answers]) for i in (0, 1))
        calibrate_errors(task.model.config, recipe.labels, mean, log_variance, truth, task.rung)
        if args.should_save:
            final = Path(args.output_dir or "runs") / "final"
            trainer.model = task.save(final)
            write_curves(final.with_name("curves.csv"), trainer.state.log_history)
    return trainer


def write_curves(path: Path, log_history: Sequence[Mapping[str, Any]]):
    """
    Write the log of a run as CSV: a line for each logged or evaluated step, a column for each quantity. The last line
    has the speed of the run (see [`Throughput.report`]).
    """
    lines: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        lines.setdefault(entry["step"], {}).update(entry)
    names = list(dict.fromkeys(name for line in lines.values() for name in line if "runtime" not in name))
    names = ["step", *(name for name in names if name != "step" and not name.endswith("per_second"))]
    with complete_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines.values()
        )
