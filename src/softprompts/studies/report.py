"""``softprompts report``: what studies found as one HTML file, as Markdown with SVG files, and as CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from softprompts import __version__
from softprompts.config import to_dict
from softprompts.storage.directory import replace_file
from softprompts.studies.figures import draw, standalone
from softprompts.studies.results import Result
from softprompts.studies.verdict import RULE, Difference

__all__ = ["render", "write_report"]

_SAMPLES = 4
"""Settings of a study whose outputs are shown."""


def write_report(results: Sequence[Result], directory: Path) -> Path:
    """Write ``report.html``, ``report.md`` with ``plots/*.svg``, ``results.csv`` and ``results.json``.

    Args:
        results: One per study.
        directory: Made if need be; files of an earlier report are replaced one by one.

    Returns:
        The HTML file.

    Raises:
        StorageError: A file cannot be written.
    """
    figures = {_key(result): draw(result) for result in results}
    for name, svg in figures.items():
        if svg is not None:
            replace_file(directory / "plots" / f"{name}.svg", standalone(svg).encode())
    parts = [_part(result, figures[_key(result)]) for result in results]
    context = {
        "parts": parts,
        "rule": RULE,
        "version": __version__,
        "verdicts": [{**one, "study": part["name"]} for part in parts for one in part["verdicts"]],
    }
    replace_file(directory / "results.csv", _csv(results).encode())
    numbers = json.dumps([result.to_dict() for result in results], indent=1, ensure_ascii=False)
    replace_file(directory / "results.json", f"{numbers}\n".encode())
    replace_file(directory / "report.md", render("report.md.j2", context).encode())
    return replace_file(directory / "report.html", render("report.html.j2", context).encode())


def _key(result: Result) -> str:
    return f"{result.plan.study.name}-{result.plan.scale_name}"


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill in a template; the filter ``cell`` makes a text fit into a cell of a Markdown table."""
    environment = jinja2.Environment(
        autoescape=template.startswith("report.html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    text = (files("softprompts.studies") / "templates" / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(context)


def _part(result: Result, svg: str | None) -> dict[str, Any]:
    """Everything that the templates say about a study."""
    plan = result.plan
    return {
        "name": plan.study.name,
        "key": _key(result),
        "title": plan.study.title,
        "question": plan.study.question,
        "scale": plan.scale_name,
        "like": plan.study.plot.like,
        "curves": plan.study.plot.kind == "curve",
        "svg": svg,
        "wide": svg is not None and _is_wide(svg),
        "metrics": plan.scale.metrics,
        "rows": [
            {
                "series": row.setting.series,
                "point": row.setting.point,
                "numbers": [row.numbers[name].shown if name in row.numbers else "-" for name in plan.scale.metrics],
                "seeds": len(row.seeds),
                "failed": row.failed,
                "left_out": row.left_out,
                "published": row.published,
            }
            for row in result.rows
        ],
        "published": any(row.published for row in result.rows),
        "verdicts": _verdicts(result),
        "planned": len(plan.cells),
        "done": result.done,
        "failed": [
            {"name": cell["name"], "message": f"{cell['error']['type']}: {cell['error']['message']}"}
            for cell in result.failed
        ],
        "left_out": result.left_out,
        "samples": _samples(result),
        "settings": yaml.safe_dump(
            json.loads(json.dumps({"recipe": plan.scale.recipe, "judges": to_dict(plan.scale.judges)})),
            sort_keys=False,
            allow_unicode=True,
        ),
        "facts": _facts(result),
    }


def _facts(result: Result) -> dict[str, str]:
    """How the numbers came about."""
    facts = result.facts
    hardware = facts.get("hardware", {})
    return {
        "command": facts.get("command", ""),
        "seeds": ", ".join(map(str, result.plan.scale.seeds)),
        "dates": ", ".join(result.dates) or facts.get("date", ""),
        "commits": ", ".join(result.commits),
        "models": ", ".join(_models(result)),
        "hardware": ", ".join(
            str(word)
            for word in (
                hardware.get("processor"),
                f"{hardware['cores']} cores" if "cores" in hardware else None,
                f"threads: {hardware['threads']}" if "threads" in hardware else None,
                hardware.get("device") if hardware.get("device") != "cpu" else None,
            )
            if word
        ),
        "cost": f"{result.done} cells, {result.cpu_seconds / 60:.1f} minutes of processor time, "
        f"{result.seconds / 60:.1f} by the clock",
    }


def _is_wide(svg: str) -> bool:
    """Whether plots stand side by side, which a phone scrolls instead of shrinking them."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    return box is not None and float(box[1]) > 2 * float(box[2])


def _verdicts(result: Result) -> list[dict[str, Any]]:
    return [
        {
            "text": one.claim.text,
            "source": one.claim.source,
            "published": one.claim.published,
            "outcome": one.outcome,
            "class": one.outcome.split()[0],
            "differences": [_difference(own) for own in one.differences],
        }
        for one in result.verdicts
    ]


def _difference(one: Difference) -> str:
    if one.mean is None:
        return f"{one.words}: not measured"
    return f"{one.words}: {one.mean:+.3g} [{one.low:+.3g}, {one.high:+.3g}]"


def _models(result: Result) -> list[str]:
    found = {}
    for cell in result.cells.values():
        model = cell.get("model")
        if model and cell.get("train", {}).get("method") != "fine_tuning":  # those are models of their own
            found[model["fingerprint"]] = f"{model['name']} ({model['fingerprint']})"
    return sorted(set(found.values()))


def _samples(result: Result) -> list[dict[str, Any]]:
    """The same record, answered by the first cell of some settings."""
    shown = []
    for setting in result.plan.settings:
        own = next(
            (cell for cell in result.cells.values() if cell["setting"] == setting.name and cell.get("samples")), None
        )
        if own is not None:
            sample = own["samples"][0]
            shown.append({"setting": setting.name, "seed": own["seed"], **sample})
    step = max(1, -(-len(shown) // _SAMPLES))
    return shown[::step]


def _csv(results: Sequence[Result]) -> str:
    """One line per cell and metric."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["study", "scale", "series", "point", "x", "task", "seed", "metric", "value", "date", "commit"])
    for result in results:
        for cell in result.plan.cells:
            found = result.cells.get(cell.name, {})
            for metric, value in sorted(found.get("metrics", {}).items()):
                setting = cell.setting
                place = [result.plan.study.name, result.plan.scale_name, setting.series, setting.point, setting.x]
                number = "" if value is None else repr(float(value))
                writer.writerow(
                    [*place, cell.task.name, cell.seed, metric, number, found.get("date"), found.get("commit")]
                )
    return buffer.getvalue()
