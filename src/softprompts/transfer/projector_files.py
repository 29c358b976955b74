"""A trained projector at rest: a directory of ``projector.safetensors`` and ``projector.json``. Never pickle.

It can be applied to any prompt of the source model of the kind and length that it was trained for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from softprompts import __version__
from softprompts.config import ProjectorConfig, decode, to_dict
from softprompts.errors import ArtifactError, ConfigError, PromptMismatchError
from softprompts.storage.directory import read_stable, write_directory
from softprompts.storage.manifest import MAX_MANIFEST_BYTES, ModelIdentity
from softprompts.storage.match import IdentifiedModel, identity_of
from softprompts.storage.recorded import read_object, read_recorded_tensors
from softprompts.storage.shapes import GeometryJson, geometry_from_json, geometry_to_json, layers_from_json
from softprompts.transfer.projector import Projector, PromptSpace

__all__ = ["MANIFEST_FILE", "TENSOR_FILE", "LoadedProjector", "load_projector", "save_projector"]

TENSOR_FILE = "projector.safetensors"
MANIFEST_FILE = "projector.json"
_FORMAT = "softprompts.projector"
_MAX_TENSOR_BYTES = 8 << 30


@dataclass(frozen=True)
class LoadedProjector:
    """A projector read from disk and what is known of it."""

    projector: Projector
    source_model: ModelIdentity
    target_model: ModelIdentity
    training: Mapping[str, Any]
    """How it was trained, as it was given to :func:`save_projector`."""


@dataclass(frozen=True)
class _Side:
    model: ModelIdentity
    geometry: GeometryJson
    layers: tuple[str, ...] | None


@dataclass(frozen=True)
class _Manifest:
    format: str
    version: str
    kind: str
    length: int
    source: _Side
    target: _Side
    config: ProjectorConfig
    training: dict[str, Any]
    sha256: str
    size_bytes: int


def save_projector(
    projector: Projector,
    directory: str | Path,
    *,
    source: IdentifiedModel,
    target: IdentifiedModel,
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a projector, atomically.

    Args:
        projector: Trained or not.
        directory: Where. A projector that is there already is only replaced with ``overwrite``, anything else never.
        source: The model whose prompts go in.
        target: The model whose prompts come out.
        training: How it was trained: tasks, objective, losses (plain data).
        overwrite: Replace an older projector.

    Raises:
        ArtifactError: It has weights that are not finite.
        PromptMismatchError: It was made for models of other shapes.
        StorageError: The directory must not be replaced, or the disk refused.
    """
    for side, frozen in ((projector.source, source), (projector.target, target)):
        if side.geometry != frozen.geometry:
            raise PromptMismatchError(
                f"the projector is for the geometry {side.geometry}, but '{frozen.name}' has {frozen.geometry}; pass "
                "the models that it was trained for"
            )
    tensors = {name: value.detach().cpu().contiguous() for name, value in projector.state_dict().items()}
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise ArtifactError(
            "the projector has weights that are not finite; nothing was written; train with a smaller learning rate"
        )
    content = save_tensors(tensors, metadata={"format": "pt"})
    manifest = {
        "format": _FORMAT,
        "version": __version__,
        "kind": projector.source.kind,
        "length": projector.source.length,
        "source": _side(projector.source, source),
        "target": _side(projector.target, target),
        "config": to_dict(projector.config),
        "training": dict(training or {}),
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
    }
    files = {TENSOR_FILE: content, MANIFEST_FILE: (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()}
    return write_directory(directory, files, marker=MANIFEST_FILE, known=files, overwrite=overwrite)


def _side(space: PromptSpace, frozen: IdentifiedModel) -> dict[str, Any]:
    return {
        "model": to_dict(identity_of(frozen)),
        "geometry": geometry_to_json(space.geometry),
        "layers": None if space.layers is None else [f"{site}.{layer}" for site, layer in space.layers],
    }


def load_projector(
    directory: str | Path, *, source: IdentifiedModel | None = None, target: IdentifiedModel | None = None
) -> LoadedProjector:
    """Read a projector and check all of it.

    Args:
        directory: What :func:`save_projector` wrote.
        source: The model whose prompts will go in; ``None`` checks nothing of it.
        target: The model whose prompts will come out.

    Raises:
        ArtifactError: Something is missing, damaged or of another format.
        PromptMismatchError: It was made for another model.
    """
    return read_stable(directory, lambda place: _load(place, source, target))


def _load(directory: Path, source: IdentifiedModel | None, target: IdentifiedModel | None) -> LoadedProjector:
    manifest = _read_manifest(directory)
    for what, side, frozen in (("source", manifest.source, source), ("target", manifest.target, target)):
        if frozen is not None and side.model.fingerprint != frozen.fingerprint:
            raise PromptMismatchError(
                f"the projector in '{directory}' has the {what} model '{side.model.name}' ({side.model.fingerprint}), "
                f"got '{frozen.name}' ({frozen.fingerprint}); load the model that it was trained for"
            )
    if not 0 < manifest.size_bytes <= _MAX_TENSOR_BYTES:
        raise ArtifactError(f"'{directory / MANIFEST_FILE}' describes a file of {manifest.size_bytes} bytes; refused")
    path = directory / TENSOR_FILE
    tensors = read_recorded_tensors(
        path, sha256=manifest.sha256, manifest=MANIFEST_FILE, size_bytes=manifest.size_bytes
    )
    try:
        with torch.device("meta"):  # nothing is allocated for what a manifest says before a file proves it
            projector = Projector(_space(manifest, manifest.source), _space(manifest, manifest.target), manifest.config)
        projector.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"the projector in '{directory}' does not have the shapes it says: {error}") from error
    return LoadedProjector(projector, manifest.source.model, manifest.target.model, manifest.training)


def _space(manifest: _Manifest, side: _Side) -> PromptSpace:
    geometry = geometry_from_json(side.geometry)
    return PromptSpace(manifest.kind, manifest.length, geometry, layers_from_json(side.layers, geometry))


def _read_manifest(directory: Path) -> _Manifest:
    path = directory / MANIFEST_FILE
    mapping = read_object(path, MAX_MANIFEST_BYTES)
    try:
        manifest = decode(_Manifest, mapping)
    except ConfigError as error:
        raise ArtifactError(f"'{path}' describes no projector of this version: {error}") from error
    if manifest.format != _FORMAT or manifest.kind not in ("embedding", "prefix"):
        raise ArtifactError(f"'{path}' says '{manifest.format}' of kind '{manifest.kind}', expected '{_FORMAT}'")
    return manifest
