"""``prompt.json``: what a saved prompt says about itself, and every check that needs no tensor.

The file carries a digest of itself (and the digest of the tensor file), so a changed bit anywhere is noticed. That
guards against damage, not against forgery: there is no signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from softprompts.config import decode, to_dict
from softprompts.errors import ArtifactError, ConfigError
from softprompts.storage.shapes import GeometryJson, geometry_from_json, geometry_to_json, layers_from_json
from softprompts.types import Geometry, LayerKey, MetricValue

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MAX_MANIFEST_BYTES",
    "MAX_TENSOR_BYTES",
    "ModelIdentity",
    "Origin",
    "ParameterCount",
    "PromptInfo",
    "TensorFile",
    "parse_manifest",
    "render_manifest",
]

FORMAT = "softprompts.prompt"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 20
MAX_TENSOR_BYTES = 4 << 30
"""Far above any real prompt: 200 positions of a model with 126 layers of 8 heads of 128 are 0.2 GiB."""

_MAX_NUMBER = 1 << 31
_MAX_SITES = 1 << 14
_MAX_TEXT = 512
_NO_DIGEST = "0" * 64
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers the prompt has."""

    trained: int
    """While it was trained, its reparametrization included."""
    stored: int
    """At rest: P times the width of one position."""


@dataclass(frozen=True)
class ModelIdentity:
    """The frozen LM that the prompt was made for; an empty text is what is not known."""

    name: str
    fingerprint: str
    """Of the weights before they were quantized: a prompt belongs to them however they are kept."""
    tokenizer_fingerprint: str
    quantization: str | None = None
    """How they were kept when the prompt was made; ``None``: plainly."""


@dataclass(frozen=True)
class Origin:
    """Where the prompt comes from."""

    task: str | None = None
    recipe: Mapping[str, Any] | None = None
    """The resolved recipe as plain mappings, lists and scalars."""
    metrics: Mapping[str, MetricValue] = field(default_factory=dict)
    seed: int | None = None
    source: str | None = None
    """The file that the prompt was imported from; ``None`` for one that was trained here."""
    created: str = ""
    """UTC, ISO 8601."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of softprompts, torch and transformers."""


@dataclass(frozen=True)
class TensorFile:
    """What ``prompt.safetensors`` must be."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class PromptInfo:
    """Everything that is known of a saved prompt besides its numbers."""

    kind: Literal["prefix", "embedding"]
    length: int
    """P."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Of the stored tensors."""
    parameters: ParameterCount
    geometry: Geometry
    model: ModelIdentity
    origin: Origin
    tensors: TensorFile
    layers: tuple[LayerKey, ...] | None = None
    """Those that a prefix reaches; ``None`` for all of them."""
    placement: Literal["prefix", "infix"] = "prefix"
    """In front of the text, or between input and output."""

    @property
    def unknown(self) -> tuple[str, ...]:
        """Keys of ``prompt.json`` that are ``null`` because the model is not known; empty as a rule."""
        if not self.geometry.is_partial:
            return ()
        geometry = ("family", "vocab_size", "max_positions", "sites")
        model = tuple(name for name, value in _model_to_json(self.model).items() if not value)
        return (*(f"geometry.{name}" for name in geometry), *(f"model.{name}" for name in model))

    @property
    def width(self) -> int:
        """W, numbers per position."""
        if self.kind == "embedding":
            return self.geometry.width
        return sum(site.width for site in self.geometry.reached(self.layers))


# --------------------------------------------------------------------------------------------------------------------
# PromptInfo -> bytes
# --------------------------------------------------------------------------------------------------------------------


def render_manifest(info: PromptInfo) -> bytes:
    """Write ``prompt.json``.

    Raises:
        ArtifactError: The file could not be read back: the recipe is not plain data, a name is not printable, ...
    """
    mapping = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "digest": _NO_DIGEST,
        **to_dict(info),
        "geometry": geometry_to_json(info.geometry),
        "model": _model_to_json(info.model),
    }
    if info.placement == "prefix":
        del mapping["placement"]  # left out, so that version 0.1 can read the file
    if info.layers is None:
        del mapping["layers"]  # here, too
    else:
        mapping["layers"] = [f"{site}.{layer}" for site, layer in info.layers]
    mapping["origin"]["metrics"] = {
        name: {"value": _finite_or_none(metric.value), "stderr": _finite_or_none(metric.stderr)}
        for name, metric in info.origin.metrics.items()
    }
    try:
        text = json.dumps(mapping, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        blank = text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the recipe or task of the prompt is not plain JSON data: {error}") from error
    content = blank.replace(_NO_DIGEST.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"prompt.json would have {len(content)} bytes, expected at most {MAX_MANIFEST_BYTES}; shorten the recipe"
        )
    parse_manifest(content)
    return content


def _model_to_json(model: ModelIdentity) -> dict[str, str | None]:
    mapping = {name: value or None for name, value in to_dict(model).items()}
    if model.quantization is None:
        del mapping["quantization"]  # left out, so that version 0.1 can read the file
    return mapping


def _finite_or_none(value: float | None) -> float | None:
    # JSON has no NaN, and a metric that failed is no reason to lose a trained prompt.
    return value if value is not None and math.isfinite(value) else None


# --------------------------------------------------------------------------------------------------------------------
# bytes -> PromptInfo
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MetricJson:
    value: float | None
    stderr: float | None


@dataclass(frozen=True)
class _OriginJson:
    task: str | None
    recipe: dict[str, Any] | None
    metrics: dict[str, _MetricJson]
    seed: int | None
    created: str
    versions: dict[str, str]
    source: str | None = None
    """Files of version 0.1 lack it."""


@dataclass(frozen=True)
class _ModelJson:
    name: str | None
    fingerprint: str | None
    tokenizer_fingerprint: str | None
    quantization: str | None = None


@dataclass(frozen=True)
class _PromptJson:
    kind: Literal["prefix", "embedding"]
    length: int
    dtype: Literal["float32", "float16", "bfloat16"]
    parameters: ParameterCount
    geometry: GeometryJson
    model: _ModelJson
    origin: _OriginJson
    tensors: TensorFile
    layers: tuple[str, ...] | None = None
    placement: Literal["prefix", "infix"] = "prefix"


def parse_manifest(content: bytes) -> PromptInfo:
    """Read ``prompt.json`` and check all that it says.

    Raises:
        ArtifactError: It is no JSON object of this format and version, its digest is wrong, a key is missing, unknown
            or of the wrong type, or a number is absurd.
    """
    # A checkout with Windows line ends is still the same file; nothing else may differ.
    content = content.replace(b"\r\n", b"\n")
    mapping = _load_json(content)
    if mapping.pop("format", None) != FORMAT:
        raise ArtifactError(f'prompt.json does not say "format": "{FORMAT}"; this is no prompt of softprompts')
    version = mapping.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"prompt.json has format version {version!r}, expected {FORMAT_VERSION}; "
            "update softprompts, or save the prompt again"
        )
    digest = mapping.pop("digest", None)
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ArtifactError("prompt.json has no digest of 64 hexadecimal digits; it was damaged or edited")
    if hashlib.sha256(content.replace(digest.encode(), _NO_DIGEST.encode(), 1)).hexdigest() != digest:
        raise ArtifactError(
            "prompt.json does not match its own digest; it was damaged or edited, so save or copy the prompt again"
        )
    try:
        info = _to_info(decode(_PromptJson, mapping))
    except ConfigError as error:
        raise ArtifactError(f"prompt.json: {error}") from error
    _check(info)
    return info


def _load_json(content: bytes) -> dict[str, Any]:
    try:
        mapping = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        json.dumps(mapping, ensure_ascii=False).encode("utf-8")  # lone surrogates would fail later, when printed
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"prompt.json is no valid JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise ArtifactError(f"prompt.json holds a {type(mapping).__name__}, expected an object")
    return mapping


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key appears twice")
    return mapping


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _to_info(raw: _PromptJson) -> PromptInfo:
    metrics = {
        name: MetricValue(math.nan if metric.value is None else metric.value, metric.stderr, name)
        for name, metric in raw.origin.metrics.items()
    }
    origin, geometry = raw.origin, geometry_from_json(raw.geometry)
    return PromptInfo(
        kind=raw.kind,
        length=raw.length,
        dtype=raw.dtype,
        parameters=raw.parameters,
        geometry=geometry,
        model=ModelIdentity(
            raw.model.name or "",
            raw.model.fingerprint or "",
            raw.model.tokenizer_fingerprint or "",
            raw.model.quantization,
        ),
        origin=Origin(origin.task, origin.recipe, metrics, origin.seed, origin.source, origin.created, origin.versions),
        tensors=raw.tensors,
        layers=layers_from_json(raw.layers, geometry),
        placement=raw.placement,
    )


def _check(info: PromptInfo) -> None:
    geometry = info.geometry
    numbers = {"length": info.length, "geometry.width": geometry.width}
    if not geometry.is_partial:
        numbers["geometry.vocab_size"] = geometry.vocab_size
    elif info.kind != "embedding":
        raise ArtifactError("prompt.json describes a prefix for a model of which only the width is known")
    if geometry.max_positions is not None:
        numbers["geometry.max_positions"] = geometry.max_positions
    if len(geometry.sites) > _MAX_SITES:
        raise ArtifactError(f"prompt.json lists {len(geometry.sites)} layers, expected at most {_MAX_SITES}")
    for site in geometry.sites:
        place = f"geometry.sites {site.key.site}.{site.key.layer}"
        if not re.fullmatch("[a-z][a-z_]{0,31}", site.key.site) or not 0 <= site.key.layer < _MAX_NUMBER:
            raise ArtifactError(
                f"prompt.json has a layer {site.key!r}, expected a site in small letters and a number from 0"
            )
        for name, value in (("kv_heads", site.kv_heads), ("key_size", site.key_size), ("value_size", site.value_size)):
            numbers[f"{place} {name}"] = value
        if site.window is not None:
            numbers[f"{place} window"] = site.window
    for name, number in numbers.items():
        if not 1 <= number < _MAX_NUMBER:
            raise ArtifactError(f"prompt.json: '{name}' is {number}, expected a number from 1 to {_MAX_NUMBER - 1}")
    if len({site.key for site in geometry.sites}) != len(geometry.sites):
        raise ArtifactError("prompt.json lists a layer twice")
    if info.kind != "prefix" and info.layers is not None:
        raise ArtifactError("prompt.json names layers, but only a prefix reaches some and not others")
    if info.kind == "prefix" and not geometry.sites:
        raise ArtifactError("prompt.json describes a prefix for a model without any layer of keys and values")
    stored = info.length * info.width
    if info.parameters.stored != stored or info.parameters.trained < 0:
        raise ArtifactError(f"prompt.json counts {info.parameters}, but its shapes give {stored} stored parameters")
    if stored * _ITEM_BYTES[info.dtype] > MAX_TENSOR_BYTES:
        raise ArtifactError(
            f"prompt.json describes {stored} parameters, more than {MAX_TENSOR_BYTES} bytes; refused unread"
        )
    if not re.fullmatch("[0-9a-f]{64}", info.tensors.sha256) or not 0 < info.tensors.size_bytes <= 2 * MAX_TENSOR_BYTES:
        raise ArtifactError(f"prompt.json describes an impossible tensor file: {info.tensors}")
    _check_texts(info)


def _check_texts(info: PromptInfo) -> None:
    """Refuse what would garble a terminal or a card: these texts are printed."""
    origin = info.origin
    texts = {
        "geometry.family": info.geometry.family,
        "model.name": info.model.name,
        "model.fingerprint": info.model.fingerprint,
        "model.tokenizer_fingerprint": info.model.tokenizer_fingerprint,
        "model.quantization": info.model.quantization or "",
        "origin.task": origin.task or "",
        "origin.source": origin.source or "",
        "origin.created": origin.created,
        **{f"origin.metrics {name!r}": name for name in origin.metrics},
        **{f"origin.versions {name!r}": f"{name} {version}" for name, version in origin.versions.items()},
    }
    for name, text in texts.items():
        if not text.isprintable() or len(text) > _MAX_TEXT:
            raise ArtifactError(
                f"prompt.json: '{name}' is {text[:40]!r}, expected at most {_MAX_TEXT} printable characters"
            )
