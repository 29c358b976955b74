"""What no method can be faster than, and what the model costs alone.

Shape letters: B rows, T tokens, M label positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from softprompts.tasks.encode import IGNORED_LABEL
from softprompts.types import Batch

__all__ = ["floor_step", "plain_step"]


def floor_step(model: PreTrainedModel, batch: Batch, *, prompt_tokens: int = 0) -> Callable[[], Tensor]:
    """Prepare the least that a step takes: forward, and backward to the activations, of the real tokens alone.

    The batch's real tokens are laid out in as many rows of equal length, so that nothing is padded and attention needs
    no mask; transformers' own model runs them without its head, with gradient from the embeddings on, so that the
    backward pass goes through every layer; the head and a plain cross-entropy run on as many positions as the batch
    has labels. There is no prompt, no optimizer, no clipping.

    Args:
        model: Plain, frozen.
        batch: Whose tokens and labels are counted; only the numbers matter.
        prompt_tokens: Tokens that are run beside those of the text, once: what a trained embedding prompt adds. They
            lengthen the rows; what does not divide by the number of rows is left out.

    Returns:
        Runs the step and gives the loss.
    """
    assert batch.labels_BT is not None
    real_M = batch.ids_BT[batch.mask_BT.bool()]
    rows = batch.rows
    length = (len(real_M) + prompt_tokens) // rows
    ids_BT = real_M.repeat(2)[: rows * length].view(rows, length)
    labels = int((batch.labels_BT[:, 1:] != IGNORED_LABEL).sum())
    share = [labels // rows + (row < labels % rows) for row in range(rows)]
    places = [(row, column) for row in range(rows) for column in range(length - 1 - share[row], length - 1)]
    row_M, column_M = torch.tensor(places, device=ids_BT.device).T
    targets_M = ids_BT[row_M, column_M + 1]

    def run() -> Tensor:
        embeddings_BTD = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
        hidden_BTD = model.base_model(inputs_embeds=embeddings_BTD, use_cache=False).last_hidden_state
        logits_MV = model.get_output_embeddings()(hidden_BTD[row_M, column_M]).float()
        loss = functional.cross_entropy(logits_MV, targets_M)
        loss.backward()
        return loss.detach()

    return run


def plain_step(model: PreTrainedModel, batch: Batch) -> Callable[[], Tensor]:
    """Prepare the usual way: the padded batch with ``labels=``, logits everywhere, backward to the activations.

    There is no prompt and no optimizer.
    """

    def run() -> Tensor:
        embeddings_BTD = model.get_input_embeddings()(batch.ids_BT).detach().requires_grad_()
        loss: Tensor = model(
            inputs_embeds=embeddings_BTD, attention_mask=batch.mask_BT, labels=batch.labels_BT, use_cache=False
        ).loss
        loss.backward()
        return loss.detach()

    return run
