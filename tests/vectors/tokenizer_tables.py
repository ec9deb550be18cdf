# SPDX-License-Identifier: Apache-2.0
"""The texts, dialogues and token sequences of `golden/vectors/tokenizer-*.json`. The answers are mistral-common's."""

from __future__ import annotations

from typing import NamedTuple

PREFIX, LEGACY, BOS = "tok-no-dummy-prefix", "tok-legacy-space-after-special", "tok-double-bos"
UNKNOWN, GREEDY, SCHEME = "tok-byte-fallback-unk", "tok-greedy-longest-match", "tok-wrong-scheme"
SPLIT, STREAM = "tok-context-continuation-split", "tok-stream-utf8-split"


class Text(NamedTuple):
    """A text to encode and to decode again."""

    name: str
    text: str
    why: str
    clauses: tuple[str, ...]
    bugs: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()  # a prompt and its continuation, which encoded apart give other ids


class Chat(NamedTuple):
    """A dialogue to encode as a prompt."""

    name: str
    messages: list[tuple[str, str]]
    why: str
    clauses: tuple[str, ...] = ("CHAT-2",)  # the template's clause is added
    bugs: tuple[str, ...] = ()


class Ids(NamedTuple):
    """A token sequence to decode: pieces as the vocabulary writes them, and byte tokens as integers."""

    name: str
    pieces: list[str | int]
    why: str
    clauses: tuple[str, ...]
    bugs: tuple[str, ...] = ()


FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"  # four people joined by ZWJ

TEXTS = [
    Text("empty", "", "The empty text has no tokens but BOS: no space is put before it.", ("TOK-1", "TOK-5")),
    Text("letter", "a", "One space is put before a text.", ("TOK-1",), bugs=(PREFIX,)),
    Text("space", " ", "Two spaces with the one put before.", ("TOK-1",), bugs=(PREFIX, SCHEME)),
    Text("space-first", " a", "The leading space is kept beside the one put before.",
         ("TOK-1",), bugs=(PREFIX, SCHEME)),
    Text("space-last", "a ", "A trailing space is kept.", ("TOK-1",), bugs=(PREFIX, SCHEME)),
    Text("spaces-between", "one  two   three    four", "Runs of spaces have pieces of their own.",
         ("TOK-1",), bugs=(PREFIX, SCHEME)),
    Text("many-spaces", " " * 100, "A run longer than any piece.", ("TOK-1", "TOK-2"), bugs=(PREFIX, SCHEME)),
    Text("newline", "\n", "A newline is a byte token.", ("TOK-1", "TOK-3"), bugs=(PREFIX, UNKNOWN, SCHEME)),
    Text("newlines", "a\n\nb\r\nc\n", "Line ends are kept as they are.", ("TOK-3",), bugs=(PREFIX, UNKNOWN, SCHEME)),
    Text("tab", "\tif x:\n\t\treturn\n", "Source code.", ("TOK-1", "TOK-3"), bugs=(PREFIX, UNKNOWN, SCHEME)),
    Text("sentence", "Hello, world!", "An ordinary sentence.", ("TOK-1", "TOK-2"), bugs=(PREFIX, SCHEME)),
    Text("longest-match", "mathematician", "Merging by score and the longest piece from the left differ here.",
         ("TOK-2",), bugs=(PREFIX, GREEDY)),
    Text("accurately", "He works accurately and unbelievably well.", "Words of several pieces.",
         ("TOK-2",), bugs=(PREFIX, SCHEME)),
    Text("digits", "3.14159 and 1,000,000", "Each digit is a token.", ("TOK-2",), bugs=(PREFIX, SCHEME)),
    Text("continuation", "The cat sat", "A prompt and its continuation are one text: 'The cat' and ' sat'.",
         ("TOK-1", "TOK-2"), bugs=(PREFIX, SCHEME, SPLIT), parts=("The cat", " sat")),
    Text("continuation-in-a-word", "understanding", "The cut falls inside a word.",
         ("TOK-1", "TOK-2"), bugs=(PREFIX, SPLIT), parts=("under", "standing")),
    Text("emoji", "\N{GRINNING FACE}", "A character of four bytes.", ("TOK-3",), bugs=(PREFIX,)),
    Text("zwj", FAMILY, "Four people joined by U+200D: one glyph, seven characters.", ("TOK-3",), bugs=(PREFIX,)),
    Text("flag-and-tone", "\U0001f44d\U0001f3fd\U0001f1e8\U0001f1ed", "A skin tone and a flag.",
         ("TOK-3",), bugs=(PREFIX,)),
    Text("cjk", "漢字かな交じり文、한국어。", "Characters inside and outside the vocabulary.",
         ("TOK-3",), bugs=(PREFIX,)),
    Text("cjk-rare", "\U00020000\U0002a6d6", "Ideographs outside the basic plane.", ("TOK-3",), bugs=(PREFIX,)),
    Text("right-to-left", "مرحبا \u200f\u05e9\u05dc\u05d5\u05dd", "Arabic and Hebrew.", ("TOK-3",), bugs=(PREFIX,)),
    Text("combining", "e\u0301 n\u0303", "Combining characters are not composed.", ("TOK-3",), bugs=(PREFIX, SCHEME)),
    Text("compatibility", "\u00e9\ufb01\u2126\uff21", "No normalisation.", ("TOK-3",), bugs=(PREFIX,)),
    Text("control-characters", "\x00\x01\x7f\x85\ufeff\u00a0\u3000", "NUL, DEL, NEL, BOM, wide spaces.",
         ("TOK-3",), bugs=(PREFIX,)),
    Text("last-character", "\ufffd\U0010ffff", "U+FFFD as text, and the last code point.", ("TOK-3",), bugs=(PREFIX,)),
    Text("space-piece", "a\u2581b", "U+2581 in a text is a space to the vocabulary, and reads back as one.",
         ("TOK-1", "TOK-6"), bugs=(PREFIX, SCHEME)),
    Text("bos-in-text", "<s>hello", "'<s>' in a text is spelled out: no second BOS.",
         ("TOK-4", "TOK-5"), bugs=(PREFIX, BOS, LEGACY)),
    Text("eos-in-text", "a</s>b", "'</s>' in the middle is spelled out, and 'b' gets no space of its own.",
         ("TOK-4",), bugs=(PREFIX, LEGACY)),
    Text("specials-in-text", "say </s>now and <s> then", "Specials between spaces.",
         ("TOK-4",), bugs=(PREFIX, SCHEME, LEGACY)),
    Text("brackets-in-text", "[INST] hi [/INST]", "Template brackets in a user's text.",
         ("TOK-4",), bugs=(PREFIX, SCHEME)),
    Text("token-names-in-text", "<unk> <0x0A> [TOOL_CALLS]", "Names of tokens in a text.", ("TOK-4",),
         bugs=(PREFIX, SCHEME, LEGACY)),
]  # fmt: skip

CHATS = [
    Chat("chat-one-turn", [("user", "Hello")], "One message."),
    Chat("chat-empty", [("user", "")], "An empty message."),
    Chat("chat-spaces", [("user", "  first and last  ")], "Spaces at the ends are kept."),
    Chat("chat-turns", [("user", "Hi"), ("assistant", "Hello! How can I help?"), ("user", "Tell me a joke.")],
         "EOS after the reply, and no second BOS."),
    Chat("chat-reply-spaces", [("user", "Hi"), ("assistant", " both ends  "), ("user", "?")],
         "V3 takes the spaces off the end of a reply, V1 does not."),
    Chat("chat-system", [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes"), ("user", "Why")],
         "The system prompt: before the first message in V1, before the last one in V3.", ("CHAT-2", "CHAT-5")),
    Chat("chat-system-empty", [("system", ""), ("user", "Hi")], "Empty counts as none.", ("CHAT-5",)),
    Chat("chat-control-strings", [("user", "<s>[INST] x [/INST]</s>"), ("assistant", "<s>y</s>"), ("user", "</s>")],
         "Control strings in messages are spelled out: a user cannot end a turn.", ("TOK-4", "CHAT-2"), bugs=(BOS,)),
    Chat("chat-newlines", [("user", "a\n\nb\n"), ("assistant", "\n"), ("user", f"{FAMILY} 漢")],
         "Newlines, a reply of one newline, emoji."),
    Chat("chat-five-turns", [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
         "EOS tokens in the middle of a context are tokens like any other."),
]  # fmt: skip

DECODES = [
    Ids("decode-nothing", [], "No ids, no text.", ("TOK-6",)),
    Ids("decode-control", ["<s>", "</s>", "<s>"], "Control tokens have no text.", ("TOK-7",)),
    Ids("decode-leading-space", ["<s>", "▁Hello", "▁Hello"], "One leading space is dropped, after BOS too.",
        ("TOK-6", "TOK-7")),
    Ids("decode-two-spaces", ["▁", "▁a"], "One space is dropped, not all.", ("TOK-6",)),
    Ids("decode-control-between", ["▁a", "</s>", "▁a"], "A control token in the middle has no text.", ("TOK-7",)),
    Ids("decode-unknown", ["<unk>", "▁a", "<unk>"], "<unk> is not silent, and the space after it stays.",
        ("TOK-6", "TOK-7")),
    Ids("decode-byte-first", [0x0A, "▁a"], "A byte token first: the space after it stays.", ("TOK-6", "TOK-8")),
    Ids("decode-bytes", [0xE6, 0xBC, 0xA2], "Three bytes, one character.", ("TOK-8",)),
    Ids("decode-invalid", [0xFF, "a", 0xE6, 0xBC], "One U+FFFD for each byte of no valid sequence.", ("TOK-8",)),
    Ids("decode-overlong", [0xC0, 0x80, 0xED, 0xA0, 0x80, 0xF4, 0x90, 0x80, 0x80],
        "An overlong form, a surrogate and a number above U+10FFFF are invalid.", ("TOK-8",)),
    Ids("decode-interrupted", [0xE6, "</s>", 0xBC, 0xA2], "A control token ends the run of bytes.", ("TOK-8",)),
]  # fmt: skip

STREAMS = [
    Ids("stream-words", ["<s>", "▁Hello", ",", "▁world", "</s>"], "Ordinary pieces come at once.", ("STREAM-1",)),
    Ids("stream-two-bytes", ["▁a", 0xC3, 0xA9, "b"], "The character comes with its last byte.", ("STREAM-2",),
        bugs=(STREAM,)),
    Ids("stream-emoji", [0xF0, 0x9F, 0x98, 0x80, 0xF0, 0x9F, 0x98, 0x81], "Two characters of four bytes.",
        ("STREAM-2",), bugs=(STREAM,)),
    Ids("stream-mixed", ["a", 0xE6, 0xBC, 0xA2, 0x0A, "b"], "Characters of one and of three bytes.",
        ("STREAM-2",), bugs=(STREAM,)),
    Ids("stream-unfinished", ["▁a", 0xF0, 0x9F, 0x98], "The text ends inside a character: U+FFFD at the end only.",
        ("STREAM-1", "STREAM-3")),
    Ids("stream-interrupted", ["▁a", 0xF0, 0x9F, "b", 0x98], "Another token ends the sequence: U+FFFD before it.",
        ("STREAM-1", "STREAM-3")),
    Ids("stream-invalid-then-valid", [0xFF, 0xC3, 0xC3, 0xA9], "Only what can become a character waits.",
        ("STREAM-2", "STREAM-3"), bugs=(STREAM,)),
]  # fmt: skip
