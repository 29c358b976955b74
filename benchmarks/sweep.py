"""Train many settings in few passes: `python benchmarks/sweep.py SWEEP.yaml --out benchmarks/results/NAME --work WORK`.

A sweep is a YAML file: a title, the seeds, the metrics, and rows of (name, recipe, overrides, what varies). Each row is
one `softprompts train` with `--seeds` and `--vary`, so all its prompts share the forward passes of one model. Its
numbers are those of the dev validation that chose the checkpoint: good for choosing settings, not untouched results. A
killed sweep goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from reporting import commit, hardware, run, today, write_result

from softprompts.folder_lock import alone_in


def train(row: dict[str, Any], sweep: dict[str, Any], work: Path, threads: int) -> dict[str, Any]:
    """Train all prompts of a row, or read what an earlier run left of them."""
    place = work / row["name"].replace(" ", "_").replace(",", "")
    said = place / "train.json"
    if not said.exists():
        place.mkdir(parents=True, exist_ok=True)
        options = [word for item in [*sweep.get("set", []), *row.get("set", [])] for word in ("--set", item)]
        options += [word for item in row["vary"] for word in ("--vary", item)]
        options += ["--seeds", ",".join(map(str, sweep["seeds"]))]
        resume = ["--resume"] if list((place / "run").rglob("last.pt")) else []
        left = place / "left.json"
        command = ["train", row["recipe"], *options, "--output", str(place / "run"), "--json", str(left), *resume]
        run(command, place / "log.txt", threads)
        found = json.loads(left.read_text())
        said.write_text(json.dumps({**found, "commit": commit()}))
    return json.loads(said.read_text())


def value_at(recipe: dict[str, Any], key: str) -> Any:
    """Look a dotted key up."""
    found: Any = recipe
    for word in key.split("."):
        found = found[word]
    return found


def settings(row: dict[str, Any], trained: dict[str, Any], metrics: list[str]) -> list[dict[str, Any]]:
    """One entry per setting of a row: means over the seeds, standard errors of those means, and what the seeds gave."""
    keys = [item.partition("=")[0] for item in row["vary"]]
    groups: dict[str, dict[str, Any]] = {}
    for prompt in trained["prompts"].values():
        recipe = yaml.safe_load((Path(prompt["output_dir"]) / "recipe.yaml").read_text())
        varied = {key: value_at(recipe, key) for key in keys}
        group = groups.setdefault(json.dumps(varied), {"run": row["name"], "varied": varied, "prompts": []})
        group["prompts"].append({"seed": recipe["training"]["seed"], **prompt})
    for group in groups.values():
        for metric in metrics:
            values = [one["metrics"].get(metric) for one in group["prompts"]]
            known = [value for value in values if value is not None]
            stderr = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
            mean = statistics.mean(known) if len(known) == len(values) else None
            group[metric] = {"mean": mean, "stderr_over_seeds": stderr, "values": values}
    return list(groups.values())


def table(groups: list[dict[str, Any]], metrics: list[str]) -> list[str]:
    """Render the settings of one row as Markdown, the best of each metric in bold."""
    keys = list(groups[0]["varied"])
    metrics = [metric for metric in metrics if any(group[metric]["mean"] is not None for group in groups)]
    head = [*[key.removesuffix(".name").split(".")[-1] for key in keys], *metrics, "best step", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    best = {}
    for metric in metrics:
        means = [group[metric]["mean"] for group in groups if group[metric]["mean"] is not None]
        best[metric] = (min(means) if metric == "loss" else max(means)) if means else None
    for group in groups:
        words = [str(value) for value in group["varied"].values()]
        for metric in metrics:
            mean, stderr = group[metric]["mean"], group[metric]["stderr_over_seeds"]
            shown = "diverged" if mean is None else f"{mean:.3g} ± {stderr or 0:.2g}"
            words.append(f"**{shown}**" if mean is not None and mean == best[metric] else shown)
        steps = [one["best_step"] for one in group["prompts"]]
        lines.append("| " + " | ".join([*words, f"{statistics.mean(steps):.0f}", str(len(steps))]) + " |")
    return lines


def report(sweep: dict[str, Any], groups: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Write title, text, one table per row, and how the numbers came about."""
    lines = [f"# {sweep['title']}", "", sweep.get("text", "").strip(), ""]
    for name in dict.fromkeys(group["run"] for group in groups):
        lines += [f"## {name}", "", *table([group for group in groups if group["run"] == name], sweep["metrics"]), ""]
    lines += [f"{key}: {value}  " for key, value in facts.items()]
    lines += ["", "± is the standard error over the seeds. Bold: the best mean of a table."]
    return "\n".join(lines)


def main() -> None:
    """Read the sweep, train its rows, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="path of the result, without suffix")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--only", help="the rows whose name holds this, nothing written: for a trial")
    parser.add_argument("--set", action="append", default=[], help="of every training, after the sweep's own")
    options = parser.parse_args()
    sweep = yaml.safe_load(options.sweep.read_text())
    sweep["set"] = [*sweep.get("set", []), *options.set]
    rows = [row for row in sweep["rows"] if options.only is None or options.only in row["name"]]
    with alone_in(options.work), ThreadPoolExecutor(options.jobs) as pool:
        trained = list(pool.map(lambda row: train(row, sweep, options.work, options.threads), rows))
    groups = [group for row, one in zip(rows, trained, strict=True) for group in settings(row, one, sweep["metrics"])]
    sets = "".join(f" --set {item}" for item in options.set)
    facts = {
        "date": today(),
        "commits": sorted({one["commit"] for one in trained}),
        "hardware": hardware(f"{options.jobs} runs at a time with {options.threads} threads"),
        "model": sorted({one["model"] for one in trained}),
        "training minutes": round(sum(one["seconds"] for one in trained) / 60, 1),
        "command": f"python benchmarks/sweep.py {options.sweep} --out {options.out} --work WORK{sets}",
    }
    text = report(sweep, groups, facts)
    if options.only is None:
        write_result(options.out, {**facts, "settings": groups}, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
