"""A whole run on E2E NLG, ours against PEFT under transformers' Trainer: how long until the same dev loss?

`python benchmarks/e2e_against_peft.py --out benchmarks/results/e2e_against_peft --work WORK`

Both sides start from the same values on the same frozen weights, see the same records in the same format, and use AdamW
with the same rate, schedule, clipping, batch size and number type. Both measure the dev loss, per token and in the same
way (rows of similar length together), after the same updates; that time is counted apart. What differs is what a user
of either side gets by default: our loop (random batches, packed rows, the prompt run once, the head on labels), and
Trainer's (shuffled batches, padded on the right) with PEFT's model. A side whose file lies in WORK is not run again.

The target is the higher one of the two lowest dev losses, so that both reach it; the time to it is that of the first
measurement at or below it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from softprompts.bench.machine import machine
from softprompts.bench.peft_peer import PeftTrainer
from softprompts.cli.loading import encode_rows, load_frozen
from softprompts.config import TrainRecipe, load_recipe
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import build_prompt
from softprompts.tasks import get_task
from softprompts.tasks.encode import IGNORED_LABEL, collate
from softprompts.training import EncodedBatches, PromptObjective, fit, in_order, mean_loss
from softprompts.types import Encoded

DEV_BATCH = 32
"""Rows of a batch when the dev loss is measured, on both sides."""


class Clock:
    """Wall time of a run, with the time that goes into measuring the dev loss kept apart."""

    def __init__(self, measure: Callable[[], float]) -> None:
        self._measure, self._apart, self._start = measure, 0.0, time.perf_counter()
        self.points: list[dict[str, float]] = []

    def measure(self, step: int) -> float:
        """Measure the dev loss and note when."""
        before = time.perf_counter()
        loss = self._measure()
        after = time.perf_counter()
        self._apart += after - before
        wall = after - self._start
        self.points.append({"step": step, "dev_loss": loss, "seconds": wall - self._apart, "wall_seconds": wall})
        print(self.points[-1], flush=True)
        return loss


def run_ours(
    recipe: TrainRecipe, frozen: FrozenLM, train: Sequence[Encoded], dev: Sequence[Encoded], work: Path
) -> Clock:
    """Train with the product's own loop."""
    objective = PromptObjective(
        PromptedLM(frozen, [build_prompt(recipe.prompt, frozen, seed=recipe.training.seed)]), recipe.training.loss
    )
    steps = iter(range(recipe.training.validate_every_steps, 10**9, recipe.training.validate_every_steps))
    clock = Clock(lambda: mean_loss(objective, in_order(dev, DEV_BATCH, pad_id=frozen.pad_id)))
    fit(
        objective,
        EncodedBatches(train, recipe.training.batch_size, frozen.pad_id, recipe.training.seed, by_length=False),
        recipe.training,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        run_dir=work,
        validate=lambda: {"loss": clock.measure(next(steps))},
    )
    return clock


def run_peft(
    recipe: TrainRecipe, frozen: FrozenLM, train: Sequence[Encoded], dev: Sequence[Encoded], work: Path
) -> Clock:
    """Train PEFT's model with transformers' Trainer."""
    peer = PeftTrainer(frozen, build_prompt(recipe.prompt, frozen, seed=recipe.training.seed))

    @torch.no_grad()
    def dev_loss() -> float:
        total, weight = 0.0, 0
        for batch in in_order(dev, DEV_BATCH, pad_id=frozen.pad_id):
            assert batch.labels_BT is not None
            labels = int((batch.labels_BT != IGNORED_LABEL).sum())
            total += float(peer.loss(batch.to(frozen.device))) * labels
            weight += labels
        return total / weight

    clock = Clock(dev_loss)

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % recipe.training.validate_every_steps == 0:
                clock.measure(state.global_step)

    def padded(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        batch = collate(rows, pad_id=frozen.pad_id)
        assert batch.labels_BT is not None
        return {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, "labels": batch.labels_BT}

    settings = TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.training.max_steps,
        per_device_train_batch_size=recipe.training.batch_size,
        learning_rate=recipe.optimizer.learning_rate,
        weight_decay=recipe.optimizer.weight_decay,
        adam_beta1=recipe.optimizer.betas[0],
        adam_beta2=recipe.optimizer.betas[1],
        adam_epsilon=recipe.optimizer.eps,
        optim="adamw_torch",
        lr_scheduler_type=recipe.schedule.name,
        warmup_steps=recipe.schedule.warmup_steps,
        max_grad_norm=recipe.training.clip_norm or 0.0,
        bf16=frozen.training_dtype is torch.bfloat16,
        use_cpu=frozen.device.type == "cpu",
        seed=recipe.training.seed,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=peer.model, args=settings, train_dataset=list(train), data_collator=padded, callbacks=[Measure()]
    )
    trainer.train()
    return clock


SIDES = {"ours": run_ours, "peft": run_peft}


def compare(points: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Find the target, and when each side reached it."""
    target = max(min(point["dev_loss"] for point in side) for side in points.values())
    reached = {name: next(point for point in side if point["dev_loss"] <= target) for name, side in points.items()}
    return {
        "target_dev_loss": target,
        "reached": reached,
        "ratio": reached["peft"]["seconds"] / reached["ours"]["seconds"],
        "ratio_with_measuring": reached["peft"]["wall_seconds"] / reached["ours"]["wall_seconds"],
        "ratio_per_step": (points["peft"][-1]["seconds"] / points["peft"][-1]["step"])
        / (points["ours"][-1]["seconds"] / points["ours"][-1]["step"]),
    }


def page(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    reached, points = report["reached"], report["points"]
    lines = [
        "# A run on E2E until the same dev loss, against PEFT with Trainer",
        "",
        f"Model `{report['model']}`, {report['prompt']}, {report['records']} training records, "
        f"{report['dev_records']} dev records, batch {report['batch_size']}, {report['precision']}; "
        f"{report['machine']['processor']}, {report['machine']['threads']} threads, "
        f"commit {report['machine']['commit']}, {report['machine']['versions']}.",
        "",
        f"Target: dev loss {report['target_dev_loss']:.4f}, the higher one of the two lowest.",
        "",
        "| | step | seconds of training | with measuring the dev loss | dev loss there |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in SIDES:
        point = reached[name]
        lines.append(
            f"| {name} | {point['step']} | {point['seconds']:.1f} | {point['wall_seconds']:.1f} "
            f"| {point['dev_loss']:.4f} |"
        )
    lines += [
        "",
        f"PEFT's time over ours: {report['ratio']:.2f} ({report['ratio_with_measuring']:.2f} with measuring; "
        f"{report['ratio_per_step']:.2f} per update).",
        "",
        "| step | ours: dev loss | seconds | PEFT: dev loss | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for mine, theirs in zip(points["ours"], points["peft"], strict=False):
        lines.append(
            f"| {mine['step']} | {mine['dev_loss']:.4f} | {mine['seconds']:.1f} | {theirs['dev_loss']:.4f} "
            f"| {theirs['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the result, without suffix")
    parser.add_argument("--work", type=Path, required=True, help="a folder outside the repository")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/prompt_tuning/e2e.yaml"))
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="A.B=C", help="change the recipe")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="updates between two measurements of the dev loss")
    parser.add_argument("--dev", type=int, default=100, help="dev records")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of both sides")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    limits = [f"training.max_steps={options.steps}", f"training.validate_every_steps={options.every}"]
    limits += [f"training.checkpoint_every_steps={options.steps}", f"task.limit_dev={options.dev}"]
    recipe = load_recipe(
        options.recipe, TrainRecipe, [*limits, f"model.precision={options.precision}", *options.changes]
    )
    frozen = load_frozen(recipe.model)
    task = get_task(recipe.task.name).configured(recipe.task)
    train, dev = (encode_rows(task.load(split, recipe.task), task, frozen, recipe.task) for split in ("train", "dev"))
    options.work.mkdir(parents=True, exist_ok=True)
    points: dict[str, list[dict[str, float]]] = {}
    for name, run in SIDES.items():
        path = options.work / f"{name}.json"
        if not path.exists():
            shutil.rmtree(options.work / name, ignore_errors=True)
            print(f"--- {name}", flush=True)
            path.write_text(json.dumps(run(recipe, frozen, train, dev, options.work / name).points))
        points[name] = json.loads(path.read_text())
    report = {
        "model": frozen.name,
        "prompt": f"{recipe.prompt.kind} of length {recipe.prompt.length}",
        "precision": options.precision,
        "records": len(train),
        "dev_records": len(dev),
        "batch_size": recipe.training.batch_size,
        "optimizer": dataclasses.asdict(recipe.optimizer),
        "schedule": dataclasses.asdict(recipe.schedule),
        **compare(points),
        "points": points,
        "machine": machine(frozen.device),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(report))


if __name__ == "__main__":
    main()
