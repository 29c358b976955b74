"""ROUGE-1, 2 and L (Lin 2004) by the package ``rouge_score``: the average over records of F1, best reference.

These are not the numbers of ROUGE-1.5.5, the Perl script behind most published tables: its tokenization, its
stemmer's exceptions and its pooling of references differ (pointer-generator on XSum, ROUGE-1: 29.70 there, 29.34 here
with stemming).
"""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

from softprompts.evaluation.scorers.base import FloatArray, Metric, Statistics, averaged, register

__all__: list[str] = []


def _statistics(kind: str, stemming: bool) -> Statistics:
    def statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        scorer = RougeScorer([kind], use_stemmer=stemming)

        def one(prediction: str, texts: Sequence[str]) -> float:
            return float(scorer.score_multi(list(texts), prediction)[kind].fmeasure)

        return averaged(one)(predictions, references)

    return statistics


for _kind in ("1", "2", "L"):
    for _stemming in (False, True):
        register(
            Metric(
                f"rouge_score_{_kind.lower()}{'_stem' if _stemming else ''}",
                f"ROUGE-{_kind} F1 of rouge_score, {'Porter stemming' if _stemming else 'no stemming'}, best of the "
                "references (not ROUGE-1.5.5, not coco-caption)",
                _statistics(f"rouge{_kind}", _stemming),
            )
        )
