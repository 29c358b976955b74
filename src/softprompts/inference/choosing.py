"""One token per row, where every row has options of its own.

What a row gets depends on its own logits, options, tokens and random numbers, and on no other row.

Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softprompts.config import DecodingConfig
from softprompts.inference.requests import TokenLogprobs
from softprompts.inference.sampling import FORBIDDEN, draw, warp
from softprompts.inference.track import Track

__all__ = ["Chosen", "choose"]


class Chosen(NamedTuple):
    """What comes next in one row."""

    token: int
    finite: bool
    """Whether the model gave numbers; if not, the token means nothing."""
    logprobs: TokenLogprobs | None
    """Where they were asked for."""


def choose(
    logits_RV: Tensor, tracks: Sequence[Track], end_ids: Collection[int], *, looks_back: bool = True
) -> list[Chosen]:
    """Choose the next token of every row.

    Args:
        logits_RV: Float32, of the last token of every row.
        tracks: The rows' options and what they have generated.
        end_ids: The model's own ends of text.
        looks_back: Whether a banned sequence may begin in the input; a decoder of its own begins a new text.
    """
    scores_RV = _allowed(logits_RV, tracks, end_ids, looks_back)
    best_R, tokens_R = scores_RV.max(dim=-1)
    finite = best_R.isfinite().tolist()  # one value that is no number, or is infinite, shows in the largest
    tokens = tokens_R.tolist()
    for options, rows in _draws(tracks, finite).items():
        uniforms = [tracks[row].random.random() for row in rows]
        drawn_R = draw(warp(scores_RV[rows], options), uniforms)
        for row, token in zip(rows, drawn_R.tolist(), strict=True):
            tokens[row] = token
    for row, track in enumerate(tracks):
        forced = track.options.forced_ids
        if track.generated < len(forced):
            tokens[row] = forced[track.generated]
    found = _logprobs(logits_RV, tracks, tokens)
    return [Chosen(tokens[row], finite[row], found.get(row)) for row in range(len(tracks))]


def _allowed(logits_RV: Tensor, tracks: Sequence[Track], end_ids: Collection[int], looks_back: bool) -> Tensor:
    """Logits with what rows add to them, minus infinity where a token may not come."""
    rows: list[int] = []
    columns: list[int] = []
    added: list[float] = []
    for row, track in enumerate(tracks):
        forbidden = {*end_ids, *track.options.stop_ids} if track.early else set()
        begin = 0 if looks_back else len(track.request.ids)
        for sequence in track.options.banned_ids:
            before = len(sequence) - 1
            struck = not before or tuple(track.tokens[max(begin, len(track.tokens) - before) :]) == sequence[:-1]
            if struck and not (before == 0 and sequence[0] in end_ids):  # the end alone cannot be banned
                forbidden.add(sequence[-1])
        bias = {token: value for token, value in track.options.logit_bias.items() if token not in forbidden}
        for token, value in (bias | dict.fromkeys(forbidden, FORBIDDEN)).items():
            if 0 <= token < logits_RV.shape[1]:
                rows.append(row)
                columns.append(token)
                added.append(value)
    if not rows:
        return logits_RV
    places = torch.tensor(rows, device=logits_RV.device), torch.tensor(columns, device=logits_RV.device)
    return logits_RV.index_put(places, torch.tensor(added, device=logits_RV.device), accumulate=True)


def _draws(tracks: Sequence[Track], finite: Sequence[bool]) -> dict[DecodingConfig, list[int]]:
    """Rows that are drawn, those with equal options together."""
    groups: dict[DecodingConfig, list[int]] = {}
    for row, track in enumerate(tracks):
        options = track.options
        if options.temperature > 0 and finite[row]:
            key = DecodingConfig(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
            groups.setdefault(key, []).append(row)
    return groups


def _logprobs(logits_RV: Tensor, tracks: Sequence[Track], tokens: Sequence[int]) -> dict[int, TokenLogprobs]:
    """Log-probabilities of the rows that asked for them, before bans and temperature."""
    rows = [row for row, track in enumerate(tracks) if track.options.logprobs is not None]
    if not rows:
        return {}
    logprobs_RV = logits_RV[rows].log_softmax(dim=-1)
    chosen_R1 = torch.tensor([tokens[row] for row in rows], device=logprobs_RV.device)[:, None]
    told = logprobs_RV.gather(1, chosen_R1)[:, 0].tolist()
    counts = [min(tracks[row].options.logprobs or 0, logprobs_RV.shape[1]) for row in rows]
    values, ids = (best.tolist() for best in logprobs_RV.topk(max(counts), dim=-1))
    return {
        row: TokenLogprobs(tokens[row], told[place], tuple(zip(ids[place][:count], values[place], strict=False)))
        for place, (row, count) in enumerate(zip(rows, counts, strict=True))
    }
