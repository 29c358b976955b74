"""Encoder-decoders: the matrix of contracts, and what does not vary from shape to shape."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from conftest import byte_tokenizer
from family_contracts import RIGHT
from seq2seq_contracts import (
    PAIR_COLUMNS,
    PairSubject,
    batch_of,
    ids_of,
    judge_pair,
    mixture,
    place_of,
    random_prefix,
    word_prompt,
)
from softprompts.baselines.fine_tuning import FineTuningObjective
from softprompts.config import DecodingConfig, PromptConfig
from softprompts.errors import ConfigError, LengthError, UnsupportedModelError
from softprompts.inference import Engine
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import build_prompt
from softprompts.prompts.prefix import choose_layers
from softprompts.types import Encoded, Example, LayerKey
from zoo_seq2seq import SEQ2SEQ_ZOO, tiny_seq2seq, with_end

TOLERANCE = 1e-4
FEW = ["bart", "t5_deep_decoder"]
"""One with learned positions, one with relative ones and unequal halves, where all shapes would show nothing more."""
REFUSED = {"mbart", "longt5"}
"""Shapes that cannot be steered at all."""


@pytest.mark.parametrize("shape", sorted(SEQ2SEQ_ZOO))
def test_every_contract_holds_or_the_model_is_refused(shape: str) -> None:
    subject = PairSubject(shape, with_end(byte_tokenizer()))
    cells = {column: judge_pair(subject, column) for column in PAIR_COLUMNS}
    others = {column: cell for column, cell in cells.items() if cell.verdict != RIGHT and column != "packed = padded"}
    if shape in REFUSED or (shape == "umt5" and not _is_causal_by_itself()):
        assert {cell.verdict for cell in cells.values()} == {"refused"}
    else:
        assert not others


def _is_causal_by_itself() -> bool:
    """Not in older releases of transformers (5.15): there, UMT5's decoder sees what it is to predict where no mask is
    given, so that the model's own loss is wrong with plain sdpa."""
    (attention,) = [layer.SelfAttention for layer in tiny_seq2seq("umt5").decoder.block[0].layer[:1]]
    return bool(attention.is_causal)


@cache
def frozen_of(shape: str) -> FrozenLM:
    return FrozenLM.from_model(tiny_seq2seq(shape), with_end(byte_tokenizer()), name=f"tiny-{shape}")


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = float(expected.detach().abs().max().clamp(min=1e-6))
    assert got.shape == expected.shape
    difference = float((got - expected).detach().abs().max()) / scale
    assert difference < tolerance, f"relative difference {difference:.2e}"


@pytest.mark.parametrize("shape", FEW)
def test_selected_and_forked_rows_continue_alone(shape: str) -> None:
    frozen = frozen_of(shape)
    prompted, rows, _, which, _ = mixture(frozen)
    _, state = prompted.start(batch_of(rows, [[1]] * len(rows), which))
    chosen = [3, 0, 0, 2]
    state.select(torch.tensor(chosen))
    prompted.step(torch.tensor([7, 8, 9, 10]), state)
    state.fork(torch.tensor([0, 2, 1, 3]))  # the two continuations of row 0 change places
    logits_BV = prompted.step(torch.tensor([11, 12, 13, 14]), state)
    texts = [[7, 11, 1], [9, 12, 1], [8, 13, 1], [10, 14, 1]]
    for number, (row, text) in enumerate(zip(chosen, texts, strict=True)):
        with torch.no_grad():
            expected = prompted.label_logits(batch_of([rows[row]], [text], [which[row]]))
        assert_close(logits_BV[number], expected.logits_MV[-1])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shape", [*FEW, "pegasus"])
def test_generation_equals_that_of_transformers_on_the_words(shape: str, beams: int) -> None:
    frozen = frozen_of(shape)
    words, rows = ids_of(3, 81), [ids_of(n, 82 + n) for n in (5, 3)]
    engine = Engine(PromptedLM(frozen, [word_prompt(frozen, words)]))
    decoding = DecodingConfig(strategy="beam", beams=beams, max_new_tokens=6)
    got = engine.generate([Encoded(tuple(row), len(row), Example("", "")) for row in rows], decoding)
    for row, generation in zip(rows, got, strict=True):
        whole = torch.tensor([words + row])
        own = frozen.model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            num_beams=beams,
            max_new_tokens=6,
            do_sample=False,
            use_cache=False,  # transformers' cache knows no decoder that is deeper than its encoder
            forced_eos_token_id=None,
        )[0, 1:].tolist()
        end = own.index(256) if 256 in own else len(own)
        assert list(generation.ids) == own[:end]


@pytest.mark.parametrize("shape", FEW)
def test_fine_tuning_trains_every_weight_with_the_models_own_loss(shape: str) -> None:
    frozen = frozen_of(shape)
    objective = FineTuningObjective(frozen)
    batch = batch_of([ids_of(n, 97 + n) for n in (6, 4)], [ids_of(4, 98), ids_of(3, 99)], [0, 0], "left")
    loss = objective.loss(batch)
    loss.total.backward()
    right = batch_of([ids_of(n, 97 + n) for n in (6, 4)], [ids_of(4, 98), ids_of(3, 99)], [0, 0])
    own = frozen.model(input_ids=right.ids_BT, attention_mask=right.mask_BT, labels=right.targets_BU).loss
    assert_close(loss.total / loss.weight, own)
    untouched = [name for name, weight in objective.tuned.model.named_parameters() if weight.grad is None]
    assert untouched == []
    assert loss.tokens == 6 + 4 + 4 + 3


@pytest.mark.parametrize("shape", FEW)
def test_prefix_from_words_is_what_the_words_evoke(shape: str) -> None:
    frozen = frozen_of(shape)
    words = torch.tensor([ids_of(4, 31)])
    states = frozen.activations(frozen.embed(words[0].tolist()))
    with torch.no_grad():
        encoded = frozen.model.get_encoder()(input_ids=words).last_hidden_state
    for name, module in frozen.model.named_modules():
        place = place_of(name)
        if place is not None and place.site == "cross":
            keys_NPH, values_NPH = states[place]
            project = (module.k, module.v) if hasattr(module, "k") else (module.k_proj, module.v_proj)
            for got, layer in zip((keys_NPH, values_NPH), project, strict=True):
                assert_close(got.transpose(0, 1).flatten(1), layer(encoded)[0])
    assert set(states) == {site.key for site in frozen.geometry.sites}


# --------------------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------------------


def test_a_model_that_shifts_its_labels_in_a_way_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_seq2seq("t5")
    monkeypatch.setattr(model, "_shift_right", lambda labels: labels.roll(1, dims=-1))
    with pytest.raises(UnsupportedModelError, match="behind a prompt of real words"):
        FrozenLM.from_model(model, byte_tokenizer())


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_layer_that_a_prefix_does_not_reach_is_noticed(monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    """The check at load is a real one: a layer that computes its attention apart from the others does not pass."""
    model = tiny_seq2seq("bart")
    before = model.config._attn_implementation
    attention = getattr(model.model, half).layers[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, steering=None, **kwargs: forward(*args, **kwargs))
    with pytest.raises(UnsupportedModelError, match=r"refused|cannot be steered"):
        FrozenLM.from_model(model, byte_tokenizer())
    assert model.config._attn_implementation == before


def test_a_window_that_scrolls_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="and stays in sight"):
        FrozenLM.from_model(tiny_seq2seq("t5gemma"), byte_tokenizer(), window="text")


def test_sites_and_layers_that_are_not_there_are_refused() -> None:
    geometry = frozen_of("bart_deep_decoder").geometry
    assert choose_layers(geometry) is None
    assert choose_layers(geometry, ("encoder", "decoder", "cross")) is None
    assert choose_layers(geometry, ("cross",), (2,)) == (LayerKey("cross", 2),)
    with pytest.raises(ConfigError, match="names 'self'"):
        choose_layers(geometry, ("self",))
    with pytest.raises(ConfigError, match="from 0 to 1"):
        choose_layers(geometry, ("encoder",), (2,))
    with pytest.raises(ConfigError, match="leave them out"):
        build_prompt(PromptConfig(kind="embedding", length=2, sites=("cross",)), frozen_of("bart"), seed=0)


def test_what_does_not_fit_into_the_positions_is_refused() -> None:
    frozen = frozen_of("bart")  # 128 positions
    words, prefix = word_prompt(frozen, ids_of(30, 1)), random_prefix(frozen, 30, 2)
    prompted = PromptedLM(frozen, [words, prefix])
    with pytest.raises(LengthError, match="130 positions of the encoder"):
        prompted.label_losses(batch_of([ids_of(100, 3)], [[1]], [0]))
    assert prompted.label_losses(batch_of([ids_of(100, 3)], [[1]], [1])).losses_M.shape == (1,)  # takes no positions
    row = Encoded(tuple(ids_of(100, 3)), 100, Example("", "", id="long"))
    with pytest.raises(LengthError, match=r"long.*prompt 30 \+ input 100"):
        Engine(prompted).check([row], DecodingConfig(max_new_tokens=5))
    with pytest.raises(LengthError, match="positions of the decoder"):
        Engine(PromptedLM(frozen)).check(
            [Encoded((1, 2), 2, Example("", ""), prompt=-1)], DecodingConfig(max_new_tokens=129)
        )
