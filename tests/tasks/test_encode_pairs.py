"""Rows for encoder-decoders: input and target are texts of their own."""

import pytest
import torch

from softprompts.errors import ConfigError, DataError, LengthError
from softprompts.tasks import END_TOKEN, TextFormat
from softprompts.tasks.encode import collate, encode
from softprompts.types import Encoded, Example

EOS, BOS, PAD = 256, 258, 257


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(tokenize(text))


def layout(separator: str = "\n", input_lead: str = "", target_lead: str = "") -> TextFormat:
    return TextFormat(lambda record, split: [], separator, input_lead, target_lead)


def make(example: Example, format: TextFormat | None = None, max_length: int = 100, **options) -> Encoded:
    options = {"end_ids": (EOS,), **options}
    return encode(example, format or layout(), tokenize, eos_id=EOS, max_length=max_length, **options)


def test_the_encoder_reads_the_input_and_the_decoder_writes_the_target():
    row = make(Example("ab", "cd"), prompt=3)
    assert (row.ids, row.decoder_ids) == ((*ids_of("ab"), EOS), (*ids_of("cd"), EOS))
    assert (row.target_start, row.target_ids, row.length, row.prompt) == (3, row.decoder_ids, 6, 3)
    asked = make(Example("ab", ""), with_target=False)
    assert (asked.ids, asked.decoder_ids) == (row.ids, None)  # nothing of the input depends on the target


@pytest.mark.parametrize("separator", ["\n", " ", END_TOKEN])
def test_a_mark_between_input_and_target_is_left_out(separator: str):
    assert make(Example("ab", "cd"), layout(separator)).ids == (*ids_of("ab"), EOS)


def test_words_between_input_and_target_are_the_end_of_the_input():
    row = make(Example("ab", "cd"), layout(" Sentiment:", " ", " "))
    # a text begins without the space that a continuation begins with
    assert (row.ids, row.decoder_ids) == ((*ids_of("ab Sentiment:"), EOS), (*ids_of("cd"), EOS))


def test_special_tokens_stand_around_both_texts_as_the_tokenizer_puts_them():
    row = make(Example("ab", "cd"), bos_ids=(BOS,))
    assert (row.ids, row.decoder_ids) == ((BOS, *ids_of("ab"), EOS), (BOS, *ids_of("cd"), EOS))


def test_a_tokenizer_without_end_token_still_gives_pairs():
    assert make(Example("ab", "cd"), end_ids=()).ids == ids_of("ab")


def test_truncation_cuts_the_input_and_keeps_its_end():
    example, format = Example("abcdefgh", "xyz"), layout(" =>")
    assert make(example, format, 7, on_long="truncate").ids == (*ids_of("abc =>"), EOS)
    with pytest.raises(LengthError, match="at most 7"):
        make(example, format, 7)
    with pytest.raises(LengthError, match="the rest does not fit"):
        make(example, format, 3, on_long="truncate")


def test_input_and_target_may_have_the_longest_length_each():
    assert make(Example("abcdefghi", "abcdefghi"), max_length=10).length == 20
    with pytest.raises(LengthError, match="target 11"):
        make(Example("a", "abcdefghij"), max_length=10, on_long="truncate")


def test_an_empty_target_is_refused():
    with pytest.raises(DataError, match="empty"):
        make(Example("a", " "))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_has_targets_in_place_of_labels(side: str):
    rows = [make(Example("abcd", "x"), prompt=1), make(Example("a", "xyz"), prompt=-1)]
    batch = collate(rows, pad_id=PAD, padding_side=side)
    assert batch.labels_BT is None
    assert batch.targets_BU is not None
    assert batch.targets_BU.tolist() == [[ord("x"), EOS, -100, -100], [*ids_of("xyz"), EOS]]
    assert [row[mask == 1].tolist() for row, mask in zip(batch.ids_BT, batch.mask_BT, strict=True)] == [
        list(row.ids) for row in rows
    ]
    assert bool(batch.mask_BT[1, -1 if side == "left" else 0])
    assert batch.prompt_of_row_B.tolist() == [1, -1]
    assert batch.tokens == sum(row.length for row in rows)
    assert torch.equal(batch.to(torch.device("cpu")).targets_BU, batch.targets_BU)


def test_inputs_alone_and_mixtures_of_rows():
    asked = make(Example("a", ""), with_target=False)
    batch = collate([asked, make(Example("b", "c"))], pad_id=PAD, with_labels=False)
    assert (batch.labels_BT, batch.targets_BU) == (None, None)
    with pytest.raises(ConfigError, match="encode them all alike"):
        collate([asked, make(Example("b", "c"))], pad_id=PAD)
