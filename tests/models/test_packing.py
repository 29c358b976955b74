"""Packed rows against padded ones: the same losses and gradients, whatever the rows, prompts and windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from conftest import SIZES, ZOO, byte_tokenizer, tiny_model
from softprompts.baselines.fine_tuning import FineTuningObjective
from softprompts.models import FrozenLM
from softprompts.models.flex import flex_packed_attention
from softprompts.models.kernels import merge, packed_attention
from softprompts.models.label_loss import chunked_cross_entropy
from softprompts.models.packing import RowPlace, attention_slots, pack
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.types import Batch, PromptStates

LENGTHS = (12, 3, 30, 9, 17, 4, 21, 2)
PROMPTS = ("embedding", 5), ("prefix", 11), ("embedding", 1), ("prefix", 40)
OF_ROW = (1, -1, 0, 2, 3, 1, 0, 3)


def batch_of(lengths: Sequence[int], prompts: Sequence[int], side: str = "right") -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (len(lengths), max(lengths)), generator=generator)
    column = torch.arange(ids.shape[1])[None]
    length = torch.tensor(lengths)[:, None]
    mask = (column < length if side == "right" else column >= ids.shape[1] - length).long()
    labels = torch.where(mask == 1, ids, -100)
    labels[torch.arange(len(lengths)), mask.argmax(dim=1)] = -100
    return Batch(ids, mask, labels, torch.tensor(prompts))


def prompted_lm(frozen: FrozenLM, *, packing: bool) -> PromptedLM:
    generator = torch.Generator().manual_seed(4)
    prompts = []
    for kind, length in PROMPTS:
        width = frozen.geometry.width if kind == "embedding" else frozen.geometry.prefix_width
        prompts.append(prompt_from_table(kind, frozen.geometry, torch.randn(length, width, generator=generator)))
    prompted = PromptedLM(frozen, prompts)
    prompted.packing = packing
    return prompted


def losses_and_gradients(prompted: PromptedLM, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    found = prompted.label_losses(batch)
    (found.losses_M * torch.linspace(0.5, 2.0, len(found.losses_M))).sum().backward()
    return found.losses_M.detach(), [parameter.grad for parameter in prompted.parameters()]


def assert_packed_equals_padded(frozen: FrozenLM, batch: Batch) -> None:
    assert frozen.packable
    packed, packed_gradients = losses_and_gradients(prompted_lm(frozen, packing=True), batch)
    padded, padded_gradients = losses_and_gradients(prompted_lm(frozen, packing=False), batch)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    for ours, plain in zip(packed_gradients, padded_gradients, strict=True):
        assert float((ours - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_equals_padded(frozen: FrozenLM, side: str) -> None:
    assert_packed_equals_padded(frozen, batch_of(LENGTHS, OF_ROW, side))


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
@pytest.mark.parametrize("window", [8, 16])
def test_short_windows(family: str, window: int) -> None:
    """Windows shorter than the rows: the text scrolls out of sight, the prompt does not."""
    model = tiny_model(family)
    short = type(model.config)(**{**model.config.to_dict(), "sliding_window": window})
    model = type(model)(short)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    frozen = FrozenLM.from_model(model, byte_tokenizer())
    # Embedded prompts longer than the window are run by the model's own rule, the same in both ways.
    assert_packed_equals_padded(frozen, batch_of(LENGTHS, OF_ROW))


def test_checkpointing_packed_rows(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    batch = batch_of(LENGTHS, OF_ROW)
    frozen = FrozenLM.from_model(tiny_model("llama"), tokenizer)
    plain, plain_gradients = losses_and_gradients(prompted_lm(frozen, packing=True), batch)
    frozen.enable_gradient_checkpointing()
    again, gradients = losses_and_gradients(prompted_lm(frozen, packing=True), batch)
    torch.testing.assert_close(again, plain)
    for ours, expected in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_model_with_bfloat16_weights_is_close() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
        frozen = FrozenLM.from_model(transformers.LlamaForCausalLM(config).bfloat16(), byte_tokenizer())
    assert frozen.packable
    packed, packed_gradients = losses_and_gradients(prompted_lm(frozen, packing=True), batch_of(LENGTHS, OF_ROW))
    padded, padded_gradients = losses_and_gradients(prompted_lm(frozen, packing=False), batch_of(LENGTHS, OF_ROW))
    torch.testing.assert_close(packed, padded, rtol=2e-2, atol=2e-2)
    for ours, plain in zip(packed_gradients, padded_gradients, strict=True):
        assert float((ours - plain).norm() / plain.norm()) < 5e-2


def test_prompts_that_no_row_carries_are_not_computed(tiny_frozen: Callable[[str], FrozenLM]) -> None:
    prompted = prompted_lm(tiny_frozen("gpt2"), packing=True)
    prompted.label_losses(batch_of((5, 6), (1, 1))).losses_M.sum().backward()
    assert [parameter.grad is not None for parameter in prompted.parameters()] == [False, True, False, False]


def test_every_family_of_the_zoo_is_packed(tiny_frozen: Callable[[str], FrozenLM]) -> None:
    assert all(tiny_frozen(family).packable for family in ZOO)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_every_token_has_one_slot(lengths: list[int]) -> None:
    firsts = [sum(lengths[:number]) for number in range(len(lengths))]
    slots = attention_slots([RowPlace(*place) for place in zip(firsts, lengths, strict=True)], torch.device("cpu"))
    total = sum(lengths)
    assert slots.tokens_S[slots.slot_M].tolist() == list(range(total))
    assert int((slots.pad_S1 == 0).sum()) == total == len(set(slots.slot_M.tolist()))
    assert slots.blocks[-1].slots.stop == len(slots.tokens_S)
    for block in slots.blocks:  # the tokens of a row stand side by side, from the row's first column on
        for row in slots.tokens_S[block.slots].view(block.rows, block.longest).tolist():
            length = lengths[firsts.index(row[0])]
            assert row == list(range(row[0], row[0] + length)) + [row[0]] * (block.longest - length)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_packed_attention_equals_the_softmax(data: st.DataObject) -> None:
    """Against attention written out with one score matrix, in float64: any rows, heads, prompts and window."""
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    of_row = data.draw(st.lists(st.integers(-1, 2), min_size=len(lengths), max_size=len(lengths)))
    heads, groups = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    window = data.draw(st.none() | st.integers(1, 6))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    sizes = (3, 1, 7)
    used = sorted({prompt for prompt in of_row if prompt >= 0})
    states = [PromptStates(length=sizes[prompt]) for prompt in used]
    renumbered = torch.tensor([used.index(prompt) if prompt >= 0 else -1 for prompt in of_row])
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    packing = pack(mask, states, renumbered)
    total = sum(lengths)
    query = torch.randn(total, heads * groups, 8, requires_grad=True)
    key, value = (torch.randn(total, heads, 8, requires_grad=True) for _ in range(2))
    prefixes = [tuple(torch.randn(heads, sizes[p], 8, requires_grad=True) for _ in range(2)) for p in used]
    got = packed_attention(query, key, value, packing, list(prefixes), window=window)
    leaves = [query, key, value, *(tensor for pair in prefixes for tensor in pair)]
    expected = written_out(query, key, value, lengths, renumbered.tolist(), prefixes, window)
    weight = torch.randn_like(got)
    gradients = torch.autograd.grad((got * weight).sum(), leaves)
    plain = torch.autograd.grad((expected * weight).sum(), leaves)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)
    for ours, reference in zip(gradients, plain, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_flex_attention_sees_what_the_kernels_see(data: st.DataObject) -> None:
    """The CUDA path, run uncompiled on the CPU (forward only: FlexAttention has no backward there)."""
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    of_row = data.draw(st.lists(st.integers(-1, 2), min_size=len(lengths), max_size=len(lengths)))
    window = data.draw(st.none() | st.integers(1, 6))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    sizes = (3, 1, 7)
    used = sorted({prompt for prompt in of_row if prompt >= 0})
    embeddings = {0: torch.randn(3, 8)}  # prompt 0 is run with the text
    states = [PromptStates(length=sizes[prompt], embeddings_PD=embeddings.get(prompt)) for prompt in used]
    renumbered = torch.tensor([used.index(prompt) if prompt >= 0 else -1 for prompt in of_row])
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    packing = pack(mask, states, renumbered)
    query = torch.randn(packing.tokens, 4, 16)
    key, value = (torch.randn(packing.tokens, 2, 16) for _ in range(2))
    prefixes = [None if p in embeddings else (torch.randn(2, sizes[p], 16), torch.randn(2, sizes[p], 16)) for p in used]
    got = flex_packed_attention(query, key, value, packing, prefixes, window=window)
    expected = packed_attention(query, key, value, packing, prefixes, window=window)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    of_row: Sequence[int],
    prefixes: Sequence[tuple[Tensor, ...]],
    window: int | None,
) -> Tensor:
    """Rows stand sorted by prompt in the packed row; each is computed alone, in float64."""
    order = sorted(range(len(lengths)), key=lambda row: of_row[row])
    parts, start = [], 0
    for row in order:
        inside = slice(start, start + lengths[row])
        start += lengths[row]
        q, k, v = (tensor[inside].double().transpose(0, 1) for tensor in (query, key, value))
        prompt = 0
        if of_row[row] >= 0:
            front_k, front_v = prefixes[of_row[row]]
            k, v, prompt = torch.cat([front_k.double(), k], 1), torch.cat([front_v.double(), v], 1), front_k.shape[1]
        groups = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        back = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None]
        seen = (back >= 0) & (back < (window or 10**6))
        seen = torch.cat([torch.ones(q.shape[1], prompt, dtype=torch.bool), seen], dim=1)
        scores = (q @ k.transpose(1, 2) * 8**-0.5).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def test_merge_is_attention_over_both_sets() -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(4, 9), torch.randn(9, 3)
    parts = [(scores[:, s].softmax(-1) @ values[s], scores[:, s].logsumexp(-1)) for s in (slice(0, 4), slice(4, 9))]
    out, log_sum = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, scores.softmax(-1) @ values)
    torch.testing.assert_close(log_sum, scores.logsumexp(-1))


@pytest.mark.parametrize("chunk_logits", [1, 30, 77, 10**6])
def test_chunked_cross_entropy_equals_the_plain_one(chunk_logits: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11).requires_grad_(False)
    hidden, labels = torch.randn(9, 6, requires_grad=True), torch.randint(0, 11, (9,))
    weight = torch.rand(9)
    losses = chunked_cross_entropy(head, hidden, labels, vocab_size=11, chunk_logits=chunk_logits)
    (gradient,) = torch.autograd.grad((losses * weight).sum(), hidden)
    expected = functional.cross_entropy(head(hidden), labels, reduction="none")
    (plain,) = torch.autograd.grad((expected * weight).sum(), hidden)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, plain)
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_cross_entropy(head, hidden, labels, vocab_size=11, chunk_logits=chunk_logits), expected
        )


def test_chunks_bound_the_memory_of_the_logits() -> None:
    """No tensor as large as all logits is ever made."""
    largest = 0

    def head(hidden: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(hidden) * 1000)
        return hidden @ weight

    weight = torch.randn(4, 1000)
    hidden = torch.randn(64, 4, requires_grad=True)
    labels = torch.randint(0, 1000, (64,))
    chunked_cross_entropy(head, hidden, labels, vocab_size=1000, chunk_logits=8000).sum().backward()
    assert largest == 8000
    assert hidden.grad is not None


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_training_in_bfloat16_is_close_to_float32(family: str, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    frozen = FrozenLM.from_model(tiny_model(family), tokenizer)
    batch = batch_of(LENGTHS, OF_ROW)
    losses, gradients = losses_and_gradients(prompted_lm(frozen, packing=True), batch)
    frozen.training_dtype = torch.bfloat16
    rough, rough_gradients = losses_and_gradients(prompted_lm(frozen, packing=True), batch)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, losses)  # it did compute otherwise
    torch.testing.assert_close(rough, losses, rtol=3e-2, atol=5e-2)
    for ours, plain in zip(rough_gradients, gradients, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - plain).norm() / plain.norm()) < 5e-2
    with torch.no_grad():  # measuring keeps the weights' type
        exact = prompted_lm(frozen, packing=True).label_losses(batch).losses_M
    torch.testing.assert_close(exact, losses, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of the compiler itself
def test_compiled_training_equals_eager(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """No graph break, and no graph for every new length of the packed row."""
    frozen = FrozenLM.from_model(tiny_model("llama"), tokenizer)
    batches = [batch_of(LENGTHS[:rows], OF_ROW[:rows]) for rows in (8, 7, 6, 8, 5)]
    expected = [losses_and_gradients(prompted_lm(frozen, packing=True), batch) for batch in batches]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    frozen.compile()
    for batch, (losses, gradients) in zip(batches, expected, strict=True):
        compiled, compiled_gradients = losses_and_gradients(prompted_lm(frozen, packing=True), batch)
        torch.testing.assert_close(compiled, losses, rtol=1e-5, atol=1e-5)
        for ours, plain in zip(compiled_gradients, gradients, strict=True):
            assert (ours is None) == (plain is None)
            if ours is not None:
                assert float((ours - plain).norm() / plain.norm()) < 1e-4
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of the compiler itself
def test_compiled_fine_tuning_equals_eager(
    tokenizer: transformers.PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a prompt, and with gradients to the weights, as one graph."""
    frozen = FrozenLM.from_model(tiny_model("llama"), tokenizer)
    torch._dynamo.reset()
    found = []
    for compiles in (False, True):
        objective = FineTuningObjective(frozen)
        if compiles:
            objective.prompted.frozen.compile()
        found.append([])
        for rows in (8, 5):
            step = objective.loss(batch_of(LENGTHS[:rows], OF_ROW[:rows]))
            gradients = torch.autograd.grad(step.total, objective.parameters(), allow_unused=True)
            found[-1] += [step.total.detach(), *(one for one in gradients if one is not None)]
    assert len(found[0]) > 20
    for plain, ours in zip(*found, strict=True):
        assert float((ours - plain).norm()) <= 1e-4 * float(plain.norm()) + 1e-6
    assert "without compilation" not in caplog.text


def test_without_a_compiler_training_goes_on(
    tokenizer: transformers.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fails(**inputs: object) -> None:
        raise TorchDynamoException("no C++ compiler found")

    frozen = FrozenLM.from_model(tiny_model("gpt2"), tokenizer)
    expected, _ = losses_and_gradients(prompted_lm(frozen, packing=True), batch_of(LENGTHS, OF_ROW))
    monkeypatch.setattr(torch, "compile", lambda body, **options: fails)
    frozen.compile()
    losses, _ = losses_and_gradients(prompted_lm(frozen, packing=True), batch_of(LENGTHS, OF_ROW))
    torch.testing.assert_close(losses, expected)
    assert "no C++ compiler found" in caplog.text
