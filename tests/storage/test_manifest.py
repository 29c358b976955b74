"""``prompt.json``: what it may say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompts.errors import ArtifactError
from softprompts.storage import ModelIdentity, Origin, ParameterCount, PromptInfo
from softprompts.storage.manifest import TensorFile, parse_manifest, render_manifest
from softprompts.storage.shapes import tensor_shapes
from softprompts.types import Geometry, KeyValueSite, LayerKey, MetricValue

NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), max_size=20)
SIZES = st.integers(1, 64)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def infos(draw: st.DrawFn) -> PromptInfo:
    keys = draw(
        st.lists(
            st.builds(LayerKey, st.sampled_from(["self", "encoder", "cross"]), st.integers(0, 99)),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    sites = tuple(KeyValueSite(key, draw(SIZES), draw(SIZES), draw(SIZES), draw(st.none() | SIZES)) for key in keys)
    geometry = Geometry(draw(NAMES), draw(SIZES), draw(SIZES), draw(st.none() | SIZES), sites)
    kind, length = draw(st.sampled_from(["prefix", "embedding"])), draw(SIZES)
    width = geometry.width if kind == "embedding" else geometry.prefix_width
    names = draw(st.lists(NAMES, max_size=3, unique=True))
    return PromptInfo(
        kind=kind,
        length=length,
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        parameters=ParameterCount(draw(st.integers(0, 10**9)), length * width),
        geometry=geometry,
        model=draw(st.builds(ModelIdentity, NAMES, NAMES, NAMES)),
        origin=Origin(
            task=draw(st.none() | NAMES),
            recipe=draw(st.none() | st.dictionaries(NAMES, PLAIN, max_size=3)),
            metrics={name: MetricValue(draw(FINITE), draw(st.none() | FINITE), name) for name in names},
            seed=draw(st.none() | st.integers()),
            created=draw(NAMES),
            versions=draw(st.dictionaries(NAMES, NAMES, max_size=3)),
        ),
        tensors=TensorFile(draw(st.text("0123456789abcdef", min_size=64, max_size=64)), draw(st.integers(1, 10**9))),
    )


@settings(max_examples=60, deadline=None)
@given(info=infos())
def test_whatever_is_written_is_read_back(info: PromptInfo):
    assert parse_manifest(render_manifest(info)) == info


@pytest.fixture
def sealed(saved: Path) -> Callable[[Callable[[dict[str, Any]], Any]], bytes]:
    """Change what a manifest says and put the digest right, as another program could."""

    def seal(change: Callable[[dict[str, Any]], Any]) -> bytes:
        mapping = json.loads((saved / "prompt.json").read_text(encoding="utf-8"))
        mapping["digest"] = "0" * 64
        change(mapping)
        text = json.dumps(mapping).encode()
        return text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)

    return seal


def setting(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(mapping: Any) -> None:
        for key in path[:-1]:
            mapping = mapping[key]
        mapping[path[-1]] = value

    return change


def test_another_layout_of_the_same_content_is_read(sealed):
    assert parse_manifest(sealed(lambda mapping: None)).length == 3


WRONG = [
    (setting("format", value="another"), "no prompt of softprompts"),
    (setting("format_version", value=2), "format version 2, expected 1; update"),
    (setting("format_version", value="1"), "format version '1'"),
    (setting("format_version", value=True), "format version True"),
    (setting("digest", value=None), "no digest"),
    (setting("digest", value="0" * 63), "no digest"),
    (setting("kind", value="prefiks"), "did you mean 'prefix'"),
    (setting("length", value=0), "'length' is 0"),
    (setting("length", value=-3), "'length' is -3"),
    (setting("length", value=1 << 31), "'length' is 2147483648"),
    (setting("length", value=4), "stored parameters"),
    (setting("length", value="three"), "'length' is 'three'"),
    (setting("length", value=None), "'length' is None"),
    (setting("dtype", value="float64"), "'dtype' is 'float64'"),
    (setting("licence", value="mine"), "unknown key 'licence'"),
    (setting("geometry", "layers", value=3), "unknown key 'geometry.layers'"),
    (lambda m: m.pop("model"), "missing key 'model'"),
    (lambda m: m["model"].pop("fingerprint"), "missing key 'model.fingerprint'"),
    (setting("geometry", "width", value=0), "'geometry.width' is 0"),
    (setting("geometry", "sites", 0, "kv_heads", value=0), "kv_heads' is 0"),
    (setting("geometry", "sites", 1, "layer", value=0), "lists a layer twice"),
    (setting("geometry", "sites", 0, "site", value="../x"), "expected a site in small letters"),
    (setting("geometry", "sites", 0, "layer", value=-1), "expected a site in small letters"),
    (setting("geometry", "sites", value=[{}] * 3), "missing key"),
    (setting("parameters", "stored", value=1), "stored parameters"),
    (setting("parameters", "trained", value=-1), "stored parameters"),
    (setting("tensors", "sha256", value="../../etc/passwd"), "impossible tensor file"),
    (setting("tensors", "size_bytes", value=-1), "impossible tensor file"),
    (setting("tensors", "size_bytes", value=1 << 60), "impossible tensor file"),
    (setting("origin", "metrics", value={"bleu": {"value": "high", "stderr": None}}), "origin.metrics.bleu.value"),
    (setting("origin", "task", value="\x1b[2J"), "printable"),
    (setting("model", "name", value="a\nb"), "printable"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_manifest_that_says_nonsense_is_refused(change: Callable[[dict[str, Any]], Any], said: str, sealed):
    with pytest.raises(ArtifactError, match=said.replace(".", "[.]")):
        parse_manifest(sealed(change))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"\xff",
     b'"\\ud800"',
     b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "list", "null", "open", "deep", "nan", "infinite", "twice", "utf8", "surrogate", "digits"],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(content: bytes):
    with pytest.raises(ArtifactError, match=r"prompt\.json"):
        parse_manifest(content)


def test_a_prompt_that_would_fill_the_memory_is_refused(sealed):
    def change(mapping: dict[str, Any]) -> None:
        mapping["length"] = 1 << 30
        width = mapping["parameters"]["stored"] // 3
        mapping["parameters"]["stored"] = width << 30

    with pytest.raises(ArtifactError, match="refused unread"):
        parse_manifest(sealed(change))


def test_shapes_are_those_of_one_position_times_the_length():
    sites = (KeyValueSite(LayerKey("encoder", 0), 2, 4, 6), KeyValueSite(LayerKey("cross", 0), 1, 3, 3))
    geometry = Geometry("t5", 12, 50, None, sites)
    assert tensor_shapes("embedding", 5, geometry) == {"embeddings": (5, 12)}
    assert tensor_shapes("prefix", 5, geometry) == {
        "encoder.0.keys": (2, 5, 4),
        "encoder.0.values": (2, 5, 6),
        "cross.0.keys": (1, 5, 3),
        "cross.0.values": (1, 5, 3),
    }
    with pytest.raises(ArtifactError, match="without any layer"):
        render_manifest(
            PromptInfo(
                kind="prefix",
                length=1,
                dtype="float32",
                parameters=ParameterCount(0, 0),
                geometry=replace(geometry, sites=()),
                model=ModelIdentity("", "", ""),
                origin=Origin(),
                tensors=TensorFile("0" * 64, 1),
            )
        )
