"""Contracts 4 and 5 of the design, for every family of the zoo and both kinds of prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from softprompts.config import InitConfig, OptimizerConfig, PromptConfig, ReparamConfig, ScheduleConfig, TrainingConfig
from softprompts.errors import TrainingInterrupted
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import build_prompt
from softprompts.tasks.encode import encode
from softprompts.tasks.formats import TextFormat
from softprompts.training import (
    TIMING_FIELDS,
    EncodedBatches,
    Event,
    PromptObjective,
    fit,
    in_order,
    mean_loss,
    read_events,
)
from softprompts.types import Encoded, Example

STEPS = 12
TEXTS = [("a cat", "meows"), ("a big dog", "barks!"), ("cow", "moo"), ("one very old owl", "hoots at night")]
CONFIG = TrainingConfig(
    max_steps=STEPS, batch_size=2, accumulation_steps=2, validate_every_steps=5, checkpoint_every_steps=6, seed=1
)


def rows_of(frozen: FrozenLM) -> list[Encoded]:
    return [
        encode(Example(*text, id=text[0]), TextFormat(list), frozen.tokenize, eos_id=frozen.eos_id, max_length=99)
        for text in TEXTS
    ]


def weights(frozen: FrozenLM) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(frozen.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def train(
    frozen: FrozenLM, kind: str, directory: Path, stop_at: int | None = None, resume: bool = False
) -> list[Mapping]:
    """Train a prompt from a fresh start; ``stop_at`` ends the process, as it were, in the middle of a step."""
    config = PromptConfig(
        kind=kind,
        length=4,
        reparametrization=ReparamConfig(name="residual", hidden_size=8),
        initializer=InitConfig(name="text", text="say it"),
    )
    objective = PromptObjective(PromptedLM(frozen, [build_prompt(config, frozen, seed=0)]))
    rows = rows_of(frozen)

    def on_event(event: Event) -> None:
        if stop_at is not None and event["event"] == "step" and event["step"] == stop_at:
            raise RuntimeError("killed")

    try:
        fit(
            objective,
            EncodedBatches(rows, CONFIG.batch_size, frozen.pad_id, CONFIG.seed),
            CONFIG,
            optimizer=OptimizerConfig(name="adamw", learning_rate=0.02, weight_decay=0.01),
            schedule=ScheduleConfig(name="cosine", warmup_steps=3),
            run_dir=directory,
            validate=lambda: {"loss": mean_loss(objective, in_order(rows, 2, pad_id=frozen.pad_id))},
            on_event=on_event,
            resume=resume,
        )
    except (RuntimeError, TrainingInterrupted):
        assert stop_at is not None
    return [
        {key: value for key, value in event.items() if key not in TIMING_FIELDS}
        for event in read_events(directory / "events.jsonl")
        if event["event"] in ("step", "validation")
    ]


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_training_learns_and_leaves_every_weight_as_it_was(frozen: FrozenLM, kind: str, tmp_path: Path) -> None:
    before, ids = weights(frozen), torch.tensor([[5, 6, 7]])
    logits = frozen.model(input_ids=ids).logits
    events = train(frozen, kind, tmp_path)
    assert weights(frozen) == before
    assert torch.equal(frozen.model(input_ids=ids).logits, logits)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(frozen: FrozenLM, kind: str, tmp_path: Path) -> None:
    unbroken = train(frozen, kind, tmp_path / "unbroken")
    train(frozen, kind, tmp_path / "killed", stop_at=8)
    resumed = train(frozen, kind, tmp_path / "killed", resume=True)
    assert resumed == unbroken


def test_detached_model_is_the_one_that_was_loaded(tmp_path: Path) -> None:
    model = tiny_model("llama")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, config = [name for name, _ in model.named_modules()], model.config.to_dict()
    model.set_attn_implementation("eager")
    frozen = FrozenLM.from_model(model, byte_tokenizer())
    train(frozen, "prefix", tmp_path)
    released = frozen.release()
    assert [name for name, _ in released.named_modules()] == modules
    assert released.config.to_dict() == config
    assert released.config._attn_implementation == "eager"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in released.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in released.modules())
