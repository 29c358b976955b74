"""The contracts of the design on encoder-decoders: shapes x sites x kinds of prompt x padding sides.

A text does not stand behind its prompt in an encoder that reads in both directions. So an embedding prompt is held
against the words themselves in transformers' own model, and a prefix against transformers' eager attention with the
keys and values put in front by hand, the layers found by their names.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from conftest import byte_tokenizer
from softprompts.baselines.fine_tuning import FineTuningObjective
from softprompts.config import DecodingConfig, PromptConfig, ReparamConfig
from softprompts.errors import ConfigError, LengthError, UnsupportedModelError
from softprompts.inference import Engine
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, build_prompt, prompt_from_table
from softprompts.prompts.prefix import choose_layers
from softprompts.types import Batch, Encoded, Example, LayerKey
from zoo_seq2seq import SEQ2SEQ_ZOO, tiny_seq2seq, with_end

TOLERANCE = 1e-4
SHAPES = sorted(SEQ2SEQ_ZOO)
FEW = ["bart", "t5_deep_decoder"]
"""One with learned positions, one with relative ones and unequal halves, where all shapes would show nothing more."""


@cache
def frozen_of(shape: str) -> FrozenLM:
    return FrozenLM.from_model(tiny_seq2seq(shape), with_end(byte_tokenizer()), name=f"tiny-{shape}")


@pytest.fixture(params=SHAPES)
def frozen(request: pytest.FixtureRequest) -> FrozenLM:
    return frozen_of(request.param)


def ids_of(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch_of(
    rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], prompts: Sequence[int], side: str = "right"
) -> Batch:
    longest, widest = max(map(len, rows)), max(map(len, targets))
    ids, targets_BU = torch.full((len(rows), longest), 257), torch.full((len(rows), widest), -100)
    mask = torch.zeros_like(ids)
    for number, (row, target) in enumerate(zip(rows, targets, strict=True)):
        columns = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[number, columns], mask[number, columns] = torch.tensor(row), 1
        targets_BU[number, : len(target)] = torch.tensor(target)
    return Batch(ids, mask, None, torch.tensor(prompts), targets_BU)


def random_prefix(frozen: FrozenLM, length: int, seed: int, layers: Sequence[LayerKey] | None = None) -> SoftPrompt:
    width = sum(site.width for site in frozen.geometry.reached(layers))
    table = torch.randn(length, width, generator=torch.Generator().manual_seed(seed))
    return prompt_from_table("prefix", frozen.geometry, table, layers)


def word_prompt(frozen: FrozenLM, words: Sequence[int]) -> SoftPrompt:
    return prompt_from_table("embedding", frozen.geometry, frozen.embed(words))


def own_logits(frozen: FrozenLM, ids: Sequence[int], target: Sequence[int]) -> Tensor:
    """The oracle: transformers itself, its own shift of the labels included; ``[U, V]``."""
    row = torch.tensor([list(ids)])
    with torch.no_grad():
        return frozen.model(
            input_ids=row, attention_mask=torch.ones_like(row), labels=torch.tensor([list(target)])
        ).logits[0]


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = float(expected.detach().abs().max().clamp(min=1e-6))
    assert got.shape == expected.shape
    difference = float((got - expected).detach().abs().max()) / scale
    assert difference < tolerance, f"relative difference {difference:.2e}"


# --------------------------------------------------------------------------------------------------------------------
# A prefix, by transformers' eager attention
# --------------------------------------------------------------------------------------------------------------------


def place_of(name: str) -> LayerKey | None:
    """Site and number of an attention module, from its name alone."""
    parts = name.split(".")
    if parts[-1] not in ("SelfAttention", "EncDecAttention", "self_attn", "encoder_attn", "cross_attn"):
        return None
    number = next(int(part) for part in parts if part.isdigit())
    if parts[-1] in ("EncDecAttention", "encoder_attn", "cross_attn"):
        return LayerKey("cross", number)
    return LayerKey("encoder" if "encoder" in parts else "decoder", number)


@contextlib.contextmanager
def eager_with_prefix(model: PreTrainedModel, prefix: Mapping[LayerKey, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Run a model in transformers' eager attention with keys and values in front of those of the text."""
    code = sys.modules[type(model).__module__]
    places = {module: place_of(name) for name, module in model.named_modules()}
    plain, former = code.eager_attention_forward, model.config._attn_implementation

    def widened(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        place = places[module]
        if place in prefix:
            keys, values = (states[None].expand(len(key), -1, -1, -1) for states in prefix[place])
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            front = (keys.shape[2], 0)
            mask = None if mask is None else functional.pad(mask, front)
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = functional.pad(kwargs["position_bias"], front)
        return plain(module, query, key, value, mask, **kwargs)

    code.eager_attention_forward = widened
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        code.eager_attention_forward = plain
        model.set_attn_implementation(former)


@pytest.mark.parametrize(
    "sites", [(), ("encoder",), ("decoder",), ("cross",)], ids=lambda sites: "".join(sites) or "all"
)
def test_prefix_equals_eager_attention_over_keys_and_values(frozen: FrozenLM, sites: tuple[str, ...]) -> None:
    layers = choose_layers(frozen.geometry, sites)
    prompt = random_prefix(frozen, 4, 1, layers)
    rows, targets = [ids_of(n, 10 + n) for n in (7, 4)], [ids_of(5, 20), ids_of(3, 21)]
    batch = batch_of(rows, targets, [0, 0])
    with torch.no_grad():
        result = PromptedLM(frozen, [prompt]).label_logits(batch)
        with eager_with_prefix(frozen.model, prompt().keys_values):
            own = frozen.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=batch.targets_BU).logits
    assert batch.targets_BU is not None
    assert_close(result.logits_MV, own[batch.targets_BU != -100].float())
    # the check can fail: the prompt makes a difference
    alone = torch.cat([own_logits(frozen, row, target) for row, target in zip(rows, targets, strict=True)])
    assert float((result.logits_MV - alone).abs().max() / alone.abs().max()) > 100 * TOLERANCE


# --------------------------------------------------------------------------------------------------------------------
# Rows, sides, decoding
# --------------------------------------------------------------------------------------------------------------------


def mixture(frozen: FrozenLM) -> tuple[PromptedLM, list[list[int]], list[list[int]], list[int], list[list[int]]]:
    """Prompts of every kind, rows of different lengths that carry them (or none), and the words of word prompts."""
    words = [ids_of(5, 41), ids_of(2, 42)]
    some = choose_layers(frozen.geometry, ("decoder", "cross"), (1,))
    prompts = [
        word_prompt(frozen, words[0]),
        random_prefix(frozen, 3, 43),
        word_prompt(frozen, words[1]),
        random_prefix(frozen, 6, 44, some),
    ]
    rows = [ids_of(n, 50 + n) for n in (6, 9, 4, 7, 5, 8)]
    targets = [ids_of(n, 60 + n) for n in (4, 2, 5, 3, 1, 4)]
    return PromptedLM(frozen, prompts), rows, targets, [1, 0, -1, 3, 2, 0], words


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batch_equals_its_rows_and_the_words(frozen: FrozenLM, side: str) -> None:
    prompted, rows, targets, which, words = mixture(frozen)
    with torch.no_grad():
        together = prompted.label_logits(batch_of(rows, targets, which, side))
        parts = together.logits_MV.split([len(target) for target in targets])
        alone = [prompted.label_logits(batch_of([r], [t], [w])) for r, t, w in zip(rows, targets, which, strict=True)]
    assert together.labels_M.tolist() == [token for target in targets for token in target]
    for part, one, row, target, prompt in zip(parts, alone, rows, targets, which, strict=True):
        assert_close(part, one.logits_MV)
        in_front = {0: words[0], 2: words[1], -1: []}.get(prompt)
        if in_front is not None:
            assert_close(part, own_logits(frozen, in_front + row, target))


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_with_cache_equals_one_pass(frozen: FrozenLM, side: str) -> None:
    prompted, rows, _, which, _ = mixture(frozen)
    new_BU = torch.tensor([ids_of(4, 70 + number) for number in range(len(rows))])
    batch = batch_of(rows, new_BU.tolist(), which, side)
    with torch.no_grad():
        expected = prompted.label_logits(batch).logits_MV.unflatten(0, (len(rows), 4))
    logits_BV, state = prompted.start(batch)
    assert_close(logits_BV, expected[:, 0])
    for column in range(3):
        assert_close(prompted.step(new_BU[:, column], state), expected[:, column + 1])


@pytest.mark.parametrize("shape", FEW)
def test_selected_and_forked_rows_continue_alone(shape: str) -> None:
    frozen = frozen_of(shape)
    prompted, rows, _, which, _ = mixture(frozen)
    _, state = prompted.start(batch_of(rows, [[1]] * len(rows), which))
    chosen = [3, 0, 0, 2]
    state.select(torch.tensor(chosen))
    prompted.step(torch.tensor([7, 8, 9, 10]), state)
    state.fork(torch.tensor([0, 2, 1, 3]))  # the two continuations of row 0 change places
    logits_BV = prompted.step(torch.tensor([11, 12, 13, 14]), state)
    texts = [[7, 11, 1], [9, 12, 1], [8, 13, 1], [10, 14, 1]]
    for number, (row, text) in enumerate(zip(chosen, texts, strict=True)):
        with torch.no_grad():
            expected = prompted.label_logits(batch_of([rows[row]], [text], [which[row]]))
        assert_close(logits_BV[number], expected.logits_MV[-1])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shape", [*FEW, "pegasus"])
def test_generation_equals_that_of_transformers_on_the_words(shape: str, beams: int) -> None:
    frozen = frozen_of(shape)
    words, rows = ids_of(3, 81), [ids_of(n, 82 + n) for n in (5, 3)]
    engine = Engine(PromptedLM(frozen, [word_prompt(frozen, words)]))
    decoding = DecodingConfig(strategy="beam", beams=beams, max_new_tokens=6)
    got = engine.generate([Encoded(tuple(row), len(row), Example("", "")) for row in rows], decoding)
    for row, generation in zip(rows, got, strict=True):
        whole = torch.tensor([words + row])
        own = frozen.model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            num_beams=beams,
            max_new_tokens=6,
            do_sample=False,
            use_cache=False,  # transformers' cache knows no decoder that is deeper than its encoder
            forced_eos_token_id=None,
        )[0, 1:].tolist()
        end = own.index(256) if 256 in own else len(own)
        assert list(generation.ids) == own[:end]


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "mlp", "residual"])
def test_every_parameter_at_all_three_sites_gets_a_gradient(frozen: FrozenLM, name: str) -> None:
    config = PromptConfig(kind="prefix", length=3, reparametrization=ReparamConfig(name=name, hidden_size=8))
    prompt = build_prompt(config, frozen, seed=0)
    # the MLP of a residual starts at an output of zero, and so do its inner gradients
    inner = [p for n, p in prompt.named_parameters() if name == "residual" and "outer" not in n and "start" not in n]
    batch = batch_of([ids_of(n, 90 + n) for n in (6, 4)], [ids_of(4, 91), ids_of(3, 92)], [0, 0])
    PromptedLM(frozen, [prompt]).label_losses(batch).losses_M.sum().backward()
    for parameter in prompt.parameters():
        assert parameter.grad is not None
        if not any(parameter is one for one in inner):
            assert bool((parameter.grad != 0).all())
    assert all(parameter.grad is None for parameter in frozen.model.parameters())
    sites = 3 if name != "none" else 0
    assert len(list(prompt.parametrization.children())) == (1 if sites else 0)
    if sites:  # a reparametrization of its own at each site
        assert len(prompt.parametrization.parts) == 3


def test_every_number_of_an_embedding_prompt_gets_a_gradient(frozen: FrozenLM) -> None:
    prompt = word_prompt(frozen, ids_of(4, 93))
    batch = batch_of([ids_of(n, 94 + n) for n in (6, 4)], [ids_of(4, 95), ids_of(3, 96)], [0, 0])
    PromptedLM(frozen, [prompt]).label_losses(batch).losses_M.sum().backward()
    (parameter,) = prompt.parameters()
    assert parameter.grad is not None
    assert bool((parameter.grad != 0).all())


@pytest.mark.parametrize("shape", FEW)
def test_gradient_checkpointing_changes_nothing(shape: str) -> None:
    plain, saving = (FrozenLM.from_model(tiny_seq2seq(shape), byte_tokenizer()) for _ in range(2))
    saving.enable_gradient_checkpointing()
    batch = batch_of([ids_of(n, 94 + n) for n in (6, 4)], [ids_of(4, 95), ids_of(3, 96)], [0, 1])
    results = []
    for frozen in (plain, saving):
        prompts = [random_prefix(frozen, 3, 1), word_prompt(frozen, ids_of(2, 3))]
        losses = PromptedLM(frozen, prompts).label_losses(batch).losses_M
        losses.sum().backward()
        results.append((losses.detach(), *(next(prompt.parameters()).grad for prompt in prompts)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    first, _ = PromptedLM(saving, prompts).start(batch)  # decoding still has its cache
    assert_close(first, PromptedLM(plain, prompts).start(batch)[0])


@pytest.mark.parametrize("shape", FEW)
def test_fine_tuning_trains_every_weight_with_the_models_own_loss(shape: str) -> None:
    frozen = frozen_of(shape)
    objective = FineTuningObjective(frozen)
    batch = batch_of([ids_of(n, 97 + n) for n in (6, 4)], [ids_of(4, 98), ids_of(3, 99)], [0, 0], "left")
    loss = objective.loss(batch)
    loss.total.backward()
    right = batch_of([ids_of(n, 97 + n) for n in (6, 4)], [ids_of(4, 98), ids_of(3, 99)], [0, 0])
    own = frozen.model(input_ids=right.ids_BT, attention_mask=right.mask_BT, labels=right.targets_BU).loss
    assert_close(loss.total / loss.weight, own)
    untouched = [name for name, weight in objective.tuned.model.named_parameters() if weight.grad is None]
    assert untouched == []
    assert loss.tokens == 6 + 4 + 4 + 3


@pytest.mark.parametrize("shape", FEW)
def test_prefix_from_words_is_what_the_words_evoke(shape: str) -> None:
    frozen = frozen_of(shape)
    words = torch.tensor([ids_of(4, 31)])
    states = frozen.activations(frozen.embed(words[0].tolist()))
    with torch.no_grad():
        encoded = frozen.model.get_encoder()(input_ids=words).last_hidden_state
    for name, module in frozen.model.named_modules():
        place = place_of(name)
        if place is not None and place.site == "cross":
            keys_NPH, values_NPH = states[place]
            project = (module.k, module.v) if hasattr(module, "k") else (module.k_proj, module.v_proj)
            for got, layer in zip((keys_NPH, values_NPH), project, strict=True):
                assert_close(got.transpose(0, 1).flatten(1), layer(encoded)[0])
    assert set(states) == {site.key for site in frozen.geometry.sites}


# --------------------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------------------


def test_a_model_that_shifts_its_labels_in_a_way_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_seq2seq("t5")
    monkeypatch.setattr(model, "_shift_right", lambda labels: labels.roll(1, dims=-1))
    with pytest.raises(UnsupportedModelError, match="behind a prompt of real words"):
        FrozenLM.from_model(model, byte_tokenizer())


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_layer_that_a_prefix_does_not_reach_is_noticed(monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    """The check at load is a real one: a layer that computes its attention apart from the others does not pass."""
    model = tiny_seq2seq("bart")
    before = model.config._attn_implementation
    attention = getattr(model.model, half).layers[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, steering=None, **kwargs: forward(*args, **kwargs))
    with pytest.raises(UnsupportedModelError, match=r"refused|cannot be steered"):
        FrozenLM.from_model(model, byte_tokenizer())
    assert model.config._attn_implementation == before


def test_a_window_that_scrolls_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="and stays in sight"):
        FrozenLM.from_model(tiny_seq2seq("t5gemma"), byte_tokenizer(), window="text")


def test_sites_and_layers_that_are_not_there_are_refused() -> None:
    geometry = frozen_of("bart_deep_decoder").geometry
    assert choose_layers(geometry) is None
    assert choose_layers(geometry, ("encoder", "decoder", "cross")) is None
    assert choose_layers(geometry, ("cross",), (2,)) == (LayerKey("cross", 2),)
    with pytest.raises(ConfigError, match="names 'self'"):
        choose_layers(geometry, ("self",))
    with pytest.raises(ConfigError, match="from 0 to 1"):
        choose_layers(geometry, ("encoder",), (2,))
    with pytest.raises(ConfigError, match="leave them out"):
        build_prompt(PromptConfig(kind="embedding", length=2, sites=("cross",)), frozen_of("bart"), seed=0)


def test_what_does_not_fit_into_the_positions_is_refused() -> None:
    frozen = frozen_of("bart")  # 128 positions
    words, prefix = word_prompt(frozen, ids_of(30, 1)), random_prefix(frozen, 30, 2)
    prompted = PromptedLM(frozen, [words, prefix])
    with pytest.raises(LengthError, match="130 positions of the encoder"):
        prompted.label_losses(batch_of([ids_of(100, 3)], [[1]], [0]))
    assert prompted.label_losses(batch_of([ids_of(100, 3)], [[1]], [1])).losses_M.shape == (1,)  # takes no positions
    row = Encoded(tuple(ids_of(100, 3)), 100, Example("", "", id="long"))
    with pytest.raises(LengthError, match=r"long.*prompt 30 \+ input 100"):
        Engine(prompted).check([row], DecodingConfig(max_new_tokens=5))
    with pytest.raises(LengthError, match="positions of the decoder"):
        Engine(PromptedLM(frozen)).check(
            [Encoded((1, 2), 2, Example("", ""), prompt=-1)], DecodingConfig(max_new_tokens=129)
        )
