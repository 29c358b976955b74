"""Which model is it? Digests of weights and vocabulary, so that a prompt is never used on another model unnoticed."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["model_fingerprint", "tokenizer_fingerprint"]

_VOLATILE = (
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def model_fingerprint(model: PreTrainedModel) -> str:
    """Identity of config and weights, 16 hex digits; the same in float32 and bfloat16."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    tensors = sorted(model.named_parameters(), key=lambda item: item[0])
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for (name, tensor), part in zip(tensors, pool.map(_tensor_digest, (t for _, t in tensors)), strict=True):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(part)
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a tokenizer: its vocabulary and what it makes of a few texts, 16 hex digits."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    samples = [
        "The quick brown fox",
        " 1984: naïve café,\n\ttabs",
        "name : Blue Spice | area : city centre",
        "日本語 🙂",
    ]
    digest = hashlib.sha256(json.dumps(vocabulary).encode())
    digest.update(json.dumps([tokenizer(sample).input_ids for sample in samples]).encode())
    return digest.hexdigest()[:16]


def _tensor_digest(tensor: Tensor) -> bytes:
    plain = tensor.detach().to("cpu", torch.bfloat16).flatten().contiguous()
    return hashlib.sha256(plain.view(torch.int16).numpy().data).digest()
