"""A soft prompt at rest: a directory of ``prompt.safetensors``, ``prompt.json`` and ``README.md``. Never pickle.

Writing is atomic (:mod:`softprompts.storage.directory`). Reading believes nothing: sizes are checked before a byte is
read, digests before a tensor is made, names, shapes, dtypes and values before a prompt is. The format is described in
``docs/reference/artifact-format.md``.

Shape letters: P prompt length, N KV heads, H head size, D width, W numbers per position (D, or all layers together).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from softprompts import __version__
from softprompts.config import to_dict
from softprompts.errors import ArtifactError, PromptMismatchError
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.prompts.prefix import flatten_states, unflatten_states
from softprompts.storage.card import render_card
from softprompts.storage.directory import list_names, read_file, read_stable, write_directory
from softprompts.storage.manifest import (
    MAX_MANIFEST_BYTES,
    Origin,
    ParameterCount,
    PromptInfo,
    TensorFile,
    parse_manifest,
    render_manifest,
)
from softprompts.storage.match import IdentifiedModel, identity_of, matched_geometry
from softprompts.storage.recorded import read_recorded_tensors
from softprompts.storage.shapes import tensor_shapes
from softprompts.types import MetricValue

__all__ = [
    "CARD_FILE",
    "MANIFEST_FILE",
    "TENSOR_FILE",
    "LoadedPrompt",
    "load_prompt",
    "read_info",
    "render_prompt",
    "save_prompt",
]

TENSOR_FILE = "prompt.safetensors"
MANIFEST_FILE = "prompt.json"
CARD_FILE = "README.md"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class LoadedPrompt:
    """A prompt read from disk and what is known of it."""

    prompt: SoftPrompt
    """Folded: without reparametrization."""
    info: PromptInfo


def save_prompt(
    prompt: SoftPrompt,
    directory: str | Path,
    *,
    frozen: IdentifiedModel,
    task: str | None = None,
    recipe: Any = None,
    metrics: Mapping[str, MetricValue | float] | None = None,
    seed: int | None = None,
    source: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> Path:
    """Save what a prompt has learned, atomically: the directory appears complete or not at all.

    Args:
        prompt: Any prompt; its folded table is stored, its reparametrization is not (checkpoints keep that).
        directory: Where. A prompt that is there already is only replaced with ``overwrite``, anything else never.
        frozen: The model that the prompt was made for.
        task: Name of the task.
        recipe: The resolved recipe, a config dataclass or plain data.
        metrics: Scores by name, plain numbers where there is no standard error.
        seed: Of the training; taken from ``recipe`` where it is not given.
        source: The file that the prompt was imported from.
        dtype: What the tensors are stored as; a prompt is trained, and comes back, in float32.
        overwrite: Replace an older prompt.

    Returns:
        The resolved directory.

    Raises:
        ArtifactError: The prompt cannot be stored: it has values that are not finite, or the recipe is no plain data.
        PromptMismatchError: The prompt was made for a model of other shapes than ``frozen``.
        StorageError: The directory must not be replaced, or the disk refused. What was there before is untouched.
    """
    plain_recipe = to_dict(recipe)
    origin = Origin(
        task=task,
        recipe=plain_recipe,
        metrics={name: _as_metric(name, value) for name, value in (metrics or {}).items()},
        seed=_seed_of(plain_recipe) if seed is None else seed,
        source=source,
    )
    files = render_prompt(prompt, frozen=frozen, origin=origin, dtype=dtype)
    return write_directory(directory, files, marker=MANIFEST_FILE, known=files, overwrite=overwrite)


def render_prompt(
    prompt: SoftPrompt,
    *,
    frozen: IdentifiedModel,
    origin: Origin,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> dict[str, bytes]:
    """Make the three files of a saved prompt, by name.

    Args:
        prompt: Any prompt; its folded table is stored.
        frozen: The model that the prompt was made for.
        origin: Where it comes from; date and versions are filled in.
        dtype: What the tensors are stored as.

    Raises:
        ArtifactError: The prompt cannot be stored: it has values that are not finite, or the recipe is no plain data.
        PromptMismatchError: The prompt was made for a model of other shapes than ``frozen``.
    """
    if prompt.geometry != frozen.geometry:
        raise PromptMismatchError(
            f"the prompt has the geometry {prompt.geometry}, but '{frozen.name}' has {frozen.geometry}; "
            "nothing was written; pass the model that the prompt was trained on"
        )
    table_PW = prompt.table_PW.detach().cpu().to(_DTYPES[dtype])
    if not bool(torch.isfinite(table_PW).all()):
        raise ArtifactError(
            f"the prompt has values that are not finite in {dtype}; nothing was written; if the training diverged, "
            "train with a smaller learning rate"
        )
    content = save_tensors(_split(table_PW, prompt), metadata={"format": "pt"})
    info = PromptInfo(
        kind=_kind(prompt.kind),
        length=prompt.length,
        dtype=dtype,
        parameters=ParameterCount(trained=prompt.trained_parameters, stored=table_PW.numel()),
        geometry=prompt.geometry,
        model=identity_of(frozen),
        origin=replace(origin, created=datetime.now(UTC).isoformat(timespec="seconds"), versions=_versions()),
        tensors=TensorFile(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)),
        layers=prompt.layers,
        placement="infix" if prompt.is_infix else "prefix",
    )
    return {TENSOR_FILE: content, MANIFEST_FILE: render_manifest(info), CARD_FILE: render_card(info).encode("utf-8")}


def read_info(directory: str | Path) -> PromptInfo:
    """Read ``prompt.json`` alone: what a prompt is, without its tensors.

    Raises:
        ArtifactError: The directory or the file is missing, damaged or of another format.
    """
    return read_stable(directory, _read_manifest)


def load_prompt(
    directory: str | Path, frozen: IdentifiedModel | None = None, *, allow_other_model: bool = False
) -> LoadedPrompt:
    """Read a prompt and check all of it.

    Args:
        directory: What :func:`save_prompt` wrote.
        frozen: The model that will carry it; ``None`` checks the directory alone.
        allow_other_model: Go on where the weights, the tokenizer or the family differ, as long as the shapes fit.

    Raises:
        ArtifactError: Something is missing, damaged, of another format or version, or a pickle (never loaded).
        PromptMismatchError: The prompt was made for another model; the message says in what they differ.
    """
    return read_stable(directory, lambda place: _load(place, frozen, allow_other_model))


def _load(directory: Path, frozen: IdentifiedModel | None, allow_other_model: bool) -> LoadedPrompt:
    info = _read_manifest(directory)
    geometry = (
        info.geometry
        if frozen is None
        else matched_geometry(info, frozen, path=directory, allow_other_model=allow_other_model)
    )
    path = directory / TENSOR_FILE
    recorded = info.tensors
    tensors = read_recorded_tensors(
        path, sha256=recorded.sha256, manifest=MANIFEST_FILE, size_bytes=recorded.size_bytes
    )
    table_PW = _join(path, tensors, info)
    return LoadedPrompt(prompt_from_table(info.kind, geometry, table_PW, info.layers, info.placement), info)


def _read_manifest(directory: Path) -> PromptInfo:
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ArtifactError(f"'{directory}' {what}, expected the directory of a prompt, with {MANIFEST_FILE} in it")
    names = list_names(directory)
    if MANIFEST_FILE not in names:
        if "adapter_config.json" in names:
            raise ArtifactError(f"'{directory}' is a PEFT adapter, no prompt of softprompts; see `softprompts convert`")
        pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
        if pickles:
            raise ArtifactError(
                f"'{directory}' holds '{pickles[0]}' and no {MANIFEST_FILE}; "
                "pickled files can run code and are never loaded"
            )
        raise ArtifactError(f"'{directory}' holds no {MANIFEST_FILE}, so it is no saved prompt")
    try:
        return parse_manifest(read_file(directory / MANIFEST_FILE, MAX_MANIFEST_BYTES))
    except ArtifactError as error:
        raise ArtifactError(f"the prompt in '{directory}' is refused: {error}") from error


# --------------------------------------------------------------------------------------------------------------------
# Flat table <-> readable tensors
# --------------------------------------------------------------------------------------------------------------------


def _split(table_PW: Tensor, prompt: SoftPrompt) -> dict[str, Tensor]:
    if prompt.kind == "embedding":
        return {"embeddings": table_PW.contiguous()}
    tensors: dict[str, Tensor] = {}
    for (site, layer), (keys_NPH, values_NPH) in unflatten_states(prompt.geometry, table_PW, prompt.layers).items():
        tensors[f"{site}.{layer}.keys"] = keys_NPH.contiguous()
        tensors[f"{site}.{layer}.values"] = values_NPH.contiguous()
    return tensors


def _join(path: Path, tensors: Mapping[str, Tensor], info: PromptInfo) -> Tensor:
    shapes = tensor_shapes(info.kind, info.length, info.geometry, info.layers)
    for what, names in (
        ("lacks", shapes.keys() - tensors.keys()),
        ("holds the unknown", tensors.keys() - shapes.keys()),
    ):
        if names:
            raise ArtifactError(
                f"'{path}' {what} tensor '{min(names)}'; expected {len(shapes)} tensors as in prompt.json"
            )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != _DTYPES[info.dtype]:
            got = f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"
            raise ArtifactError(f"tensor '{name}' of '{path}' is {got}, expected {info.dtype} {list(shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor '{name}' of '{path}' has values that are not finite; train or save it again")
    if info.kind == "embedding":
        return tensors["embeddings"].float()
    pairs = {
        site.key: (
            tensors[f"{site.key.site}.{site.key.layer}.keys"],
            tensors[f"{site.key.site}.{site.key.layer}.values"],
        )
        for site in info.geometry.reached(info.layers)
    }
    return flatten_states(info.geometry, pairs, info.layers)


# --------------------------------------------------------------------------------------------------------------------
# Small print
# --------------------------------------------------------------------------------------------------------------------


def _kind(kind: str) -> Any:
    assert kind in ("prefix", "embedding"), f"prompts of kind '{kind}' have no place in format version 1"
    return kind


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_metric(name: str, value: MetricValue | float) -> MetricValue:
    return value if isinstance(value, MetricValue) else MetricValue(float(value), None, name)


def _seed_of(recipe: Any) -> int | None:
    training = recipe.get("training") if isinstance(recipe, Mapping) else None
    seed = training.get("seed") if isinstance(training, Mapping) else None
    return seed if isinstance(seed, int) else None


def _versions() -> dict[str, str]:
    return {
        "softprompts": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
