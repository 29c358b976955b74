"""Cross-entropy of a large vocabulary in chunks, so that no more than a chunk of logits is ever in memory.

The head of a frozen model has nothing to learn, so the gradient of its input is all that the backward pass needs of
it: it is computed chunk by chunk right behind the chunk's loss, and the logits are gone before the next chunk (as in
Cut Cross-Entropy, Wijmans et al. 2025, and Liger Kernel's fused linear cross-entropy, Hsu et al. 2024).

Shape letters: M label positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["CHUNK_LOGITS", "chunked_cross_entropy", "token_losses"]

CHUNK_LOGITS = 2**23
"""Logits of one chunk: 32 MiB in float32."""


def token_losses(logits_MV: Tensor, labels_M: Tensor, z_loss: float = 0.0) -> Tensor:
    """Cross-entropy of every position, ``[M]``, plus ``z_loss`` times the square of the logits' log-sum-exp.

    The second term keeps the logits from drifting (T5X's ``z_loss``; the prompt-tuning code has 1e-4).
    """
    losses_M = functional.cross_entropy(logits_MV, labels_M, reduction="none")
    return losses_M + z_loss * logits_MV.logsumexp(dim=-1).square() if z_loss else losses_M


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden_MD: Tensor,
    labels_M: Tensor,
    *,
    vocab_size: int,
    chunk_logits: int = CHUNK_LOGITS,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of every position; gradients flow into ``hidden_MD`` only.

    Args:
        head: Hidden states ``[m, D]`` to logits ``[m, V]``; position by position, and without trained parameters.
        hidden_MD: Last hidden states at label positions.
        labels_M: Token ids.
        vocab_size: V, to choose the size of a chunk.
        chunk_logits: Most logits in memory at a time.
        z_loss: See :func:`token_losses`.

    Returns:
        Losses ``[M]`` in float32.
    """
    rows = max(1, chunk_logits // max(vocab_size, 1))
    if not (torch.is_grad_enabled() and hidden_MD.requires_grad):
        parts = zip(hidden_MD.split(rows), labels_M.split(rows), strict=True)
        return torch.cat([token_losses(head(part), target, z_loss) for part, target in parts])
    return cast(Tensor, _ChunkedCrossEntropy.apply(head, rows, z_loss, hidden_MD, labels_M))  # type: ignore[no-untyped-call]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See :func:`chunked_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, head: Callable[[Tensor], Tensor], rows: int, z_loss: float, hidden_MD: Tensor, labels_M: Tensor
    ) -> Tensor:
        """Return the losses and keep d loss / d hidden."""
        losses, gradients = [], []
        for part, target in zip(hidden_MD.split(rows), labels_M.split(rows), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = token_losses(head(leaf), target, z_loss)
                # A position's loss depends on no other position, so the gradient of the sum holds that of each.
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            losses.append(loss.detach())
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Scale every position's gradient."""
        (gradient_MD,) = ctx.saved_tensors
        return None, None, None, (gradient_MD * gradients[0][:, None]).to(gradient_MD.dtype), None
