"""What is run: a model of a known shape, and rows whose lengths are those of a real data set.

Rows are drawn, not read, so that everybody gets the same ones. Their lengths follow the training split of E2E NLG
(Novikova et al. 2017; 42,061 rows): with the tokenizer of the bundled LM they have 66.4 tokens on average (standard
deviation 17.5, from 25 to 130), 35.4 (9.0) of them the meaning representation and 31.0 (9.9) the text, which is what
is learned; the two lengths correlate with 0.72. All lengths are scaled so that a row has 50 tokens on average, about
what GPT-2's tokenizer makes of E2E.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from softprompts.models import FrozenLM
from softprompts.tasks.encode import collate
from softprompts.types import Batch, Encoded, Example

__all__ = ["MEAN_TOKENS", "RANDOM_GPT2", "draw_batch", "draw_rows", "random_gpt2"]

RANDOM_GPT2 = "gpt2-6x512"
"""Name of the shape that :func:`random_gpt2` makes."""

MEAN_TOKENS = 50
_SCALE = MEAN_TOKENS / 66.4
_INPUT = (35.4 * _SCALE, 9.0 * _SCALE)
_TARGET = (31.0 * _SCALE, 9.9 * _SCALE)
_CORRELATION = 0.72
_SHORTEST_INPUT, _SHORTEST_TARGET = 8, 5


def random_gpt2(*, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> FrozenLM:
    """Make a GPT-2 with 6 layers, width 512, 8 heads, 1024 positions and 50,257 words, its weights random.

    The weights do not matter to the time of a step. Dropout is off, as in every frozen model.
    """
    config = GPT2Config(n_layer=6, n_embd=512, n_head=8, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    nn.Module.to(model, device=device, dtype=dtype)
    return FrozenLM.from_model(model, _byte_tokenizer(), name=RANDOM_GPT2)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer to go with random weights: one token per byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|endoftext|>"})
    return fast


def draw_rows(count: int, *, vocab_size: int, seed: int, prompts: Sequence[int] = (0,)) -> list[Encoded]:
    """Draw rows of random tokens with the lengths of E2E; together they have exactly ``count`` x 50 tokens.

    Args:
        count: B.
        vocab_size: Of the model.
        seed: Of lengths and tokens.
        prompts: The prompts that the rows carry, in turns.
    """
    generator = torch.Generator().manual_seed(seed)
    common_B, own_B2 = torch.randn(count, generator=generator), torch.randn(count, 2, generator=generator)
    shared, rest = _CORRELATION**0.5, (1 - _CORRELATION) ** 0.5
    sizes = []
    for column, ((mean, deviation), shortest) in enumerate(((_INPUT, _SHORTEST_INPUT), (_TARGET, _SHORTEST_TARGET))):
        drawn_B = mean + deviation * (shared * common_B + rest * own_B2[:, column])
        sizes.append([max(shortest, round(value)) for value in drawn_B.tolist()])
    inputs, targets = sizes
    missing = count * MEAN_TOKENS - sum(inputs) - sum(targets)
    while missing:  # one token more or less for rows at random, until the sum is right
        row = int(torch.randint(count, (), generator=generator))
        step = 1 if missing > 0 else -1
        if inputs[row] + step >= _SHORTEST_INPUT:
            inputs[row] += step
            missing -= step
    rows = []
    for number, (before, after) in enumerate(zip(inputs, targets, strict=True)):
        ids = torch.randint(vocab_size, (before + after,), generator=generator).tolist()
        rows.append(Encoded(tuple(ids), before, Example("", ""), prompts[number % len(prompts)]))
    return rows


def draw_batch(count: int, frozen: FrozenLM, *, seed: int) -> Batch:
    """Draw a batch with labels, padded on the right to its longest row, as a user of PEFT would have it too."""
    rows = draw_rows(count, vocab_size=frozen.geometry.vocab_size, seed=seed)
    return collate(rows, pad_id=frozen.pad_id).to(frozen.device)
