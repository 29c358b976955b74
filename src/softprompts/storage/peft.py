"""Prompts of Hugging Face PEFT, in and out. Its words (virtual tokens, adapter, token_dim) are used in this file only.

PEFT stores one tensor ``prompt_embeddings``: ``[P, D]`` for prompt tuning, ``[P, 2 L N H]`` for prefix-tuning, where
the columns are, layer by layer, the keys of all heads and then the values of all heads. That is our own flat table, as
long as all layers have the same heads (PEFT knows no others). Keys are stored after the rotary embedding there as here.
Read and compared with peft 0.21 (``peft/utils/save_and_load.py``, ``PeftModel.get_prompt``). Decoder-only models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from softprompts.errors import ArtifactError, PromptMismatchError, UnsupportedModelError, nearest
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.storage.directory import list_names, read_file, read_stable, write_directory
from softprompts.storage.manifest import MAX_MANIFEST_BYTES, MAX_TENSOR_BYTES
from softprompts.storage.match import IdentifiedModel
from softprompts.types import Geometry

__all__ = ["PEFT_MANIFEST_FILE", "PEFT_TENSOR_FILE", "export_peft", "import_peft", "is_peft"]

PEFT_MANIFEST_FILE = "adapter_config.json"
PEFT_TENSOR_FILE = "adapter_model.safetensors"

_KINDS = {"PROMPT_TUNING": "embedding", "P_TUNING": "embedding", "PREFIX_TUNING": "prefix", "CARTRIDGE": "prefix"}
"""What PEFT's methods are once their encoders are dropped, which PEFT does when it saves."""


def is_peft(directory: str | Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (Path(directory) / PEFT_MANIFEST_FILE).is_file()


def export_peft(prompt: SoftPrompt, directory: str | Path, *, model_name: str, overwrite: bool = False) -> Path:
    """Write a prompt as PEFT would: ``PeftModel.from_pretrained(model, directory)`` then gives our logits.

    Rows that are padded differ: PEFT puts the padding between prompt and text and counts it (peft#1093).

    Args:
        prompt: Any prompt for a decoder-only model.
        directory: A new or empty one, or, with ``overwrite``, an earlier export.
        model_name: What PEFT calls the base model.
        overwrite: Replace an earlier export.

    Returns:
        The resolved directory.

    Raises:
        UnsupportedModelError: PEFT cannot represent the prompt: layers differ in heads, or there is an encoder.
        StorageError: The directory must not be replaced, or the disk refused.
    """
    geometry = prompt.geometry
    heads, size = _uniform_heads(geometry, needed=prompt.kind == "prefix")
    config: dict[str, Any] = {
        "base_model_name_or_path": model_name,
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": len(geometry.sites),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.length,
        "task_type": "CAUSAL_LM",
    }
    if prompt.kind == "prefix":
        config |= {"peft_type": "PREFIX_TUNING", "token_dim": heads * size, "prefix_projection": False}
    else:
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": geometry.width, "prompt_tuning_init": "RANDOM"}
    tensors = {"prompt_embeddings": prompt.table_PW.float().cpu().contiguous()}
    files = {
        PEFT_TENSOR_FILE: save_tensors(tensors, metadata={"format": "pt"}),
        PEFT_MANIFEST_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    return write_directory(
        directory, files, marker=PEFT_MANIFEST_FILE, known=[*files, "README.md"], overwrite=overwrite
    )


def import_peft(directory: str | Path, frozen: IdentifiedModel) -> SoftPrompt:
    """Read a prompt that PEFT saved.

    Args:
        directory: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        frozen: The model that it was made for. PEFT keeps no fingerprint, so only the shapes can be checked.

    Raises:
        ArtifactError: A file is missing or damaged, is a pickle, or holds a method that is no plain prompt.
        PromptMismatchError: The shapes are not those of the model.
    """
    return read_stable(directory, lambda place: _import(place, frozen))


def _import(directory: Path, frozen: IdentifiedModel) -> SoftPrompt:
    config = _read_config(directory)
    method = str(config.get("peft_type"))
    if method not in _KINDS:
        raise ArtifactError(f"'{directory}' is a PEFT adapter of type '{method}': {nearest(method, _KINDS)}")
    submodules = config.get("num_transformer_submodules")
    if config.get("task_type") == "SEQ_2_SEQ_LM" or submodules not in (None, 1):
        raise ArtifactError(f"'{directory}' was made for an encoder-decoder; only decoder-only models can be imported")
    kind, geometry = _KINDS[method], frozen.geometry
    table_PW = _read_table(directory)
    if kind == "prefix":
        heads, size = _uniform_heads(geometry, needed=True)
        got = tuple(config.get(name) for name in ("num_layers", "num_attention_heads", "token_dim"))
        expected = (len(geometry.sites), heads, heads * size)
        if None not in got and got != expected:
            raise PromptMismatchError(
                f"the prefix in '{directory}' has (layers, KV heads, KV width) {got}, '{frozen.name}' has {expected}; "
                "name the model that it was made for"
            )
    width = geometry.width if kind == "embedding" else geometry.prefix_width
    length = config.get("num_virtual_tokens")
    if table_PW.ndim != 2 or table_PW.shape[1] != width or table_PW.shape[0] != length or length < 1:
        raise PromptMismatchError(
            f"the {kind} prompt in '{directory}' is {list(table_PW.shape)}, expected [{length}, {width}] for "
            f"'{frozen.name}'; name the model that it was made for"
        )
    return prompt_from_table(kind, geometry, table_PW)


def _read_config(directory: Path) -> dict[str, Any]:
    names = list_names(directory)
    if PEFT_MANIFEST_FILE not in names:
        raise ArtifactError(f"'{directory}' holds no {PEFT_MANIFEST_FILE}, so it is no PEFT adapter")
    if PEFT_TENSOR_FILE not in names and "adapter_model.bin" in names:
        raise ArtifactError(
            f"'{directory}' holds a pickle, 'adapter_model.bin'; pickles are never loaded: save it again with PEFT's "
            "save_pretrained(..., safe_serialization=True)"
        )
    try:
        config = json.loads(read_file(directory / PEFT_MANIFEST_FILE, MAX_MANIFEST_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"'{directory / PEFT_MANIFEST_FILE}' is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"'{directory / PEFT_MANIFEST_FILE}' holds a {type(config).__name__}, expected an object")
    return config


def _read_table(directory: Path) -> Tensor:
    path = directory / PEFT_TENSOR_FILE
    try:
        tensors = load_tensors(read_file(path, MAX_TENSOR_BYTES))
    except SafetensorError as error:
        raise ArtifactError(f"'{path}' is no safetensors file: {error}") from error
    if set(tensors) != {"prompt_embeddings"}:
        found = ", ".join(sorted(tensors)[:4]) or "nothing"
        raise ArtifactError(f"'{path}' holds {found}, expected 'prompt_embeddings' alone: it is more than a prompt")
    table_PW = tensors["prompt_embeddings"]
    if not table_PW.is_floating_point() or not bool(torch.isfinite(table_PW).all()):
        raise ArtifactError(f"'prompt_embeddings' of '{path}' has values that are not finite numbers")
    return table_PW.float()


def _uniform_heads(geometry: Geometry, *, needed: bool) -> tuple[int, int]:
    """KV heads and head size that all layers share."""
    shapes = {(site.kv_heads, site.key_size, site.value_size) for site in geometry.sites}
    in_order = [tuple(site.key) for site in geometry.sites] == [("self", layer) for layer in range(len(geometry.sites))]
    if len(shapes) == 1 and in_order:
        heads, key_size, value_size = shapes.pop()
        if key_size == value_size:
            return heads, key_size
    if needed:
        raise UnsupportedModelError(
            f"PEFT knows one number of KV heads and one head size for all layers of a decoder, and '{geometry.family}' "
            f"has {len(geometry.sites)} layers of {len(shapes)} shapes; keep this prompt in the format of softprompts"
        )
    return 1, geometry.width
