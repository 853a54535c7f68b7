#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train SpectraFM from a recipe in a plain loop with Accelerate; equivalent to `scripts/train.py`.

    python scripts/train_accelerate.py scripts/recipes/gaia-xp-ak.yaml [--output_dir DIR] ...
    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/train_accelerate.py RECIPE ...

Recipes, options and results are those of `scripts/train.py`: on one process the loss curves agree to rounding. Of
`TrainingArguments` it reads what the recipes use: sizes and numbers of batches, rates, schedule, clipping, mixed
precision, data loading, and when to log, evaluate, save and stop.
"""

import contextlib
import copy
import itertools
import json
import math
import pickle
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches  # type: ignore[attr-defined]
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainingArguments, get_scheduler

from spectrafm_hf.training.calibration import calibrate_errors, make_compute_metrics
from spectrafm_hf.training.optimization import Ema
from spectrafm_hf.training.recipe import Recipe, checkpoints_by_step, load_stars, read_recipe
from spectrafm_hf.training.throughput import Throughput
from spectrafm_hf.training.trainer import (
    EMA_FILE,
    count_known,
    demand_finite,
    make_optimizer,
    seed_step,
    set_up,
    share_of_step,
    sum_of_zeros,
    write_curves,
)


STATE_FILE = "trainer_state.json"  # name in the Trainer


@dataclass
class Progress:
    """State of a run besides weights, optimizer and schedule."""

    step: int = 0
    unlogged_loss: float = 0.0
    unlogged_steps: int = 0
    best_step: int = 0
    best_metric: float = math.inf  # lower is better
    worse: int = 0  # evaluations since the best
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]):
        vars(self).update(state)


def evaluate(accelerator: Accelerator, model, loader: DataLoader, compute_metrics):
    """Metrics with the loss, and the input of `calibrate_errors`: mean, log-variance, (labels, their errors)."""
    model.eval()
    answers = []
    for batch in loader:
        with torch.no_grad():
            outputs = model(**batch)
        loss = outputs.loss.repeat(len(batch["labels"]))
        tensors = (outputs.mean, outputs.log_variance, batch["labels"], batch["label_errors"], loss)
        answers.append(accelerator.gather_for_metrics(tensors))
    model.train()
    mean, log_variance, labels, label_errors, losses = (
        torch.cat(parts).float().cpu().numpy() for parts in zip(*answers, strict=True)
    )
    prediction: Any = (mean, log_variance)
    truth: Any = (labels, label_errors)
    metrics = {"loss": float(losses.mean()), **compute_metrics(EvalPrediction(prediction, truth))}
    return metrics, (mean, log_variance, truth)


def train(recipe: Recipe, args: TrainingArguments, train_set, validation_set) -> list[dict[str, Any]]:
    """Train, save into `args.output_dir` and return the log."""
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        # Embeddings of scalars are unused in batches without scalars.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if recipe.ema_decay and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(f"ema_decay: expected 0 with FSDP, got {recipe.ema_decay}")
    task = set_up(recipe, args, train_set, validation_set)
    whole = copy.deepcopy(task.model)  # `prepare` may cut the weights into shards

    # ------------------------------------------------------------------------------------------ model, data, optimizer
    def load(stars, batch_size: int, collator, sampler=None) -> Any:
        return accelerator.prepare(
            DataLoader(
                stars,
                batch_size,
                sampler=sampler,
                collate_fn=collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
                drop_last=sampler is not None and args.dataloader_drop_last,
            )
        )

    loader = load(task.train_stars, args.per_device_train_batch_size, task.train_collator, task.draws)
    sets = task.validation_stars if isinstance(task.validation_stars, dict) else {"": task.validation_stars}
    eval_loaders = {name: load(stars, args.per_device_eval_batch_size, task.collator) for name, stars in sets.items()}
    model, optimizer = accelerator.prepare(task.model, make_optimizer(task.model, recipe, args))
    plain = accelerator.unwrap_model(model)
    ema = Ema(recipe.ema_decay, plain) if recipe.ema_decay else None
    compute_metrics = make_compute_metrics(plain.config, recipe.labels)

    accumulation = args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(loader) / accumulation)
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    # Not prepared: a prepared scheduler takes one step for each process.
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer.optimizer,
        args.get_warmup_steps(max_steps),
        max_steps,
        scheduler_specific_kwargs=cast(dict[str, Any], args.lr_scheduler_kwargs),
    )
    progress, throughput = Progress(), Throughput()
    output = Path(args.output_dir or "runs")

    # Not `register_for_checkpointing`: Accelerate unpickles registered objects, which could run any code.
    def load_state(folder: str | Path):
        try:
            accelerator.load_state(str(folder))
        except (pickle.UnpicklingError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"resume_from_checkpoint: expected numbers in {folder}, got {reason}") from error
        state = json.loads(Path(folder, STATE_FILE).read_text())
        scheduler.load_state_dict(state.pop("scheduler"))
        progress.load_state_dict(state)
        if ema is not None:
            ema.load_state_dict(load_file(Path(folder, EMA_FILE)))

    if args.resume_from_checkpoint:
        load_state(args.resume_from_checkpoint)

    # ------------------------------------------------------------------------------------- evaluation, saving, logging
    def due(strategy: str, every: float, at_end: bool = True) -> bool:
        if strategy == "epoch":
            return progress.step % steps_per_epoch == 0
        every = every if every >= 1 else math.ceil(every * max_steps)
        return strategy == "steps" and (progress.step % every == 0 or (at_end and progress.step == max_steps))

    def log(**values):
        epochs, steps = divmod(progress.step, steps_per_epoch)
        entry = {**values, "step": progress.step, "epoch": epochs + steps * accumulation / len(loader)}
        progress.log_history.append(entry)
        accelerator.print({name: f"{value:.4g}" for name, value in entry.items()})

    def evaluate_all() -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, eval_loader in eval_loaders.items():
            found, _ = evaluate(accelerator, model, eval_loader, compute_metrics)
            metrics |= {f"eval_{name}_{figure}" if name else f"eval_{figure}": v for figure, v in found.items()}
        return {"eval_loss": float(np.mean([v for name, v in metrics.items() if name.endswith("_loss")])), **metrics}

    def note_best(metrics: dict[str, float]):
        name = args.metric_for_best_model or "loss"
        metric = metrics[name if name.startswith("eval_") else f"eval_{name}"] * (-1 if args.greater_is_better else 1)
        progress.worse += 1
        if metric < progress.best_metric:
            progress.best_step, progress.best_metric, progress.worse = progress.step, metric, 0

    def save():
        demand_finite(sum_of_zeros(model), group, args, progress.step, "weights")
        folder = output / f"checkpoint-{progress.step}"
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()  # each process writes its own file into it
        if accelerator.is_main_process:
            if ema is not None:
                save_file(ema.state_dict(), unfinished / EMA_FILE)
            state = {**progress.state_dict(), "scheduler": scheduler.state_dict()}
            (unfinished / STATE_FILE).write_text(json.dumps(state))
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
            steps = checkpoints_by_step(output)
            for step in sorted(steps)[: -args.save_total_limit] if args.save_total_limit else []:
                if step != progress.best_step:
                    shutil.rmtree(steps[step])
        accelerator.wait_for_everyone()

    # ---------------------------------------------------------------------------------------------------- training
    model.train()
    stopped, group = False, []
    while progress.step < max_steps and not stopped:
        epoch, done = divmod(progress.step, steps_per_epoch)
        loader.set_epoch(epoch)
        task.draws.set_epoch(epoch)  # the line above does not do this for several loaders
        batches = iter(skip_first_batches(loader, done * accumulation) if done else loader)
        while not stopped and progress.step < max_steps and (group := list(itertools.islice(batches, accumulation))):
            seed_step(args.seed, progress.step, accelerator.process_index)
            loss = torch.zeros((), device=accelerator.device)
            n_known = cast(torch.Tensor, accelerator.reduce(count_known(group, accelerator.device), "sum"))
            n_batches = len(group) * accelerator.num_processes
            for number, batch in enumerate(group, 1):
                wait = number < len(group)  # the processes exchange their gradients once for each step
                with throughput.batch(batch), accelerator.no_sync(model) if wait else contextlib.nullcontext():
                    part = share_of_step(model(**batch).loss, batch, n_known, n_batches) / len(group)
                    accelerator.backward(part)
                loss += part.detach()
                demand_finite(part.detach(), [batch], args, progress.step, "loss")
            gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
            # In half precision such gradients occur, and the scaler skips their steps.
            if accelerator.scaler is None:
                demand_finite(torch.as_tensor(gradient_norm), group, args, progress.step, "norm of the gradient")
            rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.step += 1
            if ema is not None:
                ema.update(plain, progress.step)

            progress.unlogged_loss += float(accelerator.reduce(loss, "mean"))
            progress.unlogged_steps += 1
            if due(args.logging_strategy, args.logging_steps, at_end=False):
                mean_loss = progress.unlogged_loss / progress.unlogged_steps
                log(loss=mean_loss, grad_norm=float(gradient_norm), learning_rate=rate)
                progress.unlogged_loss, progress.unlogged_steps = 0.0, 0
            if due(args.eval_strategy, args.eval_steps or args.logging_steps):
                with throughput.paused(), ema.in_place_of(plain) if ema is not None else contextlib.nullcontext():
                    metrics = evaluate_all()
                log(**metrics)
                note_best(metrics)
                stopped = 0 < recipe.early_stopping_patience <= progress.worse
            if due(args.save_strategy, args.save_steps):
                with throughput.paused():
                    save()

    # ---------------------------------------------------------------------------------------------------- the end
    demand_finite(sum_of_zeros(model), group, args, progress.step, "weights")
    log(**throughput.report(accelerator.num_processes))
    log_history = progress.log_history
    if args.load_best_model_at_end and progress.best_step:
        load_state(output / f"checkpoint-{progress.best_step}")
    if ema is not None:
        ema.swap(plain)
    answers = [evaluate(accelerator, model, eval_loader, compute_metrics)[1] for eval_loader in eval_loaders.values()]
    mean, log_variance = (np.concatenate([answer[i] for answer in answers]) for i in (0, 1))
    truth = tuple(np.concatenate([answer[2][i] for answer in answers]) for i in (0, 1))
    whole.load_state_dict(accelerator.get_state_dict(model))
    calibrate_errors(whole.config, recipe.labels, mean, log_variance, truth, task.rung)
    if accelerator.is_main_process:
        task.model = whole
        task.save(output / "final")
        write_curves(output / "curves.csv", log_history)
    accelerator.end_training()
    return log_history


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help") or not argv[0].endswith((".yaml", ".yml")):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    try:
        recipe, args = read_recipe(argv[0], argv[1:])
        train(recipe, args, *load_stars(recipe, args.seed))
    except (OSError, ValueError) as error:
        print(f"train_accelerate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
