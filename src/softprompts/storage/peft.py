"""Prompts of Hugging Face PEFT, in and out. Its words (virtual tokens, adapter, token_dim) are used in this file only.

PEFT stores one tensor ``prompt_embeddings``: ``[P, D]`` for prompt tuning, ``[P, 2 L N H]`` for prefix-tuning, where
the columns are, layer by layer, the keys of all heads and then the values of all heads. That is our own flat table, as
long as all layers have the same heads (PEFT knows no others). Keys are stored after the rotary embedding there as here.
Encoders (P-tuning, a prefix's projection) are dropped when PEFT saves; CPT saves base and delta added up. Multitask
prompt tuning adds two factors per task, whose product scales the shared prompt.

For an encoder-decoder the tensor of an embedding prompt has ``2 P`` rows: the first half stands in front of the
encoder's input, the second half is never read. Its prefixes are not ours: they exist in the decoder's self-attention
alone, where they count as positions (learned positions are shifted, T5 gives them distances), and for an even number of
layers half of them is never read.

Read and compared with peft 0.21 (``peft/utils/save_and_load.py``, ``PeftModel.get_prompt``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from softprompts.errors import ArtifactError, ConfigError, PromptMismatchError, UnsupportedModelError, nearest
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.storage.directory import list_names, read_file, read_stable, write_directory
from softprompts.storage.manifest import MAX_MANIFEST_BYTES, MAX_TENSOR_BYTES
from softprompts.storage.match import IdentifiedModel
from softprompts.storage.recorded import parse_tensors, read_object
from softprompts.types import Geometry

__all__ = ["PEFT_MANIFEST_FILE", "PEFT_TENSOR_FILE", "export_peft", "import_peft", "is_peft", "peft_method"]

PEFT_MANIFEST_FILE = "adapter_config.json"
PEFT_TENSOR_FILE = "adapter_model.safetensors"

_KINDS = {
    "CARTRIDGE": "prefix",
    "CPT": "embedding",
    "MULTITASK_PROMPT_TUNING": "embedding",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "embedding",
    "P_TUNING": "embedding",
}
"""What PEFT's methods are as it saves them: for one task, without their encoders."""
_OTHER_METHODS = {
    "ADAPTION_PROMPT": "its prompts enter through a gate inside the attention, behind a softmax of their own",
    "TRAINABLE_TOKENS": "it changes rows of the embedding table, and with them the model",
}
_WEIGHTS_CHANGED = "it changes the model's weights and is no prompt"


def is_peft(directory: str | Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (Path(directory) / PEFT_MANIFEST_FILE).is_file()


def export_peft(
    prompt: SoftPrompt,
    directory: str | Path,
    *,
    model_name: str,
    method: Literal["plain", "cartridge"] = "plain",
    overwrite: bool = False,
) -> Path:
    """Write a prompt as PEFT would: ``PeftModel.from_pretrained(model, directory)`` then gives our logits.

    Two things differ in PEFT. Rows that are padded: it puts the padding between prompt and text and counts it
    (peft#1093). Sliding windows: there a prefix scrolls out of them like text, here it stays visible.

    Args:
        prompt: Any prompt for a decoder-only model, or an embedding prompt for an encoder-decoder.
        directory: A new or empty one, or, with ``overwrite``, an earlier export.
        model_name: What PEFT calls the base model.
        method: ``plain`` is prompt tuning or prefix-tuning; ``cartridge`` writes a prefix for PEFT's method of that
            name. P-tuning, CPT and multitask prompts are not written: PEFT takes what it loads there for the input of
            an encoder that is not in the file, and moves the prompt when it is trained on.
        overwrite: Replace an earlier export.

    Returns:
        The resolved directory.

    Raises:
        UnsupportedModelError: PEFT cannot represent the prompt: layers differ in heads, some layers have no prefix,
            it is an infix, or the prefix of an encoder-decoder, or the model is not on record.
        StorageError: The directory must not be replaced, or the disk refused.
    """
    geometry = prompt.geometry
    _check_representable(prompt, method)
    heads, size = _uniform_heads(geometry, needed=prompt.kind == "prefix")
    config: dict[str, Any] = {
        "base_model_name_or_path": model_name,
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": len({site.key.layer for site in geometry.sites}),
        "num_transformer_submodules": 2 if _has_encoder(geometry) else 1,
        "num_virtual_tokens": prompt.length,
        "task_type": "SEQ_2_SEQ_LM" if _has_encoder(geometry) else "CAUSAL_LM",
    }
    if method == "cartridge":
        config |= {"peft_type": "CARTRIDGE", "token_dim": heads * size, "num_frozen_tokens": 0}
    elif prompt.kind == "prefix":
        config |= {"peft_type": "PREFIX_TUNING", "token_dim": heads * size, "prefix_projection": False}
    else:
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": geometry.width, "prompt_tuning_init": "RANDOM"}
    table_PW = prompt.table_PW.float().cpu()
    if _has_encoder(geometry):
        table_PW = torch.cat([table_PW, torch.zeros_like(table_PW)])
    tensors = {"prompt_embeddings": table_PW.contiguous()}
    files = {
        PEFT_TENSOR_FILE: save_tensors(tensors, metadata={"format": "pt"}),
        PEFT_MANIFEST_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    return write_directory(
        directory, files, marker=PEFT_MANIFEST_FILE, known=[*files, "README.md"], overwrite=overwrite
    )


def import_peft(directory: str | Path, frozen: IdentifiedModel, *, task: int | None = None) -> SoftPrompt:
    """Read a prompt that PEFT saved.

    Args:
        directory: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        frozen: The model that it was made for. PEFT keeps no fingerprint, so only the shapes can be checked.
        task: For multitask prompt tuning: the number of the task, from 0, whose prompt is composed.

    Raises:
        ArtifactError: A file is missing or damaged, is a pickle, or holds a method that is no plain prompt.
        ConfigError: ``task`` is missing or there is no such task, or it is given and there are no tasks.
        PromptMismatchError: The shapes are not those of the model.
    """
    return read_stable(directory, lambda place: _import(place, frozen, task))


def peft_method(directory: str | Path) -> str:
    """PEFT's name for the method of an adapter, such as ``PREFIX_TUNING``; raises as :func:`import_peft` does."""
    return read_stable(directory, lambda place: str(_read_config(place).get("peft_type")))


def _import(directory: Path, frozen: IdentifiedModel, task: int | None) -> SoftPrompt:
    config = _read_config(directory)
    method = str(config.get("peft_type"))
    if method not in _KINDS:
        reason = _OTHER_METHODS.get(method, _WEIGHTS_CHANGED)
        raise ArtifactError(
            f"'{directory}' is a PEFT adapter of type '{method}', which cannot be imported: {reason}; "
            f"{nearest(method, _KINDS)}"
        )
    kind, geometry = _KINDS[method], frozen.geometry
    with_encoder = config.get("task_type") == "SEQ_2_SEQ_LM" or config.get("num_transformer_submodules") == 2
    _check_halves(directory, method, frozen, with_encoder)
    table_PW = _read_table(directory, method, task)
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
    if with_encoder and isinstance(length, int) and len(table_PW) == 2 * length:
        table_PW = table_PW[:length]
    if table_PW.ndim != 2 or table_PW.shape[1] != width or table_PW.shape[0] != length or length < 1:
        raise PromptMismatchError(
            f"the {kind} prompt in '{directory}' is {list(table_PW.shape)}, expected [{length}, {width}] for "
            f"'{frozen.name}'; name the model that it was made for"
        )
    return prompt_from_table(kind, geometry, table_PW)


def _has_encoder(geometry: Geometry) -> bool:
    return any(site.key.site == "encoder" for site in geometry.sites)


def _check_halves(directory: Path, method: str, frozen: IdentifiedModel, with_encoder: bool) -> None:
    """Refuse prompts of one kind of model for the other, and what PEFT makes of encoder-decoders beyond embeddings."""
    if with_encoder != _has_encoder(frozen.geometry):
        kinds = {True: "an encoder-decoder", False: "a decoder-only model"}
        raise PromptMismatchError(
            f"'{directory}' was made for {kinds[with_encoder]} and '{frozen.name}' is {kinds[not with_encoder]}; name "
            "the model that it was made for"
        )
    if with_encoder and _KINDS[method] == "prefix":
        raise ArtifactError(
            f"'{directory}' holds a prefix of an encoder-decoder, which cannot be imported: in PEFT it stands in the "
            "decoder's self-attention alone and moves the decoder's positions, so that keys and values alone do not "
            "give the same model; train it here, at all three sites"
        )
    if with_encoder and method == "MULTITASK_PROMPT_TUNING":
        raise ArtifactError(
            f"'{directory}' holds multitask prompts of an encoder-decoder, which cannot be imported: PEFT trains them "
            "with a second prompt in the decoder and generates without it, so that no prompt gives what it does"
        )


def _read_config(directory: Path) -> dict[str, Any]:
    names = list_names(directory)
    if PEFT_MANIFEST_FILE not in names:
        raise ArtifactError(f"'{directory}' holds no {PEFT_MANIFEST_FILE}, so it is no PEFT adapter")
    if PEFT_TENSOR_FILE not in names and "adapter_model.bin" in names:
        raise ArtifactError(
            f"'{directory}' holds a pickle, 'adapter_model.bin'; pickles are never loaded: save it again with PEFT's "
            "save_pretrained(..., safe_serialization=True)"
        )
    return read_object(directory / PEFT_MANIFEST_FILE, MAX_MANIFEST_BYTES)


def _read_table(directory: Path, method: str, task: int | None) -> Tensor:
    path = directory / PEFT_TENSOR_FILE
    tensors = parse_tensors(path, read_file(path, MAX_TENSOR_BYTES))
    multitask = method == "MULTITASK_PROMPT_TUNING"
    expected = {"prompt_embeddings", *(("prefix_task_cols", "prefix_task_rows") if multitask else ())}
    if set(tensors) != expected:
        found = ", ".join(sorted(tensors)[:4]) or "nothing"
        raise ArtifactError(
            f"'{path}' holds {found}, expected {' and '.join(sorted(expected))} alone: it is more than a prompt"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"'{name}' of '{path}' has values that are not finite numbers")
    table_PW = tensors["prompt_embeddings"].float()
    if multitask:
        return _composed(path, table_PW, tensors["prefix_task_cols"], tensors["prefix_task_rows"], task)
    if task is not None:
        raise ConfigError(f"'{directory}' holds one prompt, no multitask prompt; leave the number of the task out")
    return table_PW


def _composed(path: Path, table_PD: Tensor, columns_TPR: Tensor, rows_TRD: Tensor, task: int | None) -> Tensor:
    """One task's prompt: the shared one, scaled by a low-rank matrix (Wang et al. 2023)."""
    tasks = columns_TPR.shape[0]
    shapes = [list(tensor.shape) for tensor in (columns_TPR, rows_TRD)]
    fits = columns_TPR.ndim == rows_TRD.ndim == 3 and columns_TPR.shape[2] == rows_TRD.shape[1]
    if not fits or rows_TRD.shape[0] != tasks or [columns_TPR.shape[1], rows_TRD.shape[2]] != list(table_PD.shape):
        raise ArtifactError(
            f"the factors in '{path}' have the shapes {shapes[0]} and {shapes[1]}, which do not make a prompt of "
            f"{list(table_PD.shape)} per task"
        )
    if task is None or not 0 <= task < tasks:
        asked = "none was named" if task is None else f"{task} was asked for"
        raise ConfigError(f"'{path.parent}' holds prompts of {tasks} tasks (0 to {tasks - 1}) and {asked}; give --task")
    return table_PD * (columns_TPR[task].float() @ rows_TRD[task].float())


def _check_representable(prompt: SoftPrompt, method: str) -> None:
    """Refuse what has no form in PEFT."""
    geometry = prompt.geometry
    if prompt.kind == "prefix" and _has_encoder(geometry):
        raise UnsupportedModelError(
            "PEFT puts the prefix of an encoder-decoder into the decoder's self-attention alone, shares it between "
            "layers and moves the decoder's positions by its length; keep this prompt in the format of softprompts"
        )
    if prompt.kind not in ("prefix", "embedding") or (method == "cartridge" and prompt.kind != "prefix"):
        raise UnsupportedModelError(
            f"PEFT has no form for a prompt of kind '{prompt.kind}' as '{method}'; it knows embeddings in front of the "
            "input, and prefixes (also as cartridges)"
        )
    if prompt.is_infix:
        raise UnsupportedModelError(
            "PEFT puts every prompt in front of the text, and this one is an infix, trained between input and output; "
            "keep it in the format of softprompts"
        )
    if geometry.is_partial:
        raise UnsupportedModelError(
            "PEFT has to know the kind of model and its layers, and this prompt's model is not on record; bind the "
            "prompt to its model first"
        )
    if prompt.kind == "prefix":
        with torch.no_grad():
            reached = len(prompt().keys_values)
        if reached != len(geometry.sites):
            raise UnsupportedModelError(
                f"this prefix reaches {reached} of {len(geometry.sites)} layers; PEFT puts one into every layer, and "
                "keys of zeros would still take attention; keep this prompt in the format of softprompts"
            )


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
