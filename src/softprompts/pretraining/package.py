"""From a finished run to a directory that can be given away: bf16 weights, tokenizer, and a card of measured values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from softprompts.errors import DataNotFoundError
from softprompts.pretraining.card import data_table, held_out_table, training_text
from softprompts.pretraining.probes import COPY_TEMPLATES, blimp, copying, induction, sample

__all__ = ["SAMPLE_PROMPTS", "measure", "package", "write_card"]

SAMPLE_PROMPTS = (
    "Once upon a time there was a little",
    "The restaurant is",
    "U: I am looking for a place to eat in San Jose.\nS:",
    "name : Zorvik | food : Italian | city : Paris\nZorvik is",
    "The city of London is",
)
_USE = (
    "made to try soft prompts on without a download. It loads with `AutoModelForCausalLM` and `AutoTokenizer`. A text "
    "starts behind one `<|endoftext|>` (id 0), which also ends it; `<|pad|>` is id 1."
)
_DATA = (
    "`records`, `lookup` and `repetition` are self-supervised exercises in copying, made from sentences of the same "
    "corpora: pieces of a sentence (capitalised spans, numbers, a few words) stand in front of it in ever changing "
    "surface forms, and 40 % of the names are replaced on both sides by invented or borrowed ones. No benchmark's "
    "records or field names went into them. Rows of the token file hold several documents, which can see each other. "
    "Held out: 1 % of the documents, by a hash of their text (long books were cut first, so other parts of a held-out "
    "passage's book were trained on)."
)
_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, blimp_path: Path | None, pairs_per_paradigm: int | None
) -> dict[str, Any]:
    """Run every probe: BLiMP (if its file is given), copying, induction, and sample texts at temperature 0.7 and 0."""
    results: dict[str, Any] = {
        "copying": copying(model, tokenizer),
        "induction": induction(model, tokenizer),
        "samples": sample(model, tokenizer, SAMPLE_PROMPTS),
        "greedy_samples": sample(model, tokenizer, SAMPLE_PROMPTS, temperature=0.0),
    }
    if blimp_path is not None:
        scored = blimp(model, tokenizer, blimp_path, pairs_per_paradigm)
        results["blimp"] = vars(scored)
    return results


def package(
    run_folder: Path,
    target: Path,
    *,
    notes: Mapping[str, str],
    blimp_path: Path | None = None,
    pairs_per_paradigm: int | None = None,
) -> dict[str, Any]:
    """Write the model of a finished run as bf16, measure what was written, and write its card.

    Args:
        run_folder: ``output.output_dir`` of the run; must hold ``final/`` and ``result.json``.
        target: The directory to make; replaced if it exists.
        notes: Texts for the card that cannot be measured: ``hardware``, ``trials``, ``limits``, ``license``.
        blimp_path: BLiMP as one JSONL file; ``None``: not measured.
        pairs_per_paradigm: How many pairs of each paradigm; ``None``: all.

    Returns:
        The measured values, as in the card.

    Raises:
        DataNotFoundError: The run is not finished.
    """
    final, result_path = run_folder / "final", run_folder / "result.json"
    if not result_path.is_file() or not (final / "model.safetensors").is_file():
        raise DataNotFoundError(
            f"'{run_folder}' holds no finished run (no final/ or no result.json); train it to its end"
        )
    result = json.loads(result_path.read_text(encoding="utf-8"))
    recipe = json.loads((run_folder / "recipe.json").read_text(encoding="utf-8"))
    summary = run_folder / "corpus.json"
    if not summary.is_file():  # a run from before summaries were kept beside the recipe
        summary = run_folder / "tokens" / "corpus.json"
    corpus = json.loads(summary.read_text(encoding="utf-8"))
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(final / "model.safetensors").items()}
    save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
    (scratch / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    for name in _FILES:
        if (final / name).is_file():
            shutil.copy(final / name, scratch / name)
    config = AutoConfig.from_pretrained(final)
    config.dtype = torch.bfloat16
    config.save_pretrained(scratch)
    model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(scratch)
    values = {"result": result, "probes": measure(model, tokenizer, blimp_path, pairs_per_paradigm)}
    write_card(scratch / "README.md", recipe, corpus, values, notes)
    shutil.rmtree(target, ignore_errors=True)
    scratch.replace(target)
    return values


def write_card(
    path: Path, recipe: dict[str, Any], corpus: dict[str, Any], values: dict[str, Any], notes: Mapping[str, str]
) -> None:
    """Write the model card: what it is, data and licences, training, measured quality, texts, limits."""
    result, probes = values["result"], values["probes"]
    shape = recipe["model"]
    parts = [
        f"---\nlicense: {notes['license']}\nlanguage: en\npipeline_tag: text-generation\n---\n",
        f"# {recipe['name']}\n",
        f"A Llama-type decoder of {result['parameters'] / 1e6:.1f} M parameters ({shape['layers']} layers of width "
        f"{shape['width']}, {shape['heads']} heads, context {shape['context']}, vocabulary {corpus['vocab_size']}, "
        f"tied embeddings), {_USE}\n",
        "## Data\n",
        data_table(recipe, corpus),
        _DATA + "\n",
        "## Training\n",
        training_text(recipe, result, notes["hardware"]),
        f"{notes['trials']}\n",
        "## Measured\n",
        _quality_tables(result, probes),
        "## Texts\n",
        "Temperature 0.7, top-p 0.9, first try:\n",
        *(f"> {text.replace(chr(10), chr(10) + '> ')}\n" for text in probes["samples"]),
        f"## What it cannot do\n\n{notes['limits']}\n",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _quality_tables(result: dict[str, Any], probes: dict[str, Any]) -> str:
    lines = [held_out_table(result).rstrip("\n")]
    copied, repeated = probes["copying"], probes["induction"]
    lines += [
        "",
        "| probe | value |",
        "|---|---|",
        f"| an invented name repeated out of a templated record, exactly | {100 * copied['accuracy']:.1f} % "
        f"(± {100 * copied['standard_error']:.1f}) |",
    ]
    for number, (context, _) in enumerate(COPY_TEMPLATES):
        shown = context.replace("|", "\\|").replace("\n", " ⏎ ")
        lines.append(f"| ... after `{shown}` | {100 * copied[f'template_{number}']:.0f} % |")
    lines.append(f"| a word of a list of 20 common words, the second time | {100 * repeated['accuracy']:.1f} % |")
    if "blimp" in probes:
        scored = probes["blimp"]
        lines.append(
            f"| BLiMP, {scored['pairs']:,} pairs | {100 * scored['accuracy']:.1f} % "
            f"(± {100 * scored['standard_error']:.1f}; chance 50) |"
        )
        lines += [f"| ... {term} | {100 * value:.0f} % |" for term, value in scored["by_term"].items()]
    return "\n".join(lines) + "\n"
