"""What the methods of a recipe train, and how it is saved: the one place that knows all of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

if TYPE_CHECKING:
    from softprompts.baselines import FineTuningObjective
    from softprompts.baselines.autoprompt import AutoPromptObjective
    from softprompts.baselines.peft_lora import LoraObjective
    from softprompts.config import TrainRecipe
    from softprompts.models import FrozenLM
    from softprompts.prompts import SoftPrompt
    from softprompts.tasks.task import Task
    from softprompts.training import PromptObjective
    from softprompts.types import Encoded

    AnyObjective: TypeAlias = PromptObjective | FineTuningObjective | LoraObjective | AutoPromptObjective

__all__ = ["AnyObjective", "build_objective", "carries_prompt", "save_trained", "stored_parameters"]

_TRIGGER_FILE = "trigger.json"


def carries_prompt(config: TrainRecipe) -> bool:
    """Whether the rows of a method carry a prompt; otherwise the model itself is changed."""
    return config.method in ("prompt", "autoprompt")


def build_objective(config: TrainRecipe, task: Task, frozen: FrozenLM, train: Sequence[Encoded]) -> AnyObjective:
    """Build what is trained.

    Args:
        config: The recipe.
        task: Its task.
        frozen: The model.
        train: Training rows.

    Raises:
        SoftPromptsError: The recipe's settings do not fit the model.
    """
    from softprompts.baselines import FineTuningObjective, top_parameters

    if config.method in ("fine_tuning", "top_layers"):
        only = top_parameters(frozen, config.baseline.top_layers) if config.method == "top_layers" else None
        return FineTuningObjective(frozen, config.training.loss, z_loss=config.optimizer.z_loss, only=only)
    if config.method == "peft_lora":
        from softprompts.baselines.peft_lora import LoraObjective

        loss, seed = config.training.loss, config.training.seed
        return LoraObjective(frozen, config.baseline.lora, loss, z_loss=config.optimizer.z_loss, seed=seed)
    if config.method == "autoprompt":
        return _autoprompt(config, task, frozen, train)
    return _prompt(config, task, frozen)


def _prompt(config: TrainRecipe, task: Task, frozen: FrozenLM) -> PromptObjective:
    from softprompts.prompted import PromptedLM
    from softprompts.prompts import build_prompt
    from softprompts.storage import load_prompt
    from softprompts.training import PromptObjective

    initializer = config.prompt.initializer
    source = None
    if initializer.name == "prompt" and initializer.prompt is not None:
        source = load_prompt(initializer.prompt, frozen).prompt
    if initializer.name == "labels" and not initializer.labels:
        initializer = dataclasses.replace(initializer, labels=task.class_words)
    prompt_config = dataclasses.replace(config.prompt, initializer=initializer)
    prompt = build_prompt(prompt_config, frozen, seed=config.training.seed, source=source)
    return PromptObjective(PromptedLM(frozen, [prompt]), config.training.loss, z_loss=config.optimizer.z_loss)


def _autoprompt(config: TrainRecipe, task: Task, frozen: FrozenLM, train: Sequence[Encoded]) -> AutoPromptObjective:
    from softprompts.baselines.autoprompt import AutoPromptObjective, first_trigger
    from softprompts.tasks.encode import encode_choices
    from softprompts.training import EncodedBatches

    training = config.training
    examples = [row.example for row in train]
    choices = []
    if all(example.choices for example in examples):
        choices = encode_choices(
            examples, task.format, frozen.tokenize, eos_id=frozen.eos_id, bos_ids=frozen.bos_ids, end_ids=frozen.end_ids
        )
    return AutoPromptObjective(
        frozen,
        first_trigger(config.prompt, frozen, seed=training.seed),
        config.baseline.autoprompt,
        EncodedBatches(train, training.batch_size, frozen.pad_id, training.seed, by_length=False),
        choices=choices,
        label_words=task.class_words,
        reduction=training.loss,
        accumulation_steps=training.accumulation_steps,
        seed=training.seed,
    )


def stored_parameters(objective: AnyObjective) -> int:
    """Count the numbers that have to be kept for the task: of a trigger its tokens."""
    from softprompts.baselines.autoprompt import AutoPromptObjective
    from softprompts.baselines.fine_tuning import TunedObjective

    if isinstance(objective, AutoPromptObjective):
        return len(objective.trigger)
    if isinstance(objective, TunedObjective):
        return sum(weight.numel() for weight in objective.parameters())
    return sum(cast("SoftPrompt", prompt).stored_parameters for prompt in objective.prompted.prompts)


def save_trained(objective: AnyObjective, config: TrainRecipe, frozen: FrozenLM, metrics: Mapping[str, float]) -> Path:
    """Save a prompt, a model, or the part of a model that was tuned, into the recipe's folder.

    Args:
        objective: What was trained.
        config: The recipe.
        frozen: The model as it was before.
        metrics: Scores on dev.

    Raises:
        StorageError: The disk refused, or something else lies there.
    """
    from softprompts.baselines import FineTuningObjective
    from softprompts.baselines.autoprompt import AutoPromptObjective
    from softprompts.storage import save_prompt
    from softprompts.storage.directory import replace_file
    from softprompts.storage.tuned import save_delta

    directory = Path(config.output_dir)
    if config.method == "peft_lora":
        adapters = cast("LoraObjective", objective)
        return adapters.save(directory / "adapter", frozen=frozen, recipe=config, metrics=metrics)
    if isinstance(objective, FineTuningObjective) and objective.is_whole:
        return objective.save(directory / "model")
    if isinstance(objective, FineTuningObjective):
        weights = objective.trainable_state()
        return save_delta(weights, directory / "delta", frozen=frozen, recipe=config, metrics=metrics)
    if isinstance(objective, AutoPromptObjective):
        found = {**objective.words(), "task": config.task.name, "metrics": dict(metrics)}
        text = json.dumps({**found, "seed": config.training.seed}, indent=2, ensure_ascii=False) + "\n"
        replace_file(directory / _TRIGGER_FILE, text.encode("utf-8"))
    prompt = cast("SoftPrompt", objective.prompted.prompts[0])
    return save_prompt(
        prompt,
        directory / "prompt",
        frozen=frozen,
        task=config.task.name,
        recipe=config,
        metrics=metrics,
        overwrite=True,
    )
