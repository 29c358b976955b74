"""What a benchmark measures with, and what it measures on."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from softprompts.bench.machine import machine
from softprompts.bench.measure import Spread, flops, interleaved, relative_difference
from softprompts.bench.workload import MEAN_TOKENS, draw_rows
from softprompts.models.label_loss import chunked_cross_entropy


def test_subjects_take_turns():
    calls: list[tuple[str, int]] = []
    subjects = {name: (lambda number, name=name: calls.append((name, number))) for name in ("a", "b")}
    spreads = interleaved(subjects, repeats=3, device=torch.device("cpu"), warmup=1)
    assert calls == [(name, number) for number in (0, 0, 1, 2) for name in ("a", "b")]
    assert {spread.repeats for spread in spreads.values()} == {3}


def test_spread():
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0], [1.0, 9.0, 2.0, 8.0, 3.0])
    assert spread.processor == 3.0
    assert (spread.median, spread.fastest, spread.repeats) == (3.0, 1.0, 5)
    assert spread.fastest <= spread.lower <= spread.median <= spread.upper <= 5.0
    assert Spread.of([2.0], [4.0]) == Spread(2.0, 2.0, 2.0, 2.0, 4.0, 1)


def test_attention_of_the_cpu_is_counted():
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    one = 2 * 2 * 3 * 5 * 5 * 8  # one product of queries and keys
    assert flops(lambda: scaled_dot_product_attention(q, k, v)) == 2 * one
    assert flops(lambda: scaled_dot_product_attention(q, k, v).sum().backward()) == 2 * one + 5 * one


def test_a_backward_pass_within_a_forward_pass_is_counted():
    head = torch.nn.Linear(4, 10, bias=False).requires_grad_(False)
    hidden, labels = torch.randn(6, 4, requires_grad=True), torch.arange(6)
    loss = lambda: chunked_cross_entropy(head, hidden, labels, vocab_size=10, chunk_logits=30).sum().backward()  # noqa: E731
    assert flops(loss) == 2 * (2 * 6 * 4 * 10)


def test_difference_is_relative():
    assert relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == 1 / 34**0.5


def test_rows_have_the_lengths_of_e2e():
    rows = draw_rows(2000, vocab_size=100, seed=0, prompts=range(3))
    lengths = torch.tensor([float(len(row.ids)) for row in rows])
    targets = torch.tensor([float(len(row.ids) - row.target_start) for row in rows])
    assert float(lengths.sum()) == 2000 * MEAN_TOKENS
    assert abs(float(lengths.std()) - 17.5 * MEAN_TOKENS / 66.4) < 0.5
    assert abs(float(targets.sum() / lengths.sum()) - 0.467) < 0.01
    inputs = lengths - targets
    assert abs(float(torch.corrcoef(torch.stack([inputs, targets]))[0, 1]) - 0.72) < 0.05
    assert all(0 <= token < 100 for row in rows for token in row.ids)
    assert [row.prompt for row in rows[:4]] == [0, 1, 2, 0]
    assert draw_rows(5, vocab_size=100, seed=1) == draw_rows(5, vocab_size=100, seed=1) != rows[:5]


def test_a_number_says_what_it_was_measured_on():
    facts = machine(torch.device("cpu"))
    assert facts["device"] == "cpu"
    assert facts["processor"]
    assert facts["threads"] == torch.get_num_threads()
    assert (
        facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    )
