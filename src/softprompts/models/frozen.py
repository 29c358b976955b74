"""The frozen language model: weights that never change, and what a prompt needs to know of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompts.errors import ConfigError, UnsupportedModelError
from softprompts.models.attention import IMPLEMENTATION, Steering, register_attention
from softprompts.models.encoder_decoder import EncoderDecoder
from softprompts.models.geometry import probe
from softprompts.models.loading import load_pretrained
from softprompts.models.packing import Packing, pack
from softprompts.models.seq2seq_check import verify_seq2seq
from softprompts.types import LayerKey, PromptStates

__all__ = ["FrozenLM"]

_VOLATILE = (
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_DROPOUT_FIELDS = ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "hidden_dropout")


class FrozenLM:
    """A language model whose weights are frozen, without dropout, ready to be steered.

    It is decoder-only (GPT-2, Llama, ...) or an encoder-decoder (T5, BART, ...).

    Attributes:
        model: The transformers model, in eval mode, no parameter requires a gradient.
        tokenizer: Its tokenizer.
        geometry: What it offers to a prompt (probed).
        name: Where it came from, for people to read.
        pair: Its two halves if it is an encoder-decoder, otherwise ``None``.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "") -> None:
        register_attention()
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or str(model.config._name_or_path or type(model).__name__)
        self._checkpointing = False
        self._former_attention = str(model.config._attn_implementation)
        self.freeze()
        try:
            model.set_attn_implementation(IMPLEMENTATION)
            self.pair = EncoderDecoder(model) if model.config.is_encoder_decoder else None
            if self.pair is not None:
                self.geometry, self.layer_of = self.pair.geometry, self.pair.layer_of
                verify_seq2seq(self.pair, min(self.geometry.vocab_size, len(tokenizer)))
            else:
                self.geometry, self.layer_of = probe(model)
                self._verify()
            self.packable = self.pair is None and self._packs_exactly()
        except UnsupportedModelError:
            self.release()
            raise

    # -- making one --------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str = "float32",
        device: str = "auto",
        revision: str | None = None,
        quantization: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Load a model and its tokenizer from a directory or the hub.

        Args:
            name_or_path: Directory or hub name.
            dtype: ``float32``, ``bfloat16`` or ``float16``. The prompt itself is always trained in float32.
            device: ``auto`` (CUDA if there is any), ``cpu``, ``cuda``, ``cuda:1``, ...
            revision: Commit or tag on the hub.
            quantization: Only ``None`` in this version.
            gradient_checkpointing: Recompute activations in the backward pass to save memory.

        Raises:
            DataNotFoundError: There is no such model.
            ConfigError: An option is unknown.
            UnsupportedModelError: The model cannot be steered correctly.
        """
        if quantization is not None:
            raise ConfigError(f"quantization '{quantization}' is not offered by this version; leave it out (null)")
        model, tokenizer = load_pretrained(name_or_path, dtype=dtype, device=device, revision=revision)
        frozen = cls(model, tokenizer, name=str(name_or_path))
        if gradient_checkpointing:
            frozen.enable_gradient_checkpointing()
        return frozen

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "") -> Self:
        """Freeze a model that is already in memory."""
        return cls(model, tokenizer, name=name)

    def freeze(self) -> None:
        """Switch gradients and dropout off."""
        self.model.requires_grad_(False)
        self.model.eval()

    def release(self) -> PreTrainedModel:
        """Give the model back as it was handed in (its attention implementation included)."""
        self.model.set_attn_implementation(self._former_attention)
        return self.model

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each layer's activations in the backward pass.

        transformers checkpoints only modules in training mode, which also switches dropout on: so every dropout is set
        to zero first. The results stay those of eval mode.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in _DROPOUT_FIELDS:
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self._checkpointing = True
        if self.pair is not None:
            self.pair.checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again. Dropout stays off, as ever."""
        self.model.activation_checkpointing_disable()
        self._checkpointing = False
        if self.pair is not None:
            self.pair.checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self._checkpointing

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights."""
        return next(self.model.parameters()).dtype

    @property
    def parameter_count(self) -> int:
        """Numbers in its weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text."""
        ids = self.tokenizer.eos_token_id
        if ids is None:
            raise UnsupportedModelError(
                f"the tokenizer of '{self.name}' has no end-of-text token; set tokenizer.eos_token"
            )
        return int(ids)

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows; nobody ever attends to it, so any id serves where the tokenizer has none."""
        return int(self.tokenizer.pad_token_id) if self.tokenizer.pad_token_id is not None else self.eos_id

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """What the tokenizer itself puts in front of every text (Llama, Gemma: one token; GPT-2: nothing)."""
        plain = self.tokenizer("a", add_special_tokens=False).input_ids
        marked = self.tokenizer("a").input_ids
        start = next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)
        return tuple(marked[:start])

    @cached_property
    def end_ids(self) -> tuple[int, ...] | None:
        """What the tokenizer puts behind every text that an encoder reads (T5: ``</s>``); ``None`` without encoder."""
        if self.pair is None:
            return None
        marked = self.tokenizer("a").input_ids
        return tuple(marked[len(self.bos_ids) + len(self.tokenizer("a", add_special_tokens=False).input_ids) :])

    @cached_property
    def fingerprint(self) -> str:
        """Identity of config and weights, 16 hex digits.

        Weights are hashed as bfloat16, so that a model has one fingerprint whether it is loaded in float32 or bfloat16.
        """
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in _VOLATILE}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        tensors = sorted(self.model.named_parameters(), key=lambda item: item[0])
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            for (name, tensor), part in zip(tensors, pool.map(_tensor_digest, (t for _, t in tensors)), strict=True):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(part)
        return digest.hexdigest()[:16]

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Identity of the tokenizer: its vocabulary and what it makes of a few texts, 16 hex digits."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        samples = [
            "The quick brown fox",
            " 1984: naïve café,\n\ttabs",
            "name : Blue Spice | area : city centre",
            "日本語 🙂",
        ]
        digest = hashlib.sha256(json.dumps(vocabulary).encode())
        digest.update(json.dumps([self.tokenizer(sample).input_ids for sample in samples]).encode())
        return digest.hexdigest()[:16]

    # -- what it does ------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens."""
        # verbose: the tokenizer warns of long texts, which we refuse or cut ourselves
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def tokenize_words(self, text: str) -> list[int]:
        """Token ids of ``text`` as it would stand inside a sentence.

        Byte-level vocabularies hold a word with the space in front of it; SentencePiece adds that space by itself.
        """
        adds_space = str(self.tokenizer.convert_ids_to_tokens(self.tokenize("a"))[0]).startswith("▁")
        words = text.strip(" ")  # line breaks are kept: an initial text may be a whole example, its end included
        return self.tokenize(words if adds_space else f" {words}")

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings ``[len(ids), D]``, computed by the model's own module (some families scale inside it)."""
        ids_1P = torch.as_tensor(list(ids), device=self.device)[None]
        with torch.no_grad():
            embeddings: Tensor = (
                self.model.get_input_embeddings()(ids_1P) if self.pair is None else self.pair.embed(ids_1P)
            )
        return embeddings[0].clone()

    def common_ids(self, count: int) -> list[int]:
        """The ``count`` most common token ids, most common first.

        Vocabularies are made by merging the most frequent pairs first, so the order of ids is about that of frequency
        (the reading of Lester et al. 2021, section 3.2). Special tokens and pieces that are no text are left out.
        """
        special = set(self.tokenizer.all_special_ids)
        limit = min(self.geometry.vocab_size, len(self.tokenizer))
        ids: list[int] = []
        for token in range(limit):
            if token not in special and _is_text(str(self.tokenizer.decode([token]))):
                ids.append(token)
            if len(ids) == count:
                break
        return ids

    def activations(self, embeddings_PD: Tensor) -> Mapping[LayerKey, tuple[Tensor, Tensor]]:
        """Keys and values that embeddings at the start of a text evoke in every layer.

        Gradients flow into ``embeddings_PD``. In a causal model what follows cannot change these states, which is why a
        leading prompt is run once, at batch 1, and not once per row.

        Args:
            embeddings_PD: ``[P, D]``.

        Returns:
            Per layer ``(keys [N, P, H], values [N, P, H])``.
        """
        if self.pair is not None:
            return self.pair.activations(embeddings_PD)
        captured: dict[LayerKey, tuple[Tensor, Tensor]] = {}
        length = embeddings_PD.shape[0]
        self.hidden_states(
            inputs_embeds=embeddings_PD.to(self.dtype)[None],
            attention_mask=torch.ones(1, length, dtype=torch.long, device=self.device),
            position_ids=torch.arange(length, device=self.device)[None],
            steering=Steering(self.layer_of, captured=captured),
        )
        return {layer: (keys[0], values[0]) for layer, (keys, values) in captured.items()}

    def hidden_states(self, *, steering: Steering, **inputs: Any) -> Tensor:
        """Run the model without its head.

        Args:
            steering: Prompts for the attention.
            **inputs: ``input_ids`` or ``inputs_embeds``, ``attention_mask``, ``position_ids``, ``past_key_values``.

        Returns:
            Last hidden states ``[B, T, D]``, normalized as the head expects them.
        """
        inputs.setdefault("use_cache", inputs.get("past_key_values") is not None)
        checkpointing = self._checkpointing and torch.is_grad_enabled()
        # transformers checkpoints in training mode only, and drops the cache then
        if self.model.training != checkpointing:
            self.model.train(checkpointing)
        states: Tensor = self.model.base_model(steering=steering, **inputs).last_hidden_state
        return states

    def packed_hidden_states(self, ids_M: Tensor, packing: Packing) -> Tensor:
        """Run rows that lie one behind the other, embedded prompts in front of them.

        Args:
            ids_M: Text tokens in packed order, the tokens of embedded prompts not among them.
            packing: Where they lie; see :func:`softprompts.models.packing.pack`.

        Returns:
            ``[M, D]``, the hidden states of embedded prompts in front.
        """
        if packing.embeddings:
            text_MD = self.model.get_input_embeddings()(ids_M)
            prompts = [embeddings_PD.to(text_MD.dtype) for embeddings_PD in packing.embeddings]
            tokens = {"inputs_embeds": torch.cat([*prompts, text_MD])[None]}
        else:
            tokens = {"input_ids": ids_M[None]}
        # A mask of four dimensions is handed to the layers as it is; what they see is decided by the packing.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids_M.device)
        steering = Steering(self.layer_of, packing=packing)
        return self.hidden_states(
            steering=steering, attention_mask=unused, position_ids=packing.position_M[None], **tokens
        )[0]

    @property
    def head_is_trained(self) -> bool:
        """Whether the weights of the head get a gradient (they do in fine-tuning, never with prompts)."""
        return any(parameter.requires_grad for parameter in self.model.get_output_embeddings().parameters())

    def head(self, hidden_MD: Tensor) -> Tensor:
        """Logits ``[M, V]`` in float32 from hidden states at any positions."""
        if self.pair is not None:
            return self.pair.head(hidden_MD)
        logits: Tensor = self.model.get_output_embeddings()(hidden_MD).float()
        return logits

    @torch.no_grad()
    def _packs_exactly(self) -> bool:
        """Try whether two packed rows behind a prompt give what the model gives on prompt and row as plain text.

        A model that needs more than the attention interface to tell rows apart does not, and runs on padded batches.
        """
        same_size = all(site.key_size == site.value_size for site in self.geometry.sites)
        if not same_size or self.device.type != "cpu":
            return False
        generator = torch.Generator().manual_seed(1)
        high = min(self.geometry.vocab_size, len(self.tokenizer))
        prompt, *rows = (torch.randint(high, (length,), generator=generator) for length in (3, 5, 2))
        state = PromptStates(length=3, keys_values=self.activations(self.embed(prompt.tolist())))
        mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        try:
            together_MD = self.packed_hidden_states(torch.cat(rows), pack(mask_BT, [state], torch.tensor([0, 0])))
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False  # its forward cannot take a packed row
        texts = [torch.cat([prompt, row])[None] for row in rows]
        alone = [
            self.hidden_states(
                input_ids=text,
                attention_mask=torch.ones_like(text),
                position_ids=torch.arange(text.shape[1])[None],
                steering=Steering(),
            )[0, 3:]
            for text in texts
        ]
        expected_MD = torch.cat(alone).float()
        allowed = 1e-4 if self.dtype == torch.float32 else 0.1
        difference = (together_MD.float() - expected_MD).abs().max() / expected_MD.abs().max().clamp(min=1e-6)
        return bool(difference < allowed)

    def _verify(self) -> None:
        """Refuse a model in which a prefix made of a text's activations does not stand for that text."""
        generator = torch.Generator().manual_seed(0)
        high = min(self.geometry.vocab_size, len(self.tokenizer))
        ids = torch.randint(high, (1, 6), generator=generator).to(self.device)
        with torch.no_grad():
            text = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            whole = text.logits[0, 3:].float()
            prefix = self.activations(self.embed(ids[0, :3].tolist()))
            steering = Steering(self.layer_of, {layer: (k[None], v[None]) for layer, (k, v) in prefix.items()})
            hidden = self.hidden_states(
                input_ids=ids[:, 3:],
                attention_mask=torch.ones_like(ids[:, 3:]),
                position_ids=torch.arange(3, 6, device=self.device)[None],
                steering=steering,
            )
            steered = self.head(hidden[0])
        difference = float((steered - whole).abs().max() / whole.std().clamp(min=1e-6))
        allowed = 1e-3 if self.dtype == torch.float32 else 0.3
        if not difference <= allowed:
            raise UnsupportedModelError(
                f"'{self.geometry.family}' behind a prefix made of a text's own activations gives other logits than "
                f"behind the text (difference {difference:.2g} standard deviations, allowed {allowed}); it is refused"
            )


def _is_text(piece: str) -> bool:
    return bool(piece.strip()) and "�" not in piece


def _tensor_digest(tensor: Tensor) -> bytes:
    plain = tensor.detach().to("cpu", torch.bfloat16).flatten().contiguous()
    return hashlib.sha256(plain.view(torch.int16).numpy().data).digest()
