"""What `--dry-run` foretells is what training takes, measured at the allocator while the real loop runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from conftest import SIZES, byte_tokenizer
from softprompts.baselines import FineTuningObjective
from softprompts.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from softprompts.models import FrozenLM
from softprompts.models.memory import peak_bytes, weight_bytes
from softprompts.models.quantization import quantize_weights
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.training import (
    EncodedBatches,
    Member,
    PromptObjective,
    SharedPasses,
    fit_together,
    footprint,
    longest_update,
)
from softprompts.types import Encoded, Example

WIDE = {**SIZES, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 2000}
"""Wide enough that what kernels take for themselves is little beside the tensors."""
NEAR = 0.1
"""Largest relative error of a prediction."""


def gpt2() -> PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**WIDE))


def llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE, num_key_value_heads=2))


def t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=2000, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4, decoder_start_token_id=257,
        eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> PreTrainedModel:
    sizes = {**WIDE, "hidden_size": 64, "intermediate_size": 64}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_key_value_heads=2, **experts))


def frozen_lm(make: Callable[[], PreTrainedModel], quantization: str | None = None) -> FrozenLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    if quantization is not None:
        quantize_weights(model, quantization)
    return FrozenLM.from_model(model, byte_tokenizer())


def prompt(frozen: FrozenLM, kind: str, length: int = 12) -> SoftPrompt:
    width = frozen.geometry.width if kind == "embedding" else frozen.geometry.prefix_width
    return prompt_from_table(kind, frozen.geometry, 0.1 * torch.randn(length, width))


def rows(count: int, prompt: int = 0, *, pairs: bool = False) -> list[Encoded]:
    """Rows of 20 to 60 tokens, a third of them to be learned."""
    dice = random.Random(0)
    made = []
    for _ in range(count):
        ids = tuple(dice.randrange(256) for _ in range(dice.randrange(20, 60)))
        cut = 2 * len(ids) // 3
        example = Example("", "")
        made.append(
            Encoded(ids[:cut], cut, example, prompt, decoder_ids=ids[cut:])
            if pairs
            else Encoded(ids, cut, example, prompt)
        )
    return made


def members(objectives: list, data: list[Encoded], folder: Path, name: str = "adamw", **settings: int) -> list[Member]:
    """Runs of two epochs on the same rows, with batches of 8 rows."""
    steps = 2 * (len(data) // 8)
    found = []
    for number, objective in enumerate(objectives):
        config = TrainingConfig(
            **{"max_steps": steps, "batch_size": 8, "checkpoint_every_steps": steps, "seed": number} | settings
        )
        stream = EncodedBatches(data, 8, 257, seed=number)
        optimizer = OptimizerConfig(name=name, learning_rate=1e-3)
        found.append(
            Member(
                objective, stream, config, optimizer=optimizer, schedule=ScheduleConfig(), run_dir=folder / str(number)
            )
        )
    return found


def predicted_and_measured(runs: list[Member], *, shared: bool = False, others: tuple = ()) -> tuple[int, int]:
    objectives = [run.objective for run in runs]
    gradients = SharedPasses(objectives, rows_per_pass=16).gradients if shared else None
    frozen = objectives[0].prompted.frozen
    padded = not (objectives[0].prompted.packing and frozen.packable)
    batches = longest_update([run.batches for run in runs], [run.config for run in runs], padded=padded)
    found = footprint(runs, batches, gradients=gradients, others=others)
    parts = found.weights + found.prompts + found.optimizer + found.sources + found.logits + found.activations
    assert (found.method, found.peak) == ("predicted", parts)
    models = dict.fromkeys((*others, *(objective.prompted.frozen.model for objective in objectives)))
    there = weight_bytes(*models, *(objective.prompted.prompts for objective in objectives))
    return found.peak, there + peak_bytes(lambda: fit_together(runs, gradients=gradients))


def state_of(frozen: FrozenLM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in frozen.model.state_dict().items()}


@pytest.mark.parametrize("kind", ["embedding", "prefix"])
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("packing", [True, False])
def test_prediction_is_what_training_takes(
    make: Callable[[], PreTrainedModel], kind: str, packing: bool, tmp_path: Path
) -> None:
    frozen = frozen_lm(make)
    objective = PromptObjective(PromptedLM(frozen, [prompt(frozen, kind)]))
    objective.prompted.packing = packing
    before = objective.trainable_state()
    predicted, measured = predicted_and_measured(members([objective], rows(32), tmp_path))
    assert predicted == pytest.approx(measured, rel=NEAR)
    assert predicted > 1.5 * weight_bytes(frozen.model)  # what is foretold is more than the weights
    after = objective.trainable_state()  # the measured run has trained, so the prediction alone is tested below
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_nothing_is_changed_by_predicting(tmp_path: Path) -> None:
    frozen = frozen_lm(gpt2, "int8")
    objective = PromptObjective(PromptedLM(frozen, [prompt(frozen, "prefix")]))
    weights, trained = state_of(frozen), objective.trainable_state()
    (run,) = members([objective], rows(16), tmp_path)
    footprint([run], longest_update([run.batches], [run.config]))
    assert all(torch.equal(value, weights[name]) for name, value in frozen.model.state_dict().items())
    assert all(torch.equal(value, trained[name]) for name, value in objective.trainable_state().items())
    assert all(parameter.grad is None for parameter in objective.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_state_of_the_optimizer_counts(optimizer: str, tmp_path: Path) -> None:
    frozen = frozen_lm(gpt2)
    objective = PromptObjective(PromptedLM(frozen, [prompt(frozen, "prefix", 200)]))
    (run,) = members([objective], rows(8), tmp_path, optimizer)
    found = footprint([run], longest_update([run.batches], [run.config]))
    copies = {"adamw": 2, "adafactor": 1, "sgd": 0}[optimizer]
    assert found.prompts == 200 * frozen.geometry.prefix_width * 4
    assert found.optimizer == pytest.approx(copies * found.prompts, abs=100)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights(quantization: str, tmp_path: Path) -> None:
    frozen = frozen_lm(llama, quantization)
    objective = PromptObjective(PromptedLM(frozen, [prompt(frozen, "prefix")]))
    predicted, measured = predicted_and_measured(members([objective], rows(32), tmp_path))
    assert predicted == pytest.approx(measured, rel=NEAR)


def test_autocast(tmp_path: Path) -> None:
    frozen = frozen_lm(gpt2)
    frozen.training_dtype = torch.bfloat16
    objective = PromptObjective(PromptedLM(frozen, [prompt(frozen, "prefix")]))
    predicted, measured = predicted_and_measured(members([objective], rows(32), tmp_path))
    assert predicted == pytest.approx(measured, rel=NEAR)


def test_gradient_checkpointing_saves_what_is_predicted(tmp_path: Path) -> None:
    peaks = []
    for checkpointing in (False, True):
        frozen = frozen_lm(llama)
        if checkpointing:
            frozen.enable_gradient_checkpointing()
        objective = PromptObjective(PromptedLM(frozen, [prompt(frozen, "prefix")]))
        predicted, measured = predicted_and_measured(members([objective], rows(32), tmp_path / str(checkpointing)))
        assert predicted == pytest.approx(measured, rel=NEAR)
        peaks.append(measured - weight_bytes(frozen.model))
    assert peaks[1] < 0.7 * peaks[0]


def test_prompts_that_share_their_passes(tmp_path: Path) -> None:
    frozen = frozen_lm(gpt2)
    kinds = ["prefix", "embedding", "prefix"]
    objectives = [PromptObjective(PromptedLM(frozen, [prompt(frozen, kind)])) for kind in kinds]
    predicted, measured = predicted_and_measured(members(objectives, rows(32), tmp_path), shared=True)
    assert predicted == pytest.approx(measured, rel=NEAR)


def test_encoder_decoder(tmp_path: Path) -> None:
    frozen = frozen_lm(t5)
    objective = PromptObjective(PromptedLM(frozen, [prompt(frozen, "prefix")]))
    predicted, measured = predicted_and_measured(members([objective], rows(32, pairs=True), tmp_path))
    assert predicted == pytest.approx(measured, rel=NEAR)


def test_fine_tuning_counts_both_copies_of_the_model(tmp_path: Path) -> None:
    frozen = frozen_lm(gpt2)
    objective = FineTuningObjective(frozen)
    predicted, measured = predicted_and_measured(
        members([objective], rows(32, prompt=-1), tmp_path, checkpoint_every_steps=10**6), others=(frozen.model,)
    )
    assert predicted > 5 * weight_bytes(frozen.model)  # both copies, gradients and two moments
    # The last checkpoint, a copy of all weights and moments, is made when the activations are gone.
    assert predicted == pytest.approx(measured, rel=NEAR)


def test_a_model_that_needs_its_numbers_is_measured(tmp_path: Path) -> None:
    frozen = frozen_lm(mixtral)
    objective = PromptObjective(PromptedLM(frozen, [prompt(frozen, "prefix")]))
    (run,) = members([objective], rows(16), tmp_path)
    found = footprint([run], longest_update([run.batches], [run.config]))
    assert found.method == "measured"
    assert found.peak > found.weights + found.prompts + found.optimizer


def test_the_longest_batch_is_one_that_the_run_meets(tmp_path: Path) -> None:
    data = rows(50)
    stream, config = EncodedBatches(data, 8, 257, seed=3), TrainingConfig(max_steps=9, batch_size=8, seed=3)
    met = [*stream(0, 0), *stream(1, 0)][:9]
    (longest,) = longest_update([stream], [config])[0]
    assert any(torch.equal(longest.ids_BT, batch.ids_BT) for batch in met)
    assert longest.tokens == max(batch.tokens for batch in met)
    (widest,) = longest_update([stream], [config], padded=True)[0]
    assert widest.ids_BT.numel() == max(batch.ids_BT.numel() for batch in met)


def test_runs_in_step_are_measured_at_the_longest_update() -> None:
    data = rows(50)
    streams = [EncodedBatches(data, 8, 257, seed=seed) for seed in (0, 1)]
    configs = [TrainingConfig(max_steps=steps, batch_size=8, accumulation_steps=2) for steps in (3, 2)]
    met = [list(stream(0, 0)) for stream in streams]
    sizes = [
        sum(batch.tokens for run in ((0, 1) if update < 2 else (0,)) for batch in met[run][2 * update : 2 * update + 2])
        for update in range(3)
    ]
    found = longest_update(streams, configs)
    assert sum(batch.tokens for own in found.values() for batch in own) == max(sizes)
    assert all(len(own) == 2 for own in found.values())
