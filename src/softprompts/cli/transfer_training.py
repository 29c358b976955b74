"""What is trained in a transfer across models, put into the form that the training loop takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, final

from softprompts.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from softprompts.cli.transfer_tasks import SavedPrompt
    from softprompts.config import TransferRecipe
    from softprompts.models import FrozenLM
    from softprompts.prompted import PromptedLM
    from softprompts.prompts import SoftPrompt
    from softprompts.training import FitResult, StepLoss
    from softprompts.transfer import MatchBatch, Projector
    from softprompts.types import Batch, Encoded

__all__ = ["ModuleObjective", "match", "train_projector"]

B = TypeVar("B")

_HELD_OUT = 10
"""One text in so many is kept for validation."""


@final
class ModuleObjective(Generic[B]):
    """A module and a loss, as the loop wants them.

    Args:
        module: Its parameters are trained, all that require a gradient.
        loss: Of one batch, with gradient.
    """

    def __init__(self, module: nn.Module, loss: Callable[[B], StepLoss]) -> None:
        self.module, self._loss = module, loss

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the module."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def loss(self, batch: B) -> StepLoss:
        """Loss of one batch."""
        return self._loss(batch)

    def trainable_state(self) -> dict[str, Tensor]:
        """Copy of the module's parameters and buffers."""
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a copy back.

        Raises:
            CheckpointError: It belongs to another module.
        """
        try:
            self.module.load_state_dict(dict(state))
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint belongs to another recipe: {error}; resume with the recipe of that run, or choose "
                "another directory"
            ) from error


def _fit(
    objective: ModuleObjective[B],
    batches: Callable[[int, int], Iterator[B]],
    recipe: TransferRecipe,
    run_dir: Path,
    *,
    validate: Callable[[], Mapping[str, float]] | None,
    resume: bool,
    console: Console | None,
) -> FitResult:
    from softprompts.training import fit, show_progress

    with ExitStack() as stack:
        shown = stack.enter_context(show_progress(console, recipe.training.max_steps)) if console is not None else None
        return fit(
            objective,
            batches,
            recipe.training,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            run_dir=run_dir,
            validate=validate,
            on_event=shown,
            resume=resume,
        )


def _facts(result: FitResult) -> dict[str, Any]:
    best = {"best_step": result.best_step, "metrics": dict(result.best_metrics)}
    return {"steps": result.steps, "reason": result.reason, "seconds": result.seconds, "tokens": result.tokens, **best}


# --------------------------------------------------------------------------------------------------------------------
# The projector
# --------------------------------------------------------------------------------------------------------------------


def train_projector(
    recipe: TransferRecipe,
    source: FrozenLM,
    target: FrozenLM,
    place: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Path:
    """Train a projector on the recipe's pairs and save it.

    Args:
        recipe: With pairs.
        source: The model of the prompts that go in.
        target: The model of those that come out.
        place: Where the projector is saved; its run is beside it.
        resume: Go on from the run's checkpoint.
        console: For people.

    Raises:
        ConfigError: A pair lacks what the objective needs.
        SoftPromptsError: As training does.
    """
    from softprompts.cli.transfer_tasks import saved_prompts
    from softprompts.prompted import PromptedLM
    from softprompts.storage import load_prompt
    from softprompts.training import EncodedBatches, wants_batches_by_length
    from softprompts.transfer import Projector, PromptSpace, projected_prompt, save_projector, word_spread

    config = recipe.projector
    saved = [saved_prompts([Path(pair.source)])[0] for pair in recipe.pairs]
    prompts = [load_prompt(one.path, source).prompt for one in saved]
    space = PromptSpace.of(prompts[0])
    spread = word_spread(target) if space.kind == "embedding" else 1.0
    wanted = space.on(target.geometry)
    projector = Projector(space, wanted, config, seed=recipe.training.seed, norm_scale=spread).to(target.device)
    prompted = PromptedLM(target, [projected_prompt(projector, prompt) for prompt in prompts])
    tables = _tables(recipe, prompts, target) if config.objective != "task" else []
    loss = _projector_loss(recipe, projector, prompted, tables)
    result: FitResult
    run = place.with_name("projector-run")
    if config.objective == "distance":
        all_at_once = ModuleObjective[None](projector, lambda _: loss(None))
        result = _fit(
            all_at_once,
            lambda _, start: iter([None][start:]),
            recipe,
            run,
            validate=None,
            resume=resume,
            console=console,
        )
    else:
        train, dev = _pooled(saved, target)
        by_length = wants_batches_by_length(recipe.training, prompted)
        batches = EncodedBatches(train, recipe.training.batch_size, target.pad_id, recipe.training.seed, by_length)
        validate = None if not dev else lambda: {"loss": _dev_loss(prompted, dev, recipe.judge.batch_size)}
        result = _fit(
            ModuleObjective[Any](projector, loss),
            batches,
            recipe,
            run,
            validate=validate,
            resume=resume,
            console=console,
        )
    facts = {"objective": config.objective, "tasks": [one.task for one in saved], **_facts(result)}
    return save_projector(projector, place, source=source, target=target, training=facts, overwrite=True)


def _tables(recipe: TransferRecipe, prompts: Sequence[SoftPrompt], target: FrozenLM) -> list[tuple[Tensor, Tensor]]:
    """The pairs of tables that the distance is measured between."""
    from softprompts.storage import load_prompt
    from softprompts.transfer import PromptSpace

    tables = []
    for pair, prompt in zip(recipe.pairs, prompts, strict=True):
        if pair.target is None:
            raise ConfigError(
                f"objective '{recipe.projector.objective}' compares with the target model's own prompts, and the "
                f"pair of '{pair.source}' names none; set its target, or take objective task"
            )
        own = load_prompt(pair.target, target).prompt
        if PromptSpace.of(own) != PromptSpace.of(prompt).on(target.geometry):
            raise ConfigError(
                f"'{pair.target}' is a {own.kind} prompt of length {own.length}, expected one like '{pair.source}': of "
                f"kind {prompt.kind} and length {prompt.length}, on all layers"
            )
        tables.append((prompt.table_PW.to(target.device), own.table_PW.to(target.device)))
    return tables


def _projector_loss(
    recipe: TransferRecipe, projector: Projector, prompted: PromptedLM, tables: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[Batch | None], StepLoss]:
    from softprompts.training import StepLoss, batch_loss
    from softprompts.transfer import projection_distance

    def loss(batch: Batch | None) -> StepLoss:
        if batch is None:  # the distance alone: all pairs at once
            positions = len(tables) * projector.source.length
            return StepLoss(projection_distance(projector, tables), weight=len(tables), tokens=positions)
        found = batch_loss(prompted, batch, recipe.training.loss)
        if not tables:
            return found
        distance = projection_distance(projector, tables) / len(tables)
        total = found.total + recipe.projector.distance_weight * distance * found.weight
        return dataclasses.replace(found, total=total)

    return loss


def _pooled(saved: Sequence[SavedPrompt], target: FrozenLM) -> tuple[list[Encoded], list[Encoded]]:
    """Rows of all pairs' tasks, each with its own projected prompt."""
    from softprompts.cli.loading import encode_rows
    from softprompts.cli.transfer_tasks import recipe_of
    from softprompts.tasks import get_task

    train: list[Encoded] = []
    dev: list[Encoded] = []
    for number, one in enumerate(saved):
        trained_by = recipe_of(one)
        if trained_by is None:
            raise ConfigError(f"'{one.path}' does not say what it was trained on; take prompts that were trained here")
        task = get_task(trained_by.task)
        train += encode_rows(task.load("train", trained_by.task), task, target, trained_by.task, prompt=number)
        if "dev" in task.splits:
            dev += encode_rows(task.load("dev", trained_by.task), task, target, trained_by.task, prompt=number)
    return train, dev


def _dev_loss(prompted: PromptedLM, dev: Sequence[Encoded], batch_size: int) -> float:
    from softprompts.evaluation.evaluate import target_losses

    return target_losses(prompted, dev, batch_size=batch_size).loss.value


# --------------------------------------------------------------------------------------------------------------------
# Matching outputs
# --------------------------------------------------------------------------------------------------------------------


def match(
    recipe: TransferRecipe,
    prompt: SoftPrompt,
    start: SoftPrompt,
    source: FrozenLM,
    target: FrozenLM,
    folder: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[SoftPrompt, dict[str, Any]]:
    """Bring the target's outputs to the source's; no label is read.

    Args:
        recipe: How.
        prompt: Of the source model.
        start: What the target's prompt starts from.
        source: The source model.
        target: The target model.
        folder: Of the run.
        resume: Go on from its checkpoint.
        console: For people.

    Returns:
        The target's prompt, and how its training went.

    Raises:
        SoftPromptsError: The outputs cannot be compared, there is no text, or as training does.
    """
    from softprompts.cli.transfer_texts import text_rows
    from softprompts.prompted import PromptedLM
    from softprompts.training import mean_loss, wants_batches_by_length
    from softprompts.transfer import MatchBatches, Teacher, refuse_unmatchable

    refuse_unmatchable(source, target, prompt)
    rows = text_rows(recipe.match, prompt, source, seed=recipe.training.seed)
    if len(rows) < 2:
        raise ConfigError(f"there are {len(rows)} texts to match outputs on, expected 2 at least (one is held out)")
    held = max(1, len(rows) // _HELD_OUT)
    vocab_size = min(source.geometry.vocab_size, target.geometry.vocab_size, len(target.tokenizer))
    teacher = Teacher(source, prompt, vocab_size=vocab_size, top_k=recipe.match.top_k)
    student = PromptedLM(target, [start.fold()])
    train, dev = (
        MatchBatches(
            part,
            teacher,
            batch_size=recipe.training.batch_size,
            pad_id=target.pad_id,
            seed=recipe.training.seed,
            by_length=wants_batches_by_length(recipe.training, student, teacher.prompted),
        )
        for part in (rows[held:], rows[:held])
    )
    objective = ModuleObjective["MatchBatch"](student.prompts, _match_loss(recipe, student, teacher))
    before = mean_loss(objective, dev.in_order())
    result = _fit(
        objective,
        train,
        recipe,
        folder,
        validate=lambda: {"loss": mean_loss(objective, dev.in_order())},
        resume=resume,
        console=console,
    )
    facts = {**_facts(result), "texts": len(rows), "held_out": held, "held_out_loss_before": before}
    return cast("SoftPrompt", student.prompts[0]), facts


def _match_loss(recipe: TransferRecipe, student: PromptedLM, teacher: Any) -> Callable[[MatchBatch], StepLoss]:
    from softprompts.training import StepLoss
    from softprompts.transfer import matching_loss

    def loss(one: MatchBatch) -> StepLoss:
        known = one.teacher or teacher(one.batch)
        found = matching_loss(student, one.batch, known, alpha=recipe.match.alpha)
        return StepLoss(found.total, weight=found.positions, tokens=one.batch.tokens)

    return loss
