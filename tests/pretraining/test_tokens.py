from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from softprompts.errors import DataError
from softprompts.pretraining.recipe import PretrainRecipe, TokenizerConfig
from softprompts.pretraining.tokens import END_OF_TEXT, PAD, TokenFiles, prepare_tokens, save_tokenizer, train_tokenizer
from tiny_pretraining import corpus_text, make_recipe


@pytest.fixture(scope="module")
def prepared(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainRecipe, TokenFiles]:
    folder = tmp_path_factory.mktemp("run")
    recipe = make_recipe(corpus_dir, folder)
    return recipe, prepare_tokens(recipe, folder / "tokens", lambda line: None)


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = train_tokenizer([corpus_text(i) for i in range(50)], TokenizerConfig(vocab_size=400))
    for text in ("The kitchen in Paris", "çà 漢字 \x00 \t🙂", "12345", "", " two  blanks "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_and_digits() -> None:
    tokenizer = train_tokenizer([corpus_text(i) for i in range(50)], TokenizerConfig(vocab_size=400))
    assert (tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PAD)) == (0, 1)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024").ids] == list("2024")


def test_saved_tokenizer_loads_offline_and_adds_nothing(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([corpus_text(i) for i in range(50)], TokenizerConfig(vocab_size=400))
    save_tokenizer(tokenizer, tmp_path, context=32)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The kitchen in Paris serves 12 noodles."
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 1)
    assert loaded.model_max_length == 32
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in (tmp_path / "tokenizer_config.json").read_text()


def test_token_file_holds_whole_documents(prepared: tuple[PretrainRecipe, TokenFiles]) -> None:
    _, files = prepared
    tokens = files.train()
    assert tokens.dtype == np.uint16
    assert tokens[0] == 0
    assert len(tokens) == files.summary["train_tokens"] >= 20_000
    counts = files.summary["sources"]
    assert int((tokens == 0).sum()) == sum(source["documents"] for source in counts.values())
    assert "serves fresh" in files.tokenizer.decode(tokens[:200].tolist())
    assert set(files.held_out()) == {"talk", "book", "records"}


def test_shares_are_kept(prepared: tuple[PretrainRecipe, TokenFiles]) -> None:
    counts = prepared[1].summary["sources"]
    total = sum(source["characters"] for source in counts.values())
    assert abs(counts["talk"]["characters"] / total - 0.5) < 0.02
    assert abs(counts["book"]["characters"] / total - 1 / 6) < 0.02


def test_files_are_used_again_for_the_same_recipe_only(prepared: tuple[PretrainRecipe, TokenFiles]) -> None:
    recipe, files = prepared
    before = (files.folder / "train.bin").stat().st_mtime_ns
    prepare_tokens(recipe, files.folder, pytest.fail)
    assert (files.folder / "train.bin").stat().st_mtime_ns == before
    other = dataclasses.replace(recipe, tokenizer=TokenizerConfig(vocab_size=380, training_characters=50_000))
    lines: list[str] = []
    changed = prepare_tokens(other, files.folder.with_name("other"), lines.append)
    assert changed.summary["vocab_size"] == 380
    assert lines[0] == "reading the corpus"


def test_a_corpus_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl.gz").write_bytes(b"")
    (tmp_path / "book.txt").write_text("short", encoding="utf-8")
    with pytest.raises(DataError, match="holds no text to train on"):
        prepare_tokens(make_recipe(tmp_path, tmp_path / "run"), tmp_path / "run" / "tokens", lambda line: None)
