# SPDX-License-Identifier: Apache-2.0
"""Vocabularies in GGUF files: the ids and the text of llama.cpp, and of the tokenizer that they are made from."""

from __future__ import annotations

import ctypes as c
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")
pytest.importorskip("mistral_common")
pytest.importorskip("tokenizers")
sentencepiece: Any = pytest.importorskip("sentencepiece")

from refmoe.checkpoints import gguf_file  # noqa: E402
from refmoe.checkpoints.gguf_file import Vocabulary, write_gguf  # noqa: E402
from refmoe.checkpoints.synthetic import synthetic_checkpoint  # noqa: E402
from refmoe.engines.adapters import llama_cpp_library as native  # noqa: E402
from refmoe.errors import InputError  # noqa: E402
from refmoe.spec.config import Config  # noqa: E402
from refmoe.text.folder import FolderText, read_folder  # noqa: E402
from refmoe.text.gguf_vocabulary import LLAMA_3  # noqa: E402
from refmoe.text.tokenizer import Tokenizer  # noqa: E402
from tests.command_line import Refmoe  # noqa: E402
from tests.text.real_folders import V1  # noqa: E402

needs_engine = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp not installed: pip install -e '.[llama-cpp]'"
)
SMALL = Config(
    dim=32, layers=1, heads=1, kv_heads=1, head_dim=32, hidden_dim=32, vocab=0, experts=2, experts_per_token=1,
    norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
KINDS = ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
TEXTS = (
    "Hello world", " two  spaces ", "   ", "\n", "\n\n \n", "é中文字🙂\u200d", "1234567 words", "tab\there", "▁", "a▁b",
    "<0x41>", "a\u0301", "\u00a0x", "it's I'LL we'VE 'S", "x\r\ny", "…—“q”", "0.1+2=3", "\x7f\x01", "\u017ft",
    "\U0001d518", "مرحبا", "foo_bar(baz);  // c", "\u3000全角", "a" * 50, "😀" * 5,
)  # fmt: skip


def spm() -> Vocabulary:
    """Mixtral's own."""
    made: Any = sentencepiece.SentencePieceProcessor(model_file=str(V1))
    kinds = {"is_unknown": "UNKNOWN", "is_control": "CONTROL", "is_byte": "BYTE", "is_unused": "UNUSED"}
    ids = range(made.vocab_size())
    return Vocabulary(
        model="llama", pieces=[made.id_to_piece(i) for i in ids], begin=1, end=2, adds_begin=True,
        kinds=[next((kind for ask, kind in kinds.items() if getattr(made, ask)(i)), "NORMAL") for i in ids],
        scores=tuple(made.get_score(i) for i in ids),
    )  # fmt: skip


def byte_level() -> Vocabulary:
    """One of the kind of Llama 3, trained on this repository's pages."""
    library: Any = import_module("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    split = library.pre_tokenizers.Split(library.Regex(LLAMA_3), "isolated")
    level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = library.pre_tokenizers.Sequence([split, level])
    trainer = library.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    made.train_from_iterator([page.read_text(encoding="utf-8") for page in pages] + ["привет 中文 " * 9], trainer)
    model = json.loads(made.to_str())["model"]
    pieces = [*sorted(model["vocab"], key=model["vocab"].get), "<|begin_of_text|>", "<|end_of_text|>", "<think>"]
    kinds = ["NORMAL"] * len(model["vocab"]) + ["CONTROL", "CONTROL", "USER_DEFINED"]
    return Vocabulary(
        model="gpt2", pieces=pieces, kinds=kinds, begin=len(pieces) - 3, end=len(pieces) - 2, cut="llama-bpe",
        merges=tuple(" ".join(pair) for pair in model["merges"]), adds_begin=True,
    )  # fmt: skip


MADE: dict[str, Callable[[], Vocabulary]] = {"llama": spm, "gpt2": byte_level}


def write(folder: Path, vocabulary: Vocabulary) -> Path:
    config = replace(SMALL, vocab=len(vocabulary.pieces))
    write_gguf(folder / "model.gguf", config, synthetic_checkpoint(config, 1).parameters, "float32", vocabulary)
    return folder / "model.gguf"


@pytest.fixture(scope="module", params=MADE)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf"), MADE[request.param]())


@pytest.fixture(scope="module")
def ours(file: Path) -> FolderText:
    return read_folder(file, 40000)


class LlamaCpp:
    """The tokenizer of llama.cpp's library."""

    def __init__(self, path: Path) -> None:
        self.library = native.load_library(lambda _: None)
        self.library.llama_model_get_vocab.restype = c.c_void_p
        self.library.llama_model_get_vocab.argtypes = [c.c_void_p]
        model = self.library.llama_model_load_from_file(bytes(path), self.library.llama_model_default_params())
        self.vocabulary = c.c_void_p(self.library.llama_model_get_vocab(model))

    def encode(self, text: str) -> list[int]:
        """With BOS, and without control tokens of the text."""
        raw, ids = text.encode(), (c.c_int32 * 4096)()
        flags = (c.c_bool(True), c.c_bool(False))
        count = self.library.llama_tokenize(self.vocabulary, raw, c.c_int32(len(raw)), ids, c.c_int32(4096), *flags)
        return list(ids[:count])

    def decode(self, ids: list[int]) -> str:
        given, text = (c.c_int32 * len(ids))(*ids), c.create_string_buffer(1 << 16)
        flags = (c.c_bool(True), c.c_bool(False))
        count = self.library.llama_detokenize(
            self.vocabulary, given, c.c_int32(len(ids)), text, c.c_int32(1 << 16), *flags
        )
        return text.raw[:count].decode()


@pytest.fixture(scope="module")
def theirs(file: Path) -> LlamaCpp:
    return LlamaCpp(file)


@needs_engine
@pytest.mark.parametrize("text", TEXTS)
def test_the_ids_and_the_text_of_llama_cpp(text: str, ours: FolderText, theirs: LlamaCpp) -> None:
    """TEXT-6, TEXT-7. After BOS, llama.cpp's function leaves the blank that TOK-1 added."""
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert "".join(ours.pieces(ids[1:])) == theirs.decode(ids[1:])


@needs_engine
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40))
def test_the_ids_of_llama_cpp_for_any_text(text: str, ours: FolderText, theirs: LlamaCpp) -> None:
    assert ours.encode(text) == theirs.encode(text)


def test_a_vocabulary_of_sentencepiece_is_that_of_the_tokenizer_model(tmp_path: Path) -> None:
    """TEXT-6. The same ids as from the file that the GGUF was made from."""
    found, original = read_folder(write(tmp_path, spm()), 40000), Tokenizer.load(V1)
    for text in ("", *TEXTS):
        assert found.encode(text) == original.encode(text), text
    assert found.end == frozenset({original.eos_id})
    ids = [*range(0, 32000, 7), 1, 2, 0]
    assert "".join(found.pieces(ids)) == original.decode(ids)


def test_a_prompt_with_the_text_of_a_token_is_refused(tmp_path: Path) -> None:
    """TEXT-8."""
    found = read_folder(write(tmp_path, byte_level()), 40000)
    for text in ("a <|end_of_text|>", "<think>"):
        with pytest.raises(InputError, match="does not say how the text beside"):
            found.encode(text)


def test_a_vocabulary_without_text_is_none(tmp_path: Path) -> None:
    """TEXT-9. Of the files that refmoe writes: token ids are all that there is."""
    config = replace(SMALL, vocab=300)
    write_gguf(tmp_path / "model.gguf", config, synthetic_checkpoint(config, 1).parameters)
    found = read_folder(tmp_path / "model.gguf", 300)
    assert found.tokenizer is None
    assert "".join(found.pieces([5, 7])) == "5 7 "
    with pytest.raises(InputError, match="no piece of text"):
        found.encode("a")


BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "another model": ("llama", {"model": "t5"}),
    "scores missing": ("llama", {"scores": (0.0,) * 3}),
    "no BOS before a text": ("llama", {"adds_begin": False}),
    "BOS beyond": ("llama", {"begin": 32000}),
    "a piece twice": ("gpt2", {"pieces": None}),
    "another cut": ("gpt2", {"cut": "deepseek-llm"}),
    "merges of nothing": ("gpt2", {"merges": ("qzqzqz zqzq",)}),
    "merge of one": ("gpt2", {"merges": ("abc",)}),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_obeyed_is_refused(fault: str, tmp_path: Path) -> None:
    kind, changes = BROKEN[fault]
    good = MADE[kind]()
    if fault == "a piece twice":
        changes = {"pieces": [*good.pieces[:-1], good.pieces[5]]}
    path = write(tmp_path, replace(good, **changes))
    with pytest.raises(InputError) as caught:
        read_folder(path, 40000)
    assert str(caught.value).startswith(str(path))


def test_a_prompt_is_continued_from_a_gguf_file(tmp_path: Path, refmoe: Refmoe) -> None:
    path = write(tmp_path, byte_level())
    command = ("generate", "--checkpoint", path, "--prompt", "The engine", "--max-new-tokens", "3", "--json")
    said = json.loads(refmoe(*command)[1])
    text = read_folder(path, 40000)
    assert said["prompt"] == text.encode("The engine")
    assert said["text"] == "".join(text.pieces(said["tokens"]))
    assert len(said["tokens"]) == 3


def test_the_kinds_of_pieces_have_the_numbers_of_gguf() -> None:
    gguf: Any = import_module("gguf")
    assert [int(getattr(gguf.TokenType, kind)) for kind in KINDS] == [*range(1, 7)]
    assert gguf_file.placeholders(300).kinds.count("BYTE") == 256
