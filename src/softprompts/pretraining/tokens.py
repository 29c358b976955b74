"""A byte-level BPE tokenizer, and the token files that training reads."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from softprompts.config import to_dict
from softprompts.errors import DataError
from softprompts.pretraining.corpus import Source, mix, open_sources
from softprompts.pretraining.recipe import PretrainRecipe, TokenizerConfig

__all__ = [
    "END_OF_TEXT",
    "PAD",
    "TokenFiles",
    "corpus_fingerprint",
    "prepare_tokens",
    "save_tokenizer",
    "train_tokenizer",
    "with_sentinels",
]

END_OF_TEXT = "<|endoftext|>"
"""Id 0: starts and ends every document."""
PAD = "<|pad|>"
"""Id 1."""
_BATCH = 2000


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train byte-level BPE: no unknown characters, every digit on its own, no token added by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def with_sentinels(tokenizer: Tokenizer, count: int) -> Tokenizer:
    """Return the tokenizer of an encoder-decoder: ``<extra_id_0>`` and so on behind the other tokens, texts end in EOS.

    All other ids stay as they are. As in T5, the end stands behind every text, unless special tokens are left out.
    """
    extended = Tokenizer.from_str(tokenizer.to_str())
    extended.add_special_tokens([AddedToken(f"<extra_id_{i}>", normalized=False) for i in range(count)])
    extended.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}",
        pair=f"$A {END_OF_TEXT} $B {END_OF_TEXT}",
        special_tokens=[(END_OF_TEXT, 0)],
    )
    return extended


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write what ``AutoTokenizer.from_pretrained(folder)`` loads."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(str(folder))
    # transformers 5 writes a class name that 4 does not know; both know this one, and so do engines built on either.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """A prepared corpus on disk.

    Attributes:
        folder: ``tokenizer.json``, ``train.bin``, ``held_out/<source>.bin``, ``corpus.json``.
        summary: What ``corpus.json`` holds: tokens, documents and epochs per source.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the files."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @property
    def dtype(self) -> type[np.uint16 | np.uint32]:
        """Type of one token on disk."""
        return np.uint16 if self.summary["vocab_size"] <= 1 << 16 else np.uint32

    def train(self) -> NDArray[Any]:
        """Return the training tokens, one long row, memory-mapped."""
        return np.memmap(self.folder / "train.bin", dtype=self.dtype, mode="r")

    def held_out(self) -> dict[str, NDArray[Any]]:
        """Return the held-out tokens of each source that has any."""
        files = sorted((self.folder / "held_out").glob("*.bin"))
        return {f.stem: np.fromfile(f, dtype=self.dtype) for f in files if f.stat().st_size}


def corpus_fingerprint(recipe: PretrainRecipe) -> str:
    """Digest of all that token files depend on: the sections ``corpus`` and ``tokenizer``, not what the files hold."""
    key = json.dumps([to_dict(recipe.corpus), to_dict(recipe.tokenizer)], sort_keys=True)
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def prepare_tokens(recipe: PretrainRecipe, folder: Path, report: Callable[[str], None] = print) -> TokenFiles:
    """Train the tokenizer and write the token files, unless ``folder`` holds those of the same recipe already.

    Args:
        recipe: Only its sections ``corpus`` and ``tokenizer`` matter.
        folder: Where the files go; replaced as a whole once they are complete.
        report: Told about progress, a line at a time.

    Raises:
        DataError: The mix holds less than a thousand tokens.
    """
    fingerprint = corpus_fingerprint(recipe)
    if (folder / "corpus.json").is_file():
        summary = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        if summary["fingerprint"] == fingerprint:
            return TokenFiles(folder, summary)
    report("reading the corpus")
    sources = open_sources(recipe.corpus)
    report("training the tokenizer")
    tokenizer = train_tokenizer(_limited(sources, recipe), recipe.tokenizer)
    for source in sources:
        source.epochs = 0
    # A folder in the cache may be wanted by two runs at once: each writes its own.
    scratch = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "held_out").mkdir(parents=True)
    tokenizer.save(str(scratch / "tokenizer.json"))
    summary = {"fingerprint": fingerprint, "vocab_size": tokenizer.get_vocab_size()}
    summary |= _write_train(sources, tokenizer, recipe, scratch, report)
    _write_held_out(sources, tokenizer, recipe, scratch, summary)
    (scratch / "corpus.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)
    return TokenFiles(folder, summary)


def _limited(sources: list[Source], recipe: PretrainRecipe) -> Iterator[str]:
    characters = 0
    for _, document in mix(sources, recipe.corpus):
        characters += len(document)
        yield document
        if characters >= recipe.tokenizer.training_characters:
            return


def _encode(tokenizer: Tokenizer, documents: list[str], dtype: Any) -> list[NDArray[Any]]:
    """Encode documents, each behind one end-of-text token."""
    encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return [np.array([0, *item.ids], dtype=dtype) for item in encoded]


def _write_train(
    sources: list[Source], tokenizer: Tokenizer, recipe: PretrainRecipe, folder: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    counts = {s.config.name: {"tokens": 0, "documents": 0, "characters": 0} for s in sources}
    total, reported = 0, 0
    stream = mix(sources, recipe.corpus)
    with (folder / "train.bin").open("wb") as file:
        while total < recipe.corpus.tokens:
            batch = list(itertools.islice(stream, _BATCH))
            if not batch:
                break
            rows = _encode(tokenizer, [text for _, text in batch], dtype)
            for (name, text), row in zip(batch, rows, strict=True):
                counts[name]["tokens"] += len(row)
                counts[name]["documents"] += 1
                counts[name]["characters"] += len(text)
                total += len(row)
                file.write(row.tobytes())
            if total - reported >= 5_000_000:
                reported = total
                report(f"tokenised {total / 1e6:.1f} M tokens")
    if total < 1000:
        raise DataError(f"the corpus mix holds only {total} tokens; expected a thousand at the least: add text")
    for source in sources:
        counts[source.config.name]["epochs"] = source.epochs
    return {"train_tokens": total, "sources": counts}


def _write_held_out(
    sources: list[Source], tokenizer: Tokenizer, recipe: PretrainRecipe, folder: Path, summary: dict[str, Any]
) -> None:
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    for source in sources:
        rows: list[NDArray[Any]] = []
        size = 0
        stream = source.documents(recipe.corpus.seed, held_out=True)
        while size < recipe.corpus.held_out_tokens and (batch := list(itertools.islice(stream, 200))):
            rows += _encode(tokenizer, batch, dtype)
            size = sum(map(len, rows))
        tokens = np.concatenate(rows)[: recipe.corpus.held_out_tokens] if rows else np.empty(0, dtype)
        tokens.tofile(folder / "held_out" / f"{source.config.name}.bin")
        summary["sources"][source.config.name]["held_out_tokens"] = len(tokens)
