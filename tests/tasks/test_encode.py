"""Token ids, masks, labels, truncation and batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompts.errors import ConfigError, DataError, LengthError
from softprompts.tasks import END_TOKEN, TextFormat
from softprompts.tasks.encode import bucketed_batches, collate, encode, encode_choices, shuffled_batches
from softprompts.types import Encoded, Example, Segment

EOS, PAD = 256, 257


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def layout(separator: str = "\n", input_lead: str = "", target_lead: str = "") -> TextFormat:
    return TextFormat(lambda record, split: [], separator, input_lead, target_lead)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(tokenize(text))


def make(example: Example, format: TextFormat | None = None, max_length: int = 100, **options) -> Encoded:
    return encode(example, format or layout(), tokenize, eos_id=EOS, max_length=max_length, **options)


def test_a_training_row_ends_with_the_end_token_and_an_input_does_not():
    example = Example("ab", "cd")
    row = make(example, prompt=3)
    assert row == Encoded((*ids_of("ab\ncd"), EOS), 3, example, 3, infix_at=2)
    row = make(example, with_target=False)
    assert (row.ids, row.target_start) == (ids_of("ab\n"), 3)


def test_the_end_token_as_separator_and_the_leading_spaces_of_the_paper():
    row = make(Example("name : X", "X is"), layout(END_TOKEN, " ", " "))
    assert row.ids == (*ids_of(" name : X"), EOS, *ids_of(" X is"), EOS)
    assert row.target_start == 10


def test_text_that_looks_like_the_marker_is_text():
    row = make(Example(END_TOKEN, END_TOKEN))
    assert row.ids == (*ids_of(f"{END_TOKEN}\n{END_TOKEN}"), EOS)


def test_segments_are_tokenised_apart_so_that_the_input_is_the_same_in_training_and_generation():
    merging = {"ab": 1, "a": 2, "b": 3, "\n": 4, "\nb": 5}

    def greedy(text: str) -> list[int]:  # longest match first: joined, "\n" + "b" would become one token
        ids = []
        while text:
            piece = next(text[:size] for size in (2, 1) if text[:size] in merging)
            ids.append(merging[piece])
            text = text[len(piece) :]
        return ids

    options = {"eos_id": EOS, "max_length": 9}
    trained = encode(Example("a", "b"), layout(), greedy, **options)
    asked = encode(Example("a", "b"), layout(), greedy, with_target=False, **options)
    assert greedy("a\nb") == [2, 5]
    assert trained.ids == (2, 4, 3, EOS)
    assert trained.ids[: trained.target_start] == asked.ids


def test_several_input_segments_are_cut_from_the_end_of_the_last():
    class Two(TextFormat):
        def segments(self, example: Example) -> tuple[Segment, ...]:
            return (Segment("abc", "input"), *super().segments(example))

    row = encode(Example("def", "x"), Two(lambda r, s: []), tokenize, eos_id=EOS, max_length=7, on_long="truncate")
    assert row.ids == (*ids_of("abcd\nx"), EOS)


def test_too_long_is_refused_by_name_with_the_lengths():
    example = Example("abcdef", "xyz", id="r-7")
    with pytest.raises(
        LengthError, match=r"'r-7' has 11 tokens \(input 6, separator 1, target 4\).*at most 10.*on_long"
    ):
        make(example, max_length=10)
    assert make(example, max_length=11).target_start == 7
    with pytest.raises(LengthError, match="truncation cuts the input only"):
        make(example, max_length=4, on_long="truncate")
    assert make(example, max_length=5, on_long="truncate").ids == (*ids_of("\nxyz"), EOS)


@pytest.mark.parametrize("target", ["", "  ", "\n"])
def test_an_empty_target_is_refused_in_training_only(target: str):
    with pytest.raises(DataError, match="target of record 'r-1' is empty"):
        make(Example("a", target, id="r-1"))
    assert make(Example("a", target), with_target=False).ids == ids_of("a\n")


def test_nothing_to_encode_is_refused():
    with pytest.raises(DataError, match="no tokens at all"):
        make(Example("", "x", id="r"), layout(separator=""), with_target=False)


TEXTS = st.text(max_size=40)
TARGETS = st.text(min_size=1, max_size=20).filter(str.strip)
FORMATS = st.builds(
    layout,
    separator=st.sampled_from(["\n", END_TOKEN, " =>", ""]),
    input_lead=st.sampled_from(["", " "]),
    target_lead=st.sampled_from(["", " "]),
)


@given(TEXTS, TARGETS, FORMATS, st.integers(1, 120), st.sampled_from([(), (300,), (300, 301)]))
def test_truncation_keeps_start_separator_and_target_whole(text, target, format, limit, bos_ids):
    example = Example(text, target)
    whole = make(example, format, max_length=10_000, bos_ids=bos_ids)
    assert whole.ids[: len(bos_ids)] == bos_ids
    rest = len(whole.ids) - len(tokenize(format.input_lead + text))
    if rest > limit:
        with pytest.raises(LengthError):
            make(example, format, limit, on_long="truncate", bos_ids=bos_ids)
        return
    row = make(example, format, limit, on_long="truncate", bos_ids=bos_ids)
    assert len(row.ids) == min(limit, len(whole.ids))
    kept = rest - len(bos_ids)
    assert row.ids[len(row.ids) - kept :] == whole.ids[len(whole.ids) - kept :]
    assert row.ids[: len(row.ids) - kept] == whole.ids[: len(row.ids) - kept]
    assert row.ids[row.target_start :] == (*ids_of(format.target_lead + target), EOS)
    if len(whole.ids) <= limit:
        assert make(example, format, limit, bos_ids=bos_ids) == whole


@given(TEXTS, TARGETS, FORMATS.filter(lambda format: format.separator))
def test_the_input_is_a_prefix_of_the_training_row(text: str, target: str, format: TextFormat):
    row = make(Example(text, target), format, 1000)
    asked = make(Example(text, target), format, 1000, with_target=False)
    assert row.ids[: row.target_start] == asked.ids
    assert asked.target_start == len(asked.ids)


ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=12), st.integers(0, 12), st.integers(-1, 3)),
    min_size=1,
    max_size=6,
).map(lambda rows: [Encoded(tuple(ids), min(start, len(ids)), Example("", "x"), p) for ids, start, p in rows])


@given(ROWS, st.sampled_from(["right", "left"]))
def test_a_batch_gives_its_rows_back(rows: list[Encoded], side: str):
    batch = collate(rows, pad_id=PAD, padding_side=side)
    longest = max(len(row.ids) for row in rows)
    assert batch.ids_BT.shape == batch.mask_BT.shape == batch.labels_BT.shape == (len(rows), longest)
    assert batch.prompt_of_row_B.tolist() == [row.prompt for row in rows]
    for index, row in enumerate(rows):
        real = batch.mask_BT[index].bool()
        assert tuple(batch.ids_BT[index][real].tolist()) == row.ids
        assert set(batch.ids_BT[index][~real].tolist()) <= {PAD}
        learned = batch.labels_BT[index] != -100
        assert tuple(batch.labels_BT[index][learned].tolist()) == row.ids[row.target_start :]
        assert torch.equal(batch.labels_BT[index][learned], batch.ids_BT[index][learned])
        edge = batch.mask_BT[index] if side == "right" else batch.mask_BT[index].flip(0)
        assert (edge.diff() <= 0).all()  # ones, then zeros


def test_a_pad_id_that_is_also_a_token_is_not_mistaken_for_padding():
    """With the end token as padding (usual for GPT-2), the mask and the labels still hold the real one."""
    row = make(Example("a", "b"))
    batch = collate([row, make(Example("aaa", "b"))], pad_id=EOS)
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch.labels_BT.tolist()[0] == [-100, -100, *ids_of("b"), EOS, -100, -100]


def test_labels_can_be_left_out_and_a_batch_has_rows():
    assert collate([make(Example("a", "b"))], pad_id=PAD, with_labels=False).labels_BT is None
    with pytest.raises(ConfigError, match="no rows"):
        collate([], pad_id=PAD)


@given(st.lists(st.integers(1, 500), max_size=400), st.integers(1, 40), st.integers(0, 2**32), st.integers(0, 50))
def test_an_epoch_has_every_row_once(lengths: list[int], batch_size: int, seed: int, epoch: int):
    batches = bucketed_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert batches == bucketed_batches(lengths, batch_size, seed=seed, epoch=epoch)


@given(st.integers(0, 400), st.integers(1, 40), st.integers(0, 2**32), st.integers(0, 50))
def test_random_batches_have_every_row_once_too(rows: int, batch_size: int, seed: int, epoch: int):
    batches = shuffled_batches(rows, batch_size, seed=seed, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(rows))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert batches == shuffled_batches(rows, batch_size, seed=seed, epoch=epoch)


def test_random_batches_know_nothing_of_lengths():
    lengths = list(range(1000))
    spread = [np.std([lengths[i] for i in batch]) for batch in shuffled_batches(1000, 10, seed=0, epoch=0)]
    assert np.median(spread) > 200
    with pytest.raises(ConfigError, match="batch_size is 0"):
        shuffled_batches(2, 0, seed=0, epoch=0)


def test_seeds_and_epochs_give_different_orders_that_never_change():
    lengths = [3, 1, 2, 5, 4, 1, 9, 2, 6, 6]
    orders = {str(bucketed_batches(lengths, 2, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    # Pinned: a resumed run on another machine or version must see the same order.
    assert bucketed_batches(lengths, 3, seed=101, epoch=2) == [[7, 0, 4], [6], [3, 9, 8], [5, 1, 2]]


def test_batches_of_one_epoch_are_not_sorted_by_length():
    lengths = list(range(1000))
    means = [np.mean([lengths[i] for i in batch]) for batch in bucketed_batches(lengths, 10, seed=0, epoch=0)]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="batch_size is 0"):
        bucketed_batches([1, 2], 0, seed=0, epoch=0)


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def test_bucketing_saves_most_of_the_padding():
    """Lengths as in E2E (mean 56 tokens, standard deviation 18): a third of a plain batch is padding."""
    lengths = np.random.default_rng(0).normal(56, 18, 4000).clip(8, 140).astype(int).tolist()
    plain = [list(range(start, start + 16)) for start in range(0, 4000, 16)]
    assert padding_share(lengths, plain) > 0.3
    assert padding_share(lengths, bucketed_batches(lengths, 16, seed=0, epoch=0)) < 0.04


def test_an_infix_goes_where_the_input_ends():
    """In front of the separator, behind what the tokenizer puts in front; the same with and without a target."""
    example = Example("abcd", "xy")
    for options in ({}, {"with_target": False}, {"max_length": 8, "on_long": "truncate"}):
        row = make(example, layout(separator=" =>"), bos_ids=(9,), **options)
        assert row.infix_at is not None
        assert bytes(row.ids[row.infix_at :][:3]) == b" =>"
        assert row.ids[: row.infix_at][0] == 9
    rows = [make(example), make(Example("a", "xy"))]
    for side in ("left", "right"):
        infix_B = collate(rows, pad_id=PAD, padding_side=side).infix_B
        assert infix_B is not None
        assert infix_B.tolist() == [4, 1]
    assert collate([rows[0], Encoded((1, 2), 1, example)], pad_id=PAD).infix_B is None
    assert make(example, end_ids=(1,)).infix_at is None


# --- tails, choices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (40, "passage: abcdef question: xy"),
        (28, "passage: abcdef question: xy"),
        (25, "passage: abc question: xy"),
        (13, " question: xy"),
        (4, " que"),
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_truncation_spares_the_tail_of_an_input(room: int, kept: str, paired: bool):
    example = Example("passage: abcdef question: xy", "no", tail=" question: xy")
    ends = {"end_ids": (EOS,)} if paired else {}
    around = 1 if paired else len("\nno") + 1
    row = make(example, max_length=room + around, on_long="truncate", **ends)
    assert row.ids == ((*ids_of(kept), EOS) if paired else (*ids_of(kept + "\nno"), EOS))
    assert row.infix_at == (None if paired else len(kept))


def test_choices_are_what_stands_behind_the_input():
    examples = [Example("a", "no", choices=("no", "yes")), Example("b", "b", choices=("b",)), Example("c", "")]
    examples.append(Example("d", "yes", choices=("no", "yes"), tail="d"))
    options = {"eos_id": EOS}
    found = encode_choices(examples, layout(" =>", target_lead=" "), tokenize, **options)
    assert found[0] == ((*ids_of(" no"), EOS), (*ids_of(" yes"), EOS))
    assert found[1:] == [((*ids_of(" b"), EOS),), (), found[0]]
    for target in ("no", "yes"):
        row = make(replace(examples[0], target=target), layout(" =>", target_lead=" "))
        assert row.target_ids in found[0]
    paired = encode_choices(examples, layout(" =>", target_lead=" "), tokenize, bos_ids=(7,), end_ids=(EOS,), **options)
    assert paired[1] == ((7, *ids_of("b"), EOS),)
