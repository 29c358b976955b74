"""A prompt attached to an encoder-decoder: forward, ``generate`` and the real ``Seq2SeqTrainer``."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from conftest import byte_tokenizer, switches, tiny_model
from seq2seq_contracts import batch_of, ids_of
from softprompts.config import DecodingConfig, PromptConfig, ReparamConfig
from softprompts.errors import ConfigError, LengthError, UnsupportedModelError
from softprompts.inference import Engine
from softprompts.integrations.huggingface import PromptedForCausalLM, PromptedForSeq2SeqLM, attach, detach
from softprompts.models import FrozenLM
from softprompts.models.implementation import set_implementation
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.storage import load_prompt
from softprompts.types import Encoded, Example
from zoo_seq2seq import tiny_seq2seq, with_end

SHAPES = ["bart", "pegasus", "t5_deep_decoder", "t5gemma"]
"""Learned, fixed and relative positions, scaled embeddings, unequal halves, sliding windows."""
KINDS = ["prefix", "embedding"]
ROWS = [ids_of(number, 10 + number) for number in (4, 7, 3)]
TARGETS = [ids_of(number, 20 + number) for number in (5, 2, 3)]


@cache
def frozen_of(shape: str) -> FrozenLM:
    return FrozenLM.from_model(tiny_seq2seq(shape), with_end(byte_tokenizer()), name=f"tiny-{shape}")


def attached(shape: str, kind: str = "prefix", **prompt: Any) -> PromptedForSeq2SeqLM:
    model = attach(frozen_of(shape), PromptConfig(kind=kind, length=5, **prompt))
    assert isinstance(model, PromptedForSeq2SeqLM)
    model.generation_config.forced_eos_token_id = None  # Pegasus forces one that is not this tokenizer's
    with torch.no_grad():  # a prefix starts near nothing
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return model


def text(rows: list[list[int]], side: str = "right") -> dict[str, Tensor]:
    batch = batch_of(rows, rows, [0] * len(rows), side)
    return {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT}


def generated(model: Any, rows: list[list[int]], side: str = "right", **options: Any) -> list[list[int]]:
    ids = model.generate(**text(rows, side), **({"max_new_tokens": 6, "do_sample": False} | options))
    return [until_the_end(row) for row in ids[:, 1:].tolist()]


def until_the_end(ids: list[int], ends: tuple[int, ...] = (256,)) -> list[int]:
    """Without the end and what stands behind it."""
    return ids[: min((ids.index(end) for end in ends if end in ids), default=len(ids))]


def own(
    frozen: FrozenLM, prompt: SoftPrompt, rows: list[list[int]], beams: int = 1, length: int = 6
) -> list[list[int]]:
    """What softprompts itself generates."""
    decoding = DecodingConfig(strategy="beam" if beams > 1 else "greedy", beams=beams, max_new_tokens=length)
    examples = [Encoded(tuple(row), len(row), Example("", "")) for row in rows]
    made = Engine(PromptedLM(frozen, [prompt])).generate(examples, decoding)
    return [until_the_end(list(generation.ids)) for generation in made]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_are_ours_whichever_side_is_padded(shape: str, kind: str) -> None:
    model, batch = attached(shape, kind), batch_of(ROWS, TARGETS, [0, 0, 0])
    assert batch.targets_BU is not None
    logits_MV, labels_M, _ = PromptedLM(model.frozen, [model.prompt]).label_logits(batch)
    for side in ("right", "left"):
        outputs = model(**text(ROWS, side), labels=batch.targets_BU)
        assert outputs.logits.shape[:2] == batch.targets_BU.shape
        found = outputs.logits[batch.targets_BU != -100]
        torch.testing.assert_close(found, logits_MV, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outputs.loss, cross_entropy(logits_MV, labels_M), rtol=1e-5, atol=1e-5)
    outputs.loss.backward()
    assert [name for name, _ in model.named_parameters()] == ["prompted.prompts.0.parametrization.table_PW"]
    assert all(bool((parameter.grad != 0).all()) for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.frozen.model.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_disabled_it_is_the_base_model_bit_for_bit(shape: str) -> None:
    model, base = attached(shape), tiny_seq2seq(shape)
    base.generation_config.forced_eos_token_id = None
    if shape == "t5gemma":  # capped scores: some releases load it with sdpa, which leaves the cap out
        set_implementation(base, "eager")
    labels = batch_of(ROWS, TARGETS, [0, 0, 0]).targets_BU
    with torch.no_grad():
        expected = base(**text(ROWS), labels=labels)
        with model.disable():
            outputs = model(**text(ROWS), labels=labels)
        if shape == "t5gemma":  # another kernel: equal, not bit for bit
            torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(outputs.logits, expected.logits)
            assert torch.equal(outputs.loss, expected.loss)
        assert not torch.allclose(model(**text(ROWS), labels=labels).logits, expected.logits, atol=1e-2)
    with model.disable():  # transformers' cache knows no decoder that is deeper than its encoder
        assert generated(model, ROWS, use_cache=False) == generated(base, ROWS, use_cache=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_generate_agree(shape: str, kind: str) -> None:
    model = attached(shape, kind)
    expected = own(model.frozen, model.prompt, ROWS)
    assert generated(model, ROWS) == expected
    assert generated(model, ROWS, "left") == expected
    assert generated(model, ROWS, use_cache=False) == expected
    assert [generated(model, [row])[0] for row in ROWS] == expected
    assert generated(model, ROWS, num_beams=3) == own(model.frozen, model.prompt, ROWS, beams=3)
    with torch.no_grad():  # what training sees is what generate starts from
        start = torch.full((len(ROWS), 1), model.frozen.pair.start_id)
        logits = model(**text(ROWS), decoder_input_ids=start).logits[:, -1]
    firsts = [row[:1] or [256] for row in expected]
    assert logits.argmax(dim=-1, keepdim=True).tolist() == firsts


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_agrees_or_is_refused(kind: str) -> None:
    model = attached("bart", kind)
    assert generated(model, ROWS, cache_implementation="static") == own(model.frozen, model.prompt, ROWS)
    with pytest.raises(UnsupportedModelError, match="sliding windows"):
        generated(attached("t5gemma", kind), ROWS, cache_implementation="static")


@pytest.mark.parametrize("shape", ["bart", "t5"])
def test_a_prompt_made_of_words_generates_what_the_words_do(shape: str) -> None:
    frozen, words = frozen_of(shape), ids_of(5, 1)
    model = attach(frozen, prompt_from_table("embedding", frozen.geometry, frozen.embed(words)))
    together = [words + row for row in ROWS]
    for options in ({}, {"num_beams": 3}):
        found = generated(model, ROWS, **options)
        with model.disable():
            assert found == generated(model, together, **options)


def test_the_encoder_runs_once_and_its_states_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("t5", "embedding")
    encoded = model.get_encoder()(**text(ROWS))
    assert encoded.last_hidden_state.shape[1] == 5 + 7
    labels = batch_of(ROWS, TARGETS, [0, 0, 0]).targets_BU
    whole = model(**text(ROWS), labels=labels)
    given = model(attention_mask=text(ROWS)["attention_mask"], encoder_outputs=encoded, labels=labels)
    assert torch.equal(given.logits, whole.logits)
    with model.disable():
        bare = model.get_encoder()(**text(ROWS))
    with pytest.raises(ConfigError, match="expected 5 of the prompt and 7 of the text"):
        model(**text(ROWS), encoder_outputs=bare, labels=labels)
    runs: list[int] = []
    encode = model.frozen.pair.encode
    monkeypatch.setattr(model.frozen.pair, "encode", lambda *inputs: (runs.append(1), encode(*inputs))[1])
    generated(model, ROWS)
    assert runs == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    labels = batch_of(ROWS, TARGETS, [0, 0, 0]).targets_BU

    def gradient(checkpointing: bool) -> Tensor:
        config = PromptConfig(kind=kind, length=4, reparametrization=ReparamConfig(name="mlp", hidden_size=8))
        model = attach(tiny_seq2seq("t5"), config, tokenizer=with_end(byte_tokenizer()))
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()(**text(ROWS), labels=labels).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["bart", "t5"])
def test_compiled_without_a_graph_break(shape: str) -> None:
    model = attached(shape, "embedding")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = {**text(ROWS), "labels": batch_of(ROWS, TARGETS, [0, 0, 0]).targets_BU}
    outputs = compiled(**inputs)
    torch.testing.assert_close(outputs.logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    outputs.loss.backward()
    assert bool(model.prompt.parametrization.table_PW.grad.ne(0).any())


def test_the_prompt_stays_float32_on_a_bfloat16_model() -> None:
    base = tiny_seq2seq("t5").to(torch.bfloat16)
    model = attach(base, PromptConfig(kind="embedding", length=3), tokenizer=with_end(byte_tokenizer()))
    loss = model(**text(ROWS), labels=batch_of(ROWS, TARGETS, [0, 0, 0]).targets_BU).loss
    loss.backward()
    table_PW = model.prompt.parametrization.table_PW
    assert (model.dtype, table_PW.dtype, table_PW.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert len(generated(model, ROWS)) == 3


def test_detached_it_leaves_no_trace() -> None:
    base = tiny_seq2seq("bart").train()
    before, weights = switches(base), copy.deepcopy(base.state_dict())
    model = attach(base, PromptConfig(length=3), tokenizer=with_end(byte_tokenizer()))
    model.activation_checkpointing_enable()
    labels = batch_of(ROWS, TARGETS, [0, 0, 0]).targets_BU
    model.train()(**text(ROWS), labels=labels).loss.backward()
    generated(model, ROWS)
    assert detach(model) is base
    assert switches(base) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    base.eval()
    with torch.no_grad():  # what is detached steers no more
        assert torch.equal(model(**text(ROWS), labels=labels).logits, base(**text(ROWS), labels=labels).logits)


def test_saved_and_attached_again(tmp_path: Path) -> None:
    model = attached("t5", reparametrization=ReparamConfig(name="mlp", hidden_size=8))
    model.save_pretrained(tmp_path)
    assert torch.equal(load_prompt(tmp_path, model.frozen).prompt.table_PW, model.prompt.table_PW)
    again = PromptedForSeq2SeqLM.from_pretrained(tmp_path, model=model.frozen)
    labels = batch_of(ROWS, TARGETS, [0, 0, 0]).targets_BU
    assert torch.equal(again(**text(ROWS), labels=labels).logits, model(**text(ROWS), labels=labels).logits)
    with pytest.raises(UnsupportedModelError, match=r"'t5' is an encoder-decoder.*softprompts\.attach"):
        PromptedForCausalLM.from_pretrained(tmp_path, model=model.frozen)
    with pytest.raises(UnsupportedModelError, match="'llama' is decoder-only"):
        PromptedForSeq2SeqLM.attached(tiny_model("llama"), PromptConfig(length=3), tokenizer=byte_tokenizer())


def test_what_cannot_be_done_is_refused() -> None:
    model = attached("bart", "embedding")
    row, labels = text(ROWS[:1]), torch.tensor([[1, 2]])
    with pytest.raises(ConfigError, match="neither decoder_input_ids nor labels"):
        model(**row)
    with pytest.raises(ConfigError, match="neither input_ids nor inputs_embeds"):
        model(labels=labels)
    with pytest.raises(ConfigError, match="output_hidden_states is not offered"):
        model(**row, labels=labels, output_hidden_states=True)
    with pytest.raises(ConfigError, match="decoder_position_ids is not offered"):
        model(**row, labels=labels, decoder_position_ids=labels)
    with pytest.raises(LengthError, match="positions of the encoder"):
        model(input_ids=torch.zeros(1, 124, dtype=torch.long), labels=labels)
    with pytest.raises(LengthError, match="positions of the decoder"):
        model(**row, labels=torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(UnsupportedModelError, match="no infix"):
        attached("bart", "embedding", placement="infix")


# -- Seq2SeqTrainer ----------------------------------------------------------------------------------------------------


def trainer(model: PromptedForSeq2SeqLM, directory: Path, steps: int = 4, **options: Any) -> Seq2SeqTrainer:
    tokenizer = with_end(byte_tokenizer())
    data = [
        {
            "input_ids": tokenizer(f"name {'x' * (number % 5)}").input_ids,
            "labels": tokenizer(f"yes{number % 3}").input_ids,
        }
        for number in range(16)
    ]
    arguments: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-1, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
        "predict_with_generate": True, "generation_max_length": 8,
    }  # fmt: skip
    return Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(output_dir=str(directory), **(arguments | options)),
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )


def losses(run: Seq2SeqTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def fresh(kind: str) -> PromptedForSeq2SeqLM:
    config = PromptConfig(kind=kind, length=4, reparametrization=ReparamConfig(name="mlp", hidden_size=8))
    return attach(tiny_seq2seq("t5"), config, tokenizer=with_end(byte_tokenizer()))


@pytest.mark.parametrize("kind", KINDS)
def test_seq2seq_trainer_trains_resumes_and_predicts(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = fresh(kind)
    weights = copy.deepcopy(model.frozen.model.state_dict())
    whole = trainer(model, tmp_path)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.frozen.model.state_dict().items())
    resumed = trainer(fresh(kind), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(resumed.model.prompt.table_PW, model.prompt.table_PW)
    predicted = whole.predict(whole.eval_dataset)
    rows = [row["input_ids"] for row in whole.eval_dataset]
    made = [until_the_end(row[1:], (256, 257)) for row in predicted.predictions.tolist()]
    assert made == own(model.frozen, model.prompt, rows, length=7)
    batch = batch_of(rows, [row["labels"] for row in whole.eval_dataset], [0] * 4)
    with torch.no_grad():
        logits_MV, labels_M, _ = PromptedLM(model.frozen, [model.prompt]).label_logits(batch)
    assert predicted.metrics["test_loss"] == pytest.approx(float(cross_entropy(logits_MV, labels_M)), abs=1e-4)


@pytest.mark.parametrize("options", [{"bf16": True}, {"label_smoothing_factor": 0.1}])
def test_trains_with_everyday_switches(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    run = trainer(fresh("embedding"), tmp_path, steps=6, save_strategy="no", **options)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert run.model.prompt.table_PW.dtype == torch.float32


def test_accumulated_batches_count_every_label_once(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole = trainer(fresh("prefix"), tmp_path / "a", steps=2, save_strategy="no", per_device_train_batch_size=8)
    parts = trainer(fresh("prefix"), tmp_path / "b", steps=2, save_strategy="no", gradient_accumulation_steps=2)
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)
