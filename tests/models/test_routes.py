"""The ways in which prompts enter a decoder-only model, and what is refused on each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from family_contracts import Subject, judge, padded, rows_of_text
from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError, PromptMismatchError, UnsupportedModelError
from softprompts.inference import Engine
from softprompts.models import FrozenLM, attention, cache_route, eager
from softprompts.models.attention import Steering
from softprompts.models.eager import eager_attention
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.types import Encoded, Example, LayerKey
from zoo_decoders import DECODERS, Shape


@pytest.fixture(scope="module")
def load(tokenizer: PreTrainedTokenizerFast) -> Callable[..., FrozenLM]:
    return lambda name, **options: FrozenLM.from_model(DECODERS[name].build(), tokenizer, **options)


# --- plain attention -------------------------------------------------------------------------------------------------


def attention_inputs(keys: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, 2, keys, size, generator=generator) for size in (8, 6))
    return query, key, value


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_eager_attention_is_that_of_torch(scaling: float | None) -> None:
    query, key, value = attention_inputs()
    mask = torch.rand(2, 1, 5, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask, scale=scaling
    )
    found = eager_attention(query, key, value, mask, scaling=scaling)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    added = torch.where(mask, 0.0, -torch.inf)
    torch.testing.assert_close(eager_attention(query, key, value, added, scaling=scaling), found)


def test_eager_attention_without_a_mask_is_causal_from_the_end() -> None:
    query, key, value = attention_inputs()
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    torch.testing.assert_close(eager_attention(query, key, value, None), eager_attention(query, key, value, mask))
    everything = eager_attention(query, key, value, torch.ones(1, 1, 5, 9, dtype=torch.bool))
    torch.testing.assert_close(eager_attention(query, key, value, None, causal=False), everything)


def test_sinks_are_one_more_key_without_a_value() -> None:
    query, key, value = attention_inputs()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    found = eager_attention(query, key, value, None, sinks_A=sinks)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    scores = scores.masked_fill(~torch.ones(5, 9, dtype=torch.bool).tril(4), -torch.inf).exp()
    weights = scores / (scores.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(found, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2))


def test_capped_scores() -> None:
    query, key, value = attention_inputs()
    scores = 2 * torch.tanh(query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5 / 2)
    scores = scores.masked_fill(~torch.ones(5, 9, dtype=torch.bool).tril(4), -torch.inf)
    expected = (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(eager_attention(query, key, value, None, softcap=2.0), expected)


# --- the matrix can see ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_a_model_whose_cap_or_sinks_were_left_out_is_refused(
    name: str, load: Callable[..., FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = lambda *arguments, **options: eager_attention(*arguments, scaling=options["scaling"])  # noqa: E731
    monkeypatch.setattr(attention, "eager_attention", without)
    if name == "gemma2":  # its cap of 50 shows only where scores are large
        shape = DECODERS["gemma2"]
        options = {**shape.options, "attn_logit_softcapping": 0.5}
        monkeypatch.setitem(DECODERS, name, Shape(shape.classes, options))
    with pytest.raises(UnsupportedModelError, match="standard deviations"):
        load(name)


def test_a_prompt_that_ignores_its_window_is_seen(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(DECODERS["mistral, window text"], tokenizer)
    assert subject.frozen.geometry.prompt_scrolls
    monkeypatch.setattr(attention, "_window", lambda _: None)
    assert judge(subject, "embedding = words").verdict == "wrong"


def test_a_prompt_with_a_gap_behind_it_is_seen(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ALiBi of MPT counts columns: pads between prompt and text would move the prompt away."""
    subject = Subject(DECODERS["mpt"], tokenizer)
    assert judge(subject, "left-padded batch = rows").verdict == "right"
    monkeypatch.setattr(cache_route, "_columns", lambda states, _: states)
    assert judge(subject, "cache on = off").verdict == "wrong"


def test_needs_eager_only_for_what_sdpa_leaves_out() -> None:
    assert not eager.needs_eager({"scaling": 0.1, "sliding_window": 4, "softcap": None})
    assert eager.needs_eager({"softcap": 30.0})
    assert eager.needs_eager({"s_aux": torch.zeros(2)})


# --- refusals --------------------------------------------------------------------------------------------------------


def test_checkpointing_is_refused_where_prompts_stand_in_the_cache(load: Callable[..., FrozenLM]) -> None:
    with pytest.raises(UnsupportedModelError, match="gradient checkpointing drops the cache"):
        load("bloom").enable_gradient_checkpointing()


def test_a_prefix_on_some_layers_is_refused_where_prompts_stand_in_the_cache(load: Callable[..., FrozenLM]) -> None:
    frozen = load("falcon-alibi")
    layers = (LayerKey("self", 1),)
    width = sum(site.width for site in frozen.geometry.reached(layers))
    prompt = prompt_from_table("prefix", frozen.geometry, torch.zeros(3, width), layers)
    with pytest.raises(UnsupportedModelError, match="every layer or none"):
        frozen.steering([prompt()], torch.tensor([0]))


def test_kinds_without_a_place_are_refused(load: Callable[..., FrozenLM]) -> None:
    mamba, gemma4 = load("mamba"), load("gemma4")
    with pytest.raises(UnsupportedModelError, match="no layer of 'mamba' has keys and values"):
        mamba.check_kind("prefix")
    prompt = prompt_from_table("embedding", gemma4.geometry, torch.zeros(2, gemma4.geometry.width))
    with pytest.raises(UnsupportedModelError, match="reads more of a token than its embedding"):
        PromptedLM(gemma4, [prompt])


def test_windows_that_a_model_keeps_to_itself(load: Callable[..., FrozenLM]) -> None:
    with pytest.raises(UnsupportedModelError, match="applies its sliding window itself"):
        load("gpt-neo", window="visible")
    assert [site.window for site in load("gpt-neo").geometry.sites] == [None, 8, None, 8]


def test_a_prompt_keeps_to_the_window_option_of_its_training(load: Callable[..., FrozenLM]) -> None:
    visible, text = load("mistral"), load("mistral", window="text")
    prompt = prompt_from_table("embedding", visible.geometry, torch.zeros(2, visible.geometry.width))
    with pytest.raises(PromptMismatchError, match=r"trained with window 'visible'.*loaded with window 'text'"):
        PromptedLM(text, [prompt])
    assert load("llama", window="text").geometry == load("llama").geometry  # no windows, nothing to choose
    with pytest.raises(ConfigError, match="did you mean 'text'"):
        FrozenLM.load("anything", window="texts")


# --- details ---------------------------------------------------------------------------------------------------------


def test_the_models_own_head_is_used_where_it_does_more_than_multiply(load: Callable[..., FrozenLM]) -> None:
    heads = {name: load(name).causal.head for name in ("llama", "gemma2", "granite", "cohere", "gpt-j")}
    assert heads["llama"].is_plain
    assert not any(heads[name].is_plain for name in ("gemma2", "granite", "cohere"))


def test_the_model_of_a_head_is_left_alone() -> None:
    model = tiny_model("llama")
    modules = dict(model.named_modules())
    FrozenLM.from_model(model, _tokenizer())
    assert dict(model.named_modules()) == modules
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 260)


def _tokenizer() -> PreTrainedTokenizerFast:
    from conftest import byte_tokenizer

    return byte_tokenizer()


def test_layers_that_share_keys_and_values_share_a_prefix(load: Callable[..., FrozenLM]) -> None:
    frozen = load("gemma4")
    assert len(frozen.geometry.sites) == 4
    assert len(frozen.layer_of) == 6
    assert len(set(frozen.layer_of.values())) == 4


def test_a_prompt_in_the_input_is_read_once_per_row(load: Callable[..., FrozenLM]) -> None:
    frozen = load("lfm2")
    assert not frozen.folds
    prompt = prompt_from_table("embedding", frozen.geometry, torch.randn(3, frozen.geometry.width))
    (states,) = PromptedLM(frozen, [prompt]).states()
    assert states.embeddings_PD is not None
    steering = frozen.steering([states], torch.tensor([0, -1, 0]))
    assert steering.front_BPD is not None
    assert steering.front_BPD.shape == (3, 3, frozen.geometry.width)
    assert steering.front_BP.tolist() == [[True] * 3, [False] * 3, [True] * 3]


def test_masks_of_scrolling_prompts_depend_on_the_window() -> None:
    steering = Steering(position_BT=torch.tensor([[4, 5]]))
    query, keys = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    narrow = steering.widened(None, query, keys, 4, True, None, 3)
    wide = steering.widened(None, query, keys, 4, True, None, None)
    assert narrow[0, 0, :, :4].tolist() == [[False, False, True, True], [False, False, False, True]]
    assert wide[0, 0, :, :4].all()


@pytest.mark.parametrize("name", ["bloom", "gemma4", "lfm2", "deepseek-v3", "gpt-oss"])
def test_half_precision_on_every_route(name: str, tokenizer: Any) -> None:
    subject = Subject(DECODERS[name], tokenizer)
    half = FrozenLM.from_model(DECODERS[name].build().to(torch.bfloat16), tokenizer)
    prompts = [subject.word_prompt(kind) for kind in subject.kinds()]
    batch = padded(rows_of_text(), [0, len(prompts) - 1, -1], "left")
    exact = PromptedLM(subject.frozen, prompts).label_losses(batch).losses_M
    rounded = PromptedLM(half, prompts)
    losses_M = rounded.label_losses(batch).losses_M
    losses_M.sum().backward()
    assert float((losses_M - exact).detach().abs().mean()) < 0.2
    _, state = rounded.start(batch)
    assert bool(torch.isfinite(rounded.step(torch.tensor([5, 6, 7]), state)).all())


@pytest.mark.parametrize("name", ["gpt-neo", "mpt", "mamba", "qwen3-next"])
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_generated_texts_do_not_depend_on_the_batch(name: str, strategy: str, tokenizer: Any) -> None:
    subject = Subject(DECODERS[name], tokenizer)
    prompted = PromptedLM(subject.frozen, [subject.word_prompt(kind) for kind in subject.kinds()])
    rows = [
        Encoded(tuple(ids), len(ids), Example("", ""), number - 1)
        for number, ids in enumerate(rows_of_text()[: len(prompted.prompts) + 1])
    ]
    engine = Engine(prompted)
    decoding = DecodingConfig(strategy=strategy, beams=2, max_new_tokens=5, min_new_tokens=3)
    together = engine.generate(rows, decoding)
    alone = [engine.generate([row], decoding)[0] for row in rows]
    assert [generation.ids for generation in together] == [generation.ids for generation in alone]


def test_only_words_can_be_read_where_a_layer_looks_them_up_again(load: Callable[..., FrozenLM]) -> None:
    frozen = load("gemma4")
    states = frozen.activations(frozen.embed([3, 1, 4]))
    assert next(iter(states.values()))[0].shape[1] == 3
    with pytest.raises(UnsupportedModelError, match="reads more of a token"):
        frozen.activations(frozen.embed([3, 1, 4]) * 1.01)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which older releases of transformers call
@pytest.mark.parametrize("name", ["gpt-bigcode", "biogpt", "opt", "phi", "mixtral", "gpt2"])
def test_recomputing_switches_every_dropout_off_on_padded_rows_too(name: str, tokenizer: Any) -> None:
    """Packed rows know no dropout at all, so only padded ones show one that was forgotten."""
    subject = Subject(DECODERS[name], tokenizer)
    prompted = PromptedLM(subject.frozen, [subject.word_prompt("prefix")])
    prompted.packing = False
    batch = padded(rows_of_text(), [0, 0, 0], "right")
    expected = prompted.label_losses(batch).losses_M
    subject.frozen.enable_gradient_checkpointing()
    found = prompted.label_losses(batch).losses_M
    assert subject.frozen.model.training
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
