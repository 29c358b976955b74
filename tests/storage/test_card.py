"""The card of a prompt, compared with cards that were read by people."""

from __future__ import annotations

import ast
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from softprompts.storage import ModelIdentity, Origin, ParameterCount, PromptInfo, read_info
from softprompts.storage.card import render_card
from softprompts.storage.manifest import TensorFile
from softprompts.types import Geometry, KeyValueSite, LayerKey, MetricValue

GOLDEN = Path(__file__).parent / "golden"
SITES = tuple(KeyValueSite(LayerKey("self", layer), 4, 16, 16) for layer in range(4))
PREFIX = PromptInfo(
    kind="prefix",
    length=10,
    dtype="float32",
    parameters=ParameterCount(trained=70_176, stored=5120),
    geometry=Geometry("llama", 64, 8192, 512, SITES),
    model=ModelIdentity("some-team/small-llama", "0123456789abcdef", "fedcba9876543210"),
    origin=Origin(
        task="e2e",
        recipe={"training": {"seed": 3}},
        metrics={"rouge_l": MetricValue(0.7, None, "rouge_l"), "bleu": MetricValue(0.6823, 0.0041, "bleu")},
        seed=3,
        created="2026-01-02T03:04:05+00:00",
        versions={"softprompts": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    ),
    tensors=TensorFile("0" * 64, 20_000),
)
EMBEDDING = replace(
    PREFIX,
    kind="embedding",
    parameters=ParameterCount(trained=640, stored=640),
    model=replace(PREFIX.model, name="bundled"),
    origin=Origin(created="2026-01-02T03:04:05+00:00"),
)


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(("name", "info"), [("prefix", PREFIX), ("embedding", EMBEDDING)])
def test_card_is_as_it_was(name: str, info: PromptInfo):
    """To accept a change: SOFTPROMPTS_UPDATE_GOLDEN=1 pytest tests/storage/test_card.py, then read the difference."""
    path = GOLDEN / f"card_{name}.md"
    if os.environ.get("SOFTPROMPTS_UPDATE_GOLDEN"):
        path.write_text(render_card(info), encoding="utf-8")
    assert render_card(info) == path.read_text(encoding="utf-8")


def test_front_matter_is_what_the_hub_reads():
    front = front_matter(render_card(PREFIX))
    assert front["library_name"] == "softprompts"
    assert front["base_model"] == "some-team/small-llama"
    assert front["license"] == "unknown"
    assert front["tags"] == ["softprompts", "prefix-tuning"]
    assert front["model-index"][0]["results"][0]["metrics"][0] == {"type": "bleu", "value": 0.6823}


@pytest.mark.parametrize("name", ["bundled", "/home/me/models/llama", "../llama", "a/b/c", "", "C:\\models"])
def test_a_base_model_is_named_only_if_the_hub_could_know_it(name: str):
    info = replace(PREFIX, model=replace(PREFIX.model, name=name))
    assert "base_model" not in front_matter(render_card(info))


@pytest.mark.parametrize("name", ["it's", 'a"b', "a: b", "$(touch x)", "a'; rm -rf b #", "`x`|y|"])
def test_names_are_quoted_wherever_they_stand(name: str):
    info = replace(PREFIX, model=replace(PREFIX.model, name=name), origin=replace(PREFIX.origin, task=name))
    card = render_card(info)
    assert front_matter(card)["model-index"][0]["results"][0]["dataset"]["name"] == name
    python = card.split("```python\n")[1].split("```\n")[0] if "`" not in name else None
    if python is not None:
        calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
        assert name in [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]
        command = card.split("```bash\n")[1].split("```\n")[0]
        assert shlex.split(command)[3] == name
    table = next(line for line in card.splitlines() if line.startswith("| task |"))
    assert table.replace("\\|", "").count("|") == 3


def test_the_saved_card_is_that_of_the_saved_manifest(saved: Path):
    assert (saved / "README.md").read_text(encoding="utf-8") == render_card(read_info(saved))
