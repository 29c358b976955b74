"""What several verbs load: the frozen model of a recipe, and the rows of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import typer

from softprompts.config import ModelConfig, TaskConfig

if TYPE_CHECKING:
    from softprompts.evaluation.predict import Ranking
    from softprompts.models import FrozenLM
    from softprompts.tasks.task import Task
    from softprompts.types import Encoded, Example

__all__ = [
    "BUNDLED",
    "Encoder",
    "TargetOption",
    "TemplateOption",
    "encode_rows",
    "load_frozen",
    "ranking_of",
    "resolve_model",
    "template_overrides",
]

BUNDLED = "bundled"
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="TEMPLATE", help='Input of the task "records", such as "Review: {text} Sentiment:".'
    ),
]
TargetOption = Annotated[
    str | None, typer.Option("--target", metavar="TEMPLATE", help='Target of the task "records", such as "{label}".')
]


class Encoder(Protocol):
    """How the examples of a run become rows."""

    def __call__(self, examples: Sequence[Example], *, with_target: bool) -> list[Encoded]:
        """Encode examples, with their targets or without."""
        ...


def template_overrides(format: str | None, target: str | None) -> list[str]:
    """Write the options ``--format`` and ``--target`` as overrides of a recipe."""
    given = {"task.format": format, "task.target": target}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def resolve_model(name_or_path: str) -> str:
    """Turn ``bundled`` into the directory of the small LM that comes with this package."""
    if name_or_path != BUNDLED:
        return name_or_path
    from softprompts.pretraining import bundled_lm_path

    return str(bundled_lm_path())


def load_frozen(config: ModelConfig) -> FrozenLM:
    """Load the frozen model of a recipe.

    Raises:
        DataNotFoundError: There is no such model.
        UnsupportedModelError: It cannot be steered correctly.
    """
    from transformers.utils import logging

    from softprompts.models import FrozenLM
    from softprompts.models.precision import training_dtype

    logging.disable_progress_bar()  # a bar for loading weights would stand between the verb's own lines
    frozen = FrozenLM.load(
        resolve_model(config.name_or_path),
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        quantization=config.quantization,
        gradient_checkpointing=config.gradient_checkpointing,
        window=config.window,
    )
    frozen.training_dtype = training_dtype(config.precision, frozen.device, frozen.geometry.width)
    # A folder differs from machine to machine; what people call the model, or its name on the hub, does not.
    is_folder = Path(config.name_or_path).is_dir() and config.name_or_path != BUNDLED
    frozen.name = Path(config.name_or_path).resolve().name if is_folder else config.name_or_path
    return frozen


def encode_rows(
    examples: Sequence[Example],
    task: Task,
    frozen: FrozenLM,
    config: TaskConfig,
    *,
    prompt: int = 0,
    with_target: bool = True,
) -> list[Encoded]:
    """Encode examples for a frozen model.

    Args:
        examples: Of one split.
        task: As :meth:`Task.configured` gave it.
        frozen: Brings the tokenizer and its special tokens.
        config: Lengths.
        prompt: The prompt that the rows carry, -1 for none.
        with_target: False gives the inputs only.

    Raises:
        ConfigError: ``task.setting.target_prefix`` is text to this model's tokenizer.
    """
    from softprompts.tasks.encode import encode

    if config.setting.target_prefix is not None:
        _check_special(config.setting.target_prefix, frozen)
    return [
        encode(
            example,
            task.format,
            frozen.tokenize,
            eos_id=frozen.eos_id,
            max_length=config.max_length,
            on_long=config.on_long,
            prompt=prompt,
            with_target=with_target,
            bos_ids=frozen.bos_ids,
            end_ids=frozen.end_ids,
        )
        for example in examples
    ]


def _check_special(prefix: str, frozen: FrozenLM) -> None:
    """Refuse a prefix of targets that a generated text would show."""
    from softprompts.errors import ConfigError

    shown = str(frozen.tokenizer.decode(frozen.tokenize(prefix), skip_special_tokens=True)).strip()
    if shown:
        raise ConfigError(
            f"task.setting.target_prefix '{prefix}' is text to the tokenizer of '{frozen.name}' (it shows '{shown}'), "
            "expected special tokens of its own, such as the sentinel <extra_id_0> of T5; leave it out for this model"
        )


def ranking_of(
    rows: Sequence[Encoded],
    task: Task,
    frozen: FrozenLM,
    config: TaskConfig,
    by: Literal["sum", "mean", "prior"],
    encode: Encoder | None = None,
) -> Ranking | None:
    """Encode the choices of some rows, for ranking; ``None`` where a row has none.

    Args:
        rows: Inputs.
        task: As :meth:`Task.configured` gave it.
        frozen: Brings the tokenizer and its special tokens.
        config: Lengths.
        by: What the choices are ranked by.
        encode: How inputs are encoded, if in another way than by :func:`encode_rows`.
    """
    from softprompts.evaluation.predict import Ranking
    from softprompts.tasks.encode import encode_choices

    if not rows or not all(row.example.choices for row in rows):
        return None
    choices = encode_choices(
        [row.example for row in rows],
        task.format,
        frozen.tokenize,
        eos_id=frozen.eos_id,
        bos_ids=frozen.bos_ids,
        end_ids=frozen.end_ids,
    )
    priors: list[Encoded] = []
    if by == "prior":
        empty = [replace(row.example, input="", tail="") for row in rows]
        if encode is not None:
            priors = encode(empty, with_target=False)
        else:
            for row, one in zip(rows, empty, strict=True):
                priors += encode_rows([one], task, frozen, config, prompt=row.prompt, with_target=False)
    return Ranking(choices, by, priors)
