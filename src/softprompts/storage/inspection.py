"""What the numbers of a prompt look like: how long its vectors are, and which words lie next to them.

Shape letters: P prompt length, N KV heads, H head size, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from softprompts.models import FrozenLM
from softprompts.prompts import SoftPrompt
from softprompts.storage.directory import list_names, read_stable

__all__ = ["LayerNorms", "NearWord", "directory_bytes", "nearest_words", "norms_of_layers", "norms_of_positions"]

_CHUNK = 8192
"""Rows of the embedding table that are compared at a time: a few hundred MB for the widest models."""


@dataclass(frozen=True)
class NearWord:
    """A token of the vocabulary beside a prompt vector."""

    text: str
    id: int
    cosine: float


@dataclass(frozen=True)
class LayerNorms:
    """How long a prefix's vectors are in one layer: mean L2 norm over heads and positions."""

    layer: str
    keys: float
    values: float


def directory_bytes(directory: str | Path) -> int:
    """Size of all files in the directory of a prompt; raises ArtifactError where it cannot be listed."""
    return read_stable(directory, lambda place: sum((place / name).lstat().st_size for name in list_names(place)))


def norms_of_layers(prompt: SoftPrompt) -> list[LayerNorms]:
    """Measure a prefix layer by layer; empty for a prompt without keys and values."""
    with torch.no_grad():
        return [
            LayerNorms(f"{site}.{layer}", float(keys_NPH.norm(dim=-1).mean()), float(values_NPH.norm(dim=-1).mean()))
            for (site, layer), (keys_NPH, values_NPH) in prompt().keys_values.items()
        ]


def norms_of_positions(prompt: SoftPrompt) -> list[float]:
    """L2 norm of each of the P vectors of the prompt's table."""
    norms: list[float] = prompt.table_PW.norm(dim=1).tolist()
    return norms


def nearest_words(prompt: SoftPrompt, frozen: FrozenLM, *, count: int = 5) -> list[list[NearWord]]:
    """Find the tokens whose embeddings point where the prompt's vectors point (Lester et al. 2021, section 7).

    Args:
        prompt: An embedding prompt; the vectors of a prefix do not lie in the space of embeddings.
        frozen: The model whose vocabulary is searched; all ids that its tokenizer can produce.
        count: How many tokens per vector.

    Returns:
        Per position the nearest tokens, nearest first, by cosine as in the paper.
    """
    assert prompt.kind == "embedding", "only embedding prompts have neighbours in the vocabulary"
    with torch.no_grad():
        queries_PD = _directions(prompt.table_PW.to(frozen.device))
        limit = min(frozen.geometry.vocab_size, len(frozen.tokenizer))
        best_P = queries_PD.new_empty(queries_PD.shape[0], 0)
        best_ids_P = torch.empty(queries_PD.shape[0], 0, dtype=torch.long, device=frozen.device)
        for start in range(0, limit, _CHUNK):
            ids = range(start, min(start + _CHUNK, limit))
            cosines_PC = queries_PD @ _directions(frozen.embed(ids)).T
            chunk_ids_PC = torch.tensor(ids, device=frozen.device).expand(queries_PD.shape[0], -1)
            best_P, order = torch.cat([best_P, cosines_PC], dim=1).topk(min(count, ids.stop), dim=1)
            best_ids_P = torch.cat([best_ids_P, chunk_ids_PC], dim=1).gather(1, order)
    return [
        [
            NearWord(str(frozen.tokenizer.decode([token])), token, cosine)
            for token, cosine in zip(ids, cosines, strict=True)
        ]
        for ids, cosines in zip(best_ids_P.tolist(), best_P.tolist(), strict=True)
    ]


def _directions(vectors: Tensor) -> Tensor:
    # A vector of zeros (a padding row of the table) has no direction: its cosine becomes 0, not NaN.
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
