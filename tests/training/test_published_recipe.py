"""Details of the published recipes: z_loss, no dropout in the frozen model, the mean of several metrics."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from softprompts.baselines import FineTuningObjective
from softprompts.cli.train import run_recipe
from softprompts.config import (
    InitConfig,
    OptimizerConfig,
    PromptConfig,
    ScheduleConfig,
    TrainingConfig,
    TrainRecipe,
    decode,
)
from softprompts.errors import ConfigError
from softprompts.models import FrozenLM
from softprompts.models.label_loss import chunked_cross_entropy
from softprompts.prompted import PromptedLM
from softprompts.prompts import build_prompt
from softprompts.training import EncodedBatches, PromptObjective, SharedPasses, fit, in_order, mean_loss, read_events
from softprompts.types import Batch, Encoded, Example
from tiny_world import model_section, save_model, write_records
from zoo_seq2seq import tiny_seq2seq

TEXTS = [("a cat", "meows"), ("a big dog", "barks!"), ("cow", "moo"), ("one very old owl", "hoots at night")]
DROPOUTS = (
    "dropout_rate",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
)


def rows_of(frozen: FrozenLM) -> list[Encoded]:
    rows = []
    for source, target in TEXTS:
        head, tail = frozen.tokenize(source), [*frozen.tokenize(target), frozen.eos_id]
        if frozen.pair is not None:
            rows.append(Encoded(tuple(head), len(head), Example(source, target), 0, decoder_ids=tuple(tail)))
        else:
            rows.append(Encoded((*head, *tail), len(head), Example(source, target), 0))
    return rows


def objective_of(frozen: FrozenLM, kind: str = "embedding", length: int = 3, **options: Any) -> PromptObjective:
    config = PromptConfig(kind=kind, length=length, initializer=InitConfig(name="text", text="say it"))
    return PromptObjective(PromptedLM(frozen, [build_prompt(config, frozen, seed=0)]), **options)


# --- z_loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_logits", [1, 30, 10**6])
def test_z_loss_follows_its_formula(chunk_logits: int):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11).requires_grad_(False)
    hidden, labels = torch.randn(9, 6, requires_grad=True), torch.randint(0, 11, (9,))
    losses = chunked_cross_entropy(head, hidden, labels, vocab_size=11, chunk_logits=chunk_logits, z_loss=0.03)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    logits = head(hidden)
    log_z = logits.exp().sum(dim=-1).log()
    expected = log_z - logits[torch.arange(9), labels] + 0.03 * log_z**2
    (plain,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, plain)
    with torch.no_grad():
        again = chunked_cross_entropy(head, hidden, labels, vocab_size=11, chunk_logits=chunk_logits, z_loss=0.03)
    torch.testing.assert_close(again, expected)


def z_term(frozen: FrozenLM, prompted: PromptedLM, batch: Batch) -> float:
    with torch.no_grad():
        return float(prompted.label_logits(batch).logits_MV.logsumexp(dim=-1).square().sum())


@pytest.mark.parametrize("tuned", [False, True], ids=["prompt", "fine-tuning"])
def test_z_loss_is_trained_and_not_measured(tiny_frozen: Callable[[str], FrozenLM], tuned: bool):
    frozen = tiny_frozen("gpt2")
    make = FineTuningObjective if tuned else lambda frozen, z_loss: objective_of(frozen, z_loss=z_loss)
    plain, with_z = make(frozen, z_loss=0.0), make(frozen, z_loss=0.01)
    (batch,) = in_order(rows_of(frozen), 4, pad_id=frozen.pad_id)
    own = batch if not tuned else Batch(batch.ids_BT, batch.mask_BT, batch.labels_BT, batch.prompt_of_row_B * 0 - 1)
    extra = 0.01 * z_term(frozen, plain.prompted, own)
    assert extra > 0.1
    difference = float(with_z.loss(batch).total.detach() - plain.loss(batch).total.detach())
    assert difference == pytest.approx(extra, rel=1e-4)
    assert mean_loss(with_z, [batch]) == pytest.approx(mean_loss(plain, [batch]), rel=1e-6)


def test_prompts_with_other_z_losses_share_a_run_and_get_their_own_gradients(tiny_frozen: Callable[[str], FrozenLM]):
    frozen = tiny_frozen("gpt2")
    objectives = [objective_of(frozen, z_loss=z_loss) for z_loss in (0.0, 0.05, 0.05)]
    (batch,) = in_order(rows_of(frozen), 4, pad_id=frozen.pad_id)
    sums = SharedPasses(objectives, rows_per_pass=64).gradients({number: [batch] for number in range(3)})
    shared = [objective.parameters()[0].grad for objective in objectives]
    for number, objective in enumerate(objectives):
        loss = objective.loss(batch)
        (alone,) = torch.autograd.grad(loss.total, objective.parameters())
        torch.testing.assert_close(shared[number], alone, rtol=1e-4, atol=1e-5)
        assert sums[number].total == pytest.approx(float(loss.total.detach()), rel=1e-5)
    assert not torch.allclose(shared[0], shared[1], rtol=1e-2)


# --- dropout ---------------------------------------------------------------------------------------------------------


def train(objective: PromptObjective, directory: Path, config: TrainingConfig) -> list[float]:
    frozen = objective.prompted.frozen
    batches = EncodedBatches(rows_of(frozen), 2, frozen.pad_id)
    optimizer, schedule = OptimizerConfig("adafactor", 0.3, weight_decay=1e-5), ScheduleConfig("constant")
    fit(objective, batches, config, optimizer=optimizer, schedule=schedule, run_dir=directory)
    return [event["loss"] for event in read_events(directory / "events.jsonl") if event["event"] == "step"]


def with_dropout(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """The same weights in a model whose config asks for dropout wherever its family has one."""
    config = copy.deepcopy(model.config)
    for part in (config, getattr(config, "encoder", None), getattr(config, "decoder", None)):
        for name in DROPOUTS:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, share)
    made = type(model)(config)
    made.load_state_dict(model.state_dict())
    return made.train()  # as `from_pretrained` does not give it, but as a user may


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("shape", ["t5", "bart", "t5gemma"])
def test_training_on_an_encoder_decoder_has_no_dropout(
    shape: str, recompute: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    """A model whose config asks for dropout gives, update by update, the losses of its twin that asks for none."""
    losses = []
    for share in (0.0, 0.4):
        model = with_dropout(tiny_seq2seq(shape), share)
        if share:
            inputs = torch.arange(12)[None] + 60
            with torch.no_grad():  # it would matter: the model as given is noisy
                noisy = [model(input_ids=inputs, decoder_input_ids=inputs).logits for _ in range(2)]
            assert not torch.allclose(*noisy)
        frozen = FrozenLM.from_model(model, tokenizer)
        if recompute:
            frozen.enable_gradient_checkpointing()
        kinds = ("embedding", "prefix")
        config = TrainingConfig(max_steps=4, batch_size=2)
        losses.append([train(objective_of(frozen, kind), tmp_path / f"{kind}{share}", config) for kind in kinds])
    assert losses[0] == losses[1]


# --- mean of metrics -------------------------------------------------------------------------------------------------


def recipe(directory: Path, evaluation: dict[str, Any]) -> TrainRecipe:
    files = {split: str(directory / "rows.jsonl") for split in ("train", "dev")}
    return decode(
        TrainRecipe,
        {
            "preset": "prompt_tuning_paper",
            "model": model_section(directory),
            "task": {**files, "format": "The {animal} says", "target": "{sound}"},
            "prompt": {"length": 3, "initializer": {"labels": ["moo", "meow"]}},
            "training": {"max_steps": 2, "validate_every_steps": 1, "batch_size": 2},
            "evaluation": {"decoding": {"max_new_tokens": 4}, **evaluation},
            "output_dir": str(directory / "run"),
        },
    )


@pytest.fixture
def world(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    save_model(tmp_path, tokenizer)
    write_records(tmp_path / "rows.jsonl", [{"animal": "cow", "sound": "moo"}, {"animal": "cat", "sound": "meow"}])
    return tmp_path


def test_the_mean_of_several_metrics_selects(world: Path):
    result = run_recipe(recipe(world, {"metrics": ["exact_match", "chrf"]}))
    found = [event for event in read_events(world / "run" / "events.jsonl") if event["event"] == "validation"]
    assert len(found) == 2
    for event in found:
        metrics = event["metrics"]
        assert set(metrics) == {"loss", "exact_match", "chrf", "mean"}
        assert metrics["mean"] == pytest.approx((metrics["exact_match"] + metrics["chrf"]) / 2)
    best = max(found, key=lambda event: event["metrics"]["mean"])
    assert result["best_step"] == best["step"]
    assert result["metrics"]["mean"] == best["metrics"]["mean"]
    stored = json.loads((world / "run" / "prompt" / "prompt.json").read_text())
    assert stored["origin"]["recipe"]["preset"] == "prompt_tuning_paper"
    assert stored["origin"]["recipe"]["optimizer"]["learning_rate"] == 0.3


@pytest.mark.parametrize(
    ("metrics", "said"), [(["exact_match", "nist"], "nist has a scale of its own"), (["ter"], "ter is an error rate")]
)
def test_metrics_that_cannot_be_averaged_are_refused(world: Path, metrics: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        run_recipe(recipe(world, {"metrics": metrics}))
