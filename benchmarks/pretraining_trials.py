"""Short pretraining runs that differ in size, vocabulary or corpus mix: what should a small LM be?

`python benchmarks/pretraining_trials.py benchmarks/pretraining_trials.yaml --out OUT --work WORK`

A trial is the bundled LM's recipe with some values changed and few tokens. Losses per token of different tokenizers
cannot be compared, so every LM is measured in bits per byte on the same held-out documents; beside it stand copying
and induction, which a prefix needs (`softprompts.pretraining.probes`). A trial that lies in WORK is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import yaml
from reporting import commit, hardware, today, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompts.config import load_recipe
from softprompts.pretraining.corpus import open_sources
from softprompts.pretraining.pretrain import pretrain
from softprompts.pretraining.probes import copying, induction, sequence_log_probs
from softprompts.pretraining.recipe import PretrainRecipe

DOCUMENTS = 60
"""Held-out documents per source of plain text."""


def held_out_texts(recipe: PretrainRecipe) -> dict[str, list[str]]:
    """Return the base recipe's held-out documents of plain text: no trial, whatever its mix, was trained on them."""
    return {
        source.config.name: list(itertools.islice(source.documents(recipe.corpus.seed, held_out=True), DOCUMENTS))
        for source in open_sources(recipe.corpus)
        if source.config.objective == "plain"
    }


def reweighted(recipe: PretrainRecipe, factors: dict[str, float]) -> PretrainRecipe:
    """Multiply the weights of the sources with a given objective; factor 0 leaves them out."""
    sources = tuple(
        dataclasses.replace(source, weight=source.weight * factors.get(source.objective, 1.0))
        for source in recipe.corpus.sources
        if factors.get(source.objective, 1.0) > 0
    )
    return dataclasses.replace(recipe, corpus=dataclasses.replace(recipe.corpus, sources=sources))


def bits_per_byte(model: Any, tokenizer: Any, texts: list[str], context: int) -> float:
    """Score texts by their code length; what is longer than the context is scored in pieces."""
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows += [[0, *ids[start : start + context - 1]] for start in range(0, len(ids), context - 1)]
    sums, _ = sequence_log_probs(model, rows, batch_size=8)
    return -sum(sums) / math.log(2) / sum(len(text.encode()) for text in texts)


def trial(row: dict[str, Any], grid: dict[str, Any], texts: dict[str, list[str]], work: Path) -> dict[str, Any]:
    """Run one trial and measure its LM, or read what an earlier run left of it."""
    folder = work / row["name"].replace(" ", "_").replace(",", "")
    result = folder / "trial.json"
    if result.is_file():
        return dict(json.loads(result.read_text()))
    overrides = [*grid["set"], *row.get("set", []), f"output.output_dir={folder}"]
    recipe = reweighted(load_recipe(grid["recipe"], PretrainRecipe, overrides), row.get("weights", {}))
    print(f"== {row['name']}", flush=True)
    run = pretrain(recipe, resume=(folder / "checkpoint.pt").is_file())
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    by_source = {name: bits_per_byte(model, tokenizer, own, recipe.model.context) for name, own in texts.items()}
    size = {name: sum(len(text.encode()) for text in own) for name, own in texts.items()}
    found = {
        "name": row["name"],
        "changed": row.get("set", []),
        "weights": row.get("weights", {}),
        "parameters": run.parameters,
        "tokens": run.state.tokens,
        "seconds": run.state.seconds,
        "bits_per_byte": sum(by_source[name] * size[name] for name in size) / sum(size.values()),
        "by_source": by_source,
        "copying": copying(model, tokenizer)["accuracy"],
        "induction": induction(model, tokenizer)["accuracy"],
    }
    result.write_text(json.dumps(found))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Render the trials as Markdown."""
    lines = ["| trial | parameters | tokens | seconds | bits per byte | copying | induction |", "|" + " --- |" * 7]
    for row in rows:
        numbers = [f"{row['parameters'] / 1e6:.2f} M", f"{row['tokens'] / 1e6:.2f} M", f"{row['seconds']:.0f}"]
        scores = [f"{row['bits_per_byte']:.3f}", f"{100 * row['copying']:.1f} %", f"{100 * row['induction']:.1f} %"]
        lines.append("| " + " | ".join([row["name"], *numbers, *scores]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the grid, run its trials, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="path of the result, without suffix")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    options = parser.parse_args()
    grid = yaml.safe_load(options.grid.read_text())
    texts = held_out_texts(load_recipe(grid["recipe"], PretrainRecipe))
    rows = [trial(row, grid, texts, options.work) for row in grid["rows"]]
    facts = {
        "title": grid["title"],
        "date": today(),
        "commit": commit(),
        "hardware": hardware(),
        "command": f"python benchmarks/pretraining_trials.py {options.grid} --out {options.out} --work WORK",
    }
    lines = [f"# {grid['title']}", "", grid["text"].strip(), "", table(rows), ""]
    lines += [f"{key}: {facts[key]}  " for key in ("date", "commit", "hardware", "command")]
    write_result(options.out, {**facts, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
