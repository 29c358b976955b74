"""A prompt on a frozen encoder-decoder: forward and ``generate`` as transformers has them.

An embedding prompt stands in front of the encoder's input and takes positions of the encoder, a prefix takes none. The
encoder's states are ``[prompt][text][pads]``, whichever side the text came padded on; the decoder's ids, labels and
logits have the same length.

Shape letters: B batch, T text tokens, S prompt and text tokens, U decoder tokens, P prompt length, D width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from softprompts.errors import ConfigError, UnsupportedModelError
from softprompts.integrations.huggingface.generation import GeneratingPromptModel, refuse_inner_outputs
from softprompts.models.encoder_decoder import EncoderDecoder
from softprompts.models.seq2seq import check_room
from softprompts.types import PromptStates

__all__ = ["PromptedForSeq2SeqLM"]


class PromptedForSeq2SeqLM(GeneratingPromptModel):
    """A frozen encoder-decoder with a prompt; made by :func:`softprompts.attach`."""

    reads_pairs = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        prompt_states: PromptStates | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Read the input behind the prompt and write behind it.

        Args:
            input_ids: ``[B, T]``, padded on either side.
            attention_mask: 1 on real tokens of the text; the prompt is not in it.
            decoder_input_ids: ``[B, U]``; left out, they are made of the labels.
            decoder_attention_mask: As in transformers.
            encoder_outputs: What :meth:`get_encoder` gave for this text.
            past_key_values: A cache of the decoder. The prompt is not in it.
            inputs_embeds: ``[B, T, D]`` instead of ids, scaled as the encoder takes them.
            decoder_inputs_embeds: ``[B, U, D]`` instead of ids.
            labels: ``[B, U]``, -100 where nothing is learned; what the decoder should predict at its positions.
            use_cache: Whether a cache is returned.
            prompt_states: What :meth:`states` gave; computed here if left out.
            **kwargs: ``num_items_in_batch`` for the loss.

        Returns:
            Loss, logits ``[B, U, V]`` (float32), cache and the encoder's states ``[B, S, D]``.

        Raises:
            ConfigError: Inner outputs are asked for, an argument is unknown, or ``encoder_outputs`` do not hold the
                prompt.
            LengthError: Prompt and text, or the target, do not fit into the model's positions.
        """
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask, "encoder_outputs": encoder_outputs,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds, "use_cache": use_cache,
        }  # fmt: skip
        items = kwargs.pop("num_items_in_batch", None)
        if not self._steers:
            own: Seq2SeqLMOutput = self.frozen.model(**inputs, labels=labels, **kwargs)
            return own
        refuse_inner_outputs(kwargs)
        _refuse_unknown(kwargs)
        states = self.states() if prompt_states is None else prompt_states
        if encoder_outputs is None:
            encoded_BSD = self.encode(input_ids, attention_mask, inputs_embeds, states)
        else:
            encoded_BSD = encoder_outputs[0]
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise ConfigError("neither decoder_input_ids nor labels are given; give one of them")
            decoder_input_ids = self._pair.decoder_input(labels)
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and labels is None and not torch.is_grad_enabled()
        cache = None if not use_cache else self._pair.new_cache() if past_key_values is None else past_key_values
        self._check_target(decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds, cache)
        hidden_BUD = self._pair.decode(
            decoder_input_ids if decoder_inputs_embeds is None else None,
            encoded_BSD,
            _encoded_mask(encoded_BSD, attention_mask, _columns(states)),
            self.steering(states),
            cache=cache,
            mask=decoder_attention_mask,
            embeddings_BUD=decoder_inputs_embeds,
        )
        logits_BUV = self._pair.head(hidden_BUD)
        loss = None if labels is None else _loss(logits_BUV, labels, items)
        return Seq2SeqLMOutput(
            loss=loss, logits=logits_BUV, past_key_values=cache, encoder_last_hidden_state=encoded_BSD
        )

    @property
    def _pair(self) -> EncoderDecoder:
        pair = self.frozen.pair
        assert pair is not None, "attached() refuses decoder-only models"
        return pair

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        states: PromptStates,
    ) -> Tensor:
        """Run the encoder on prompt and text; ``[B, S, D]``, ``S = P + T`` with an embedding prompt, otherwise T.

        Args:
            input_ids: As for :meth:`forward`, like the next two.
            attention_mask: The text's.
            inputs_embeds: Instead of ids.
            states: What :meth:`states` gave.

        Raises:
            ConfigError: There is no text.
            LengthError: Prompt and text do not fit into the encoder's positions.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ConfigError("neither input_ids nor inputs_embeds are given; give one of them")
            inputs_embeds = self._pair.embed(input_ids)
        B, T = inputs_embeds.shape[:2]
        check_room(self._pair, _columns(states), T, 0)
        if attention_mask is None:
            attention_mask = torch.ones(B, T, dtype=torch.long, device=inputs_embeds.device)
        # pads go behind the text, where they are in training with softprompts itself; a mask that has them there
        # already is left as it is
        order_BT = torch.argsort((attention_mask == 0).int(), dim=1, stable=True)
        embeddings_BSD = inputs_embeds.gather(1, order_BT[..., None].expand_as(inputs_embeds))
        if states.embeddings_PD is not None:
            front_BPD = states.embeddings_PD.to(embeddings_BSD.dtype).expand(B, -1, -1)
            embeddings_BSD = torch.cat([front_BPD, embeddings_BSD], dim=1)
        mask_BS = _encoded_mask(embeddings_BSD, attention_mask, _columns(states))
        return self._pair.encode(embeddings_BSD, mask_BS, self.steering(states))

    def _check_target(self, tokens: Tensor | None, cache: EncoderDecoderCache | None) -> None:
        assert tokens is not None
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, int):  # a static cache counts in a tensor, which is not waited for
            check_room(self._pair, 0, 0, past + tokens.shape[1])

    # -- generate ----------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, behind the prompt, which is computed once.

        Raises:
            UnsupportedModelError: A static cache is asked for, and the model has sliding windows.
        """
        if self._steers:
            asked = kwargs.get("generation_config") or self.generation_config
            implementation = kwargs.get("cache_implementation", getattr(asked, "cache_implementation", None))
            if implementation is not None and any(site.window is not None for site in self.frozen.geometry.sites):
                raise UnsupportedModelError(
                    f"cache_implementation='{implementation}': caches of transformers drop what sliding windows pass, "
                    f"also of the encoder's states, which '{self.frozen.geometry.family}' reads as a whole; leave it "
                    "out"
                )
            if implementation is None and kwargs.get("use_cache", getattr(asked, "use_cache", True)) is not False:
                # transformers' own counts layers by the encoder's config, and drops what sliding windows pass
                kwargs.setdefault("past_key_values", self._pair.new_cache())
        return super().generate(*args, **kwargs)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder behind the prompt, as ``generate`` runs it once; the model's own while the prompt is left out."""
        if not self._steers:
            encoder: nn.Module = self.frozen.model.get_encoder()
            return encoder
        return _Encoder(self)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """What the decoder reads to predict ``labels``, ``[B, U]``; collators of transformers ask for it."""
        return self._pair.decoder_input(labels)


class _Encoder(nn.Module):
    """The encoder behind the prompt, as seen from outside; the model itself is no part of it."""

    def __init__(self, whole: PromptedForSeq2SeqLM) -> None:
        super().__init__()
        self._whole = (whole,)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_states: PromptStates | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        refuse_inner_outputs({"output_attentions": output_attentions, "output_hidden_states": output_hidden_states})
        whole = self._whole[0]
        states = whole.states() if prompt_states is None else prompt_states
        return BaseModelOutput(last_hidden_state=whole.encode(input_ids, attention_mask, inputs_embeds, states))


def _columns(states: PromptStates) -> int:
    """Positions of the encoder that a prompt takes."""
    return 0 if states.embeddings_PD is None else states.length


def _encoded_mask(encoded_BSD: Tensor, mask_BT: Tensor | None, front: int) -> Tensor:
    """1 on the encoder's real positions ``[B, S]``: a prompt of ``front``, the text, and no pads, which are last."""
    B, S = encoded_BSD.shape[:2]
    if mask_BT is None:
        return torch.ones(B, S, dtype=torch.long, device=encoded_BSD.device)
    if mask_BT.shape[1] + front != S:
        raise ConfigError(
            f"encoder_outputs has {S} positions, expected {front} of the prompt and {mask_BT.shape[1]} of the text; "
            "compute it with get_encoder() of the model that the prompt is attached to"
        )
    length_B1 = (mask_BT != 0).sum(dim=1, keepdim=True) + front
    return (torch.arange(S, device=mask_BT.device)[None] < length_B1).long()


def _loss(logits_BUV: Tensor, labels_BU: Tensor, items: Tensor | int | None) -> Tensor:
    """Cross-entropy, divided by the labels of the whole step if they are known (several batches may make a step)."""
    reduction = "mean" if items is None else "sum"
    flat = labels_BU.flatten().to(logits_BUV.device)
    loss = functional.cross_entropy(logits_BUV.flatten(0, 1), flat, ignore_index=-100, reduction=reduction)
    return loss if items is None else loss / items


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    unknown = sorted(name for name, value in kwargs.items() if value is not None)
    if unknown:
        raise ConfigError(
            f"{unknown[0]} is not offered with a prompt attached to an encoder-decoder; leave it out, or use disable()"
        )
