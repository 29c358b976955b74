"""The ``README.md`` of a saved prompt: a model card as on the Hugging Face Hub, made from ``prompt.json`` alone."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from softprompts.storage.manifest import PromptInfo
from softprompts.types import MetricValue

__all__ = ["render_card"]

_METHODS = {"prefix": "prefix-tuning", "embedding": "prompt-tuning"}
_DESCRIPTIONS = {
    ("prefix", "prefix"): "learned keys and values in front of the attention of every layer",
    ("embedding", "prefix"): "learned embeddings in front of the input",
    ("prefix", "infix"): "learned keys and values between input and output, in the attention of every layer",
    ("embedding", "infix"): "learned embeddings between input and output",
}

_LIMITS = """## Limits

The prompt works with exactly the model and tokenizer above: their fingerprints are checked when it is loaded. It
inherits the model's biases and the terms of its licence. Its own licence is not stated yet: set `license` in the first
lines of this file.
"""

_UNKNOWN_LIMITS = """## Limits

The file that this prompt was imported from does not name its model, so only the width is known and checked: with
another model of the same width it loads and means nothing. Its own licence is not stated yet: set `license` in the
first lines of this file.
"""


def render_card(info: PromptInfo) -> str:
    """Write the card.

    Args:
        info: What is known of the prompt.

    Returns:
        Markdown with YAML front matter. The licence is left as ``unknown``: only the owner knows it.
    """
    front = yaml.safe_dump(_front_matter(info), sort_keys=False, allow_unicode=True)
    task = info.origin.task
    model = info.model.name or "the model below"
    sections = [
        f"---\n{front}---\n",
        f"# A soft prompt for {_text(model)}{f', task {_text(task)}' if task else ''}\n",
        f"{info.length} positions of {_METHODS[info.kind]}: {_DESCRIPTIONS[info.kind, info.placement]}. "
        "The model itself is not changed.\n",
        _facts(info),
        _metrics(info.origin.metrics),
        _usage(info),
        _UNKNOWN_LIMITS if info.geometry.is_partial else _LIMITS,
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(info: PromptInfo) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "softprompts", "license": "unknown"}
    # The hub takes only its own names here, no paths.
    if info.model.name != "bundled" and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", info.model.name):
        front["base_model"] = info.model.name
    front["tags"] = ["softprompts", _METHODS[info.kind]]
    task = info.origin.task
    scores = [
        {"type": name, "value": metric.value}
        for name, metric in sorted(info.origin.metrics.items())
        if math.isfinite(metric.value)
    ]
    if task and scores:
        result = {"task": {"type": "text-generation"}, "dataset": {"type": task, "name": task}, "metrics": scores}
        front["model-index"] = [{"name": f"{task}-{_METHODS[info.kind]}", "results": [result]}]
    return front


def _facts(info: PromptInfo) -> str:
    origin, parameters = info.origin, info.parameters
    rows = {
        "model": _code(info.model.name),
        "model fingerprint": _code(info.model.fingerprint),
        "tokenizer fingerprint": _code(info.model.tokenizer_fingerprint),
        **({"weights kept in": _code(info.model.quantization)} if info.model.quantization else {}),
        "family": _code("" if info.geometry.is_partial else info.geometry.family),
        **({"width": str(info.geometry.width)} if info.geometry.is_partial else {}),
        "kind": info.kind,
        **({} if info.placement == "prefix" else {"placement": f"{info.placement}, between input and output"}),
        "length": str(info.length),
        "parameters": f"{parameters.stored:,} stored as {info.dtype}, {parameters.trained:,} trained",
        "task": _text(origin.task or "not stated"),
        "seed": "not stated" if origin.seed is None else str(origin.seed),
        **({} if origin.source is None else {"imported from": _code(origin.source)}),
        "created": _text(origin.created),
        "made with": _text(", ".join(f"{name} {version}" for name, version in sorted(origin.versions.items()))),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"


def _metrics(metrics: Mapping[str, MetricValue]) -> str:
    if not metrics:
        return "## Metrics\n\nNone were saved with this prompt.\n"
    rows = [
        f"| {_text(name)} | {metric.value:.4g} | {'not known' if metric.stderr is None else f'{metric.stderr:.2g}'} |"
        for name, metric in sorted(metrics.items())
    ]
    return "\n".join(["## Metrics", "", "| metric | value | standard error |", "|---|---|---|", *rows]) + "\n"


def _usage(info: PromptInfo) -> str:
    model = info.model.name or "MODEL"
    bundled = model == "bundled"
    place = "bundled_lm_path()" if bundled else json.dumps(model, ensure_ascii=False)
    extra = "from softprompts.pretraining import bundled_lm_path\n" if bundled else ""
    return f"""## How to use it

```python
from softprompts.models import FrozenLM
{extra}from softprompts.prompted import PromptedLM
from softprompts.storage import load_prompt

frozen = FrozenLM.load({place})
prompted = PromptedLM(frozen, [load_prompt("DIRECTORY", frozen).prompt])
```

or, line by line from standard input:

```bash
softprompts generate --model {shlex.quote(model)} --prompt DIRECTORY
```

How it was trained is in `prompt.json`, under `origin.recipe`.
"""


def _text(text: str) -> str:
    """Escape what Markdown tables and HTML would take for their own."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", text)


def _code(text: str) -> str:
    return f"`{text.replace('`', '').replace('|', '')}`" if text else "not stated"
