"""Run a grid of recipes and write its table: `python benchmarks/grid.py GRID.yaml --out benchmarks/results/NAME`.

A grid is a YAML file: a title, the seeds, what is evaluated, and rows of (name, recipe, overrides). Every cell (row and
seed) is one `softprompts train` and one `softprompts evaluate`, and one JSON file below `--work`; a killed grid goes on
where it was. The result is a JSON file with every number of every seed and a Markdown table with means and standard
errors over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


def run(arguments: list[str], log: Path, threads: int) -> None:
    """Run one softprompts command; its output goes to a log beside the cell."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        file.write(f"$ softprompts {' '.join(arguments)}\n")
        file.flush()
        command = [sys.executable, "-m", "softprompts", *arguments]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode
    if code:
        raise SystemExit(f"softprompts {arguments[0]} ended with {code}; see {log}")


def commit() -> str:
    """Return the commit that is checked out now."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def cell(row: dict[str, Any], seed: int, grid: dict[str, Any], work: Path, threads: int) -> dict[str, Any]:
    """Train and evaluate one cell, or read what an earlier run left of it."""
    place = work / f"{row['name'].replace(' ', '_').replace('=', '')}-seed{seed}"
    result = place / "cell.json"
    if result.exists():
        return json.loads(result.read_text())
    place.mkdir(parents=True, exist_ok=True)
    log, trained = place / "log.txt", {}
    evaluated: list[str] = ["--model", "bundled"]
    if "recipe" in row:
        overrides = [*grid.get("set", []), *row.get("set", []), f"training.seed={seed}"]
        options = [word for item in overrides for word in ("--set", item)]
        resume = ["--resume"] if (place / "run" / "last.pt").exists() else []
        train = ["train", row["recipe"], *options, "--output", str(place / "run"), "--json", str(place / "train.json")]
        run([*train, *resume], log, threads)
        trained = json.loads((place / "train.json").read_text())
        tuned = trained["method"] == "fine_tuning"
        evaluated = ["--model", trained["saved"]] if tuned else ["--prompt", trained["saved"]]
    judged = place / "evaluate.json"
    options = [word for item in grid["evaluate"].get("set", []) for word in ("--set", item)]
    task = ["--task", grid["evaluate"]["task"], "--split", grid["evaluate"]["split"]]
    run(["evaluate", *evaluated, *task, *options, "--json", str(judged), "--output", str(place)], log, threads)
    found = {"name": row["name"], "seed": seed, "commit": commit(), "train": trained}
    found["evaluate"] = json.loads(judged.read_text())
    result.write_text(json.dumps(found))
    return found


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
            stderr = row[metric]["stderr_over_seeds"]
            shown = row[metric]["stderr_over_records"] if stderr is None else stderr
            cells.append(f"{row[metric]['mean']:.2f} ± {shown or 0:.2f}")
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
    options = parser.parse_args()
    grid = yaml.safe_load(options.grid.read_text())
    metrics = grid["evaluate"]["metrics"]
    plan = [(row, seed) for row in grid["rows"] for seed in (grid["seeds"] if "recipe" in row else [0])]
    with ThreadPoolExecutor(options.jobs) as pool:
        cells = list(pool.map(lambda item: cell(*item, grid, options.work, options.threads), plan))
    processes = f"{options.jobs} runs at a time with {options.threads} threads"
    rows = summary(cells, metrics)
    facts = {
        "title": grid["title"],
        "date": time.strftime("%Y-%m-%d"),
        "commits": sorted({item["commit"] for item in cells}),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {processes}",
        "training_hours": sum(item["train"].get("seconds", 0) for item in cells) / 3600,
        "command": f"python benchmarks/grid.py {options.grid} --out {options.out} --work WORK",
        "model_fingerprints": sorted({item["evaluate"]["model"]["fingerprint"] for item in cells if not _tuned(item)}),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    lines = [f"# {grid['title']}", "", grid.get("text", "").strip(), "", table(rows, metrics), ""]
    lines += [f"{key}: {facts[key]}  " for key in ("date", "commits", "hardware", "model_fingerprints", "command")]
    lines.append("")
    lines.append("± is the standard error over the seeds (over the records, by bootstrap, where there is one seed).")
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
