"""Text from single tokens: whole characters only, no half of a stop string, and all of it in the end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer
from softprompts.inference.text_stream import TextStream

TOKENIZER = byte_tokenizer()
EOS = 256


def _byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: pieces with a mark for the space, and bytes for what is no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "▁", "▁cat", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


FALLBACK = _byte_fallback()


def streamed(ids, stop=(), tokenizer=TOKENIZER, at_once=False):
    stream = TextStream(tokenizer, stop, at_once=at_once)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped_by is not None:
            return pieces, stream.stopped_by
    return [*pieces, stream.finish()], stream.stopped_by


def encoded(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


@given(st.text(max_size=40))
@settings(deadline=None)
def test_pieces_are_whole_characters_and_make_up_the_text(text):
    pieces, _ = streamed(encoded(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, EOS), max_size=30))
@settings(deadline=None)
def test_any_bytes_give_what_they_decode_to(ids):
    assert "".join(streamed(ids)[0]) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert streamed(ids, at_once=True)[0] == [""] * len(ids) + ["".join(streamed(ids)[0])]


@given(st.text(alphabet="ab ", max_size=30))
@settings(deadline=None)
def test_a_text_that_is_told_at_once_ends_where_it_would(text):
    for stop in ("ab", "b "), ("aa",):
        pieces, stopped_by = streamed(encoded(text), stop)
        again, stopped_by_again = streamed(encoded(text), stop, at_once=True)
        assert ("".join(again), stopped_by_again) == ("".join(pieces), stopped_by)


@given(st.lists(st.sampled_from(["▁a", "b", "▁", "▁cat", "é", "<0xE2> <0x82> <0xAC>", "<0x0A>"]), max_size=30))
@settings(deadline=None)
def test_pieces_with_marks_for_spaces_and_bytes(pieces):
    ids = FALLBACK.convert_tokens_to_ids([part for piece in pieces for part in piece.split()])
    assert "".join(streamed(ids, tokenizer=FALLBACK)[0]) == FALLBACK.decode(ids, skip_special_tokens=True)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(deadline=None)
def test_a_stop_string_cuts_in_front_of_its_first_occurrence(text, stop):
    pieces, stopped_by = streamed(encoded(text), stop)
    # tokens come one by one, so what is complete first counts, not what begins first
    ends = [(text.find(one) + len(one), text.find(one), one) for one in stop if one in text]
    if not ends:
        assert ("".join(pieces), stopped_by) == (text, None)
        return
    first = min(end for end, _, _ in ends)
    cuts = {(place, one) for end, place, one in ends if end == first}
    assert "".join(pieces) == text[: min(place for place, _ in cuts)]
    assert stopped_by in {one for _, one in cuts}


def test_what_may_become_a_stop_string_is_kept_back():
    stream = TextStream(TOKENIZER, ["END", "NO"])
    assert [stream.push(token) for token in encoded("xENxE")] == ["x", "", "", "ENx", ""]
    assert stream.finish() == "E"
    assert stream.stopped_by is None


@pytest.mark.parametrize("stop", ["€", "é!"])
def test_a_stop_string_of_several_bytes(stop):
    pieces, stopped_by = streamed(encoded(f"caf{stop} and more"), [stop])
    assert ("".join(pieces), stopped_by) == ("caf", stop)


def test_a_stop_string_does_not_count_before_its_time():
    stream = TextStream(TOKENIZER, ["b"])
    assert [stream.push(token, may_stop=False) for token in encoded("ab")] == ["a", "b"]
    assert stream.push(encoded("b")[0]) == ""
    assert stream.stopped_by == "b"
