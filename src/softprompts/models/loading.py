"""A model and its tokenizer from a directory or the hub, with clear errors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from softprompts.cache_folder import find_member, is_member
from softprompts.errors import ConfigError, DataNotFoundError, UnsupportedModelError, nearest
from softprompts.models.quantization import check_quantization, quantize_weights

__all__ = ["load_pretrained"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pretrained(
    name_or_path: str | Path, *, dtype: str, device: str, revision: str | None = None, quantization: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder-only model or an encoder-decoder, whichever its config says.

    Args:
        name_or_path: Directory, hub name, or ``family/NAME`` for a model of the family in the user's cache folder.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto`` (CUDA if there is any), ``cpu``, ``cuda``, ``cuda:1``, ...
        revision: Commit or tag on the hub.
        quantization: ``int8``, ``int4`` or ``None``; done before the weights go to a GPU.

    Raises:
        DataNotFoundError: There is no such model.
        ConfigError: An option is unknown.
        UnsupportedModelError: It is no language model.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}': {nearest(dtype, _DTYPES)}")
    kind_of_weights = check_quantization(quantization)
    place = _device(device)
    if is_member(name_or_path):
        name_or_path = find_member(str(name_or_path))
    try:
        # low-level loaders raise OSError for a missing directory, a missing file and an unreachable hub alike
        config = AutoConfig.from_pretrained(str(name_or_path), revision=revision)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(str(name_or_path), dtype=_DTYPES[dtype], revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), revision=revision)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise DataNotFoundError(
            f"model '{name_or_path}' cannot be loaded: {reason}; give a directory that holds a transformers model, "
            "a hub name, or 'bundled' (in Python: softprompts.pretraining.bundled_lm_path())"
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(f"'{name_or_path}' is no language model that can be loaded: {error}") from error
    if kind_of_weights is not None:
        quantize_weights(model, kind_of_weights)
    nn.Module.to(model, place)
    return model, tokenizer


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}'; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{name}' asked for, but this torch sees no CUDA device; use device: cpu")
    return device
