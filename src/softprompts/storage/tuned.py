"""Tuned weights at rest: a directory of ``tuned.json`` and the weights that differ from those of the frozen model.

What tunes some of a model's weights (its top layers) or adds some (adapters of other libraries) leaves far less behind
than a model. ``tuned.json`` says for which model that is, with which recipe it was made, and what the weights' digest
is. A delta keeps its weights in ``delta.safetensors``, under the names that they have in the model. Never pickle.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from softprompts import __version__
from softprompts.config import decode, to_dict
from softprompts.errors import ArtifactError, ConfigError, PromptMismatchError
from softprompts.models import FrozenLM
from softprompts.storage.directory import read_stable, write_directory
from softprompts.storage.manifest import MAX_MANIFEST_BYTES, ModelIdentity
from softprompts.storage.match import identity_of
from softprompts.storage.recorded import read_object, read_recorded_tensors

__all__ = [
    "DELTA_FILE",
    "TUNED_FILE",
    "TunedInfo",
    "check_model",
    "is_tuned",
    "load_delta",
    "read_tuned",
    "save_delta",
    "save_tuned",
]

TUNED_FILE = "tuned.json"
DELTA_FILE = "delta.safetensors"


@dataclass(frozen=True)
class TunedInfo:
    """What is known of tuned weights."""

    method: str
    """As in the recipe."""
    model: ModelIdentity
    weights_file: str
    sha256: str
    """Of that file."""
    stored_parameters: int
    """Numbers in it."""
    task: str | None = None
    recipe: Mapping[str, Any] | None = None
    """The resolved recipe as plain mappings, lists and scalars."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    version: str = ""
    """Of softprompts."""


def is_tuned(directory: str | Path) -> bool:
    """Whether a directory holds tuned weights."""
    return (Path(directory) / TUNED_FILE).is_file()


def save_tuned(
    files: Mapping[str, bytes],
    directory: str | Path,
    *,
    weights_file: str,
    stored_parameters: int,
    frozen: FrozenLM,
    recipe: Any,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write tuned weights with their ``tuned.json``, atomically; an older directory of this kind is replaced.

    Args:
        files: Contents by name, ``weights_file`` among them.
        directory: Where.
        weights_file: The file that holds the weights.
        stored_parameters: Numbers in it.
        frozen: The model that they belong to.
        recipe: The resolved recipe (:class:`softprompts.config.TrainRecipe`).
        metrics: Scores on the dev split.

    Raises:
        StorageError: The directory holds something else, or the disk refused.
    """
    info = TunedInfo(
        method=recipe.method,
        model=identity_of(frozen),
        weights_file=weights_file,
        sha256=hashlib.sha256(files[weights_file]).hexdigest(),
        stored_parameters=stored_parameters,
        task=recipe.task.name,
        recipe=to_dict(recipe),
        metrics=dict(metrics or {}),
        version=__version__,
    )
    text = json.dumps(to_dict(info), indent=2, ensure_ascii=False) + "\n"
    content = {TUNED_FILE: text.encode("utf-8"), **files}
    return write_directory(directory, content, marker=TUNED_FILE, known=content, overwrite=True)


def save_delta(
    weights: Mapping[str, Tensor],
    directory: str | Path,
    *,
    frozen: FrozenLM,
    recipe: Any,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Save the weights of a model that were changed; see :func:`save_tuned`.

    Args:
        weights: By their names in the model.
        directory: Where.
        frozen: The model as it was before.
        recipe: The resolved recipe.
        metrics: Scores on the dev split.
    """
    content = save_tensors({name: value.contiguous() for name, value in weights.items()}, metadata={"format": "pt"})
    stored = sum(value.numel() for value in weights.values())
    files = {DELTA_FILE: content}
    return save_tuned(
        files,
        directory,
        weights_file=DELTA_FILE,
        stored_parameters=stored,
        frozen=frozen,
        recipe=recipe,
        metrics=metrics,
    )


def read_tuned(directory: str | Path) -> TunedInfo:
    """Read ``tuned.json``.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    return read_stable(directory, _read_info)


def _read_info(place: Path) -> TunedInfo:
    path = place / TUNED_FILE
    mapping = read_object(path, MAX_MANIFEST_BYTES)
    try:
        info = decode(TunedInfo, mapping)
    except ConfigError as error:
        raise ArtifactError(f"'{path}' is damaged or of another version: {error}; train again") from error
    if info.weights_file in ("", ".", "..") or set(info.weights_file) & set("/\\\0"):
        raise ArtifactError(
            f"'{path}' says that its weights are in '{info.weights_file}', expected the name of a file beside it; "
            "it was changed by hand, so take it from where it was made, or train again"
        )
    return info


def check_model(info: TunedInfo, frozen: FrozenLM, directory: str | Path) -> None:
    """Refuse a model that tuned weights are not for.

    Raises:
        PromptMismatchError: Its weights or its tokenizer are others.
    """
    for what, wanted, got in (
        ("weights", info.model.fingerprint, frozen.fingerprint),
        ("tokenizer", info.model.tokenizer_fingerprint, frozen.tokenizer_fingerprint),
        ("quantization", info.model.quantization, frozen.quantization),
    ):
        if wanted != got:
            raise PromptMismatchError(
                f"'{directory}' was tuned on '{info.model.name}', whose {what} ({wanted}) are not those of "
                f"'{frozen.name}' ({got}); load the model that it was tuned on"
            )


@torch.no_grad()
def load_delta(directory: str | Path, frozen: FrozenLM, *, in_place: bool = False) -> FrozenLM:
    """Put changed weights into a model.

    Args:
        directory: What :func:`save_delta` wrote.
        frozen: The model that they were made from.
        in_place: Change that model's own weights, and spend no memory on a copy; ``frozen`` must not be used any more.

    Returns:
        The tuned model, frozen.

    Raises:
        ArtifactError: A file is missing or damaged, or names weights that the model does not have.
        PromptMismatchError: They were made from another model.
    """

    def read(place: Path) -> tuple[Path, dict[str, Tensor]]:
        info = _read_info(place)
        check_model(info, frozen, directory)
        path = place / info.weights_file
        return path, read_recorded_tensors(path, sha256=info.sha256, manifest=TUNED_FILE)

    path, weights = read_stable(directory, read)
    model = frozen.release() if in_place else copy.deepcopy(frozen.model)
    own = dict(model.named_parameters())
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise ArtifactError(f"'{path}' holds '{name}' {list(value.shape)}, which '{frozen.name}' does not have")
        own[name].copy_(value)
    return FrozenLM.from_model(model, frozen.tokenizer, name=f"{frozen.name}-tuned")
