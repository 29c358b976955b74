"""A small corpus on disk."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from softprompts.pretraining.tokens import prepare_tokens
from tiny_pretraining import corpus_text, make_recipe, quiet


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``talk.jsonl.gz`` (400 records) and ``book.txt`` (one long text)."""
    folder = tmp_path_factory.mktemp("corpus")
    with gzip.open(folder / "talk.jsonl.gz", "wt", encoding="utf-8") as file:
        for i in range(400):
            file.write(json.dumps({"text": corpus_text(i)}) + "\n")
    (folder / "book.txt").write_text("\n".join(corpus_text(i) for i in range(1000, 1100)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokens(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of that corpus, as :func:`make_recipe` wants them; nobody may write there."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare_tokens(make_recipe(corpus_dir, folder), folder / "tokens", quiet)
    return folder / "tokens"
