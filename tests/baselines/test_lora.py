"""LoRA by PEFT in our loop: its gradient, its file, and its way through evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from softprompts.baselines.peft_lora import LoraObjective, load_lora
from softprompts.cli.train import run_recipe
from softprompts.config import LoraConfig, TrainRecipe
from softprompts.errors import ArtifactError, ConfigError, PromptMismatchError
from softprompts.models import FrozenLM
from softprompts.training import in_order, mean_loss
from softprompts.types import Encoded, Example


def rows(frozen: FrozenLM) -> list[Encoded]:
    made = []
    for number in range(6):
        ids = (*frozen.tokenize(f"{number}:{'x' * number}"), *frozen.tokenize("ok"), frozen.eos_id)
        made.append(Encoded(ids, len(ids) - 3, Example("", "ok", id=str(number)), -1))
    return made


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_and_gradient_are_those_of_peft_itself(family: str, tiny_frozen: Callable[[str], FrozenLM]) -> None:
    frozen = tiny_frozen(family)
    objective = LoraObjective(frozen, LoraConfig(rank=2), seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in objective.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    own = rows(frozen)
    (batch,) = in_order(own, 6, pad_id=frozen.pad_id)
    objective.loss(batch).total.backward()
    found = [weight.grad.clone() for weight in objective.parameters() if weight.grad is not None]
    assert len(found) == len(objective.parameters())
    for weight in objective.parameters():
        weight.grad = None

    total = torch.zeros(())
    for row in own:
        ids_1T = torch.tensor([row.ids])
        labels_1T = ids_1T.clone()
        labels_1T[:, : row.target_start] = -100
        output = objective.tuned.model(input_ids=ids_1T, labels=labels_1T)
        total = total + output.loss * len(row.target_ids)
    total.backward()
    for weight, ours in zip(objective.parameters(), found, strict=True):
        torch.testing.assert_close(ours, weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own, where the test itself calls it
def test_an_adapter_is_trained_resumed_saved_by_peft_and_judged(
    recipe: Callable[..., TrainRecipe],
    command: Callable[..., str],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    def lora(folder: str, steps: int) -> TrainRecipe:
        return recipe(
            method="peft_lora",
            schedule={"name": "constant"},
            baseline={"lora": {"rank": 2, "alpha": 4}},
            evaluation={"selection": "loss"},
            training={"max_steps": steps},
            output_dir=str(tmp_path / folder),
        )

    result = run_recipe(lora("whole", 4))
    assert result["metrics"]["loss"] < result["reference_loss"]
    assert result["stored_parameters"] == result["trained_parameters"] < result["model_parameters"] / 5
    run_recipe(lora("broken", 2))
    assert run_recipe(lora("broken", 4), resume=True)["metrics"] == result["metrics"]

    report = json.loads(command("evaluate", "--prompt", result["saved"], "--split", "dev", "--json", "-"))
    assert (report["method"], report["stored_parameters"]) == ("peft_lora", result["stored_parameters"])
    assert report["metrics"]["loss"]["value"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)

    plain = FrozenLM.load(lora("", 1).model.name_or_path, device="cpu")
    by_peft = peft.PeftModel.from_pretrained(tiny_model("gpt2"), result["saved"]).eval()
    ids_1T = torch.tensor([plain.tokenize("It is fine.")])
    adapted = load_lora(result["saved"], plain)
    with torch.no_grad():
        torch.testing.assert_close(adapted.model(ids_1T).logits, by_peft(ids_1T).logits)
        assert not torch.allclose(adapted.model(ids_1T).logits, plain.model(ids_1T).logits, atol=1e-3)
    with pytest.raises(PromptMismatchError, match="whose weights"):
        load_lora(result["saved"], FrozenLM.from_model(tiny_model("gpt2", seed=1), tokenizer))
    # the digest of another file would say nothing of the one that PEFT reads
    path = Path(result["saved"]) / "tuned.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_file": "adapter_config.json"}))
    with pytest.raises(ArtifactError, match="expected 'adapter_model"):
        load_lora(result["saved"], plain)


def test_what_makes_no_adapter_is_refused(tiny_frozen: Callable[[str], FrozenLM]) -> None:
    with pytest.raises(ConfigError, match=r"baseline.lora.rank is 0"):
        LoraObjective(tiny_frozen("gpt2"), LoraConfig(rank=0))
    with pytest.raises(ConfigError, match="PEFT finds no place"):
        LoraObjective(tiny_frozen("gpt2"), LoraConfig(modules=("nowhere",)))
    losses = [
        mean_loss(
            LoraObjective(tiny_frozen("gpt2"), LoraConfig(), seed=seed),
            in_order(rows(tiny_frozen("gpt2")), 6, pad_id=0),
        )
        for seed in (0, 1)
    ]
    assert losses[0] == losses[1]  # an adapter starts at nothing
