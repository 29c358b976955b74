"""Which metrics a task is scored by, under which short names, and where its references lie in the data folder.

A sheet maps the names that people know (``bleu``, ``rouge_l``) to exact metrics: BLEU of E2E is not BLEU of WebNLG.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["SHEETS", "Sheet"]


@dataclass(frozen=True)
class Sheet:
    """How one benchmark is scored."""

    metrics: Mapping[str, str]
    """Name in the report -> name in ``METRICS``."""
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Split or part of it -> reference files below the data folder, in the official format and order."""


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _published(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


_WEBNLG = "research_only/metric_refs/webnlg2017/refs_tok_lower"
_ANSWERS = {"exact_match": "squad_em", "f1": "squad_f1"}
_MRQA = ("textbookqa", "bioasq", "race", "relationextraction", "duorc", "drop")

SHEETS: Mapping[str, Sheet] = MappingProxyType(
    {
        "e2e": Sheet(
            {"bleu": "e2e_bleu", **_same("nist", "meteor", "rouge_l", "cider")},
            {"test": ("metric_refs/e2e/test_references.jsonl",)},
        ),
        "webnlg": Sheet(
            {"bleu": "webnlg_bleu", "meteor": "webnlg_meteor", "ter": "webnlg_ter"},
            {
                part: _published(_WEBNLG, *(f"{name}.ref{number}" for number in range(3)))
                for part, name in {"test": "all", "seen": "seen", "unseen": "unseen"}.items()
            },
        ),
        "dart": Sheet(
            {"bleu": "multi_bleu", "meteor": "meteor_plain", "ter": "ter"},
            {"test": _published("metric_refs/dart", "ref0.txt", "ref1.txt", "ref2.txt")},
        ),
        "xsum": Sheet(
            _same("rouge_score_1_stem", "rouge_score_2_stem", "rouge_score_l_stem"),
            {"test": ("metric_refs/xsum/gold-test-sentences.txt",)},
        ),
        "squad": Sheet(_ANSWERS),
        **{f"mrqa_{name}": Sheet(_ANSWERS) for name in _MRQA},
        "superglue_record": Sheet(_ANSWERS),
        "superglue_cb": Sheet(_same("accuracy", "macro_f1")),
        "superglue_multirc": Sheet({"f1a": "f1", "exact_match": "group_exact_match", "accuracy": "accuracy"}),
        "glue_mrpc": Sheet(_same("accuracy", "f1")),
        "glue_qqp": Sheet(_same("accuracy", "f1")),
        "glue_cola": Sheet(_same("matthews", "accuracy")),
    }
)
"""By task; a task without a sheet is scored by its own metrics."""
