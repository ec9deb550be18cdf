# SPDX-License-Identifier: Apache-2.0
"""Real folders: the same ids and the same text as transformers; and what cannot be obeyed is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from refmoe.errors import InputError  # noqa: E402
from refmoe.text.folder import FolderText, read_folder  # noqa: E402
from refmoe.text.tokenizer import Tokenizer  # noqa: E402
from tests.text.real_folders import CHATML, CONTROL, DOLPHIN, FOLDERS, IM, LLAMA, V1, sentencepiece_json, write  # noqa: E402

pytestmark = pytest.mark.engines

ROWS = 32064
"""Rows of the embedding: more than there are tokens, as padded models have."""
TEXTS = (
    "", "Hello world", " two  spaces ", "\n", "é中文字🙂\u200d", "<s>a</s> b", "x<|im_end|>\nuser y",
    "a <|im_start|> b", "<|eot_id|>", "<unk>", "1234567 words", "tab\there", "▁", "<0x41>", "a\u0301",
)  # fmt: skip
DIALOGUES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "hi"}],
    [
        {"role": "user", "content": " What is <s> or 中?\n"},
        {"role": "assistant", "content": "An example <|im_end|>"},
        {"role": "user", "content": ""},
    ],
)


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FolderText, Any]:
    folder = FOLDERS[request.param](tmp_path_factory.mktemp("real"))
    return read_folder(folder, ROWS), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["chatml, added tokens", "instruct", "llama 3"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FolderText, Any]:
    """A folder as transformers saves it: a tokenizer.json, a template, and no tokenizer.model."""
    before, folder = FOLDERS[request.param](tmp_path_factory.mktemp("before")), tmp_path_factory.mktemp("saved")
    transformers.AutoTokenizer.from_pretrained(before).save_pretrained(folder)
    (folder / "config.json").write_bytes((before / "config.json").read_bytes())
    assert (folder / "chat_template.jinja").exists()
    assert not (folder / "tokenizer.model").exists()
    return read_folder(folder, ROWS), transformers.AutoTokenizer.from_pretrained(folder)


def assert_equal(ours: FolderText, theirs: Any) -> None:
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    for dialogue in DIALOGUES:
        if theirs.chat_template is not None:
            expected = theirs.apply_chat_template(dialogue, add_generation_prompt=True)["input_ids"]
            assert ours.encode_chat(dialogue) == expected, dialogue


def test_the_ids_of_transformers(pair: tuple[FolderText, Any]) -> None:
    """TEXT-1."""
    assert_equal(*pair)


def test_the_ids_of_transformers_in_a_folder_that_it_saved(saved: tuple[FolderText, Any]) -> None:
    assert_equal(*saved)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_text_of_transformers_streamed(pair: tuple[FolderText, Any], data: st.DataObject) -> None:
    """Any ids of the model: bytes in any order, added tokens, and rows without a token."""
    ours, theirs = pair
    edges = st.sampled_from([0, 1, 2, *range(250, 259), 31999, *range(32000, 32004), ROWS - 1])
    ids = data.draw(st.lists(st.integers(0, 300) | st.integers(0, ROWS - 1) | edges, max_size=20))
    assert "".join(ours.pieces(ids)) == theirs.decode(ids, skip_special_tokens=True)


def test_every_row_is_written_one_by_one(pair: tuple[FolderText, Any]) -> None:
    """TEXT-5."""
    ours, _ = pair
    assert all(isinstance(piece, str) for token in range(ROWS) for piece in ours.pieces([token]))


def test_text_is_not_held_back(pair: tuple[FolderText, Any]) -> None:
    """Each word arrives with its token, apart from a run of bytes."""
    ours, theirs = pair
    ids = theirs("one two three", add_special_tokens=False)["input_ids"]
    assert len(list(ours.pieces(ids))) == len(ids)


def test_ordinary_text_has_the_ids_of_the_sentencepiece_file(tmp_path: Path) -> None:
    """The two files of Mixtral's folder say the same."""
    ours, exact = read_folder(FOLDERS["mixtral"](tmp_path), ROWS), Tokenizer.load(V1)
    for text in ("Hello world", " two  spaces ", "é中文字🙂", "\n", "1234567 words"):
        assert ours.encode(text) == exact.encode(text)


# End tokens


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({}, {2}),
        ({"config__json": {"eos_token_id": 32000}}, {32000}),
        ({"config__json": {"eos_token_id": None}}, set()),
        ({"generation_config__json": {"eos_token_id": [32000, 2]}}, {32000, 2}),
        ({"config__json": {"eos_token_id": 2}, "generation_config__json": {"eos_token_id": [32000, 2]}}, {32000, 2}),
        ({"config__json": {"eos_token_id": 5}, "generation_config__json": {"do_sample": True}}, {5}),
    ],
)
def test_end_tokens(tmp_path: Path, files: dict[str, Any], end: set[int]) -> None:
    assert read_folder(write(tmp_path, **files), 8).end == end


def test_the_end_token_of_a_folder_in_mistrals_layout(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer__model=V1)
    (folder / "config.json").unlink()
    assert read_folder(folder, 32000).end == {2}


# tokenizer.model with added tokens


def dolphin(folder: Path, **files: Any) -> FolderText:
    """A folder whose added tokens are beyond tokenizer.model, with no tokenizer.json."""
    return read_folder(write(folder, tokenizer__model=V1, **{"tokenizer_config__json": DOLPHIN} | files), 32002)


@pytest.mark.parametrize("older", [False, True], ids=["tokenizer_config.json", "added_tokens.json"])
def test_added_tokens_beyond_a_sentencepiece_file_are_written(tmp_path: Path, older: bool) -> None:
    """TEXT-5."""
    files: dict[str, Any] = {}
    if older:
        files["tokenizer_config__json"] = {"tokenizer_class": "LlamaTokenizer"}
        files["added_tokens__json"] = {"<|im_end|>": 32000, "<|im_start|>": 32001}
    text = dolphin(tmp_path, **files)
    end = "<|im_end|>" if older else ""
    assert "".join(text.pieces([1, 22557, 32001, 1526, 32000])) == f"Hello<|im_start|> world{end}"
    assert list(text.pieces([3 + 0xC3, 32001, 3 + 0xA9])) == ["\ufffd<|im_start|>", "\ufffd"]


@pytest.mark.parametrize("refused", ["a<|im_end|>b", "<|im_start|>"])
def test_a_text_with_an_added_token_is_refused_without_a_tokenizer_json(tmp_path: Path, refused: str) -> None:
    """TEXT-2."""
    text = dolphin(tmp_path)
    assert text.encode("Hello <s> world") == Tokenizer.load(V1).encode("Hello <s> world")
    with pytest.raises(InputError, match=r"does not say how the text beside the token .* is split"):
        text.encode(refused)


@pytest.mark.parametrize("ids", [[32001, 1526], [32000, 1526], [1, 32000, 1526], [1526, 32001, 1526], [32002, 1526]])
def test_the_space_after_an_added_token_is_that_of_transformers(tmp_path: Path, ids: list[int]) -> None:
    """TEXT-5. The first space of a reply is not written, and only tokens without text may stand before it."""
    text = read_folder(write(tmp_path / "ours", tokenizer__model=V1, tokenizer_config__json=DOLPHIN), ROWS)
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDERS["chatml, added tokens"](tmp_path / "theirs"))
    assert "".join(text.pieces(ids)) == theirs.decode(ids, skip_special_tokens=True)


def test_a_template_is_not_guessed_without_a_tokenizer_json(tmp_path: Path) -> None:
    """Engines differ in how they split the text after an added token, so the ids would be a guess."""
    with pytest.raises(InputError, match=r"beside the token '<\|im_end\|>'"):
        dolphin(tmp_path).encode_chat(DIALOGUES[0])


def test_a_template_of_plain_text_is_obeyed_without_a_tokenizer_json(tmp_path: Path) -> None:
    """TEXT-3."""
    plain = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}ASSISTANT:"
    found = dolphin(tmp_path, chat_template__jinja=plain).encode_chat([{"role": "user", "content": "hi"}])
    assert found == Tokenizer.load(V1).encode("USER: hi\nASSISTANT:", bos=False)


def test_mixtrals_own_template_holds_where_there_is_none(tmp_path: Path) -> None:
    """TEXT-4."""
    ours = read_folder(FOLDERS["mixtral, both files"](tmp_path), ROWS).encode_chat([{"role": "user", "content": "hi"}])
    assert ours == [1, *Tokenizer.load(V1).encode("[INST] hi [/INST]", bos=False)]


# Refused


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no vocabulary": ({}, 32002, "neither tokenizer.json nor tokenizer.model is there"),
    "more pieces than rows": ({"tokenizer__model": V1}, 31999, "need 32000 rows, but the model has 31999"),
    "more added than rows": ({"tokenizer__model": V1, "added_tokens__json": {"<pad>": 32000}}, 32000, "need 32001"),
    "a token beyond the rows": (
        {"tokenizer__json": "json", "tokenizer_config__json": DOLPHIN}, 32001, "need 32002 rows",
    ),
    "an id that is taken": (
        {"tokenizer__json": "json", "added_tokens__json": {"<|im_end|>": 31999}}, 32002, "token 31999 is",
    ),
    "an id after a gap": (
        {"tokenizer__json": "json", "added_tokens__json": {"<|im_end|>": 32001}}, 32002, "token 32001 is missing",
    ),
    "two lists that disagree": (
        {"tokenizer__json": "json", "tokenizer_config__json": DOLPHIN, "added_tokens__json": {"<pad>": 32000}}, 32002,
        "'<pad>' is token 32000, but tokenizer_config.json",
    ),
    "no bos": (
        {"tokenizer__json": "json", "tokenizer_config__json": LLAMA | {"add_bos_token": False}}, 32002,
        "adds '<s>' to a text, but tokenizer_config.json says that 'add_bos_token' is false",
    ),
    "an end of text": (
        {"tokenizer__json": "json", "tokenizer_config__json": LLAMA | {"add_eos_token": True}}, 32002, "adds none",
    ),
    "not a vocabulary": ({"tokenizer__json": "{}"}, 32002, "cannot be read as a vocabulary"),
    "cut short": ({"tokenizer__json": '{"version": "1.0", "model": {'}, 32002, "cannot be read as a vocabulary"),
    "a pointer": ({"tokenizer__model": "version https://git-lfs.github.com/spec/v1"}, 32002, "a pointer of Git LFS"),
    "end a text": ({"config__json": {"eos_token_id": "</s>"}}, 32002, "'eos_token_id' is"),
    "end below zero": ({"generation_config__json": {"eos_token_id": [2, -1]}}, 32002, "generation_config.json"),
    "a token that is no text": ({"tokenizer_config__json": {"bos_token": 1}}, 32002, "'bos_token' is 1"),
    "added, a list": ({"tokenizer_config__json": {"added_tokens_decoder": []}}, 32002, "an object was expected"),
    "added, no id": (
        {"tokenizer_config__json": {"added_tokens_decoder": {"x": IM["32000"]}}}, 32002,
        "the id of a token was expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_obeyed_is_refused(tmp_path: Path, name: str) -> None:
    files, rows, words = REFUSED[name]
    files = {key: sentencepiece_json() if value == "json" else value for key, value in files.items()}
    write(tmp_path, **files)
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path, rows).encode("text")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


TEMPLATES = {
    "syntax": ("{% if %}", "line 1"),
    "its own words": ("{{ raise_exception('Only system!') }}", "refuses the dialogue: Only system!"),
    "the day": ("{{ strftime_now('%d') }}", "depends on the day"),
    "a fault": ("{{ 1 + 'a' }}", "fails on this dialogue"),
    "undefined": ("{{ messages[7].content.x }}", "fails on this dialogue"),
    "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails on this dialogue"),
    "a file": ("{% include '/etc/passwd' %}", "fails on this dialogue"),
    "change": ("{{ messages.append(1) }}", "fails on this dialogue"),
    "endless": ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails on this dialogue"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_cannot_be_obeyed_is_refused(tmp_path: Path, name: str) -> None:
    template, words = TEMPLATES[name]
    write(tmp_path, tokenizer__json=sentencepiece_json(), tokenizer_config__json=LLAMA, chat_template__jinja=template)
    with pytest.raises(InputError, match=r"chat_template\.jinja: the chat template") as caught:
        read_folder(tmp_path, ROWS).encode_chat(DIALOGUES[0])
    assert words in str(caught.value)


def test_a_template_named_default_is_expected(tmp_path: Path) -> None:
    config = LLAMA | {"chat_template": [{"name": "rag", "template": CHATML}]}
    write(tmp_path, tokenizer__json=sentencepiece_json(), tokenizer_config__json=config)
    with pytest.raises(InputError, match=r"tokenizer_config.json: 'chat_template' is \[\"rag\"\]"):
        read_folder(tmp_path, ROWS)


def test_a_dialogue_needs_a_template_or_mixtrals_own_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, tokenizer__json=sentencepiece_json(), tokenizer_config__json=LLAMA)
    with pytest.raises(InputError, match=r"neither a chat template nor tokenizer\.model"):
        read_folder(tmp_path, ROWS).encode_chat(DIALOGUES[0])


def test_control_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    assert json.loads(sentencepiece_json())["added_tokens"][1]["id"] == 1
    assert CONTROL["1"]["content"] == "<s>"
    assert read_folder(FOLDERS["mixtral"](tmp_path), ROWS).encode("<s>") == [1, 1]
