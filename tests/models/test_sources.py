"""Inputs in front of infixes are read once: the same losses and gradients, without their tokens in the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import byte_tokenizer, tiny_model
from softprompts.errors import ConfigError, UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.models.causal import CausalModel
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.types import Batch
from zoo_decoders import DECODERS

PROMPTS = [("prefix", "infix", 8), ("embedding", "prefix", 5), ("embedding", "infix", 3), ("prefix", "prefix", 6)]
PROMPTS += [("prefix", "infix", 2)]
INPUTS, OUTPUTS = (7, 2, 12, 5, 1, 9, 4, 20, 3, 7), (6, 9, 2, 4, 11, 5, 3, 8, 2, 5)
MIXED = (0, 1, 2, -1, 0, 3, 2, 4, 0, 4)
PLENTY = 2**30


def batch_of(inputs: Sequence[int], outputs: Sequence[int], prompts: Sequence[int], side: str = "right") -> Batch:
    """Rows of so many tokens; all of the output but its first token is to be predicted."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(inputs) + torch.tensor(outputs)
    ids = torch.randint(0, 256, (len(inputs), int(lengths.max())), generator=generator)
    place = torch.arange(ids.shape[1])[None]
    if side == "left":
        place = place - (ids.shape[1] - lengths[:, None])
    mask = ((place >= 0) & (place < lengths[:, None])).long()
    labels = torch.where((mask == 1) & (place > torch.tensor(inputs)[:, None]), ids, -100)
    return Batch(ids, mask, labels, torch.tensor(prompts), infix_B=torch.tensor(inputs))


def prompted_lm(frozen: FrozenLM, *, packing: bool = True) -> PromptedLM:
    prompts = []
    for number, (kind, placement, length) in enumerate(PROMPTS):
        width = frozen.geometry.width if kind == "embedding" else frozen.geometry.prefix_width
        table = torch.randn(length, width, generator=torch.Generator().manual_seed(number))
        prompts.append(prompt_from_table(kind, frozen.geometry, table, placement=placement))
    prompted = PromptedLM(frozen, prompts)
    prompted.packing = packing
    return prompted


def losses_and_gradients(prompted: PromptedLM, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    prompted.zero_grad()
    losses = prompted.label_losses(batch).losses_M
    (losses * torch.linspace(0.5, 2.0, len(losses))).sum().backward()
    return losses.detach(), [
        parameter.grad.clone() for parameter in prompted.parameters() if parameter.grad is not None
    ]


def assert_same(frozen: FrozenLM, batch: Batch, *, packing: bool = True) -> None:
    plain, plain_gradients = losses_and_gradients(prompted_lm(frozen, packing=packing), batch)
    prompted = prompted_lm(frozen, packing=packing)
    sources = prompted.keep_sources(limit_bytes=PLENTY)
    for _ in range(2):  # the first time inputs are read, the second time they are known
        losses, gradients = losses_and_gradients(prompted, batch)
        torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-5)
        assert len(gradients) == len(plain_gradients)
        for ours, expected in zip(gradients, plain_gradients, strict=True):
            assert float((ours - expected).norm() / expected.norm()) < 1e-5
    free = [row for row, prompt in enumerate(batch.prompt_of_row_B.tolist()) if prompt not in (1, 3)]
    assert batch.infix_B is not None
    assert len(sources) == len(free)
    assert sources.bytes == int(batch.infix_B[free].sum()) * frozen.geometry.prefix_width * 4


@pytest.mark.parametrize("packing", [True, False])
def test_kept_inputs_change_nothing(frozen: FrozenLM, packing: bool) -> None:
    """A mixed batch: prompts in front see the input, so those rows are run whole."""
    windows = any(site.window is not None for site in frozen.geometry.sites)
    if windows and not packing:
        prompted = prompted_lm(frozen, packing=False)
        with pytest.raises(UnsupportedModelError, match="cache_source"):
            prompted.keep_sources(limit_bytes=PLENTY)
        return
    assert_same(frozen, batch_of(INPUTS, OUTPUTS, MIXED, "right" if packing else "left"), packing=packing)


@pytest.mark.parametrize("window", [8, 16])
def test_short_windows(window: int) -> None:
    """What a window hides of an input stays hidden."""
    model = tiny_model("mistral")
    short = type(model)(type(model.config)(**{**model.config.to_dict(), "sliding_window": window}))
    short.load_state_dict(model.state_dict())
    assert_same(FrozenLM.from_model(short.eval(), byte_tokenizer()), batch_of(INPUTS, OUTPUTS, MIXED))


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_sinks_and_latent_attention(name: str) -> None:
    """No packed rows here; values are of another size than keys."""
    options = {"sliding_window": 96} if name == "gpt-oss" else {}
    shape = DECODERS[name]
    frozen = FrozenLM.from_model(replace(shape, options={**shape.options, **options}).build().eval(), byte_tokenizer())
    if name == "gpt-oss":
        with pytest.raises(UnsupportedModelError, match="cache_source"):
            prompted_lm(frozen).keep_sources(limit_bytes=PLENTY)
    else:
        assert_same(frozen, batch_of(INPUTS, OUTPUTS, MIXED))


def test_rows_with_a_prefix_on_some_layers_only(tiny_frozen: Callable[[str], FrozenLM]) -> None:
    frozen = tiny_frozen("llama")
    layers = [site.key for site in frozen.geometry.sites[1:]]
    width = sum(site.width for site in frozen.geometry.reached(layers))
    table = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    batch = batch_of(INPUTS, OUTPUTS, [0] * 10)
    for packing in (True, False):
        found = []
        for keep in (False, True):
            prompted = PromptedLM(frozen, [prompt_from_table("prefix", frozen.geometry, table, layers, "infix")])
            prompted.packing = packing
            if keep:
                prompted.keep_sources(limit_bytes=PLENTY)
            found.append(losses_and_gradients(prompted, batch))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)


def test_inputs_are_read_once_and_not_run_again(
    tiny_frozen: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, tokens = tiny_frozen("gpt2"), []
    run = CausalModel.run
    monkeypatch.setattr(
        CausalModel,
        "run",
        lambda self, steering, **inputs: tokens.append(inputs["position_ids"].numel()) or run(self, steering, **inputs),
    )
    prompted = prompted_lm(frozen)
    prompted.keep_sources(limit_bytes=PLENTY)
    batch = batch_of([9, 9, 4], [3, 5, 2], [0, 0, 4])
    batch.ids_BT[1, :9] = batch.ids_BT[0, :9]  # two rows with one input: it is read once
    prompted.label_losses(batch)
    prompted.label_losses(batch)
    assert tokens == [2 * 9, 3 + 5 + 2, 3 + 5 + 2]


def test_gradient_checkpointing(tokenizer) -> None:
    frozen = FrozenLM.from_model(tiny_model("llama"), tokenizer)
    frozen.enable_gradient_checkpointing()
    assert_same(frozen, batch_of(INPUTS, OUTPUTS, MIXED))


def test_bfloat16_steps_read_inputs_in_bfloat16(tokenizer) -> None:
    frozen = FrozenLM.from_model(tiny_model("llama"), tokenizer)
    batch = batch_of(INPUTS, OUTPUTS, [0] * 10)
    frozen.training_dtype = torch.bfloat16
    prompted = prompted_lm(frozen)
    plain = losses_and_gradients(prompted, batch)[0]
    sources = prompted.keep_sources(limit_bytes=PLENTY)
    torch.testing.assert_close(losses_and_gradients(prompted, batch)[0], plain, rtol=3e-2, atol=3e-2)
    assert sources.bytes == sum(INPUTS) * frozen.geometry.prefix_width * 2


def test_the_limit_is_kept(tiny_frozen: Callable[[str], FrozenLM]) -> None:
    frozen = tiny_frozen("gpt2")
    batch = batch_of(INPUTS, OUTPUTS, [0] * 10)
    needed = sum(INPUTS) * frozen.geometry.prefix_width * 4
    prompted = prompted_lm(frozen)
    sources = prompted.keep_sources(limit_bytes=needed)
    assert sources.needed_bytes({torch.float32: [(1, 2, 3), (1, 2, 3), (4,)]}) == 4 * frozen.geometry.prefix_width * 4
    prompted.label_losses(batch)
    assert sources.bytes == needed
    with pytest.raises(ConfigError, match="cache_source_gib"):
        prompted.label_losses(batch_of([30], [3], [0]))
    with pytest.raises(ConfigError, match="71 tokens"):
        sources.needed_bytes({torch.float32: [tuple(range(71))]})
