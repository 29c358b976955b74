"""Scores of choices: one pass that reads every input once equals scoring each pair of input and choice on its own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from conftest import SIZES
from seq2seq_contracts import PairSubject, mixture, random_prefix, word_prompt
from softprompts.errors import ConfigError, DataError, LengthError
from softprompts.inference import Engine, score_choices
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.tasks.encode import collate
from softprompts.types import Encoded, Example

EOS = 256
CHOICES = [b"no", b"not", b"yes", b"n"]
"""They share beginnings, and one is the beginning of others."""


def tokens_of(*words: bytes) -> list[tuple[int, ...]]:
    return [(*word, EOS) for word in words]


def row_of(text: bytes, prompt: int, *, infix_at: int | None = None) -> Encoded:
    return Encoded(tuple(text), len(text), Example(text.decode(), "", id=text.decode()), prompt, infix_at=infix_at)


def one_by_one(
    prompted: PromptedLM, rows: Sequence[Encoded], choices: Sequence[Sequence[tuple[int, ...]]]
) -> list[list[float]]:
    """The plain way: a forward pass of its own for every pair, and the loss of its target."""
    found = []
    for row, own in zip(rows, choices, strict=True):
        scores = []
        for choice in own:
            pair = Encoded((*row.ids, *choice), row.target_start, row.example, row.prompt, infix_at=row.infix_at)
            if prompted.frozen.pair is not None:
                pair = Encoded(row.ids, row.target_start, row.example, row.prompt, decoder_ids=choice)
            batch = collate([pair], pad_id=prompted.frozen.pad_id)
            with torch.no_grad():
                scores.append(-float(prompted.label_losses(batch).losses_M.double().sum()))
        found.append(scores)
    return found


def farthest(found: Sequence[tuple[float, ...]], expected: Sequence[Sequence[float]]) -> float:
    """The largest difference between scores."""
    pairs = [pair for one, right in zip(found, expected, strict=True) for pair in zip(one, right, strict=True)]
    return max(abs(one - right) for one, right in pairs)


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_decoders_with_mixed_prompts(tiny_frozen, batch_size: int):
    """Embedding prompts, prefixes of two lengths, rows without any, own choices per row, in any batch."""
    frozen = tiny_frozen("llama")
    prompts = [word_prompt(frozen, list(b"answer: ")), random_prefix(frozen, 3, 1), random_prefix(frozen, 7, 2)]
    prompted = PromptedLM(frozen, prompts)
    texts = [b"one?", b"a longer question?", b"two?", b"x", b"the fifth?"]
    rows = [row_of(text, prompt) for text, prompt in zip(texts, [0, 1, 2, -1, 1], strict=True)]
    choices = [
        tokens_of(*CHOICES),
        tokens_of(b"a", b"bcd"),
        tokens_of(*CHOICES),
        tokens_of(b"only"),
        tokens_of(b"", b"e"),
    ]
    ready: list[int] = []
    found = score_choices(Engine(prompted), rows, choices, batch_size=batch_size, on_progress=ready.append)
    assert farthest(found, one_by_one(prompted, rows, choices)) < 2e-4
    assert sum(ready) == len(rows)


def test_many_rows_that_share_a_long_prompt(tiny_frozen):
    """Enough rows and columns that decoding reads the prompt once for all of them."""
    frozen = tiny_frozen("gpt2")
    prompted = PromptedLM(frozen, [random_prefix(frozen, 64, 3)])
    rows = [row_of(b"question %d" % number, 0) for number in range(20)]
    choices = [tokens_of(b"False", b"True")] * len(rows)
    assert farthest(score_choices(Engine(prompted), rows, choices), one_by_one(prompted, rows, choices)) < 2e-4


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_an_infix_stands_between_input_and_choice(tiny_frozen, kind: str):
    frozen = tiny_frozen("gpt2")
    width = frozen.geometry.prefix_width if kind == "prefix" else frozen.geometry.width
    table = torch.randn(4, width, generator=torch.Generator().manual_seed(7))
    infix = prompt_from_table(kind, frozen.geometry, table, placement="infix")
    prompted = PromptedLM(frozen, [infix, random_prefix(frozen, 2, 8)])
    rows = [row_of(b"first\n", 0, infix_at=5), row_of(b"the second\n", 0, infix_at=10), row_of(b"third\n", 1)]
    choices = [tokens_of(*CHOICES)] * 3
    assert (
        farthest(score_choices(Engine(prompted), rows, choices, batch_size=2), one_by_one(prompted, rows, choices))
        < 2e-4
    )


def test_a_model_that_is_reached_through_its_cache(tokenizer: PreTrainedTokenizerFast):
    config = BloomConfig(**{**SIZES, "n_layer": 2, "n_head": 4})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        frozen = FrozenLM.from_model(BloomForCausalLM(config).eval(), tokenizer, name="tiny-bloom")
    assert frozen.causal is not None
    assert not frozen.causal.through_attention
    prompted = PromptedLM(frozen, [random_prefix(frozen, 3, 1), word_prompt(frozen, list(b"say "))])
    rows = [row_of(b"one", 0), row_of(b"number two", 1), row_of(b"the third", -1)]
    choices = [tokens_of(*CHOICES)] * 3
    assert farthest(score_choices(Engine(prompted), rows, choices), one_by_one(prompted, rows, choices)) < 2e-4


@pytest.mark.parametrize("shape", ["t5", "bart"])
def test_encoder_decoders_with_mixed_prompts(shape: str, tokenizer: PreTrainedTokenizerFast):
    """Prefixes at all sites and at some, embedding prompts of two lengths, rows without any; the encoder runs once."""
    subject = PairSubject(shape, tokenizer)
    prompted, texts, _, owners, _ = mixture(subject.frozen)
    rows = [row_of(bytes(byte % 128 for byte in text), prompt) for text, prompt in zip(texts, owners, strict=True)]
    choices = [tokens_of(*CHOICES) if number % 2 else tokens_of(b"ab", b"abc") for number in range(len(rows))]
    calls = []
    counter = subject.frozen.pair.encoder.register_forward_hook(lambda *_: calls.append(1))
    found = score_choices(Engine(prompted), rows, choices, batch_size=3)
    counter.remove()
    assert len(calls) == 2  # a batch of three rows each
    assert farthest(found, one_by_one(prompted, rows, choices)) < 2e-4


def test_mistakes_are_refused(tiny_frozen):
    frozen = tiny_frozen("gpt2")
    engine = Engine(PromptedLM(frozen))
    row = row_of(b"text", -1)
    with pytest.raises(DataError, match="choices for 2 rows, but there are 1"):
        score_choices(engine, [row], [tokens_of(b"a")] * 2)
    for wrong in ([], [()]):
        with pytest.raises(DataError, match="record 'text' has no choices"):
            score_choices(engine, [row], [wrong])
    with pytest.raises(ConfigError, match="names prompt 3"):
        score_choices(engine, [row_of(b"text", 3)], [tokens_of(b"a")])
    with pytest.raises(LengthError, match="the model has 256"):
        score_choices(engine, [row_of(b"x" * 254, -1)], [tokens_of(b"a", b"bcd")])
