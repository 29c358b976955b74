"""The columns of the matrix of families for PEFT: the same shapes, the same oracle, through PEFT's own interface.

A contract that holds for prompt tuning and for prefix tuning is right; one that raises for either fails; one that runs
and gives other numbers is wrong. Batches are given to PEFT as its documentation does: padded on the right for
training, on the left for ``generate``.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from family_contracts import (
    COLUMNS,
    RIGHT,
    WORDS,
    Cell,
    NotApplicableError,
    Subject,
    WrongError,
    demand_equal,
    padded,
    rows_of_text,
)
from softprompts.models.dropout import switch_dropout_off

__all__ = ["judge_peft"]

NEW_TOKENS = 4
PAD = 257


def judge_peft(subject: Subject, column: str) -> Cell:
    """Fill one cell: ``right``, ``fails`` (an exception), ``wrong`` or ``not applicable``."""
    cells = [_judge(subject, column, kind) for kind in WORDS if kind in column or not column.endswith("= words")]
    for verdict in ("wrong", "fails", "not applicable"):
        found = [cell for cell in cells if cell.verdict == verdict]
        if found:
            return Cell(verdict, "; ".join(dict.fromkeys(cell.reason for cell in found)))
    return Cell(RIGHT)


def _judge(subject: Subject, column: str, kind: str) -> Cell:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CONTRACTS[column](subject, kind)
    except NotApplicableError as error:
        return Cell("not applicable", str(error))
    except WrongError as error:
        return Cell("wrong", f"{kind}: {error}")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return Cell("fails", f"{kind}: {type(error).__name__}: {reason}"[:200])
    finally:
        logging.disable(logging.NOTSET)
    return Cell(RIGHT)


def _tuned(subject: Subject, kind: str, *, exact: bool = False) -> PeftModel:
    """The model of a shape with a PEFT prompt, of real words where they can be represented (``exact``: or an error)."""
    model = subject.shape.build()
    ids = torch.tensor([subject.words(kind)])
    length = ids.shape[1]
    if kind == "embedding":
        tuned = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length))
        with torch.no_grad():
            _table(tuned).copy_(model.get_input_embeddings()(ids)[0])
        return tuned
    tuned = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length))
    try:
        with torch.no_grad():
            _table(tuned).copy_(_keys_values(subject.twin, ids))
    except (IndexError, RuntimeError, ValueError):
        if exact:
            raise
        # keys and values of words do not fit into it; the other contracts can be tried with random ones
    return tuned


def _table(tuned: PeftModel) -> Tensor:
    (parameter,) = [parameter for parameter in tuned.prompt_encoder.parameters() if parameter.requires_grad]
    return parameter


@torch.no_grad()
def _keys_values(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Keys and values of words in PEFT's layout, ``[P, 2 * layers * heads * size]``."""
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    columns = [states[0].transpose(0, 1).flatten(1) for layer in cache.layers for states in (layer.keys, layer.values)]
    return torch.cat(columns, dim=1)


def _forward(tuned: PeftModel, kind: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """Training's forward on a right-padded batch: logits that predict all tokens but each row's first."""
    batch = padded(rows, [0] * len(rows), "right")
    logits_BTV = tuned(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits.float()
    logits_BTV = logits_BTV[:, -batch.ids_BT.shape[1] :]  # of prompt tuning it also returns the prompt's
    return torch.cat([logits_BTV[number, : len(row) - 1] for number, row in enumerate(rows)])


def _generated(tuned: PeftModel, rows: Sequence[Sequence[int]], steps: int = 1, use_cache: bool = True) -> Tensor:
    """Logits of the first steps of greedy generation, ``[B, steps, V]``, rows padded on the left."""
    batch = padded(rows, [0] * len(rows), "left")
    out: Any = tuned.generate(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask_BT,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits, dim=1).float()


@torch.no_grad()
def _oracle(subject: Subject, kind: str) -> None:
    rows, words = rows_of_text(), subject.words(kind)
    expected = torch.cat([_plain(subject, [*words, *row])[len(words) : -1] for row in rows])
    demand_equal(_forward(_tuned(subject, kind, exact=True), kind, rows), expected, "real words")


def _plain(subject: Subject, ids: Sequence[int]) -> Tensor:
    return subject.twin(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


@torch.no_grad()
def _left(subject: Subject, kind: str) -> None:
    tuned, rows = _tuned(subject, kind), rows_of_text()
    demand_equal(_generated(tuned, rows), torch.cat([_generated(tuned, [row]) for row in rows]), "left-padded")


@torch.no_grad()
def _right(subject: Subject, kind: str) -> None:
    tuned, rows = _tuned(subject, kind), rows_of_text()
    alone = torch.cat([_forward(tuned, kind, [row]) for row in rows])
    demand_equal(_forward(tuned, kind, rows), alone, "right-padded")


def _no_packing(subject: Subject, kind: str) -> None:
    raise NotApplicableError("PEFT does not pack rows")


def _no_label_head(subject: Subject, kind: str) -> None:
    raise NotApplicableError("PEFT runs the head everywhere")


@torch.no_grad()
def _first_step(subject: Subject, kind: str) -> None:
    tuned, rows = _tuned(subject, kind), rows_of_text()
    trained = _forward(tuned, kind, [[*row, 65] for row in rows])
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    demand_equal(_generated(tuned, rows)[:, 0], trained[ends], "first step")


@torch.no_grad()
def _cache(subject: Subject, kind: str) -> None:
    tuned, rows = _tuned(subject, kind), rows_of_text()[:1]
    without = _generated(tuned, rows, NEW_TOKENS, use_cache=False)
    demand_equal(_generated(tuned, rows, NEW_TOKENS), without, "cache")


def _trained(tuned: PeftModel, kind: str) -> Tensor:
    rows = rows_of_text()
    labels_M = torch.cat([torch.tensor(row[1:]) for row in rows])
    torch.nn.functional.cross_entropy(_forward(tuned, kind, rows), labels_M).backward()
    gradient = _table(tuned).grad
    if gradient is None:
        raise WrongError("no gradient")
    return gradient


def _gradient(subject: Subject, kind: str) -> None:
    gradient = _trained(_tuned(subject, kind), kind)
    dead = int((gradient == 0).sum())
    if dead or not bool(torch.isfinite(gradient).all()):
        raise WrongError(f"{dead} of {gradient.numel()} numbers get no gradient")


def _unchanged(subject: Subject, kind: str) -> None:
    tuned = _tuned(subject, kind)
    _trained(tuned, kind)
    if _digest(tuned.get_base_model()) != _digest(subject.shape.build()):
        raise WrongError("weights have changed")


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _checkpointing(subject: Subject, kind: str) -> None:
    expected = _trained(_tuned(subject, kind), kind)
    tuned = _tuned(subject, kind)
    switch_dropout_off(tuned)
    tuned.gradient_checkpointing_enable({"use_reentrant": False})
    tuned.train()
    demand_equal(_trained(tuned, kind), expected, "gradient", 1e-3)


CONTRACTS: dict[str, Callable[[Subject, str], None]] = dict(
    zip(
        COLUMNS,
        (
            _oracle,
            _oracle,
            _left,
            _right,
            _no_packing,
            _first_step,
            _cache,
            _gradient,
            _no_label_head,
            _unchanged,
            _checkpointing,
        ),
        strict=True,
    )
)
