"""The contracts of the design, as one matrix: families x kinds of prompt x padding sides.

1. A prompt of real words stands for the words. 2. A batch equals its rows. 3. A fast path equals the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from softprompts.models import FrozenLM
from softprompts.models.attention import Steering
from softprompts.prompted import PromptedLM
from softprompts.prompts import EmbeddingPrompt, PrefixPrompt, SoftPrompt, prompt_from_table
from softprompts.prompts.prefix import flatten_states
from softprompts.types import Batch

TOLERANCE = 1e-4
KINDS = ["embedding", "prefix"]
SIDES = ["left", "right"]


def word_prompt(kind: str, frozen: FrozenLM, ids: Sequence[int]) -> SoftPrompt:
    """A prompt that stands for real words: their embeddings, or the keys and values they evoke."""
    embeddings_PD = frozen.embed(ids)
    table = embeddings_PD if kind == "embedding" else flatten_states(frozen.geometry, frozen.activations(embeddings_PD))
    return prompt_from_table(kind, frozen.geometry, table)


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded(rows: Sequence[Sequence[int]], prompts: Sequence[int], side: str, labels: bool = True) -> Batch:
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), 257), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        columns = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[number, columns], mask[number, columns] = torch.tensor(row), 1
    labels_BT = torch.where(mask == 1, ids, -100)
    first_B = mask.argmax(dim=1)
    labels_BT[torch.arange(len(rows)), first_B] = -100
    return Batch(ids, mask, labels_BT if labels else None, torch.tensor(prompts))


def text_logits(frozen: FrozenLM, ids: Sequence[int]) -> Tensor:
    """The oracle: transformers itself on plain text, logits ``[T, V]``."""
    tensor = torch.tensor([list(ids)])
    with torch.no_grad():
        return frozen.model(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits[0]


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = float(expected.detach().abs().max().clamp(min=1e-6))
    assert got.shape == expected.shape
    difference = float((got - expected).detach().abs().max()) / scale
    assert difference < tolerance, f"relative difference {difference:.2e}"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_of_words_gives_the_logits_of_the_words(frozen: FrozenLM, kind: str, side: str) -> None:
    words, rows = random_ids(7, 1), [random_ids(n, 10 + n) for n in (4, 9, 6)]
    prompted = PromptedLM(frozen, [word_prompt(kind, frozen, words)])
    with torch.no_grad():
        result = prompted.label_logits(padded(rows, [0, 0, 0], side))
    expected = torch.cat([text_logits(frozen, words + row)[len(words) : -1] for row in rows])
    assert_close(result.logits_MV, expected)
    # the check can fail: other words give other logits
    other = torch.cat([text_logits(frozen, random_ids(7, 2) + row)[len(words) : -1] for row in rows])
    assert float((result.logits_MV - other).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("side", SIDES)
def test_mixed_batch_equals_its_rows(frozen: FrozenLM, side: str) -> None:
    """Rows with an embedding prompt, a longer prefix, a short prefix and no prompt at all, of different lengths."""
    words = [random_ids(5, 21), random_ids(11, 22), random_ids(1, 23)]
    kinds = ["embedding", "prefix", "prefix"]
    prompted = PromptedLM(frozen, [word_prompt(k, frozen, w) for k, w in zip(kinds, words, strict=True)])
    rows, which = [random_ids(n, 30 + n) for n in (6, 3, 12, 8, 5)], [1, -1, 0, 2, 1]
    with torch.no_grad():
        together = prompted.label_logits(padded(rows, which, side))
        alone = [prompted.label_logits(padded([row], [w], side)).logits_MV for row, w in zip(rows, which, strict=True)]
    assert_close(together.logits_MV, torch.cat(alone))
    texts = [(words[w] if w >= 0 else []) + row for row, w in zip(rows, which, strict=True)]
    oracle = [text_logits(frozen, text)[-len(row) : -1] for text, row in zip(texts, rows, strict=True)]
    assert_close(together.logits_MV, torch.cat(oracle))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_cache_equals_one_pass(frozen: FrozenLM, kind: str, side: str) -> None:
    words = [random_ids(6, 41), random_ids(9, 42)]
    prompted = PromptedLM(frozen, [word_prompt(kind, frozen, w) for w in words])
    rows, which = [random_ids(n, 50 + n) for n in (4, 7, 5)], [0, 1, -1]
    new_BS = torch.tensor([random_ids(5, 60 + b) for b in range(3)])
    logits_BV, state = prompted.start(padded(rows, which, side, labels=False))
    steps = [logits_BV] + [prompted.step(new_BS[:, i], state) for i in range(new_BS.shape[1])]
    for number, (row, w) in enumerate(zip(rows, which, strict=True)):
        text = (words[w] if w >= 0 else []) + row + new_BS[number].tolist()
        assert_close(torch.stack([step[number] for step in steps]), text_logits(frozen, text)[-6:])


def test_selected_rows_continue_alone(frozen: FrozenLM) -> None:
    words = [random_ids(6, 41), random_ids(9, 42)]
    prompted = PromptedLM(frozen, [word_prompt("prefix", frozen, w) for w in words])
    rows, which = [random_ids(n, 50 + n) for n in (4, 7, 5)], [0, 1, -1]
    _, state = prompted.start(padded(rows, which, "left", labels=False))
    state.select(torch.tensor([2, 0, 0]))
    logits_BV = prompted.step(torch.tensor([7, 8, 9]), state)
    texts = [rows[2] + [7], words[0] + rows[0] + [8], words[0] + rows[0] + [9]]
    assert_close(logits_BV, torch.stack([text_logits(frozen, text)[-1] for text in texts]))


def plain_loss(frozen: FrozenLM, embeddings_PD: Tensor, batch: Batch) -> Tensor:
    """Prompt tuning the plain way: the prompt is copied in front of every row and the head runs everywhere."""
    losses = []
    for row in range(batch.rows):
        real = batch.mask_BT[row] == 1
        ids = batch.ids_BT[row][real]
        assert batch.labels_BT is not None
        labels = batch.labels_BT[row][real]
        inputs = torch.cat([embeddings_PD, frozen.embed(ids.tolist())])[None]
        hidden = frozen.hidden_states(
            inputs_embeds=inputs,
            attention_mask=torch.ones(1, inputs.shape[1], dtype=torch.long),
            position_ids=torch.arange(inputs.shape[1])[None],
            steering=Steering(),
        )
        logits = frozen.head(hidden[0])[len(embeddings_PD) :]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("side", SIDES)
def test_prompt_once_equals_prompt_per_row(frozen: FrozenLM, side: str) -> None:
    table = frozen.embed(random_ids(8, 71))
    once, plain = (prompt_from_table("embedding", frozen.geometry, table) for _ in range(2))
    batch = padded([random_ids(n, 80 + n) for n in (5, 9, 7)], [0, 0, 0], side)
    logits = PromptedLM(frozen, [once]).label_logits(batch)
    loss = torch.nn.functional.cross_entropy(logits.logits_MV, logits.labels_M, reduction="sum")
    loss.backward()
    expected = plain_loss(frozen, plain.table(), batch)
    expected.backward()
    assert_close(loss, expected, 1e-5)
    assert_close(gradient(once), gradient(plain), 1e-5)


def gradient(prompt: SoftPrompt) -> Tensor:
    gradients = [parameter.grad for parameter in prompt.parameters() if parameter.grad is not None]
    assert gradients
    return torch.cat([grad.flatten() for grad in gradients])


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_prompt_gets_a_gradient_and_nothing_of_the_model(frozen: FrozenLM, kind: str) -> None:
    prompt = word_prompt(kind, frozen, random_ids(6, 91))
    batch = padded([random_ids(n, 92 + n) for n in (6, 4)], [0, 0], "right")
    logits = PromptedLM(frozen, [prompt]).label_logits(batch)
    torch.nn.functional.cross_entropy(logits.logits_MV, logits.labels_M).backward()
    assert bool((gradient(prompt) != 0).all())
    assert all(parameter.grad is None for parameter in frozen.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_folded_embedding_prompt_equals_unfolded(frozen: FrozenLM, kind: str) -> None:
    prompt = word_prompt(kind, frozen, random_ids(6, 101))
    folded = PrefixPrompt(
        frozen.geometry, prompt_from_table("prefix", frozen.geometry, fold(frozen, prompt)).parametrization, 6
    )
    batch = padded([random_ids(n, 110 + n) for n in (6, 4)], [0, 0], "left")
    with torch.no_grad():
        expected = PromptedLM(frozen, [prompt]).label_logits(batch).logits_MV
        assert_close(PromptedLM(frozen, [folded]).label_logits(batch).logits_MV, expected)


def fold(frozen: FrozenLM, prompt: SoftPrompt) -> Tensor:
    with torch.no_grad():
        return flatten_states(frozen.geometry, PromptedLM(frozen, [prompt]).states()[0].keys_values)


def test_embedding_prompt_is_final_kind(frozen: FrozenLM) -> None:
    prompt = word_prompt("embedding", frozen, random_ids(3, 1))
    assert isinstance(prompt, EmbeddingPrompt)
    assert prompt.stored_parameters == prompt.trained_parameters == 3 * frozen.geometry.width
