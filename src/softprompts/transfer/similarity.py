"""How alike prompts are, by their numbers.

The four measures of the study of transferability (Su et al. 2022, "On Transferability of Prompt Tuning for Natural
Language Processing", section 6.1), on tokens ``a_i`` and ``b_j`` of two prompts:

=====================  ==============  ==================================================
name                   in the paper    value
=====================  ==============  ==================================================
``euclidean``          E_concat        1 / (1 + norm of the difference of all numbers)
``euclidean_tokens``   E_average       1 / (1 + mean over all pairs i, j of the distance)
``cosine``             C_concat        cosine of all numbers as one vector
``cosine_tokens``      C_average       mean over all pairs i, j of the cosine
=====================  ==============  ==================================================

The flat ones compare position with position, so they need prompts of one length; the token-wise ones do not look at
the order and take any lengths. The token-wise ones pair each token with every token of the other prompt, so a prompt
is not 1 to itself: it is as alike to itself as its tokens are to each other.

A prefix has a space of its own for the keys and for the values of every layer, and vectors of one layer can be ten
times as long as those of another. Each space is therefore measured for itself, and a prefix's similarity is the mean
over them. Reparametrizations do not matter: what is compared is the folded prompt. The other measure of the paper,
activated neurons, needs the model: :mod:`softprompts.transfer.neurons`.

Shape letters: K prompts, P prompt length, W numbers per position in one space, N KV heads, H head size, S positions
of all prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from softprompts.errors import LengthError, PromptMismatchError
from softprompts.prompts import SoftPrompt
from softprompts.prompts.prefix import unflatten_states
from softprompts.registry import Registry

__all__ = ["MEASURES", "Measure", "spaces"]


@dataclass(frozen=True)
class Measure:
    """A way to say how alike two prompts are; larger is more alike."""

    name: str
    title: str
    """In a few words, for tables and pictures."""
    needs_equal_lengths: bool
    compute: Callable[[Sequence[Tensor]], Tensor]
    """From the tables ``[P, W]`` (float64) of K prompts in one space to ``[K, K]``."""

    def __call__(self, one: SoftPrompt, other: SoftPrompt) -> float:
        """Say how alike two prompts are; raises as :meth:`by_space` does."""
        return float(self.matrix([one, other])[0, 1])

    def matrix(self, prompts: Sequence[SoftPrompt]) -> Tensor:
        """Compare every prompt with every other one.

        Returns:
            ``[K, K]`` in float64, symmetric: the mean over all spaces.

        Raises:
            PromptMismatchError: They are not of one kind, or made for models of different shapes.
            LengthError: This measure is flat and their lengths differ.
        """
        return torch.stack(list(self.by_space(prompts).values())).mean(dim=0)

    def by_space(self, prompts: Sequence[SoftPrompt]) -> dict[str, Tensor]:
        """Compare them in every space for itself: ``"embeddings"``, or ``"self.0.keys"``, ``"self.0.values"`` and on.

        Raises:
            PromptMismatchError: They are not of one kind, or made for models of different shapes.
            LengthError: This measure is flat and their lengths differ.
        """
        cut = [spaces(prompt) for prompt in prompts]
        _check_comparable(prompts, cut)
        lengths = sorted({prompt.length for prompt in prompts})
        if self.needs_equal_lengths and len(lengths) > 1:
            raise LengthError(
                f"the measure '{self.name}' compares position with position, but the prompts have the lengths "
                f"{', '.join(map(str, lengths))}; take '{self.name}_tokens', which compares any lengths"
            )
        return {name: self.compute([tables[name] for tables in cut]) for name in cut[0]}


def spaces(prompt: SoftPrompt) -> dict[str, Tensor]:
    """Cut a folded prompt into tables ``[P, W]``, one per space in which its vectors can be compared.

    Returns:
        In float64 on the CPU: ``"embeddings"`` ``[P, D]``, or keys and values ``[P, N H]`` of each layer of a prefix.
    """
    table_PW = prompt.table_PW.double().cpu()
    if prompt.kind == "embedding":
        return {"embeddings": table_PW}
    cut: dict[str, Tensor] = {}
    for (site, layer), (keys_NPH, values_NPH) in unflatten_states(prompt.geometry, table_PW, prompt.layers).items():
        cut[f"{site}.{layer}.keys"] = keys_NPH.transpose(0, 1).flatten(1)
        cut[f"{site}.{layer}.values"] = values_NPH.transpose(0, 1).flatten(1)
    return cut


def _check_comparable(prompts: Sequence[SoftPrompt], cut: Sequence[Mapping[str, Tensor]]) -> None:
    kinds = sorted({prompt.kind for prompt in prompts})
    if len(kinds) > 1:
        raise PromptMismatchError(
            f"prompts of the kinds {' and '.join(kinds)} have no numbers in common; turn the embeddings into a prefix "
            "with `softprompts convert --fold` first, or compare activated neurons"
        )
    shapes = [{name: table_PW.shape[1] for name, table_PW in tables.items()} for tables in cut]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise PromptMismatchError(
                f"prompt {number} has {_describe(shape)}, prompt 0 has {_describe(shapes[0])}; only prompts for models "
                "of one shape, on the same layers, can be compared by their numbers"
            )


def _describe(widths: Mapping[str, int]) -> str:
    if "embeddings" in widths:
        return f"embeddings of width {widths['embeddings']}"
    return f"{sum(widths.values())} numbers per position in {len(widths) // 2} layers"


# --------------------------------------------------------------------------------------------------------------------
# The measures: tables of K prompts in one space -> [K, K]
# --------------------------------------------------------------------------------------------------------------------


def _euclidean(tables: Sequence[Tensor]) -> Tensor:
    flat_KM = torch.stack([table_PW.flatten() for table_PW in tables])
    # Differences, not products of the vectors: a prompt and its copy are exactly 1.
    return 1 / (1 + torch.cdist(flat_KM, flat_KM, compute_mode="donot_use_mm_for_euclid_dist"))


def _euclidean_tokens(tables: Sequence[Tensor]) -> Tensor:
    all_SW = torch.cat(list(tables))
    lengths_K = torch.tensor([len(table_PW) for table_PW in tables])
    owner_S = torch.arange(len(tables)).repeat_interleave(lengths_K)
    mean_KK = all_SW.new_zeros(len(tables), len(tables))
    for number, table_PW in enumerate(tables):  # one prompt at a time against all: [S, S] at once could be too much
        distance_S = torch.cdist(table_PW, all_SW).mean(dim=0)
        mean_KK[number].index_add_(0, owner_S, distance_S)
    mean_KK = mean_KK / lengths_K
    return 1 / (1 + (mean_KK + mean_KK.T) / 2)


def _cosine(tables: Sequence[Tensor]) -> Tensor:
    # A vector of zeros has no direction: it becomes zeros, and its cosines 0.
    direction_KM = functional.normalize(torch.stack([table_PW.flatten() for table_PW in tables]), dim=1)
    return (direction_KM @ direction_KM.T).clamp(-1, 1)


def _cosine_tokens(tables: Sequence[Tensor]) -> Tensor:
    # The mean of all products is the product of the means: no pair of tokens has to be looked at.
    mean_KW = torch.stack([functional.normalize(table_PW, dim=1).mean(dim=0) for table_PW in tables])
    return (mean_KW @ mean_KW.T).clamp(-1, 1)


MEASURES: Registry[Measure] = Registry("similarity measure")
"""Measures by name; what is registered here can be asked for with ``--measure``."""

for _measure in (
    Measure("euclidean", "1 / (1 + distance), all numbers", True, _euclidean),
    Measure("euclidean_tokens", "1 / (1 + mean distance of tokens)", False, _euclidean_tokens),
    Measure("cosine", "cosine, all numbers", True, _cosine),
    Measure("cosine_tokens", "mean cosine of tokens", False, _cosine_tokens),
):
    MEASURES.register(_measure.name)(_measure)
