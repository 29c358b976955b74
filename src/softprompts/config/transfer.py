"""The keys of a recipe of ``softprompts transfer models``, one dataclass per section.

The string below a field says what it means; ``docs/reference/transfer-recipe.md`` is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from softprompts.config.schema import ModelConfig, OptimizerConfig, ScheduleConfig, TaskConfig, TrainingConfig

__all__ = ["JudgeConfig", "MatchConfig", "PairConfig", "ProjectorConfig", "TransferRecipe"]


@dataclass(frozen=True)
class PairConfig:
    """One task's prompts on both models: what a projector learns from."""

    source: str
    """Directory of the prompt on the source model."""
    target: str | None = None
    """Directory of the target model's own prompt for the task; needed for the objective ``distance``."""


@dataclass(frozen=True)
class ProjectorConfig:
    """From the prompts of one model to those of another."""

    kind: Literal["flatten", "token", "linear"] = "flatten"
    """``flatten``: the whole prompt through Linear, ``activation``, Linear (the paper's); ``token``: each position by
    itself through the same; ``linear``: each position by itself through one Linear."""
    hidden_size: int = 768
    activation: Literal["leaky_relu", "tanh"] = "leaky_relu"
    norm: Literal["auto", "layer", "none"] = "auto"
    """``layer``: LayerNorm of every position of the result, starting at the spread of the target's word embeddings;
    ``auto``: for embedding prompts only."""
    objective: Literal["distance", "task", "both"] = "task"
    """``distance``: squared error to the target model's own prompt of the task; ``task``: loss of the frozen target
    model with the projected prompt; ``both``: their sum."""
    distance_weight: float = 1.0
    """Of the distance in ``both``."""
    path: str | None = None
    """Directory of a projector that is trained already; nothing is trained then."""


@dataclass(frozen=True)
class MatchConfig:
    """Without labels: the target model with its prompt learns to answer like the source model with its own."""

    start: Literal["least_squares", "copy", "projector", "random"] = "least_squares"
    """Where the target's prompt starts; ``projector`` takes ``projector.path``."""
    alpha: float = 0.5
    """Weight of the change that the prompt makes (delta KL); the rest is on the outputs themselves. Large where the
    target model does well without a prompt, or the source model is weak."""
    top_k: int | None = None
    """Keep only so many of the source's probabilities, computed once, and the sum of the rest; ``null`` computes all of
    them in every step."""
    texts: str | None = None
    """File of plain texts: one per line, or JSON Lines with a field ``text``."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """In place of ``texts``: a task whose training inputs are the texts. Its answers are not read."""
    limit: int = 1000
    """Most texts."""
    answers: Literal["source", "none"] = "source"
    """For inputs of a task: continue them with what the source model answers with its prompt (greedily), or not."""
    positions: Literal["all", "answer"] = "all"
    """Where outputs are compared: at every token, or only behind the input."""
    max_length: int = 256
    """Longest text in tokens; a longer one is cut."""


@dataclass(frozen=True)
class JudgeConfig:
    """On what the result is judged."""

    split: Literal["train", "dev", "test"] = "dev"
    limit: int | None = None
    measure: Literal["auto", "loss", "accuracy"] = "auto"
    """``accuracy``: the likeliest of the task's choices; ``loss``: nats per target token; ``auto``: accuracy where the
    task has choices."""
    own: tuple[str, ...] = ()
    """Directories of the target model's own prompts, in the order of ``prompts``; recovery is measured against them."""
    batch_size: int = 32


@dataclass(frozen=True)
class TransferRecipe:
    """Everything that `softprompts transfer models` needs to know."""

    method: Literal["match", "projector", "least_squares", "copy", "random"] = "match"
    source_model: ModelConfig = field(default_factory=ModelConfig)
    target_model: ModelConfig = field(default_factory=ModelConfig)
    prompts: tuple[str, ...] = ()
    """Directories of the source model's prompts that are to be transferred."""
    pairs: tuple[PairConfig, ...] = ()
    """For the projector: the tasks that it is trained on."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    output_dir: str = "runs/transfer"
