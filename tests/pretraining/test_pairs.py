from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompts.pretraining.pairs import Cut, SpanCorruption

SENTINEL = 1000


@st.composite
def corruptions(draw: st.DrawFn) -> tuple[SpanCorruption, np.ndarray, int]:
    length = draw(st.integers(2, 120))
    density, mean = draw(st.floats(0.01, 0.99)), draw(st.floats(1.0, 12.0))
    ids = draw(st.lists(st.integers(0, SENTINEL - 1), min_size=length, max_size=length))
    return SpanCorruption(length, density, mean, SENTINEL, end=0), np.array(ids), draw(st.integers(0, 1 << 30))


@given(corruptions())
def test_inputs_and_targets_rebuild_the_text(case: tuple[SpanCorruption, np.ndarray, int]) -> None:
    spans, ids, seed = case
    inputs, targets = spans.pair(ids, np.random.default_rng(seed))
    np.testing.assert_array_equal(spans.restore(inputs, targets), ids)
    assert (len(inputs), len(targets)) == (spans.input_length, spans.target_length)
    sentinels = np.arange(SENTINEL, SENTINEL + spans.spans)
    np.testing.assert_array_equal(inputs[inputs >= SENTINEL], sentinels)
    np.testing.assert_array_equal(targets[targets >= SENTINEL], sentinels)
    assert inputs[-1] == targets[-1] == 0
    # A row begins with text, ends with a span, and two spans never touch: no sentinel follows another.
    assert inputs[0] < SENTINEL <= inputs[-2]
    assert targets[0] == SENTINEL
    assert not ((inputs[:-1] >= SENTINEL) & (inputs[1:] >= SENTINEL)).any()
    assert not ((targets[:-1] >= SENTINEL) & (targets[1:] >= SENTINEL)).any()


def test_lengths_are_those_of_t5() -> None:
    # random_spans_helper of the T5 code: 568 tokens become 512 and 114, both with their end.
    spans = SpanCorruption(568, 0.15, 3.0, 32_000, end=1)
    assert (spans.input_length, spans.target_length) == (512, 114)
    assert (spans.noise_tokens, spans.spans) == (85, 28)


def test_spans_vary_and_have_the_asked_share_and_mean_length() -> None:
    spans = SpanCorruption(512, 0.15, 3.0, SENTINEL, end=0)
    ids, rng = np.arange(512) % 900 + 1, np.random.default_rng(0)
    lost = np.zeros(512)
    lengths: list[int] = []
    for _ in range(300):
        _, targets = spans.pair(ids, rng)
        pieces = np.split(targets[:-1], np.flatnonzero(targets[:-1] >= SENTINEL))[1:]
        lengths += [len(piece) - 1 for piece in pieces]
        for piece in pieces:
            lost[np.flatnonzero(np.isin(ids, piece[1:]))] += 1
    assert np.mean(lengths) == pytest.approx(77 / 26)
    assert min(lengths) == 1
    assert max(lengths) > 8
    # every place is cut out about as often; the first never, the last always
    assert lost[0] == 0
    assert lost[5:500].min() / 300 > 0.05
    assert lost[5:500].max() / 300 < 0.30


@given(st.integers(2, 60), st.data())
def test_a_cut_row_is_the_row(length: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(1, length - 1))
    cut = Cut(length, target, end=0, pad=1)
    ids = np.arange(2, length + 2)
    inputs, targets = cut.pair(ids, np.random.default_rng(data.draw(st.integers(0, 1 << 30))))
    assert (len(inputs), len(targets)) == (cut.input_length, cut.target_length)
    at = int(np.flatnonzero(inputs == 0)[0])
    assert at >= 1
    assert (inputs[at + 1 :] == 1).all()
    np.testing.assert_array_equal(np.concatenate([inputs[:at], targets]), ids[: at + target])


def test_every_cut_occurs() -> None:
    cut, rng = Cut(8, 3, end=0, pad=1), np.random.default_rng(0)
    firsts = [int(cut.pair(np.arange(2, 10), rng)[1][0]) for _ in range(2000)]
    counts = np.bincount(firsts, minlength=8)[3:8]
    assert counts.sum() == 2000
    assert counts.min() > 330
