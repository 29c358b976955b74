"""Transfer without training: a copy, a random start, a linear map fitted to what the two models make of the same words.

The linear map is the vocabulary-to-vocabulary recycling of Lester et al. 2022 ("Reducing Retraining by Recycling
Parameter-Efficient Prompts", arXiv 2208.05577): least squares from the word embeddings of one model to those of the
other, over the words that both have, applied to a prompt. For a prefix the same is done, layer by layer and keys and
values apart, with what random runs of words evoke in both models.

Shape letters: P prompt length, D width, W numbers per position, n words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softprompts.config import InitConfig, ProjectorConfig, PromptConfig
from softprompts.errors import PromptMismatchError
from softprompts.models import FrozenLM
from softprompts.prompts import SoftPrompt, build_prompt, prompt_from_table
from softprompts.prompts.prefix import flatten_states
from softprompts.transfer.projector import Projector, PromptSpace

__all__ = ["copied", "least_squares", "least_squares_map", "random_start", "shared_words", "word_spread"]

_POSITIONS_PER_NUMBER = 4
"""Keys and values of so many positions are compared for every number that a map reads."""
_SPREAD_WORDS = 2000


def copied(prompt: SoftPrompt, frozen: FrozenLM) -> SoftPrompt:
    """Put the same numbers in front of another model.

    Raises:
        PromptMismatchError: A position has other shapes there.
    """
    source = PromptSpace.of(prompt)
    target = source.on(frozen.geometry)
    if list(source.pieces.items()) != list(target.pieces.items()):
        raise PromptMismatchError(
            f"a {prompt.kind} prompt for a {prompt.geometry.family} of width {prompt.geometry.width} with "
            f"{len(prompt.geometry.sites)} layers cannot be copied to '{frozen.name}', a {frozen.geometry.family} of "
            f"width {frozen.geometry.width} with {len(frozen.geometry.sites)} layers; take method least_squares, "
            "projector or match"
        )
    return prompt_from_table(prompt.kind, frozen.geometry, prompt.table_PW, target.layers, prompt.placement)


def random_start(prompt: SoftPrompt, frozen: FrozenLM, *, seed: int = 0) -> SoftPrompt:
    """A prompt like this one, but of random common words of the other model: what a transfer has to beat."""
    target = PromptSpace.of(prompt).on(frozen.geometry)
    sites = tuple(dict.fromkeys(key.site for key in target.layers or ()))
    config = PromptConfig(
        kind="prefix" if prompt.kind == "prefix" else "embedding",
        placement="infix" if prompt.is_infix else "prefix",
        length=prompt.length,
        initializer=InitConfig(name="vocabulary"),
        sites=tuple(site for site in ("encoder", "decoder", "cross") if site in sites),
    )
    return build_prompt(config, frozen, seed=seed)


def shared_words(source: FrozenLM, target: FrozenLM) -> tuple[list[int], list[int]]:
    """Ids of the pieces of text that both vocabularies have, in the order of the source's ids.

    Special tokens are left out: the models use them as they please.
    """
    special = {*source.tokenizer.all_special_tokens, *target.tokenizer.all_special_tokens}
    theirs = target.tokenizer.get_vocab()
    pairs = [
        (own, theirs[piece])
        for piece, own in source.tokenizer.get_vocab().items()
        if piece in theirs and piece not in special
    ]
    limits = source.geometry.vocab_size, target.geometry.vocab_size
    pairs = sorted(pair for pair in pairs if pair[0] < limits[0] and pair[1] < limits[1])
    return [own for own, _ in pairs], [other for _, other in pairs]


def least_squares_map(given_nD: Tensor, wanted_nE: Tensor) -> Tensor:
    """The matrix ``[D, E]`` with the least ``|given @ matrix - wanted|``, of least norm, in float64."""
    matrix_DE: Tensor = torch.linalg.lstsq(given_nD.double().cpu(), wanted_nE.double().cpu(), driver="gelsd").solution
    return matrix_DE


def least_squares(prompt: SoftPrompt, source: FrozenLM, target: FrozenLM, *, seed: int = 0) -> SoftPrompt:
    """Map a prompt by what both models make of the words that they share.

    Args:
        prompt: Of the source model.
        source: Its model.
        target: The model that gets a prompt.
        seed: Of the runs of words that keys and values are compared on (prefixes only).

    Raises:
        PromptMismatchError: The models share fewer words than an embedding has numbers, or a prefix is to be moved
            between models with different tokenizers.
    """
    space = PromptSpace.of(prompt)
    own_ids, other_ids = shared_words(source, target)
    if len(own_ids) < source.geometry.width:
        raise PromptMismatchError(
            f"'{source.name}' and '{target.name}' share {len(own_ids)} words, expected at least "
            f"{source.geometry.width}, the width of the source's embeddings, to fit a map to them"
        )
    if prompt.kind == "embedding":
        matrix_DE = least_squares_map(source.embed(own_ids), target.embed(other_ids))
        table = (prompt.table_PW.double().cpu() @ matrix_DE).float()
        return prompt_from_table(prompt.kind, target.geometry, table, None, prompt.placement)
    wanted = space.on(target.geometry)
    return prompt_from_table(
        prompt.kind,
        target.geometry,
        _mapped_prefix(prompt, space, wanted, source, target, seed),
        wanted.layers,
        prompt.placement,
    )


def _mapped_prefix(
    prompt: SoftPrompt, space: PromptSpace, wanted: PromptSpace, source: FrozenLM, target: FrozenLM, seed: int
) -> Tensor:
    """Fit one map per piece on all positions of the runs together, with a constant."""
    if source.tokenizer_fingerprint != target.tokenizer_fingerprint:
        raise PromptMismatchError(
            f"'{source.name}' and '{target.name}' have different tokenizers, so their keys and values of one text do "
            "not lie side by side; train a projector on pairs of prompts (method projector)"
        )
    given_nW, wanted_nW = _evoked(space, wanted, source, target, seed)
    linear = Projector(space, wanted, ProjectorConfig(kind="linear", norm="none"))
    with torch.no_grad():
        given = given_nW.split(list(space.pieces.values()), dim=1)
        for net, place, part in zip(
            linear.nets, linear.source_places, wanted_nW.split(list(wanted.pieces.values()), dim=1), strict=True
        ):
            ones = torch.ones(len(given_nW), 1)
            matrix = least_squares_map(torch.cat([given[place], ones], dim=1), part).float()
            net.weight.copy_(matrix[:-1].T)  # type: ignore[operator]
            net.bias.copy_(matrix[-1])  # type: ignore[operator]
        table_PW: Tensor = linear(prompt.table_PW.cpu())
    return table_PW


@torch.no_grad()
def _evoked(
    space: PromptSpace, wanted: PromptSpace, source: FrozenLM, target: FrozenLM, seed: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of random runs of words in both models, ``[runs * P, W]`` each."""
    words = torch.tensor(shared_words(source, target)[0])
    generator = torch.Generator().manual_seed(seed)
    given, made = [], []
    runs = 1 + _POSITIONS_PER_NUMBER * max(space.pieces.values()) // space.length
    for _ in range(runs):
        ids = words[torch.randint(len(words), (space.length,), generator=generator)].tolist()
        given.append(flatten_states(space.geometry, source.activations(source.embed(ids)), space.layers).cpu())
        made.append(flatten_states(wanted.geometry, target.activations(target.embed(ids)), wanted.layers).cpu())
    return torch.cat(given), torch.cat(made)


def word_spread(frozen: FrozenLM) -> float:
    """Standard deviation of the numbers in a model's common word embeddings: how large those of a prompt should be."""
    return float(frozen.embed(frozen.common_ids(_SPREAD_WORDS)).float().std())
