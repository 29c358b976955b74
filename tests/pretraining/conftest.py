"""A small corpus on disk."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tiny_pretraining import corpus_text


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``talk.jsonl.gz`` (400 records) and ``book.txt`` (one long text)."""
    folder = tmp_path_factory.mktemp("corpus")
    with gzip.open(folder / "talk.jsonl.gz", "wt", encoding="utf-8") as file:
        for i in range(400):
            file.write(json.dumps({"text": corpus_text(i)}) + "\n")
    (folder / "book.txt").write_text("\n".join(corpus_text(i) for i in range(1000, 1100)), encoding="utf-8")
    return folder
