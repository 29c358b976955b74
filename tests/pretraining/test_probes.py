from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softprompts.errors import DataError, DataNotFoundError
from softprompts.pretraining.probes import COPY_TEMPLATES, blimp, copying, induction, sample, sequence_log_probs
from softprompts.pretraining.recipe import TokenizerConfig
from softprompts.pretraining.tokens import END_OF_TEXT, train_tokenizer
from tiny_pretraining import corpus_text


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = train_tokenizer([corpus_text(i) for i in range(50)], TokenizerConfig(vocab_size=400))
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def test_batched_scores_are_those_of_single_rows(model: LlamaForCausalLM) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 400, (n,), generator=generator).tolist() for n in (3, 9, 5, 2, 7)]
    sums, _ = sequence_log_probs(model, rows, skip=[1, 4, 2, 1, 6], batch_size=2)
    for row, skip, got in zip(rows, [1, 4, 2, 1, 6], sums, strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        assert got == pytest.approx(sum(float(log_probs[i - 1, row[i]]) for i in range(skip, len(row))), abs=1e-4)


def test_greedy_flag_agrees_with_generate(model: LlamaForCausalLM) -> None:
    context = [0, 17, 99, 250]
    output = model.generate(
        torch.tensor([context]), max_new_tokens=5, do_sample=False, pad_token_id=1, eos_token_id=None
    )
    row = output[0].tolist()
    wrong = [*row[:-1], (row[-1] + 1) % 400]
    _, greedy = sequence_log_probs(model, [row, wrong], skip=[4, 4])
    assert greedy == [True, False]


def test_blimp_counts_the_more_probable_sentence(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts = [corpus_text(i).split("\n")[0] for i in range(12)]
    scores, _ = sequence_log_probs(model, [[0, *tokenizer(t)["input_ids"]] for t in texts])
    records = []
    for i in range(0, 12, 2):
        better, worse = sorted((i, i + 1), key=lambda k: -scores[k])
        pair = (texts[better], texts[worse]) if i % 4 == 0 else (texts[worse], texts[better])
        records.append({"uid": f"u{i % 4}", "term": f"t{i % 4}", "good": pair[0], "bad": pair[1]})
    path = tmp_path / "blimp.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    result = blimp(model, tokenizer, path)
    assert (result.by_term, result.pairs, result.accuracy) == ({"t0": 1.0, "t2": 0.0}, 6, 0.5)
    assert result.standard_error == pytest.approx((0.25 / 6) ** 0.5)
    assert blimp(model, tokenizer, path, pairs_per_paradigm=1).pairs == 2


def test_blimp_refuses_no_data(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="does not exist"):
        blimp(model, tokenizer, tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds no pairs"):
        blimp(model, tokenizer, tmp_path / "empty.jsonl")


def test_a_random_model_copies_nothing(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    result = copying(model, tokenizer, count=12)
    assert result["accuracy"] == 0.0
    assert len(result) == 2 + len(COPY_TEMPLATES)
    repeated = induction(model, tokenizer, count=4, length=8)
    assert repeated["accuracy"] < 0.2
    assert repeated["loss"] == pytest.approx(torch.log(torch.tensor(400.0)).item(), abs=0.5)
    assert repeated["first_loss"] == pytest.approx(repeated["loss"], abs=0.5)


def test_induction_needs_words(model: LlamaForCausalLM) -> None:
    bytes_only = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer([], TokenizerConfig(vocab_size=300)), bos_token=END_OF_TEXT
    )
    with pytest.raises(DataError, match="has 0 tokens that are words"):
        induction(model, bytes_only)


def test_copying_is_perfect_for_a_model_that_copies(tokenizer: PreTrainedTokenizerFast) -> None:
    """A stand-in that knows the answers: every token of the row it is given is its greedy choice."""

    class Oracle(torch.nn.Module):
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            logits = torch.nn.functional.one_hot(input_ids.roll(-1, dims=1), 400).float() * 20

            class Output:
                pass

            output = Output()
            output.logits = logits  # type: ignore[attr-defined]
            return output

    assert copying(Oracle(), tokenizer, count=12)["accuracy"] == 1.0  # type: ignore[arg-type]
    assert induction(Oracle(), tokenizer, count=4, length=8)["accuracy"] == 1.0  # type: ignore[arg-type]


def test_samples_begin_with_their_prompts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    first = sample(model, tokenizer, ["The kitchen", "A"], max_new_tokens=5, seed=1)
    assert first[0].startswith("The kitchen")
    assert first == sample(model, tokenizer, ["The kitchen", "A"], max_new_tokens=5, seed=1)
