"""One text by several prompts: every step takes the mean of their next-token distributions.

Shape letters: B requests, N members (prompts), R = B * N rows of the forward pass, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError
from softprompts.inference.track import Track

__all__ = ["averaged_together", "check_averaged", "mean_logprobs"]


def mean_logprobs(logits_RV: Tensor, members: int) -> Tensor:
    """Average distributions, each over the vocabulary, and return the logarithm.

    Args:
        logits_RV: Of N neighbouring rows per request.
        members: N.

    Returns:
        Log-probabilities ``[B, V]`` in float32, computed without leaving the logarithm: a token that every member finds
        very unlikely keeps its place in the order.
    """
    logprobs_RV = logits_RV.float().log_softmax(dim=-1)
    logprobs_BNV = logprobs_RV.view(-1, members, logprobs_RV.shape[-1])
    return logprobs_BNV.logsumexp(dim=1) - math.log(members)


def check_averaged(decoding: DecodingConfig) -> None:
    """Refuse ways of decoding that cannot share their steps.

    Raises:
        ConfigError: ``decoding`` asks for a beam search: its beams would have to be those of all members.
    """
    if decoding.strategy == "beam" and decoding.beams > 1:
        raise ConfigError(
            f"a beam search ({decoding.beams} beams) cannot average next-token distributions; expected greedy or "
            "sample: set decoding.strategy=greedy, or let the members answer on their own and choose among the answers"
        )


def averaged_together(logits_RV: Tensor, tracks: list[Track]) -> tuple[Tensor, list[Track]]:
    """Average what was computed for outputs that several rows write together.

    Rows of one output may be computed in different steps, where inputs are read in pieces; those that are ready keep
    what they heard until the last one is.

    Args:
        logits_RV: Of the last token of every row that was computed.
        tracks: The rows.

    Returns:
        Logits, or log-probabilities of a mean, of the outputs whose next token can be chosen, and their leaders.
    """
    if all(len(track.leader.together) == 1 for track in tracks):
        return logits_RV, tracks
    alone = [row for row, track in enumerate(tracks) if len(track.leader.together) == 1]
    parts, leaders = [logits_RV[alone]], [tracks[row] for row in alone]
    for track, logits_V in zip(tracks, logits_RV, strict=True):
        rows = track.leader.together
        if len(rows) == 1:
            continue
        track.heard_V = logits_V
        heard = [one.heard_V for one in rows if one.heard_V is not None]
        if len(heard) == len(rows):
            parts.append(mean_logprobs(torch.stack(heard), len(rows)))
            leaders.append(track.leader)
            for one in rows:
                one.heard_V = None
    return torch.cat(parts), leaders
