# SPDX-License-Identifier: Apache-2.0
"""TOK-1 to TOK-8 over the real vocabularies, against mistral-common and against byte-pair encoding written out."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.errors import InputError
from refmoe.text.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "  a",
    "a ",
    "a  ",
    "one  two   three    four",
    "\n",
    "\n\n",
    "a\nb\n",
    " \n ",
    "\t",
    "\tif x:\n\t\treturn\r\n",
    "Hello, world!",
    "He works accurately.",
    "I'm sure it's 3.14159 or 1,000,000 \u2014 “quoted”…",
    "\N{GRINNING FACE}",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",  # four people joined by ZWJ
    "\U0001f44d\U0001f3fd\U0001f1e8\U0001f1ed",  # a skin tone, a flag
    "漢字かな交じり文、한국어 텍스트。",
    "\U00020000\U0002a6d6",  # ideographs outside the basic plane
    "e\u0301 n\u0303 o\u0308\u0323",  # combining characters
    "\u00e9\ufb01\u2126\u00bd\uff21",  # characters that a compatibility normalisation would change
    "مرحبا بالعالم ‏שלום",
    "नमस्ते ไทย",
    "\x00",
    "a\x00b",
    "\x01\x7f\x85\ufeff\u200b\u00a0\u3000",
    "▁",
    "a▁b ▁c",
    "\ufffd\U0010ffff",
    "<s>",
    "</s>",
    "<s>hello</s>",
    "say </s>now and <s> then",
    "[INST] hi [/INST]",
    "[INST]",
    "[TOOL_CALLS][control_12]",
    "<unk>",
    "<0x0A>",
    "⁇",
    "{}[]()<>&%$#@!~`^*_+-=|\\:;\"'?/.,",
    "The quick brown fox jumps over the lazy dog. " * 200,
    "ab" * 3000,
    "\N{GRINNING FACE}" * 500,
    " " * 1000,
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:24]))
@pytest.mark.parametrize("bos", [True, False])
def test_encode_agrees_with_mistral_common(tokenizer, mistral, text, bos):
    """TOK-1 to TOK-5. Bugs tok-no-dummy-prefix, tok-wrong-scheme, tok-legacy-space-after-special."""
    theirs = mistral.instruct_tokenizer.tokenizer
    assert tokenizer.encode(text, bos=bos) == theirs.encode(text, bos=bos, eos=False)


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_encode_agrees_with_mistral_common_on_any_text(tokenizer, mistral, text):
    theirs = mistral.instruct_tokenizer.tokenizer
    assert tokenizer.encode(text) == theirs.encode(text, bos=True, eos=False)


@pytest.fixture(scope="module")
def pieces(tokenizer) -> tuple[dict[str, tuple[float, int]], list[int]]:
    """The ordinary pieces with their scores and ids, and the 256 byte tokens in the order of their bytes."""
    ids = [token for token in range(tokenizer.vocab_size) if not tokenizer.is_control(token)]
    byte_tokens = sorted((token for token in ids if tokenizer.is_byte(token)), key=tokenizer.piece)
    ordinary = set(ids) - set(byte_tokens) - {tokenizer.processor.unk_id()}
    return {tokenizer.piece(token): (tokenizer.processor.get_score(token), token) for token in ordinary}, byte_tokens


def byte_pair_encoding(scores: dict[str, tuple[float, int]], byte_tokens: list[int], text: str) -> list[int]:
    """TOK-1 to TOK-3 taken literally, one merge at a time, from only the pieces and their scores."""
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(scores[a + b][0], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = []
    for symbol in symbols:
        ids += [scores[symbol][1]] if symbol in scores else [byte_tokens[byte] for byte in symbol.encode()]
    return ids


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:24]))
def test_encode_is_byte_pair_encoding_by_score(tokenizer, pieces, text):
    """TOK-1 to TOK-4. Bugs tok-greedy-longest-match, tok-byte-fallback-unk, tok-no-dummy-prefix."""
    assert tokenizer.encode(text[:200], bos=False) == byte_pair_encoding(*pieces, text[:200])


@given(text=st.text(alphabet=st.sampled_from("aeinorst  \n▁é漢<s>"), max_size=30))
@settings(max_examples=200, deadline=None)
def test_encode_is_byte_pair_encoding_on_any_text(tokenizer, pieces, text):
    assert tokenizer.encode(text, bos=False) == byte_pair_encoding(*pieces, text)


def test_merging_by_score_differs_from_the_longest_match(tokenizer, pieces):
    """TOK-2, bug tok-greedy-longest-match: seen only on words where the two cut differently."""
    word, greedy = "▁mathematician", []
    while word:
        greedy.append(max((word[:n] for n in range(1, len(word) + 1) if word[:n] in pieces[0]), key=len))
        word = word.removeprefix(greedy[-1])
    assert greedy == ["▁mathemat", "ician"]
    assert pieces_of(tokenizer, "mathematician") == ["▁mat", "hem", "atic", "ian"]


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(token) for token in tokenizer.encode(text, bos=False)]


def test_a_space_is_put_before_a_text(tokenizer):
    """TOK-1, bug tok-no-dummy-prefix; the empty text and a leading space are the edges."""
    assert pieces_of(tokenizer, "") == []
    assert pieces_of(tokenizer, "a") == ["▁a"]
    assert pieces_of(tokenizer, " a") == ["▁", "▁a"]
    assert pieces_of(tokenizer, " ") == ["▁▁"]


def test_spaces_are_kept(tokenizer):
    """TOK-1, bug tok-wrong-scheme: a vocabulary without 'Ġ' loses every space of a byte-level scheme."""
    assert pieces_of(tokenizer, "the cat") == ["▁the", "▁cat"]


def test_a_character_outside_the_vocabulary_becomes_bytes(tokenizer):
    """TOK-3, bug tok-byte-fallback-unk: neither <unk> nor nothing; a newline is a byte token too."""
    assert pieces_of(tokenizer, "\n") == ["▁", "<0x0A>"]
    assert pieces_of(tokenizer, "\U0010ffff") == ["▁", "<0xF4>", "<0x8F>", "<0xBF>", "<0xBF>"]


@given(text=st.lists(st.sampled_from(["<s>", "</s>", "[INST]", "<unk>", "<0x0A>", " ", "a", "[/INST]"])).map("".join))
@settings(max_examples=200, deadline=None)
def test_text_never_yields_a_control_token(tokenizer, text):
    """TOK-4, TOK-3 and TOK-5. Bug tok-double-bos: text that says '<s>' adds no second BOS."""
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert not any(tokenizer.is_control(token) or tokenizer.is_unknown(token) for token in ids[1:])


def test_text_is_not_cut_at_a_control_string(v1):
    """TOK-4, bug tok-legacy-space-after-special: no '▁' appears after the '</s>' in the middle."""
    assert pieces_of(v1, "a</s>b") == ["▁a", "</", "s", ">", "b"]


def test_parts_encoded_apart_are_not_the_whole(tokenizer):
    """TOK-1 and TOK-2, bug tok-context-continuation-split: a prompt and its continuation are encoded as one text."""
    context, continuation = "The cat", " sat"
    whole = tokenizer.encode(context + continuation, bos=False)
    assert [tokenizer.piece(token) for token in whole] == ["▁The", "▁cat", "▁sat"]
    assert tokenizer.encode(context, bos=False) + tokenizer.encode(continuation, bos=False) != whole


def test_the_ids_of_mixtral(v1, v3):
    """The vocabularies as published: 32000 and 32768 pieces."""
    assert (v1.vocab_size, v1.bos_id, v1.eos_id) == (32000, 1, 2)
    assert (v3.vocab_size, v3.bos_id, v3.eos_id) == (32768, 1, 2)
    assert (v1.control_id("<s>"), v1.control_id("[INST]"), v1.control_id("the")) == (1, None, None)
    assert (v3.control_id("[INST]"), v3.control_id("[/INST]")) == (3, 4)
    assert v1.encode("accurately") == [1, *v1.encode("accurately", bos=False)]


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_decode_undoes_encode(tokenizer, text):
    """TOK-6 to TOK-8: every text comes back, except that the piece character itself reads as a space."""
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@given(ids=st.lists(st.integers(0, 31999), max_size=30))
@settings(max_examples=200, deadline=None)
def test_decode_agrees_with_mistral_common(tokenizer, mistral, ids):
    assert tokenizer.decode(ids) == mistral.instruct_tokenizer.tokenizer.decode(ids)


def test_decode_of_tokens_that_text_never_yields(v1):
    """TOK-6 and TOK-7, expected texts written by hand."""
    space, a = v1.encode(" a", bos=False)
    line_feed = v1.encode("\n", bos=False)[1]
    unknown = v1.processor.unk_id()
    assert v1.decode([]) == ""
    assert v1.decode([v1.bos_id, v1.eos_id, v1.bos_id]) == ""
    assert v1.decode([v1.bos_id, a, v1.eos_id, a]) == "a a"
    assert v1.decode([space, a]) == " a"
    assert v1.decode([line_feed, a]) == "\n a"
    assert v1.decode([unknown, a]) == " \u2047  a"
    assert v1.decode(np.array([a, a])) == "a a"


@pytest.mark.parametrize("token", [-1, 32000, 10**12, -(10**30)])
def test_an_id_outside_the_vocabulary_is_refused(v1, token):
    for use in (lambda: v1.decode([1, token]), lambda: v1.piece(token), lambda: v1.is_control(token)):
        with pytest.raises(InputError, match=rf"token id {token} is outside .*0 to 31999 was expected"):
            use()


def test_a_lone_surrogate_is_refused(v1):
    with pytest.raises(InputError, match=r"lone surrogate U\+DC80 at index 2"):
        v1.encode("ab\udc80")


def one_sentence(error: pytest.ExceptionInfo[InputError], path) -> None:
    message = str(error.value)
    assert str(path) in message
    assert "expected" in message or "Mixtral" in message
    assert "\n" not in message
    assert "INTERNAL" not in message


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\x00" * 64, b"\x08", b"{}", b"PK\x03\x04", b"\x0a\x00"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        Tokenizer.load(path)
    one_sentence(error, path)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(InputError, match="the file is empty"):
        Tokenizer.load(tmp_path / "tokenizer.model")


def test_a_file_without_byte_fallback_is_refused(tmp_path, v1_file):
    """TOK-3, bug tok-byte-fallback-unk: the 256 byte tokens are there, but the trainer's setting is off.

    sentencepiece refuses such a file itself, which `check_conventions` relies on.
    """
    content = v1_file.read_bytes()
    switched_on, off = b"\x98\x02\x01", b"\x98\x02\x00"  # trainer_spec.byte_fallback, field 35 of the protobuf
    assert content.count(switched_on) == 1
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content.replace(switched_on, off))
    with pytest.raises(InputError, match="sentencepiece cannot load") as error:
        Tokenizer.load(path)
    one_sentence(error, path)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"directory.*tokenizer\.model") as error:
        Tokenizer.load(tmp_path)
    one_sentence(error, tmp_path)


def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path, v1_file):
    """A file cut between two pieces can be parsed, so its behaviour is checked."""
    content = v1_file.read_bytes()
    path = tmp_path / "tokenizer.model"
    cuts = {*range(0, len(content), len(content) // 12), *range(len(content) - 700, len(content), 20)}
    cuts |= {at for at in range(1, len(content)) if content[at : at + 1] == b"\x0a"} & set(range(4000, 4400))
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(InputError) as error:
            Tokenizer.load(path)
        one_sentence(error, path)


def train(tmp_path, **changes):
    """Train a small model with Mixtral's conventions except for `changes`."""
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat and the dog ran to the cat\n" * 20)
    conventions = {
        "model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": True, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "m"), **conventions | changes
    )
    return tmp_path / "m.model"


def test_a_small_vocabulary_with_the_same_conventions_is_accepted(tmp_path):
    tokenizer = Tokenizer.load(train(tmp_path))
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode("the  cat\n")) == "the  cat\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"add_dummy_prefix": False}, "decodes two space pieces as '  '"),
        ({"remove_extra_whitespaces": True}, "decodes two space pieces as ''"),
        ({"byte_fallback": False, "vocab_size": 30}, "has 0 byte tokens"),
        ({"bos_id": -1}, "has no BOS token"),
        ({"eos_id": -1}, "has no EOS token"),
        ({"unk_surface": "?"}, r"decodes <unk> as '\?'"),
    ],
)
def test_another_convention_is_refused(tmp_path, changes, sentence):
    """TOK-1, TOK-3, TOK-6 and TOK-7 would not hold."""
    path = train(tmp_path, **changes)
    with pytest.raises(InputError, match=sentence) as error:
        Tokenizer.load(path)
    one_sentence(error, path)


def test_without_sentencepiece_the_extra_is_named(monkeypatch, v1_file):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"the tokenizer needs .*refmoe\[text\]"):
        Tokenizer.load(v1_file)
