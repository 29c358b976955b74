"""The real ``transformers.Trainer``: it trains, saves, resumes and picks the best, and only the prompt changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from conftest import byte_tokenizer, tiny_model
from softprompts.config import PromptConfig, ReparamConfig
from softprompts.errors import CheckpointError
from softprompts.integrations.huggingface import PromptedForCausalLM, attach, detach
from softprompts.prompted import PromptedLM
from softprompts.storage import load_prompt
from softprompts.types import Batch

pytest.importorskip("accelerate")

TOKENIZER = byte_tokenizer()


def rows(count: int) -> list[dict[str, list[int]]]:
    made = []
    for number in range(count):
        given, wanted = (
            TOKENIZER(f"name {'x' * (number % 5)}").input_ids,
            [*TOKENIZER(f" yes{number % 3}").input_ids, 256],
        )
        labels = [-100] * len(given) + wanted
        made.append({"input_ids": given + wanted, "attention_mask": [1] * len(labels), "labels": labels})
    return made


def prompted(kind: str = "prefix", reparametrization: str = "mlp", family: str = "llama") -> PromptedForCausalLM:
    config = PromptConfig(kind=kind, length=4, reparametrization=ReparamConfig(name=reparametrization, hidden_size=8))
    return attach(tiny_model(family), config, tokenizer=TOKENIZER)


def trainer(model: PromptedForCausalLM, directory: Path, steps: int = 4, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(output_dir=str(directory), **(arguments | options)),
        train_dataset=rows(16),
        eval_dataset=rows(8),
        data_collator=DataCollatorForSeq2Seq(TOKENIZER, padding=True, label_pad_token_id=-100),
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def our_loss(model: PromptedForCausalLM, data: list[dict[str, list[int]]]) -> float:
    batch = DataCollatorForSeq2Seq(TOKENIZER, padding=True, label_pad_token_id=-100)(data)
    ours = Batch(batch["input_ids"], batch["attention_mask"], batch["labels"], torch.zeros(len(data), dtype=torch.long))
    with torch.no_grad():
        logits_MV, labels_M, _ = PromptedLM(model.frozen, [model.prompt]).label_logits(ours)
    return float(torch.nn.functional.cross_entropy(logits_MV, labels_M))


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_trains_the_prompt_and_nothing_else(kind: str, tmp_path: Path):
    model = prompted(kind)
    weights, start = copy.deepcopy(model.frozen.model.state_dict()), model.prompt.table_PW
    run = trainer(model, tmp_path, steps=6, save_strategy="no")
    run.train()
    trained = losses(run)
    assert trained[-1] < trained[0] - 0.5
    assert not torch.equal(model.prompt.table_PW, start)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.frozen.model.state_dict().items())
    assert run.evaluate()["eval_loss"] == pytest.approx(our_loss(model, rows(8)), abs=1e-5)
    predicted = run.predict(rows(8))
    assert predicted.predictions.shape[:2] == predicted.label_ids.shape
    assert detach(model).config.use_cache


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
@pytest.mark.parametrize("reparametrization", ["none", "mlp"])
def test_resumes_bit_for_bit(kind: str, reparametrization: str, tmp_path: Path):
    whole = trainer(prompted(kind, reparametrization), tmp_path)
    whole.train()
    model = prompted(kind, reparametrization)
    resumed = trainer(model, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(model.prompt.table_PW, whole.model.prompt.table_PW)
    saved = load_prompt(tmp_path / "checkpoint-4", model.frozen)
    assert torch.equal(saved.prompt.table_PW, model.prompt.table_PW)


def test_the_best_checkpoint_comes_back(tmp_path: Path):
    # judged by the largest loss, so that the best is not the last one
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    run = trainer(prompted(), tmp_path, **options, load_best_model_at_end=True)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert run.evaluate()["eval_loss"] == run.state.best_metric
    best = load_prompt(tmp_path / "checkpoint-2", run.model.frozen)
    assert torch.equal(run.model.prompt.table_PW, best.prompt.table_PW)


def test_another_prompt_is_not_resumed(tmp_path: Path):
    trainer(prompted(reparametrization="none"), tmp_path, steps=2).train()
    with pytest.raises(CheckpointError, match="same kind, length and reparametrization"):
        trainer(prompted(reparametrization="mlp"), tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_no_loss(family: str, tmp_path: Path):
    plain = trainer(prompted(family=family), tmp_path / "a", save_strategy="no")
    plain.train()
    model = prompted(family=family)
    named_so = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # not in older releases
    switch = "activation_checkpointing" if named_so else "gradient_checkpointing"
    spared = trainer(model, tmp_path / "b", save_strategy="no", **{switch: True})
    spared.train()
    assert model.frozen.gradient_checkpointing
    assert losses(spared) == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_trains_with_everyday_switches(options: dict[str, Any], tmp_path: Path):
    run = trainer(prompted("embedding"), tmp_path, steps=6, save_strategy="no", **options)
    run.train()
    trained = losses(run)
    assert trained[-1] < trained[0] - 0.3
    assert run.model.prompt.table_PW.dtype == torch.float32


def test_accumulated_batches_count_every_label_once(tmp_path: Path):
    whole = trainer(prompted(), tmp_path / "a", steps=2, save_strategy="no", per_device_train_batch_size=8)
    parts = trainer(prompted(), tmp_path / "b", steps=2, save_strategy="no", gradient_accumulation_steps=2)
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.slow
def test_trl_trains_and_resumes(tmp_path: Path):
    trl: Any = pytest.importorskip("trl")
    datasets: Any = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(
        [{"prompt": f"name {number % 7}", "completion": f" yes{number % 3}"} for number in range(16)]
    )

    def run(model: PromptedForCausalLM, resume: str | None = None) -> list[float]:
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            logging_steps=1, save_steps=2, use_cpu=True, bf16=False, disable_tqdm=True, max_length=64,
        )  # fmt: skip
        sft = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=TOKENIZER)
        sft.train(resume_from_checkpoint=resume)
        return losses(sft)

    whole, again = prompted(), prompted()
    expected = run(whole)
    assert expected[-1] < expected[0]
    assert run(again, str(tmp_path / "checkpoint-2")) == expected
    assert torch.equal(again.prompt.table_PW, whole.prompt.table_PW)
