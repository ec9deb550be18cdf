# SPDX-License-Identifier: Apache-2.0
"""STREAM-1 to STREAM-3 over the real vocabularies: the streamed pieces, joined, are the text decoded at once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refmoe.errors import InputError
from refmoe.text.stream import TextStream, decode_utf8, stream_text


def byte_tokens(tokenizer, data: bytes) -> list[int]:
    return [tokenizer.processor.piece_to_id(f"<0x{byte:02X}>") for byte in data]


def streamed(tokenizer, ids) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.feed(token) for token in ids), stream.finish()]


# Half of the ids below 1100, where the control, unknown and byte tokens of both vocabularies are.
any_ids = st.lists(st.one_of(st.integers(0, 1099), st.integers(0, 31999)), max_size=40)
BYTES_OF_NOTE = [0x00, 0x20, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1]
BYTES_OF_NOTE += [0xE2, 0x96, 0x81, 0xED, 0xEE, 0xEF, 0xBD, 0xF0, 0xF1, 0xF4, 0xF5, 0xF8, 0xFE, 0xFF]


@given(ids=any_ids)
@settings(max_examples=500, deadline=None)
def test_the_stream_joined_is_the_whole_decoded(tokenizer, ids):
    """STREAM-1, over any ids. Bug tok-stream-utf8-split."""
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_the_stream_joined_is_the_whole_decoded_for_bytes(tokenizer, data):
    """STREAM-1 and TOK-8 for hard input: valid, truncated, overlong and surrogate sequences, and tokens between."""
    chunk = st.one_of(
        st.text(min_size=1, max_size=2).map(str.encode),
        st.lists(st.sampled_from(BYTES_OF_NOTE), min_size=1, max_size=5).map(bytes),
    )
    a, space = tokenizer.encode("a", bos=False)[0], tokenizer.encode(" a", bos=False)[0]
    other = st.sampled_from([tokenizer.bos_id, tokenizer.eos_id, tokenizer.processor.unk_id(), a, space])
    parts = st.one_of(chunk.map(lambda c: byte_tokens(tokenizer, c)), other.map(lambda token: [token]))
    ids = [token for part in data.draw(st.lists(parts, max_size=8)) for token in part]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_every_pair_of_notable_bytes_before_a_tail(v1):
    """TOK-8, exhaustively at the borders of UTF-8's ranges: sentencepiece and the rule agree on each."""
    for first in BYTES_OF_NOTE:
        for second in BYTES_OF_NOTE:
            for tail in (b"", b"\x80", b"\x80\x80", b"A"):
                ids = byte_tokens(v1, bytes([first, second]) + tail)
                assert "".join(streamed(v1, ids)) == v1.decode(ids), (hex(first), hex(second), tail)


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_a_text_streams_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert "".join(stream_text(tokenizer, ids)) == text.replace("▁", " ")


def test_a_character_split_over_byte_tokens_comes_whole_with_its_last_byte(tokenizer):
    """STREAM-2, bug tok-stream-utf8-split: decoding token by token would give four U+FFFD."""
    ids = byte_tokens(tokenizer, "\N{GRINNING FACE}€".encode())
    assert streamed(tokenizer, ids) == ["", "", "", "\N{GRINNING FACE}", "", "", "€", ""]
    assert "".join(tokenizer.decode([token]) for token in ids) == "\ufffd" * 7


def test_bytes_that_nothing_completes_are_replaced_one_by_one(tokenizer):
    """TOK-8, bug tok-stream-utf8-split: a tail cut short, and a sequence that a control token cuts."""
    assert streamed(tokenizer, byte_tokens(tokenizer, b"\xf0\x9f\x98")) == ["", "", "", "\ufffd" * 3]
    cut = [*byte_tokens(tokenizer, b"\xe2"), tokenizer.eos_id, *byte_tokens(tokenizer, b"\x82\xac")]
    assert streamed(tokenizer, cut) == ["", "\ufffd", "\ufffd", "\ufffd", ""]
    assert tokenizer.decode(cut) == "\ufffd" * 3


def test_text_that_cannot_change_does_not_wait(tokenizer):
    """STREAM-3: a byte that ends a broken sequence releases it at once."""
    assert streamed(tokenizer, byte_tokens(tokenizer, b"\xe2A\xffB")) == ["", "\ufffdA", "\ufffd", "B", ""]
    ids = tokenizer.encode("one two", bos=False)
    assert streamed(tokenizer, ids) == ["one", " two", ""]


def test_only_the_space_of_the_beginning_is_dropped(tokenizer):
    """TOK-6: the space is dropped after BOS too, but neither twice nor after a byte."""
    a, space = tokenizer.encode("a", bos=False)[0], tokenizer.encode(" a", bos=False)[0]
    assert streamed(tokenizer, [tokenizer.bos_id, a, a]) == ["", "a", " a", ""]
    assert streamed(tokenizer, [space, tokenizer.eos_id, space, a]) == ["", "", " ", " a", ""]
    assert streamed(tokenizer, [*byte_tokens(tokenizer, b"\n"), a]) == ["\n", " a", ""]


def test_stream_text_yields_no_empty_piece(v1):
    ids = [v1.bos_id, *v1.encode("\N{GRINNING FACE} hi", bos=False), v1.eos_id]
    assert list(stream_text(v1, ids)) == ["\N{GRINNING FACE}", " hi"]


def test_an_id_outside_the_vocabulary_leaves_the_stream_as_it_was(v1):
    stream = TextStream(v1)
    stream.feed(byte_tokens(v1, b"\xe2")[0])
    with pytest.raises(InputError, match="token id 32000 is outside"):
        stream.feed(32000)
    assert stream.finish() == "\ufffd"


@given(data=st.binary(max_size=12))
@example(data=b"a\xed\xa0")
@settings(deadline=None)
def test_at_most_three_bytes_are_kept_back(data):
    """STREAM-3: a lead byte and the bytes after it wait, which does not change the complete text."""
    text, kept = decode_utf8(data, final=False)
    assert len(kept) <= 3
    assert not kept or kept[0] >= 0xC2
    assert all(0x80 <= byte <= 0xBF for byte in kept[1:])
    assert decode_utf8(data, final=True) == (text + "\ufffd" * len(kept), b"")


def test_bytes_that_a_continuation_completes_are_kept_back(tokenizer):
    """STREAM-2: every proper beginning of a character gives no text before the character is whole."""
    for character in ("\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff"):
        ids = byte_tokens(tokenizer, character.encode())
        assert streamed(tokenizer, ids) == [""] * (len(ids) - 1) + [character, ""]
