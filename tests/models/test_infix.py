"""Infixes: [x; PROMPT; y], as embeddings and as keys and values, in training, scoring and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import byte_tokenizer, tiny_model
from softprompts.errors import DataError, UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.prompts.prefix import flatten_states
from softprompts.types import Batch
from zoo_decoders import DECODERS

TOLERANCE = 1e-4
SIDES = ["left", "right"]


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch_of(
    inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], prompts: Sequence[int], side: str
) -> Batch:
    """Rows x + y; all of y but its first token is to be predicted (that one is the separator)."""
    rows = [[*x, *y] for x, y in zip(inputs, outputs, strict=True)]
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 257), torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        first = longest - len(row) if side == "left" else 0
        ids[number, first : first + len(row)], mask[number, first : first + len(row)] = torch.tensor(row), 1
        learned = slice(first + len(inputs[number]) + 1, first + len(row))
        labels[number, learned] = ids[number, learned]
    return Batch(ids, mask, labels, torch.tensor(prompts), infix_B=torch.tensor([len(x) for x in inputs]))


def text_logits(frozen: FrozenLM, ids: Sequence[int]) -> Tensor:
    """The oracle: transformers itself on plain text, logits ``[T, V]``."""
    tensor = torch.tensor([list(ids)])
    with torch.no_grad():
        return frozen.model(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits[0]


def embedding_infix(frozen: FrozenLM, words: Sequence[int]) -> SoftPrompt:
    return prompt_from_table("embedding", frozen.geometry, frozen.embed(words), placement="infix")


def evoked_infix(frozen: FrozenLM, before: Sequence[int], words: Sequence[int]) -> SoftPrompt:
    """The keys and values that words evoke behind one certain input: as an infix there they stand for the words."""
    states = frozen.activations(frozen.embed([*before, *words]))
    behind = {layer: (keys[:, len(before) :], values[:, len(before) :]) for layer, (keys, values) in states.items()}
    return prompt_from_table("prefix", frozen.geometry, flatten_states(frozen.geometry, behind), placement="infix")


def random_prompt(frozen: FrozenLM, kind: str, placement: str, length: int, seed: int) -> SoftPrompt:
    width = frozen.geometry.width if kind == "embedding" else frozen.geometry.prefix_width
    table = torch.randn(length, width, generator=torch.Generator().manual_seed(seed))
    return prompt_from_table(kind, frozen.geometry, table, placement=placement)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = float(expected.detach().abs().max().clamp(min=1e-6))
    assert got.shape == expected.shape
    difference = float((got - expected).detach().abs().max()) / scale
    assert difference < tolerance, f"relative difference {difference:.2e}"


INPUTS = [random_ids(n, 10 + n) for n in (4, 9, 6, 0, 2)]
OUTPUTS = [random_ids(n, 40 + n) for n in (5, 3, 8, 4, 2)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_embeddings_of_words_stand_for_the_words(frozen: FrozenLM, side: str, packing: bool) -> None:
    words = [random_ids(7, 1), random_ids(3, 2)]
    prompted = PromptedLM(frozen, [embedding_infix(frozen, own) for own in words])
    prompted.packing = packing
    which = [0, 1, 0, 1, -1]
    with torch.no_grad():
        got = prompted.label_logits(batch_of(INPUTS, OUTPUTS, which, side)).logits_MV
    expected = [
        text_logits(frozen, [*x, *(words[w] if w >= 0 else []), *y])[-len(y) : -1]
        for x, y, w in zip(INPUTS, OUTPUTS, which, strict=True)
    ]
    assert_close(got, torch.cat(expected))
    in_front = [text_logits(frozen, [*words[0], *INPUTS[0], *OUTPUTS[0]])[-len(OUTPUTS[0]) : -1]]
    assert float((got[: len(in_front[0])] - in_front[0]).abs().max()) > 100 * TOLERANCE  # the place makes a difference


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_keys_and_values_of_words_stand_for_the_words(frozen: FrozenLM, side: str, packing: bool) -> None:
    """What words evoke behind an input, given as an infix there: rows, positions and visibility are all right."""
    words = [random_ids(length, 70 + length) for length in (6, 2, 9, 4, 1)]
    prompted = PromptedLM(frozen, [evoked_infix(frozen, x, own) for x, own in zip(INPUTS, words, strict=True)])
    prompted.packing = packing
    with torch.no_grad():
        got = prompted.label_logits(batch_of(INPUTS, OUTPUTS, range(5), side)).logits_MV
    expected = [
        text_logits(frozen, [*x, *own, *y])[-len(y) : -1] for x, y, own in zip(INPUTS, OUTPUTS, words, strict=True)
    ]
    assert_close(got, torch.cat(expected))


def every_kind(frozen: FrozenLM) -> PromptedLM:
    kinds = [("embedding", "prefix", 5), ("prefix", "prefix", 11), ("embedding", "infix", 3), ("prefix", "infix", 8)]
    kinds += [("prefix", "infix", 2), ("embedding", "infix", 6)]
    return PromptedLM(frozen, [random_prompt(frozen, *kind, seed=number) for number, kind in enumerate(kinds)])


MIXED = [3, 0, 2, -1, 3, 1, 5, 4, 2]
MIXED_INPUTS = [random_ids(n, 100 + n) for n in (7, 2, 12, 5, 1, 9, 4, 20, 3)]
MIXED_OUTPUTS = [random_ids(n, 200 + n) for n in (6, 9, 2, 4, 11, 5, 3, 8, 2)]


@pytest.mark.parametrize("side", SIDES)
def test_a_mixed_batch_equals_its_rows_packed_and_padded(frozen: FrozenLM, side: str) -> None:
    found = {}
    for packing in (True, False):
        prompted = every_kind(frozen)
        prompted.packing = packing
        losses = prompted.label_losses(batch_of(MIXED_INPUTS, MIXED_OUTPUTS, MIXED, side)).losses_M
        (losses * torch.linspace(0.5, 2.0, len(losses))).sum().backward()
        found[packing] = losses.detach(), [parameter.grad for parameter in prompted.parameters()]
        assert all(bool((gradient != 0).all()) for gradient in found[packing][1])
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-4, atol=1e-5)
    for ours, plain in zip(found[True][1], found[False][1], strict=True):
        assert float((ours - plain).norm() / plain.norm()) < 1e-5
    prompted.packing = False
    with torch.no_grad():
        alone = [
            prompted.label_losses(batch_of([x], [y], [w], side)).losses_M
            for x, y, w in zip(MIXED_INPUTS, MIXED_OUTPUTS, MIXED, strict=True)
        ]
    torch.testing.assert_close(torch.cat(alone), found[True][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_decoding_equals_the_training_forward(frozen: FrozenLM, side: str) -> None:
    """Train forward == generate's first step, and each later one; rows are selected on the way."""
    prompted = every_kind(frozen)
    whole = batch_of(MIXED_INPUTS, MIXED_OUTPUTS, MIXED, side)
    with torch.no_grad():
        found = prompted.label_logits(whole)
    of_row = [found.logits_MV[found.row_M == row] for row in range(whole.rows)]
    heads = [y[:1] for y in MIXED_OUTPUTS]
    inputs = replace(batch_of(MIXED_INPUTS, heads, MIXED, side), labels_BT=None)
    logits_BV, state = prompted.start(inputs)
    rows, step = list(range(whole.rows)), 0
    while True:
        assert_close(logits_BV, torch.stack([of_row[row][step] for row in rows]))
        step += 1
        keep = [place for place, row in enumerate(rows) if len(of_row[row]) > step]
        if not keep:
            break
        state.select(torch.tensor(keep))
        rows = [rows[place] for place in keep]
        logits_BV = prompted.step(torch.tensor([MIXED_OUTPUTS[row][step] for row in rows]), state)
    assert step == max(map(len, MIXED_OUTPUTS)) - 1


def test_with_nothing_in_front_an_infix_is_a_prefix(tiny_frozen: Callable[[str], FrozenLM]) -> None:
    frozen = tiny_frozen("llama")
    batch = batch_of([[], []], OUTPUTS[:2], [0, 1], "right")
    losses = []
    for placement in ("prefix", "infix"):
        prompts = [random_prompt(frozen, kind, placement, 6, seed=3) for kind in ("prefix", "embedding")]
        with torch.no_grad():
            losses.append(PromptedLM(frozen, prompts).label_losses(batch).losses_M)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_short_windows(family: str) -> None:
    """Keys and values stay visible behind a window, embeddings scroll by like the text that they stand in."""
    model = tiny_model(family)
    short = type(model)(type(model.config)(**{**model.config.to_dict(), "sliding_window": 8}))
    short.load_state_dict(model.state_dict())
    frozen = FrozenLM.from_model(short.eval(), byte_tokenizer())
    words = random_ids(7, 1)
    batch = batch_of(MIXED_INPUTS, MIXED_OUTPUTS, [0] * 9, "right")
    with torch.no_grad():
        got = PromptedLM(frozen, [embedding_infix(frozen, words)]).label_logits(batch).logits_MV
    texts = [
        text_logits(frozen, [*x, *words, *y])[-len(y) : -1] for x, y in zip(MIXED_INPUTS, MIXED_OUTPUTS, strict=True)
    ]
    assert_close(got, torch.cat(texts))
    losses = []
    for packing in (True, False):
        prompted = PromptedLM(frozen, [random_prompt(frozen, "prefix", "infix", 12, seed=5)])
        prompted.packing = packing
        with torch.no_grad():
            losses.append(prompted.label_losses(batch).losses_M)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_say_where_it_goes_are_refused(tiny_frozen: Callable[[str], FrozenLM]) -> None:
    frozen = tiny_frozen("gpt2")
    batch = batch_of(INPUTS, OUTPUTS, [0] * 5, "right")
    for kind in ("embedding", "prefix"):
        prompted = PromptedLM(frozen, [random_prompt(frozen, kind, "infix", 3, seed=1)])
        with pytest.raises(DataError, match="where its input ends"):
            prompted.label_losses(replace(batch, infix_B=None))
        with pytest.raises(DataError, match="where its input ends"):
            prompted.start(replace(batch, infix_B=None))


def test_an_output_that_would_not_see_the_infix_is_refused(tiny_frozen: Callable[[str], FrozenLM]) -> None:
    """No separator: the first token of the output would be predicted in front of the keys and values."""
    frozen = tiny_frozen("gpt2")
    x, y = INPUTS[0], OUTPUTS[0]
    batch = batch_of([x], [y], [0], "right")
    assert batch.labels_BT is not None
    batch.labels_BT[0, len(x)] = y[0]
    prompted = PromptedLM(frozen, [random_prompt(frozen, "prefix", "infix", 3, seed=1)])
    with pytest.raises(DataError, match="separator"):
        prompted.label_losses(batch)
    with pytest.raises(DataError, match="separator"):
        prompted.start(batch_of([x], [[]], [0], "right"))
    words = random_ids(5, 1)  # embeddings are read: the last of them predicts
    prompted = PromptedLM(frozen, [embedding_infix(frozen, words)])
    expected = text_logits(frozen, [*x, *words, *y])[-len(y) - 1 : -1]
    with torch.no_grad():
        assert_close(prompted.label_logits(batch).logits_MV, expected)
    assert_close(prompted.start(batch_of([x], [[]], [0], "right"))[0], expected[:1])


def test_encoder_decoders_have_no_infix() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=260, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=257
    )
    frozen = FrozenLM.from_model(transformers.T5ForConditionalGeneration(config), byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match="no infix"):
        PromptedLM(frozen, [random_prompt(frozen, "prefix", "infix", 3, seed=1)])


ELSEWHERE = ["bloom", "gpt-neo", "gemma2-small-window", "gpt-oss", "deepseek-v3", "lfm2", "jamba", "mamba"]
"""Prompts through the cache, capped scores, sinks, latent attention, recurrent states."""


@pytest.mark.parametrize("name", ELSEWHERE)
def test_embeddings_stand_for_words_where_packed_rows_do_not_run(name: str) -> None:
    """Side by side with a prompt in front and with none, padded on either side, and continued."""
    frozen = FrozenLM.from_model(DECODERS[name].build().eval(), byte_tokenizer())
    assert frozen.causal is not None
    words = [random_ids(7, 1), random_ids(3, 2)]
    in_front = prompt_from_table("embedding", frozen.geometry, frozen.embed(words[1]))
    prompted = PromptedLM(frozen, [embedding_infix(frozen, words[0]), in_front])
    which = [0, 1, 0, 1, -1]
    texts = []
    for x, y, w in zip(INPUTS, OUTPUTS, which, strict=True):
        texts.append([*x, *words[0], *y] if w == 0 else [*(words[1] if w == 1 else []), *x, *y])
    of_row = [
        frozen.causal.own_logits(torch.tensor([text]))[0, -len(y) :] for text, y in zip(texts, OUTPUTS, strict=True)
    ]
    seen = [number for number, w in enumerate(which) if w == 0 or not frozen.geometry.sites or not _windows(frozen)]
    for side in SIDES:
        with torch.no_grad():
            found = prompted.label_logits(batch_of(INPUTS, OUTPUTS, which, side))
        for number in seen:  # where a window is short, a prompt in front stays visible and words do not
            assert_close(found.logits_MV[found.row_M == number], of_row[number][:-1])
        inputs = replace(batch_of(INPUTS, [y[:1] for y in OUTPUTS], which, side), labels_BT=None)
        logits_BV, state = prompted.start(inputs)
        then_BV = prompted.step(torch.tensor([y[1] for y in OUTPUTS]), state)
        for number in seen:
            assert_close(torch.stack([logits_BV[number], then_BV[number]]), of_row[number][:2])


def _windows(frozen: FrozenLM) -> bool:
    return any(site.window is not None for site in frozen.geometry.sites)
