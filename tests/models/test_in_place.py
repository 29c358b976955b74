"""The cache that is written in place against transformers' own, and prompts that rows share against copies of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from softprompts.models import sharing
from softprompts.models.attention import Steering
from softprompts.models.cache import DecodeState
from softprompts.models.frozen import FrozenLM
from softprompts.models.in_place import InPlaceCache, InPlaceLayer
from softprompts.models.inputs import left_aligned, position_ids, prompt_lengths
from softprompts.models.sharing import PromptsOfRows, worth_sharing
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.types import Batch, LayerKey, PromptStates

LENGTHS, WHICH = (4, 7, 5, 1), (0, 1, -1, 0)
ORDERS = ([3, 0, 0, 2, 1], [4, 1, 3], [1, 0, 2])
"""More rows, fewer rows, the same number in another order."""


def states_of(frozen: FrozenLM, lengths: Sequence[int]) -> list[PromptStates]:
    generator = torch.Generator().manual_seed(3)
    tables = [torch.randn(length, frozen.geometry.prefix_width, generator=generator) for length in lengths]
    prompts = [prompt_from_table("prefix", frozen.geometry, table) for table in tables]
    with torch.no_grad():
        return PromptedLM(frozen, prompts).states()


def batch_of(lengths: Sequence[int], which: Sequence[int], seed: int = 0) -> Batch:
    generator, longest = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(0, 256, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]).long()
    return Batch(ids, mask, None, torch.tensor(which))


def plain_start(prompted: PromptedLM, batch: Batch, states: list[PromptStates]) -> tuple[Tensor, DecodeState]:
    """What start() did before there was a cache of our own: prompts joined to everything, in every step anew."""
    frozen, batch, cache = prompted.frozen, left_aligned(batch), DynamicCache()
    length_B = prompt_lengths(states, batch.prompt_of_row_B)
    steering = Steering.of_prompts(frozen.layer_of, states, batch.prompt_of_row_B)
    with torch.no_grad():
        hidden_BTD = frozen.hidden_states(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, position_ids=position_ids(batch.mask_BT, length_B),
            past_key_values=cache, steering=steering,
        )  # fmt: skip
        state = DecodeState(cache, batch.mask_BT, length_B + batch.mask_BT.sum(dim=1), steering)
        return frozen.head(hidden_BTD[:, -1]), state


def decode(prompted: PromptedLM, logits_BV: Tensor, state: DecodeState, steps: int = 6) -> Tensor:
    """Logits of a few steps with rows repeated, dropped and reordered in between, all rows of all steps."""
    every, generator = [logits_BV], torch.Generator().manual_seed(8)
    for number in range(steps):
        if number < len(ORDERS):
            state.select(torch.tensor(ORDERS[number]))
        every.append(prompted.step(torch.randint(0, 256, (state.rows,), generator=generator), state))
    return torch.cat(every)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.fixture
def few_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every prompt worth sharing."""
    monkeypatch.setattr(sharing, "_FEWEST_ROWS", 0)
    monkeypatch.setattr(sharing, "_FEWEST_COLUMNS", 0)


@pytest.mark.parametrize("lengths", [(5, 9), (6, 6)])
def test_in_place_equals_joined(frozen: FrozenLM, lengths: tuple[int, int]) -> None:
    prompted, states, batch = PromptedLM(frozen), states_of(frozen, lengths), batch_of(LENGTHS, WHICH)
    logits_BV, state = prompted.start(batch, states)
    assert isinstance(state.cache, InPlaceCache)
    assert not state.steering.shared
    expected = decode(prompted, *plain_start(prompted, batch, states))
    assert_close(decode(prompted, logits_BV, state), expected)
    assert all(layer.has_front for layer in state.cache.layers)  # the prompts were really read from there


@pytest.mark.parametrize("which", [WHICH, (0, 0, 0, 0), (-1, -1, -1, -1)])
@pytest.mark.usefixtures("few_columns")
def test_shared_equals_joined(frozen: FrozenLM, which: tuple[int, ...]) -> None:
    prompted, states, batch = PromptedLM(frozen), states_of(frozen, (5, 9)), batch_of(LENGTHS, which)
    logits_BV, state = prompted.start(batch, states)
    assert state.steering.shared == (which != (-1, -1, -1, -1))
    expected = decode(prompted, *plain_start(prompted, batch, states))
    assert_close(decode(prompted, logits_BV, state), expected)


def test_forked_beams_equal_selected_ones(frozen: FrozenLM) -> None:
    prompted, states, batch = PromptedLM(frozen), states_of(frozen, (5, 9)), batch_of((4, 6), (1, 0))
    results = []
    for name in ("fork", "select"):
        _, state = prompted.start(batch, states, width=3)
        state.select(torch.tensor([0, 0, 0, 1, 1, 1]))
        generator = torch.Generator().manual_seed(5)
        for parents in ([0, 1, 2, 3, 4, 5], [2, 0, 0, 5, 5, 4], [1, 1, 0, 3, 5, 4]):
            getattr(state, name)(torch.tensor(parents))
            results.append(prompted.step(torch.randint(0, 256, (6,), generator=generator), state))
    assert torch.equal(torch.cat(results[:3]), torch.cat(results[3:]))


def test_prompts_of_some_layers_only(tiny_frozen) -> None:
    """A prefix may reach some layers only, and not the same ones as its neighbour's."""
    frozen = tiny_frozen("llama")
    states = states_of(frozen, (5, 9, 4))
    states = [
        replace(state, keys_values={key: pair for key, pair in state.keys_values.items() if key.layer in reached})
        for state, reached in zip(states, [(0, 1), (1,), (1,)], strict=True)
    ]
    prompted, batch = PromptedLM(frozen), batch_of(LENGTHS, (0, 1, -1, 2))
    expected = decode(prompted, *plain_start(prompted, batch, states))
    assert_close(decode(prompted, *prompted.start(batch, states)), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.usefixtures("few_columns")
def test_shared_prompts_are_not_copied_per_row(tiny_frozen, family: str) -> None:
    frozen = tiny_frozen(family)
    states = states_of(frozen, (5, 9))
    _, state = PromptedLM(frozen).start(batch_of(LENGTHS, WHICH), states)
    PromptedLM(frozen).step(torch.tensor([1, 2, 3, 4]), state)
    prompts = state.steering.keys_values
    assert isinstance(prompts, PromptsOfRows)
    assert {len(keys) for keys, _ in prompts._stacks.values()} == {2}  # one per prompt
    assert state.cache.layers[0].keys.shape[2] == max(LENGTHS) + 1
    assert all(not layer.has_front for layer in state.cache.layers)


def test_growing_keeps_everything() -> None:
    """Far beyond the first buffer, rows dropped and repeated on the way, against joined tensors."""
    cache, plain, generator = InPlaceCache(front=3), DynamicCache(), torch.Generator().manual_seed(0)
    front = torch.randn(1, 2, 3, 4, generator=generator)
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    rows = 4
    for step in range(40):
        new = torch.randn(rows, 2, 9 if step % 7 == 0 else 5, 4, generator=generator)
        keys, _ = cache.update(new, 2 * new, 0)
        expected, _ = plain.update(new, 2 * new, 0)
        assert torch.equal(keys, expected)
        held = cache.holder(module, keys)
        assert isinstance(held, InPlaceLayer)
        if step == 0:
            held.put_front(front, 2 * front)
        wide_keys, wide_values = held.behind_front()
        assert torch.equal(wide_keys, torch.cat([front.expand(rows, -1, -1, -1), expected], dim=2))
        assert torch.equal(wide_values, 2 * wide_keys)
        if step % 5 == 4:
            order = torch.randint(0, rows, ((3, 6, 4, 1, 5)[step // 5 % 5],), generator=generator)
            rows = len(order)
            cache.select(order)
            plain.batch_select_indices(order)
    assert cache.get_seq_length() == plain.get_seq_length() > 200
    assert cache.holder(module, keys.clone()) is None  # keys that a model made of the cache's are not the cache's


def test_a_step_copies_nothing_that_is_already_there() -> None:
    cache = InPlaceCache()
    cache.update(torch.ones(2, 1, 5, 4), torch.ones(2, 1, 5, 4), 0)
    before = cache.layers[0].keys
    after, _ = cache.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), 0)
    assert after.data_ptr() == before.data_ptr()
    cache.select(torch.tensor([0]))
    assert cache.layers[0].keys.data_ptr() == before.data_ptr()


@pytest.mark.parametrize(
    ("length", "prompts", "rows", "expected"),
    [(100, 1, 32, True), (200, 2, 32, True), (20, 32, 32, False), (100, 32, 32, False), (5, 1, 32, False)],
)
def test_what_is_worth_sharing(length: int, prompts: int, rows: int, expected: bool) -> None:
    states = [PromptStates(length, keys_values={LayerKey("self", 0): (torch.zeros(1), torch.zeros(1))})] * prompts
    assert worth_sharing(states, rows) is expected
