"""RNNLG (Wen et al. 2016): a dialogue act about a restaurant or a hotel becomes the system's sentence. Apache-2.0.

``inform(name='trattoria';food=italian)`` is read as ``inform | name : trattoria | food : italian``. Outside training an
act is judged once, with all its texts. The two domains share most slots: each is a domain shift of the other
(``task.setting.judge_task=rnnlg_hotel``). Not on the hub; files with ``act, reference`` will do (``task.train=FILE``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from softprompts.config import DecodingConfig
from softprompts.errors import DataError
from softprompts.tasks.formats import TextFormat, text_field
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["RNNLG", "linearize_act"]

_ACT = re.compile(r"(\??)(\w+)\((.*)\)")
_SLOT = re.compile(r"(\w+)(?:=('.*?'|[^;]*))?(?:;|$)")
_FILES = {"train": "train", "dev": "valid", "test": "test"}


def linearize_act(act: str) -> str:
    """Turn ``?select(area='south';area='north')`` into ``? select | area : south | area : north``.

    Raises:
        DataError: ``act`` is not of the form ``act(slot=value;...)``.
    """
    match = _ACT.fullmatch(act.strip())
    if match is None:
        raise DataError(f"the act {act!r} is not of the form act(slot=value;...)")
    parts, end = [f"{match[1]} {match[2]}".strip()], 0
    for slot in _SLOT.finditer(match[3]):
        if slot.start() != end:
            break
        value = (slot[2] or "").strip("'")
        parts.append(f"{slot[1]} : {value}" if value else slot[1])
        end = slot.end()
    if end != len(match[3]):
        raise DataError(f"the slots of the act {act!r} cannot be read from {match[3][end:]!r} on")
    return " | ".join(parts)


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    act, text = linearize_act(text_field(record, "act")), text_field(record, "reference")
    return [Example(act, text, id=str(record.get("id", "")))]


RNNLG = tuple(
    register(
        Task(
            name=f"rnnlg_{domain}",
            description=f"dialogue acts about {domain}s to text",
            format=TextFormat(_read),
            source=Source(local={split: f"rnnlg/{domain}/{file}.jsonl" for split, file in _FILES.items()}),
            metrics=("bleu", "chrf"),
            decoding=DecodingConfig(strategy="beam", beams=5, max_new_tokens=100, banned=("\n", "\n\n")),
            merge_inputs=True,
        )
    )
    for domain in ("restaurant", "hotel")
)
"""Restaurants, hotels."""
