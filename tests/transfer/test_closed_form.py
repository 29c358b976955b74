"""Copies and least squares: exact where they can be, refused where they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer, tiny_model
from softprompts.config import InitConfig, PromptConfig
from softprompts.errors import PromptMismatchError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, build_prompt
from softprompts.tasks.encode import collate
from softprompts.transfer import copied, least_squares, random_start
from softprompts.transfer.closed_form import least_squares_map, shared_words
from softprompts.types import Encoded, Example

KINDS = ["embedding", "prefix"]


def prompt_of(frozen: FrozenLM, kind: str, seed: int = 0, **settings: object) -> SoftPrompt:
    start = InitConfig(name="uniform", scale=0.3)
    return build_prompt(PromptConfig(kind=kind, length=4, initializer=start, **settings), frozen, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_the_same_prompt_on_the_same_model(source: FrozenLM, kind: str):
    prompt = prompt_of(source, kind)
    assert torch.equal(copied(prompt, source).table_PW, prompt.table_PW)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_needs_the_same_shapes(source: FrozenLM, target: FrozenLM, llama: Callable[..., FrozenLM], kind: str):
    prompt = prompt_of(source, kind)
    with pytest.raises(PromptMismatchError, match=r"cannot be copied to 'llama-48x5'.*method least_squares"):
        copied(prompt, target)
    deeper = llama(32, 4)  # embeddings know nothing of depth, prefixes do
    if kind == "embedding":
        assert copied(prompt, deeper).geometry == deeper.geometry
    else:
        with pytest.raises(PromptMismatchError, match="with 3 layers"):
            copied(prompt, deeper)


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_from_a_model_to_itself_is_the_identity(source: FrozenLM, kind: str):
    prompt = prompt_of(source, kind) if kind == "embedding" else _evoked(source)
    mapped = least_squares(prompt, source, source)
    assert torch.allclose(mapped.table_PW, prompt.table_PW, atol=2e-4)


def _evoked(frozen: FrozenLM) -> SoftPrompt:
    """A prefix that real words evoke: where the runs of words span all directions, any other does as well."""
    return build_prompt(PromptConfig(length=4, initializer=InitConfig(name="vocabulary")), frozen, seed=5)


def test_the_map_is_that_of_the_normal_equations(source: FrozenLM, target: FrozenLM):
    own, other = shared_words(source, target)
    given, wanted = source.embed(own).double(), target.embed(other).double()
    matrix = torch.linalg.solve(given.T @ given, given.T @ wanted)
    assert torch.allclose(least_squares_map(given, wanted), matrix, atol=1e-8)
    prompt = prompt_of(source, "embedding")
    plain = (prompt.table_PW.double() @ matrix).float()
    assert torch.allclose(least_squares(prompt, source, target).table_PW, plain, atol=1e-5)


def test_a_linear_change_of_the_embeddings_is_found(source: FrozenLM, tokenizer: PreTrainedTokenizerFast):
    turned = tiny_model("llama")
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        turned.get_input_embeddings().weight.copy_(source.model.get_input_embeddings().weight @ turn)
    other = FrozenLM.from_model(turned, tokenizer)
    prompt = prompt_of(source, "embedding")
    assert torch.allclose(least_squares(prompt, source, other).table_PW, prompt.table_PW @ turn, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_start_is_a_prompt_of_the_target(source: FrozenLM, target: FrozenLM, kind: str):
    prompt = prompt_of(source, kind)
    batch = collate([Encoded((65, 66, 67), 1, Example("", ""))], pad_id=target.pad_id)
    for moved in (least_squares(prompt, source, target), random_start(prompt, target, seed=1)):
        assert (moved.kind, moved.length, moved.geometry) == (kind, 4, target.geometry)
        assert bool(torch.isfinite(PromptedLM(target, [moved]).label_losses(batch).losses_M).all())
    assert torch.equal(random_start(prompt, target, seed=1).table_PW, random_start(prompt, target, seed=1).table_PW)


def test_special_tokens_are_no_shared_words(source: FrozenLM, target: FrozenLM):
    own, other = shared_words(source, target)
    assert own == other == list(range(256))


def test_too_few_shared_words_or_another_tokenizer(source: FrozenLM, llama: Callable[..., FrozenLM]):
    cut = byte_tokenizer()
    renamed = FrozenLM.from_model(tiny_model("llama"), cut)
    cut.add_special_tokens({"additional_special_tokens": sorted(cut.get_vocab(), key=cut.get_vocab().get)[:240]})  # type: ignore[arg-type]
    with pytest.raises(PromptMismatchError, match=r"share \d+ words, expected at least 32"):
        least_squares(prompt_of(source, "embedding"), source, renamed)
    other = byte_tokenizer()
    other.add_tokens(["another word"])
    grown = FrozenLM.from_model(tiny_model("llama"), other)
    assert least_squares(prompt_of(source, "embedding"), source, grown).length == 4
    with pytest.raises(PromptMismatchError, match="different tokenizers"):
        least_squares(prompt_of(source, "prefix"), source, grown)
