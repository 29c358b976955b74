"""Matching outputs without labels: the loss is the plain one, and following it brings the models together."""

from __future__ import annotations

import itertools

import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from softprompts.config import InitConfig, PromptConfig
from softprompts.errors import ConfigError, PromptMismatchError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, build_prompt
from softprompts.tasks.encode import collate
from softprompts.transfer import (
    MatchBatches,
    Teacher,
    divergence,
    least_squares,
    matching_loss,
    refuse_unmatchable,
)
from softprompts.transfer.matching import Known
from softprompts.types import Encoded, Example

VOCABULARY = 258
"""What the tokenizer has; the models have two rows more."""


def prompt_of(frozen: FrozenLM, kind: str = "embedding", seed: int = 0, placement: str = "prefix") -> SoftPrompt:
    config = PromptConfig(kind=kind, length=4, placement=placement, initializer=InitConfig(name="uniform"))  # type: ignore[arg-type]
    return build_prompt(config, frozen, seed=seed)


def rows(count: int, seed: int = 0) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    lengths = itertools.cycle((5, 9, 7))
    drawn = [torch.randint(97, 123, (length,), generator=generator) for length in itertools.islice(lengths, count)]
    return [Encoded(tuple(ids.tolist()), 1, Example("", "", id=str(number))) for number, ids in enumerate(drawn)]


def plain_logits(frozen: FrozenLM, prompt: SoftPrompt | None, row: Encoded) -> torch.Tensor:
    """Logits that predict tokens 1 and on of a text, by the model itself, one row at a time."""
    words = frozen.embed(row.ids)
    front = torch.zeros(0, words.shape[1]) if prompt is None else prompt.table_PW
    logits = frozen.model(inputs_embeds=torch.cat([front, words])[None]).logits[0]
    return logits[len(front) : -1, :VOCABULARY]


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_the_loss_is_the_plain_one(source: FrozenLM, target: FrozenLM, alpha: float):
    own, theirs = prompt_of(source), prompt_of(target, seed=1)
    texts = rows(3)
    output = sum(kl(plain_logits(source, own, row), plain_logits(target, theirs, row)) for row in texts)
    change = sum(
        kl(
            plain_logits(source, own, row) - plain_logits(source, None, row),
            plain_logits(target, theirs, row) - plain_logits(target, None, row),
        )
        for row in texts
    )
    batch = collate(texts, pad_id=target.pad_id)
    teacher = Teacher(source, own, vocab_size=VOCABULARY)
    found = matching_loss(PromptedLM(target, [theirs]), batch, teacher(batch), alpha=alpha)
    assert float(found.output) == pytest.approx(float(output), rel=1e-3)
    assert found.positions == sum(len(row.ids) - 1 for row in texts)
    if alpha > 0:
        assert float(found.change) == pytest.approx(float(change), rel=1e-3)
    assert float(found.total) == pytest.approx((1 - alpha) * float(output) + alpha * float(change), rel=1e-3)


def test_a_model_matches_itself_with_the_same_prompt(source: FrozenLM):
    prompt = prompt_of(source)
    batch = collate(rows(3), pad_id=source.pad_id)
    teacher = Teacher(source, prompt, vocab_size=VOCABULARY)
    found = matching_loss(PromptedLM(source, [prompt]), batch, teacher(batch), alpha=0.5)
    assert abs(float(found.total.detach())) < 1e-3


def test_kept_outputs_are_those_of_the_moment_and_never_more_than_all(source: FrozenLM, target: FrozenLM):
    own, theirs = prompt_of(source), prompt_of(target, seed=1)
    student = PromptedLM(target, [theirs])
    losses = {}
    for top_k in (None, 1, 8, VOCABULARY - 1):
        teacher = Teacher(source, own, vocab_size=VOCABULARY, top_k=top_k)
        batches = list(MatchBatches(rows(7), teacher, batch_size=3, pad_id=target.pad_id)(0, 0))
        assert [one.teacher is None for one in batches] == [top_k is None] * 3
        losses[top_k] = 0.0
        for one in batches:
            now = teacher(one.batch)
            known = now if one.teacher is None else one.teacher
            assert torch.allclose(known.output.logprobs, now.output.logprobs, atol=1e-4)
            assert torch.allclose(known.change.logprobs, now.change.logprobs, atol=1e-4)
            losses[top_k] += float(matching_loss(student, one.batch, known, alpha=0.5).total.detach())
    assert losses[1] < losses[8] < losses[None]
    assert losses[VOCABULARY - 1] == pytest.approx(losses[None], rel=1e-4)


def test_divergence_counts_what_is_not_kept_as_one_outcome():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    teacher = torch.tensor([[0.5, 0.3, 0.1, 0.1]])
    kept = Known(teacher[:, :2].log(), torch.tensor([[0, 1]]))
    q = logits.softmax(-1)[0]
    plain = 0.5 * (0.5 / q[0]).log() + 0.3 * (0.3 / q[1]).log() + 0.2 * (0.2 / (q[2] + q[3])).log()
    assert float(divergence(kept, logits)) == pytest.approx(float(plain), rel=1e-5)
    everything = float(divergence(Known(teacher.log()), logits))
    assert everything == pytest.approx(float((teacher * (teacher / logits.softmax(-1)).log()).sum()), rel=1e-5)
    assert everything > float(plain)


@pytest.mark.parametrize("by_length", [True, False])
def test_batches_come_back_alike_from_any_start(source: FrozenLM, by_length: bool):
    teacher = Teacher(source, prompt_of(source), vocab_size=VOCABULARY)
    batches = MatchBatches(rows(7), teacher, batch_size=2, pad_id=source.pad_id, seed=4, by_length=by_length)
    whole, rest = list(batches(1, 0)), list(batches(1, 2))
    assert len(whole) == 4
    assert [one.batch.ids_BT.tolist() for one in whole[2:]] == [one.batch.ids_BT.tolist() for one in rest]
    assert sum(one.batch.rows for one in batches.in_order()) == 7


@pytest.mark.parametrize("top_k", [None, 8])
def test_random_batches_hold_every_text_once_with_its_own_outputs(source: FrozenLM, top_k: int | None):
    teacher = Teacher(source, prompt_of(source), vocab_size=VOCABULARY, top_k=top_k)
    texts = rows(60)
    drawn, sorted_ = (
        MatchBatches(texts, teacher, batch_size=6, pad_id=source.pad_id, by_length=by_length)
        for by_length in (False, True)
    )
    assert sorted(itertools.chain(*drawn.indices(0))) == list(range(60))
    assert drawn.indices(0) != drawn.indices(1)

    def mixed(batches: MatchBatches) -> int:
        return sum(len({texts[index].length for index in indices}) > 1 for indices in batches.indices(0))

    assert mixed(drawn) >= 8  # of 10 batches; three lengths of 20 texts each
    assert mixed(sorted_) <= 2
    for one in itertools.islice(drawn(0, 0), 3):
        now = teacher(one.batch)
        known = now if one.teacher is None else one.teacher
        assert torch.allclose(known.output.logprobs, now.output.logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", ["embedding", "prefix"])
def test_following_the_loss_brings_held_out_outputs_together(source: FrozenLM, target: FrozenLM, kind: str):
    own = prompt_of(source, kind)
    student = PromptedLM(target, [least_squares(own, source, target)])
    teacher = Teacher(source, own, vocab_size=VOCABULARY)
    before = [weight.clone() for frozen in (source, target) for weight in frozen.model.parameters()]
    held_out = collate(rows(6, seed=9), pad_id=target.pad_id)

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(matching_loss(student, held_out, teacher(held_out), alpha=0.5).total)

    start = held_out_loss()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    for one in MatchBatches(rows(200), teacher, batch_size=16, pad_id=target.pad_id)(0, 0):
        optimizer.zero_grad()
        found = matching_loss(student, one.batch, teacher(one.batch), alpha=0.5)
        (found.total / found.positions).backward()
        optimizer.step()
    assert held_out_loss() < 0.9 * start
    after = [weight for frozen in (source, target) for weight in frozen.model.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))


def test_what_cannot_be_matched_is_refused(source: FrozenLM, target: FrozenLM):
    other = byte_tokenizer()
    other.add_tokens(["another word"])
    with pytest.raises(PromptMismatchError, match="their tokenizers differ"):
        refuse_unmatchable(source, FrozenLM.from_model(tiny_model("llama"), other), prompt_of(source))
    with pytest.raises(ConfigError, match="an infix stands behind an input"):
        refuse_unmatchable(source, target, prompt_of(source, placement="infix"))
    with pytest.raises(ConfigError, match=r"match.top_k is 258, expected 1 to 257"):
        Teacher(source, prompt_of(source), vocab_size=VOCABULARY, top_k=258)
    batch = collate(rows(2), pad_id=target.pad_id)
    known = Teacher(source, prompt_of(source), vocab_size=VOCABULARY)(batch)
    with pytest.raises(ConfigError, match=r"match.alpha is 2"):
        matching_loss(PromptedLM(target, [prompt_of(target)]), batch, known, alpha=2)
