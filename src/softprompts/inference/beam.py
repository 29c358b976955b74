"""Beam search, equal to that of ``transformers`` (``early_stopping=False``), several requests at a time.

Shape letters: B requests, k beams, C candidates (2k), V vocabulary, L ``max_new_tokens``, R = B * k rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softprompts.config import DecodingConfig
from softprompts.inference.sampling import FORBIDDEN

__all__ = ["BeamSearch", "Hypothesis", "Step"]

_OUT = -1e9
"""Added to the score of what may not be chosen. Finite as in transformers, so that orders among such entries agree."""


@dataclass(frozen=True)
class Hypothesis:
    """One finished output as token ids."""

    ids: tuple[int, ...]
    """Generated tokens, the end-of-sequence token left out."""
    logprob: float
    """Sum of the model's log-probabilities of these tokens and of the end token, if there is one."""
    finished: bool
    """Whether the model ended the text itself (``False``: it was cut at ``max_new_tokens``)."""


class Step(NamedTuple):
    """What a search decided: who is done, and what the others feed to the model next."""

    closed: list[tuple[int, Hypothesis]]
    """Requests that are done, each with its output."""
    parents_R: Tensor
    """For every row that goes on: the row of the previous forward pass that it continues."""
    tokens_R: Tensor
    """For every row that goes on: its next token."""


class BeamSearch:
    """Keeps the k best unfinished texts of every request, and the k best finished ones.

    Each step extends every beam by every token and takes the 2k best candidates: enough that k of them go on even if
    the other k end. A candidate that ends, and is among the best k, competes for the finished places with its score,
    the sum of log-probabilities divided by ``length ** length_penalty`` (the end token counts; below 0 favours short
    texts). A request is done when all its finished places are taken and the best running beam, at its present length,
    no longer beats the worst of them; or at ``max_new_tokens``, where running texts compete as they are. This is the
    stopping rule of transformers' default ``early_stopping=False``, and what prefix-tuning's paper decodes with
    (beam 5).

    A request that is done leaves the batch, so later steps are smaller; this changes nothing for the others, because
    requests never look at each other.

    Args:
        requests: Names of the requests, in order; given back when a request is closed.
        decoding: ``beams``, ``max_new_tokens`` and ``length_penalty``.
        eos_id: The end-of-sequence token.
        device: Where the logits are.
    """

    def __init__(self, requests: Sequence[int], decoding: DecodingConfig, *, eos_id: int, device: torch.device) -> None:
        rows, beams, limit = len(requests), decoding.beams, decoding.max_new_tokens
        self.width = beams
        self.new_tokens = 0
        self._requests = list(requests)
        self._decoding, self._eos_id = decoding, eos_id
        self._ids_BkL = torch.full((rows, beams, limit), eos_id, dtype=torch.long, device=device)
        self._sums_Bk = torch.full((rows, beams), _OUT, device=device)
        self._sums_Bk[:, 0] = 0.0  # All beams start equal: only the first may have children in the first step.
        self._done_ids_BkL = self._ids_BkL.clone()
        self._done_length_Bk = torch.zeros((rows, beams), dtype=torch.long, device=device)
        self._done_score_Bk = torch.full((rows, beams), _OUT, device=device)
        self._done_sum_Bk = torch.zeros((rows, beams), device=device)
        self._is_done_Bk = torch.zeros((rows, beams), dtype=torch.bool, device=device)

    def advance(self, logits_RV: Tensor, forbidden_RV: Tensor | None) -> Step:
        """Extend, rank, finish.

        Args:
            logits_RV: Of every beam's last token, in float32.
            forbidden_RV: True where a token may not come; broadcasts to the logits.
        """
        beams, rows = self.width, len(self._requests)
        logprobs_RV = logits_RV.log_softmax(dim=-1)
        if forbidden_RV is not None:
            logprobs_RV = logprobs_RV.masked_fill(forbidden_RV, FORBIDDEN)  # not renormalised, as in transformers
        vocab_size = logprobs_RV.shape[-1]
        total_BkV = logprobs_RV.view(rows, beams, vocab_size) + self._sums_Bk[:, :, None]
        sums_BC, flat_BC = total_BkV.view(rows, -1).topk(2 * beams, dim=1)
        parent_BC, token_BC = flat_BC // vocab_size, flat_BC % vocab_size
        ids_BCL = self._ids_BkL.gather(1, parent_BC[:, :, None].expand(-1, -1, self._ids_BkL.shape[2]))
        ids_BCL[:, :, self.new_tokens] = token_BC
        self.new_tokens += 1
        ends_BC = (token_BC == self._eos_id) | (self.new_tokens == self._decoding.max_new_tokens)

        self._finish(ids_BCL, sums_BC, ends_BC)
        self._sums_Bk, pick_Bk = (sums_BC + ends_BC * _OUT).topk(beams, dim=1)
        self._ids_BkL = _take(ids_BCL, pick_Bk)
        return self._close(parent_BC.gather(1, pick_Bk), token_BC.gather(1, pick_Bk))

    def _finish(self, ids_BCL: Tensor, sums_BC: Tensor, ends_BC: Tensor) -> None:
        """Let the ending candidates among the best k compete for the finished places."""
        beams = self.width
        among_best_C = torch.arange(ends_BC.shape[1], device=ends_BC.device) < beams
        ended_BC = ends_BC & among_best_C
        score_BC = sums_BC / self.new_tokens**self._decoding.length_penalty + ~ended_BC * _OUT
        merged = torch.cat([self._done_score_Bk, score_BC], dim=1)
        self._done_score_Bk, pick_Bk = merged.topk(beams, dim=1)
        length_BC = torch.full_like(ends_BC, self.new_tokens, dtype=torch.long)
        self._done_ids_BkL = _take(torch.cat([self._done_ids_BkL, ids_BCL], dim=1), pick_Bk)
        self._done_length_Bk = torch.cat([self._done_length_Bk, length_BC], dim=1).gather(1, pick_Bk)
        self._done_sum_Bk = torch.cat([self._done_sum_Bk, sums_BC], dim=1).gather(1, pick_Bk)
        self._is_done_Bk = torch.cat([self._is_done_Bk, ended_BC], dim=1).gather(1, pick_Bk)

    def _close(self, parent_Bk: Tensor, token_Bk: Tensor) -> Step:
        """Take the requests that are done out of the batch."""
        best_running_B = self._sums_Bk[:, 0] / self.new_tokens**self._decoding.length_penalty
        hopeless_B = self._is_done_Bk.all(dim=1) & (best_running_B <= self._done_score_Bk.min(dim=1).values)
        if self.new_tokens == self._decoding.max_new_tokens:
            hopeless_B = torch.ones_like(hopeless_B)
        closed = [(self._requests[row], self._best(row)) for row in hopeless_B.nonzero()[:, 0].tolist()]
        staying_B = (~hopeless_B).nonzero()[:, 0]
        parents_R = (staying_B[:, None] * self.width + parent_Bk[staying_B]).view(-1)
        tokens_R = token_Bk[staying_B].view(-1)
        if closed:
            self._requests = [self._requests[row] for row in staying_B.tolist()]
            self._ids_BkL, self._sums_Bk = self._ids_BkL[staying_B], self._sums_Bk[staying_B]
            self._done_ids_BkL, self._done_length_Bk = self._done_ids_BkL[staying_B], self._done_length_Bk[staying_B]
            self._done_score_Bk, self._done_sum_Bk = self._done_score_Bk[staying_B], self._done_sum_Bk[staying_B]
            self._is_done_Bk = self._is_done_Bk[staying_B]
        return Step(closed, parents_R, tokens_R)

    def _best(self, row: int) -> Hypothesis:
        ids = self._done_ids_BkL[row, 0, : int(self._done_length_Bk[row, 0])].tolist()
        ended = bool(ids) and ids[-1] == self._eos_id
        return Hypothesis(tuple(ids[:-1] if ended else ids), float(self._done_sum_Bk[row, 0]), ended)


def _take(values_BCL: Tensor, pick_Bk: Tensor) -> Tensor:
    """Pick entries of dimension 1, per row: ``[B, C, L]`` and ``[B, k]`` give ``[B, k, L]``."""
    return values_BCL.gather(1, pick_Bk[:, :, None].expand(-1, -1, values_BCL.shape[2]))
