"""Transfer across tasks on our own LM: `python benchmarks/task_transfer.py --out RESULT --work WORK`.

One embedding prompt per task, every prompt on every task without training (Su et al., NAACL 2022), what the similarity
of two prompts says about it, and how many updates a start from the best source saves. Every prompt, every cell of the
matrix and every warm start is a file below `--work`; a killed run goes on where it was. Results: JSON and Markdown.

Two measures: `relative loss` is the own prompt's dev loss over that of the transferred prompt (1: as good as the own
prompt), for every task; `relative accuracy` is the accuracy of ranking the label words over the own prompt's, for the
classification tasks (of CLINC150, with 150 label words, the loss only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from reporting import commit, hardware, own_threads, today, write_result
from rich.console import Console

from softprompts.cli.train import run_recipe
from softprompts.cli.transfer_tasks import cross_task
from softprompts.config import JudgeConfig, TrainRecipe, decode
from softprompts.training import read_events
from softprompts.transfer import steps_to_reach

TYPES = {
    "glue_sst2": "sentiment",
    "subj": "sentiment",
    "glue_mrpc": "pairs of sentences",
    "superglue_rte": "pairs of sentences",
    "superglue_cb": "pairs of sentences",
    "clinc150": "intent",
    "trec": "intent",
    "e2e": "data to text",
    "rnnlg_restaurant": "data to text",
    "rnnlg_hotel": "data to text",
}
MANY_LABELS = ("clinc150",)
SIMILARITIES = ("cosine", "cosine_tokens", "euclidean", "euclidean_tokens", "neurons")


def recipe(task: str, place: Path, options: argparse.Namespace, seed: int, source: str | None = None) -> TrainRecipe:
    """One training run: short, on a part of the records, validated often."""
    start = {"name": "vocabulary"} if source is None else {"name": "prompt", "prompt": source}
    return decode(
        TrainRecipe,
        {
            "model": {"name_or_path": options.model, "compile": "no"},
            "task": {
                "name": task,
                "max_length": options.max_length,
                "on_long": "truncate",
                "limit_train": options.train_records,
                "limit_dev": options.dev_records,
            },
            "prompt": {"kind": "embedding", "length": options.length, "initializer": start},
            "optimizer": {"learning_rate": options.learning_rate},
            "schedule": {"name": "constant", "warmup_steps": 10},
            "training": {
                "max_steps": options.steps,
                "batch_size": 16,
                "validate_every_steps": options.validate_every,
                "checkpoint_every_steps": 50,
                "seed": seed,
            },
            "evaluation": {"selection": "loss"},
            "output_dir": str(place),
        },
    )


def trained(config: TrainRecipe) -> dict[str, Any]:
    """Train, or read what an earlier run left."""
    place = Path(config.output_dir)
    result = place / "result.json"
    if not result.exists():
        found = run_recipe(config, resume=(place / "last.pt").exists())
        result.write_text(json.dumps(found, default=str))
        print(f"{place.name}: loss {found['metrics']['loss']:.4f}, {found['seconds']:.0f} s", flush=True)
    return json.loads(result.read_text())


def matrices(prompts: list[Path], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both matrices, with the similarities' correlations."""
    console = Console(quiet=True)
    found = {}
    for name, measure, tasks in (
        ("loss", "loss", list(options.tasks)),
        ("accuracy", "accuracy", [task for task in options.tasks if TYPES[task] != "data to text"]),
    ):
        chosen = [task for task in tasks if name == "loss" or task not in MANY_LABELS]
        judging = JudgeConfig(split="dev", limit=options.dev_records, measure=measure)
        if chosen:
            found[name] = cross_task(
                prompts, chosen, judging, options.work / f"matrix-{name}", options.model, TYPES, SIMILARITIES, console
            )
    return found


def warm_starts(found: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each target: runs from words and runs from the best source, and the updates to the former's own best loss."""
    rows = []
    for target in options.targets:
        source = found["best_source"][target]
        for seed in options.seeds:
            place = options.work / "warm" / f"{target}-{seed}"
            saved = str(options.work / "prompts" / source / "prompt")
            cold = trained(recipe(target, place / "cold", options, seed))
            warm = trained(recipe(target, place / "warm", options, seed, saved))
            events = {name: read_events(place / name / "events.jsonl") for name in ("cold", "warm")}
            score = cold["metrics"]["loss"]
            row = {"target": target, "source": source, "seed": seed, "own_loss": score}
            row["cold_steps"] = steps_to_reach(events["cold"], score)
            row["warm_steps"] = steps_to_reach(events["warm"], score)
            row["warm_best_loss"] = warm["metrics"]["loss"]
            rows.append(row)
    return rows


def percent(value: float | None) -> str:
    """Two digits, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def matrix_table(found: dict[str, Any]) -> list[str]:
    """Relative scores as Markdown: a row per prompt, a column per task."""
    matrix = found["matrix"]
    lines = ["| prompt of | " + " | ".join(matrix["tasks"]) + " |", "| --- " * (len(matrix["tasks"]) + 1) + "|"]
    lines.append("| (none) | " + " | ".join(map(percent, found["relative_none_M"])) + " |")
    for name, row in zip(matrix["prompts"], found["relative_KM"], strict=True):
        lines.append(f"| {name} | " + " | ".join(map(percent, row)) + " |")
    return lines


def report(found: dict[str, dict[str, Any]], warm: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    lines = ["# Transfer across tasks", "", (__doc__ or "").split("\n\n")[2].strip(), ""]
    for name, one in found.items():
        means = one["type_means"]
        lines += [f"## Relative {name}", "", *matrix_table(one), ""]
        lines.append(
            f"Mean within a type {percent(means['same_type'])} ({means['same_cells']} cells), across types "
            f"{percent(means['cross_type'])} ({means['cross_cells']} cells)."
        )
        lines += ["", "| similarity | Spearman's rho | p | mean of rho within tasks |", "| --- | --- | --- | --- |"]
        for measure, value in one["correlation"].items():
            p = "-" if value["p_value"] is None else f"{value['p_value']:.1g}"
            lines.append(f"| {measure} | {percent(value['rho'])} | {p} | {percent(value['mean_per_task'])} |")
        lines.append("")
    lines += ["## Warm start: updates to the best dev loss of the run from words", ""]
    lines += ["| target | source | seed | own loss | from words | from the source | best loss from the source |"]
    lines.append("| --- " * 7 + "|")
    for row in warm:
        never = row["warm_steps"] if row["warm_steps"] is not None else "not reached"
        lines.append(
            f"| {row['target']} | {row['source']} | {row['seed']} | {row['own_loss']:.4f} | {row['cold_steps']} | "
            f"{never} | {row['warm_best_loss']:.4f} |"
        )
    for target in dict.fromkeys(row["target"] for row in warm):
        own = [row for row in warm if row["target"] == target]
        reached = [row["warm_steps"] for row in own if row["warm_steps"] is not None]
        mean = f"{statistics.mean(reached):.0f}" if reached else "-"
        cold = statistics.mean(row["cold_steps"] for row in own)
        lines += [
            "",
            f"{target}: {len(reached)} of {len(own)} warm starts reach it, after {mean} updates on average "
            f"({cold:.0f} from words).",
        ]
    return "\n".join([*lines, "", *(f"{key}: {value}  " for key, value in facts.items())])


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the result, without suffix")
    parser.add_argument("--work", type=Path, required=True, help="folder of prompts, cells and runs")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--tasks", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--targets", nargs="+", default=["rnnlg_hotel", "trec"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--validate-every", type=int, default=10)
    parser.add_argument("--train-records", type=int, default=1000)
    parser.add_argument("--dev-records", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    options = parser.parse_args()
    start = time.perf_counter()
    runs = [options.work / "prompts" / task for task in options.tasks]
    losses = {run.name: trained(recipe(run.name, run, options, 0)) for run in runs}
    found = matrices(runs, options)
    warm = warm_starts(found["loss"], options)
    facts = {
        "date": today(),
        "commit": commit(),
        "hardware": hardware(own_threads()),
        "model": found["loss"]["model"],
        "settings": {key: str(value) for key, value in vars(options).items() if key not in ("out", "work")},
        "training seconds per prompt": round(statistics.mean(one["seconds"] for one in losses.values()), 1),
        "seconds of this call": round(time.perf_counter() - start),
    }
    write_result(options.out, {"facts": facts, "matrices": found, "warm_starts": warm}, report(found, warm, facts))


if __name__ == "__main__":
    main()
