"""What an encoder-decoder must show before it is steered: tried on the model itself, when it is loaded.

Two checks, because a text does not stand behind its prompt in a bidirectional encoder, and the oracle of decoder-only
models (a prefix of a text's activations gives what the text gives) says nothing there:

* *Words.* Rows with an embedding prompt of real words, with a prefix and with nothing, in one batch, padded: those
  without a prefix must have the logits that the model itself, its own shift of the labels included, gives for words
  and text; and decoding step by step must repeat all of them.
* *Sites.* Extra tokens stand behind a text at such places that every token of the text attends to all of them. Their
  keys and values, at all three sites, are then taken as a prefix, and the extra tokens away: nothing may change for the
  text. A layer that a prefix does not reach, a mask that hides it, or a site that is mistaken for another one changes
  something. Keys stand for themselves wherever they stand only without relative position biases, so these are left out
  of this check (the first one runs with them).

Shape letters: T text tokens, X text and extra tokens, U decoder tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softprompts.errors import UnsupportedModelError
from softprompts.models.attention import Steering
from softprompts.models.encoder_decoder import EncoderDecoder
from softprompts.models.seq2seq import label_states, start
from softprompts.types import Batch, LayerKey, PromptStates

__all__ = ["verify_seq2seq"]

_TEXT, _EXTRA, _TARGET = 5, 3, 4


@torch.no_grad()
def verify_seq2seq(pair: EncoderDecoder, vocab_size: int) -> None:
    """Run both checks.

    Args:
        pair: The model's halves.
        vocab_size: Ids below this one are tried.

    Raises:
        UnsupportedModelError: One of them fails.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (64,), generator=generator)
    ids = ids[(ids != pair.pad_id) & (ids != pair.start_id)][: 2 * (_TEXT + _EXTRA + _TARGET)].to(pair.model.device)
    _check_words(pair, ids, generator)
    _check_sites(pair, ids)


def _check_words(pair: EncoderDecoder, ids: Tensor, generator: torch.Generator) -> None:
    words, text, short = ids[:_EXTRA], ids[_EXTRA : _EXTRA + _TEXT], ids[-2:]
    targets = ids[_EXTRA + _TEXT : _EXTRA + _TEXT + _TARGET]
    prefix = {
        site.key: (
            torch.randn(site.kv_heads, 2, site.key_size, generator=generator).to(ids.device),
            torch.randn(site.kv_heads, 2, site.value_size, generator=generator).to(ids.device),
        )
        for site in pair.geometry.sites
    }
    states = [PromptStates(_EXTRA, embeddings_PD=pair.embed(words)), PromptStates(2, keys_values=prefix)]
    pads = torch.full((_TEXT - 2,), pair.pad_id, device=ids.device)
    batch = Batch(
        ids_BT=torch.stack([text, torch.cat([pads, short]), text]),
        mask_BT=torch.tensor([[1] * _TEXT, [0] * (_TEXT - 2) + [1, 1], [1] * _TEXT], device=ids.device),
        labels_BT=None,
        prompt_of_row_B=torch.tensor([0, -1, 1], device=ids.device),
        targets_BU=torch.stack([targets, torch.cat([targets[:2], targets.new_full((2,), -100)]), targets]),
    )
    hidden_MD, _, row_M = label_states(pair, batch, states)
    logits_MV = pair.head(hidden_MD)
    for row, whole, target in ((0, torch.cat([words, text]), targets), (1, short, targets[:2])):
        own = pair.model(
            input_ids=whole[None], attention_mask=torch.ones_like(whole[None]), labels=target[None], use_cache=False
        )
        _compare(pair, logits_MV[row_M == row], own.logits[0], "behind a prompt of real words than behind the words")
    logits_BV, state = start(pair, batch, states)
    for number in range(_TARGET):
        at_M = torch.cat([torch.arange(int((row_M == row).sum())) for row in range(3)]).to(row_M.device) == number
        _compare(pair, logits_BV[row_M[at_M]], logits_MV[at_M], "when it decodes step by step than in one pass")
        logits_BV = state.step(targets[number].expand(3))


def _check_sites(pair: EncoderDecoder, ids: Tensor) -> None:
    device, read, written = ids.device, _TEXT + _EXTRA, _TARGET + _EXTRA
    ids_1X, ids_1U = ids[None, :read], ids[None, read : read + written]
    embeddings_1XD, mask_1X = pair.embed(ids_1X), torch.ones_like(ids_1X)
    # The target reads itself causally and all of the extra tokens; these read what they like.
    mask_UU = torch.ones(written, written, dtype=torch.bool, device=device)
    mask_UU[:_TARGET, :_TARGET] = mask_UU[:_TARGET, :_TARGET].tril()
    captured: dict[LayerKey, tuple[Tensor, Tensor]] = {}
    both = Steering(pair.layer_of, captured=captured, unbiased=True)
    encoded_1XD = pair.encode(embeddings_1XD, mask_1X, both)
    hidden_1UD = pair.decode(ids_1U, encoded_1XD, mask_1X, both, mask=mask_UU[None, None])
    texts = {"encoder": _TEXT, "decoder": _TARGET, "cross": _TEXT}
    prefix = {
        layer: (keys[:, :, texts[layer.site] :], values[:, :, texts[layer.site] :])
        for layer, (keys, values) in captured.items()
    }
    mask_1T = mask_1X[:, :_TEXT]
    reading, writing = (Steering(pair.layer_of, prefix, unbiased=True) for _ in range(2))
    alone_1TD = pair.encode(embeddings_1XD[:, :_TEXT], mask_1T, reading)
    target_1UD = pair.decode(ids_1U[:, :_TARGET], alone_1TD, mask_1T, writing)
    remedy = "behind a prefix of some tokens' own keys and values than beside the tokens"
    _compare(pair, alone_1TD, encoded_1XD[:, :_TEXT], f"in its encoder {remedy}")
    _compare(pair, pair.head(target_1UD), pair.head(hidden_1UD[:, :_TARGET]), remedy)


def _compare(pair: EncoderDecoder, got: Tensor, expected: Tensor, where: str) -> None:
    allowed = 1e-3 if pair.model.dtype == torch.float32 else 0.3
    difference = float((got.float() - expected.float()).abs().max() / expected.float().std().clamp(min=1e-6))
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"'{pair.family}' gives other numbers {where} (difference {difference:.2g} standard deviations, allowed "
            f"{allowed}); it is refused"
        )
