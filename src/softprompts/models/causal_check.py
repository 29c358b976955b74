"""The check at load: does a prompt made of a text's own tokens stand for that text, in this very model?

The model's own forward with its plain attention says what is right. Against it stand the paths that are used later: a
batch of two rows of different lengths, one with a prompt and one without, padded on the right as in training, and
padded on the left and continued by one token as in decoding. Five forward passes over a few tokens.

Shape letters: T tokens of prompt and text, S tokens of a forward pass, V vocabulary; there are two rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softprompts.errors import UnsupportedModelError
from softprompts.models.attention import Steering
from softprompts.models.causal import CausalModel
from softprompts.models.inputs import position_ids
from softprompts.models.packing import pack
from softprompts.models.slot_pass import SlotPass, Span
from softprompts.models.slots import SlotCache
from softprompts.types import PromptStates

__all__ = ["packs_exactly", "runs_in_slots", "verify_causal"]

_LONGEST = 8
"""Tokens of the check, or fewer where a window is shorter: then all of them see each other."""
_SHORTEST = 4
_MISHAPS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def verify_causal(causal: CausalModel, vocab_size: int) -> None:
    """Refuse a model in which a prompt does not do what its text does.

    Args:
        causal: The model.
        vocab_size: Ids that may stand in a text.

    Raises:
        UnsupportedModelError: Some path gives other logits than the model's own forward, or fails.
    """
    family = causal.probed.geometry.family
    windows = [site.window for site in causal.probed.geometry.sites if site.window is not None]
    length = max(_SHORTEST, min([_LONGEST, *windows]))
    generator = torch.Generator().manual_seed(0)
    ids_2T = torch.randint(vocab_size, (2, length), generator=generator).to(causal.model.device)
    exact = causal.model.dtype == torch.float32
    allowed = 1e-3 if exact else 0.6  # logits of unrelated texts are about 1.1 apart, in the mean
    try:
        expected_2TV = causal.own_logits(ids_2T)
        spread = float(expected_2TV.std().clamp(min=1e-6))
        for path, logits_MV, row, start in _steered(causal, ids_2T, length // 2):
            error_MV = (logits_MV - expected_2TV[row, start:][: len(logits_MV)]).abs()
            # in half precision a mixture may send single tokens to other experts; a wrong path is wrong everywhere
            size = float(error_MV.max() if exact else error_MV.mean()) / spread
            if not size <= allowed:
                raise UnsupportedModelError(
                    f"'{family}' behind a prompt made of a text's own tokens gives other logits than behind the text "
                    f"({path}: difference {size:.2g} standard deviations, allowed {allowed}); it is refused"
                )
    except _MISHAPS as error:
        if isinstance(error, UnsupportedModelError):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(f"'{family}' fails behind a prompt ({reason[0]}); it is refused") from error


def _steered(causal: CausalModel, ids_2T: Tensor, P: int) -> Iterator[tuple[str, Tensor, int, int]]:
    """Run the paths; yields name, logits ``[M, V]``, row and the token whose successor the first of them predicts.

    Row 0 is a prompt of its first P tokens and the text behind it, row 1 is text alone.
    """
    T, device = ids_2T.shape[1], ids_2T.device
    embeddings_PD = causal.model.get_input_embeddings()(ids_2T[:1, :P])[0].clone()
    if causal.probed.stateful:
        state = PromptStates(P, embeddings_PD=embeddings_PD)
    else:
        state = PromptStates(P, keys_values=causal.activations(embeddings_PD))
    prompt_of_row_2 = torch.tensor([0, -1], device=device)
    length_2 = torch.tensor([P, 0], device=device)
    shifted = torch.cat([ids_2T[0, P:], ids_2T[0, :P]])  # pads may hold anything
    right = torch.stack([shifted, ids_2T[1]]), (torch.arange(T, device=device) < T - length_2[:, None]).long()
    left = torch.stack([ids_2T[0], ids_2T[1]]), (torch.arange(T, device=device) >= length_2[:, None]).long()

    hidden = causal.run(
        causal.steering([state], prompt_of_row_2),
        input_ids=right[0],
        attention_mask=right[1],
        position_ids=position_ids(right[1], length_2),
        use_cache=False,
    )
    yield "padded on the right", causal.head(hidden[0, : T - P]), 0, P
    yield "padded on the right, no prompt", causal.head(hidden[1]), 1, 0

    steering, cache = causal.decoding([state], prompt_of_row_2, 2)
    positions = position_ids(left[1], length_2)
    read = {"past_key_values": cache, "use_cache": True}
    hidden = causal.run(
        steering, input_ids=left[0][:, :-1], attention_mask=left[1][:, :-1], position_ids=positions[:, :-1], **read
    )
    yield "padded on the left", causal.head(hidden[0, P:]), 0, P
    steering.begin()
    hidden = causal.run(
        steering, input_ids=left[0][:, -1:], attention_mask=left[1], position_ids=positions[:, -1:], **read
    )
    yield "continued", causal.head(hidden[0]), 0, T - 1
    yield "continued, no prompt", causal.head(hidden[1]), 1, T - 1


@torch.no_grad()
def packs_exactly(causal: CausalModel, vocab_size: int) -> bool:
    """Try whether two packed rows behind a prompt give what the model gives on prompt and row as plain text.

    A model that needs more than the attention interface to tell rows apart does not, and runs on padded batches.
    """
    geometry = causal.probed.geometry
    same_size = all(site.key_size == site.value_size for site in geometry.sites)
    plain = causal.through_attention and not geometry.prompt_scrolls
    if not plain or not same_size or causal.model.device.type != "cpu":
        return False
    generator = torch.Generator().manual_seed(1)
    prompt, *rows = (torch.randint(vocab_size, (length,), generator=generator) for length in (3, 5, 2))
    embeddings_PD = causal.model.get_input_embeddings()(prompt[None])[0].clone()
    state = PromptStates(length=3, keys_values=causal.activations(embeddings_PD))
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    try:
        together_MD = causal.run_packed(torch.cat(rows), pack(mask_BT, [state], torch.tensor([0, 0])))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # its forward cannot take a packed row
    texts = [torch.cat([prompt, row])[None] for row in rows]
    alone = [
        causal.run(
            Steering(),
            input_ids=text,
            attention_mask=torch.ones_like(text),
            position_ids=torch.arange(text.shape[1])[None],
            use_cache=False,
        )[0, 3:]
        for text in texts
    ]
    expected_MD = torch.cat(alone).float()
    allowed = 1e-4 if causal.model.dtype == torch.float32 else 0.1
    difference = (together_MD.float() - expected_MD).abs().max() / expected_MD.abs().max().clamp(min=1e-6)
    return bool(difference < allowed)


@torch.no_grad()
def runs_in_slots(causal: CausalModel, vocab_size: int) -> bool:
    """Try whether rows in slots get the logits of plain text: read in two pieces and continued, one with a prompt."""
    geometry, device = causal.probed.geometry, causal.model.device
    if not causal.through_attention:
        return False
    windows = [site.window for site in geometry.sites if site.window is not None]
    T = max(_SHORTEST, min([_LONGEST, *windows]))
    P = T // 2
    ids_2T = torch.randint(vocab_size, (2, T), generator=torch.Generator().manual_seed(0)).to(device)
    try:
        state = PromptStates(
            P, keys_values=causal.activations(causal.model.get_input_embeddings()(ids_2T[0, :P]).clone())
        )
        cache = SlotCache(geometry, dtype=causal.model.dtype, device=device, limit_bytes=1 << 40)
        cache.open(0, T, state)
        cache.open(1, T)
        found = torch.zeros(2, T, dtype=torch.bool, device=device)
        logits_2TV = torch.zeros(2, T, geometry.vocab_size, device=device)
        for spans in (
            [Span(1, 0, 2)],
            [Span(0, P, T - P - 1), Span(1, 2, T - 3)],
            [Span(0, T - 1, 1), Span(1, T - 1, 1)],
        ):
            slots = SlotPass(cache, spans)
            ordered = [spans[number] for number in slots.order]
            row_M = torch.tensor([span.row for span in ordered for _ in range(span.length)], device=device)
            hidden_MD = causal.run_slots(ids_2T[row_M, slots.column_M], slots)
            logits_MV = causal.head(hidden_MD)
            logits_2TV[row_M, slots.column_M, : logits_MV.shape[1]] = logits_MV
            found[row_M, slots.column_M] = True
        expected_2TV = causal.own_logits(ids_2T)
    except _MISHAPS:
        return False  # its forward cannot take a packed row, or its attention more than the slots know
    exact = causal.model.dtype == torch.float32
    error_MV = (logits_2TV[..., : expected_2TV.shape[-1]] - expected_2TV)[found].abs()
    size = float(error_MV.max() if exact else error_MV.mean()) / float(expected_2TV.std().clamp(min=1e-6))
    return size <= (1e-3 if exact else 0.6)
