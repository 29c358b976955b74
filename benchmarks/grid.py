"""Run a grid of recipes and write its table: `python benchmarks/grid.py GRID.yaml --out benchmarks/results/NAME`.

A grid is a YAML file: a title, the seeds, what is evaluated, and rows of (name, recipe, overrides). Every cell (row and
seed) is one `softprompts train` and one `softprompts evaluate`, and one JSON file below `--work`; a killed grid goes on
where it was. A row may have `evaluate` and `seeds` of its own, and with `together: true` they are trained in one pass.
The result is a JSON file with every number of every seed and a Markdown table with means and standard errors over them.
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


def folder(row: dict[str, Any], seed: int, work: Path) -> Path:
    """Where a cell keeps its files."""
    name = row["name"].replace(" ", "_").replace("=", "").replace(",", "").replace("/", "-")
    return work / f"{name}-seed{seed}"


def trained(row: dict[str, Any], seeds: list[int], grid: dict[str, Any], work: Path, threads: int) -> list[dict]:
    """Train a row with some seeds, in one pass if there are several; what the verb says of each."""
    if "recipe" not in row:
        return [{} for _ in seeds]
    place = folder(row, seeds[0], work)
    overrides = [*grid.get("set", []), *row.get("set", [])]
    overrides += [] if len(seeds) > 1 else [f"training.seed={seeds[0]}"]
    options = [word for item in overrides for word in ("--set", item)]
    options += ["--seeds", ",".join(map(str, seeds))] if len(seeds) > 1 else []
    resume = ["--resume"] if list((place / "run").rglob("last.pt")) else []
    said = place / "train.json"
    if not said.exists():
        train = ["train", row["recipe"], *options, "--output", str(place / "run"), "--json", str(said)]
        run([*train, *resume], place / "log.txt", threads)
    found = json.loads(said.read_text())
    return [found["prompts"][f"seed-{seed}"] for seed in seeds] if len(seeds) > 1 else [found]


def cells(row: dict[str, Any], seeds: list[int], grid: dict[str, Any], work: Path, threads: int) -> list[dict]:
    """Train and evaluate cells of one row, or read what an earlier run left of them."""
    places = [folder(row, seed, work) for seed in seeds]
    if all((place / "cell.json").exists() for place in places):
        return [json.loads((place / "cell.json").read_text()) for place in places]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    shared = grid.get("evaluate", {})
    wanted = {**shared, **row.get("evaluate", {})}
    sets = [*shared.get("set", []), *row.get("evaluate", {}).get("set", [])]
    options = [word for item in sets for word in ("--set", item)]
    done = []
    for seed, place, found in zip(seeds, places, trained(row, seeds, grid, work, threads), strict=True):
        judged = place / "evaluate.json"
        subject = ["--model", grid["model"]]
        if found:
            if not found["saved"]:
                raise SystemExit(f"{row['name']}, seed {seed}: training left nothing to judge ({found['reason']})")
            tuned = found["method"] == "fine_tuning"
            subject = ["--model", found["saved"]] if tuned else ["--prompt", found["saved"]]
        task = ["--task", wanted["task"], "--split", wanted["split"]]
        said = ["--json", str(judged), "--output", str(place)]
        run(["evaluate", *subject, *task, *options, *said], place / "log.txt", threads)
        one = {"name": row["name"], "seed": seed, "commit": commit(), "train": found}
        one |= {"metrics": wanted["metrics"], "evaluate": json.loads(judged.read_text())}
        (place / "cell.json").write_text(json.dumps(one))
        done.append(one)
    return done


def _tuned(item: dict[str, Any]) -> bool:
    """Whether the cell's model is no longer the frozen one."""
    return item["train"].get("method") == "fine_tuning"


def summary(cells: list[dict[str, Any]], metrics: list[str]) -> list[dict[str, Any]]:
    """One entry per row: means over the seeds, standard errors of those means, and what the seeds gave."""
    rows = []
    for name in dict.fromkeys(item["name"] for item in cells):
        own = [item for item in cells if item["name"] == name]
        row: dict[str, Any] = {"name": name, "seeds": [item["seed"] for item in own]}
        for metric in metrics:
            if any(metric not in item.get("metrics", metrics) for item in own):
                continue
            values = [item["evaluate"]["metrics"][metric]["value"] for item in own]
            stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            row[metric] = {"mean": statistics.mean(values), "stderr_over_seeds": stderr, "values": values}
            row[metric]["stderr_over_records"] = own[0]["evaluate"]["metrics"][metric]["stderr"]
        for key in ("steps", "seconds", "trained_parameters", "stored_parameters"):
            found = [item["train"][key] for item in own if item["train"]]
            row[key] = statistics.mean(found) if found else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], metrics: list[str]) -> str:
    """Render the rows as Markdown."""
    head = ["method", *metrics, "seeds", "steps", "training s", "trained", "stored"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [row["name"]]
        for metric in metrics:
            if metric not in row:
                cells.append("-")
                continue
            stderr = row[metric]["stderr_over_seeds"]
            shown = row[metric]["stderr_over_records"] if stderr is None else stderr
            same_for_all = metric.startswith("majority/")
            cells.append(f"{row[metric]['mean']:.2f}" + ("" if same_for_all else f" ± {shown or 0:.2f}"))
        cells.append(str(len(row["seeds"])))
        for key in ("steps", "seconds", "trained_parameters", "stored_parameters"):
            cells.append("-" if row[key] is None else f"{row[key]:,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the grid, run its cells, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="path of the result, without suffix")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--set", action="append", default=[], help="of every training, after the grid's own")
    options = parser.parse_args()
    grid = yaml.safe_load(options.grid.read_text())
    grid["set"] = [*grid.get("set", []), *options.set]
    named = [item.partition("=")[2] for item in grid["set"] if item.startswith("model.name_or_path=")]
    grid["model"] = named[-1] if named else "bundled"
    plan = []
    for row in grid["rows"]:
        seeds = row.get("seeds", grid["seeds"]) if "recipe" in row else [0]
        plan += [(row, seeds)] if row.get("together") else [(row, [seed]) for seed in seeds]
    with alone_in(options.work), ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda item: cells(*item, grid, options.work, options.threads), plan))
    done = [one for own in found for one in own]
    each = [{**grid.get("evaluate", {}), **row.get("evaluate", {})}["metrics"] for row in grid["rows"]]
    metrics = list(dict.fromkeys(metric for own in each for metric in own))
    processes = f"{options.jobs} runs at a time with {options.threads} threads"
    rows = summary(done, metrics)
    facts = {
        "title": grid["title"],
        "date": today(),
        "commits": sorted({item["commit"] for item in done}),
        "hardware": hardware(processes),
        "training_hours": sum(item["train"].get("seconds", 0) for item in done) / 3600,
        "model": grid["model"],
        "command": " ".join(
            ["python benchmarks/grid.py", f"{options.grid} --out {options.out} --work WORK"]
            + [f"--set {item}" for item in options.set]
        ),
        "model_fingerprints": sorted({item["evaluate"]["model"]["fingerprint"] for item in done if not _tuned(item)}),
    }
    lines = [f"# {grid['title']}", "", grid.get("text", "").strip(), "", table(rows, metrics), ""]
    told = ("date", "commits", "hardware", "model", "model_fingerprints", "command")
    lines += [f"{key}: {facts[key]}  " for key in told]
    lines.append("")
    lines.append("± is the standard error over the seeds (over the records, by bootstrap, where there is one seed).")
    write_result(options.out, {**facts, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
