# SPDX-License-Identifier: Apache-2.0
"""Folders with text files as people have them: each file of a real kind, names and sizes replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

V1 = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
"""The tokenizer.model of Mixtral 8x7B."""
CHATML = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""The template of Mixtral 8x7B Instruct, as its tokenizer_config.json has it."""


def token(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **plain, **flags, "special": special}


CONTROL = {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>")}
LLAMA = {
    "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": CONTROL, "bos_token": "<s>",
    "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": True, "model_max_length": 1 << 40,
    "pad_token": None, "sp_model_kwargs": {}, "spaces_between_special_tokens": False,
    "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "use_default_system_prompt": False,
}  # fmt: skip
"""The tokenizer_config.json of Mixtral 8x7B."""
IM = {"32000": token("<|im_end|>"), "32001": token("<|im_start|>", special=False)}
DOLPHIN = LLAMA | {
    "added_tokens_decoder": CONTROL | IM, "eos_token": "<|im_end|>", "chat_template": CHATML, "use_fast": True,
}  # fmt: skip
"""Of dolphin-2.7-mixtral-8x7b: ChatML, whose end of turn is an added token."""


@cache
def sentencepiece_json() -> str:
    """The tokenizer.json of Mixtral 8x7B, made from its tokenizer.model as transformers 4 made the published one."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(V1))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    score = processor.get_score
    pairs = [
        (-score(vocab[piece]), (vocab[piece[:cut]], vocab[piece[cut:]]), (piece[:cut], piece[cut:]))
        for piece in pieces[259:] for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab
    ]  # fmt: skip
    merges = [pair for _, _, pair in sorted(pairs)]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return str(made.to_str())


@cache
def byte_level_json() -> str:
    """A tokenizer.json of the kind of Llama 3, which merges of Llamas have: bytes of characters, one BOS."""
    made = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [Path(__file__).read_text(), "the quick brown fox jumps over the lazy dog, 中文字 привет"]
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    size = made.get_vocab_size()
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", size)]
            ),
        ]
    )  # fmt: skip
    return str(made.to_str())


LLAMA3 = {
    "bos_token": "<|begin_of_text|>", "clean_up_tokenization_spaces": True, "eos_token": "<|eot_id|>",
    "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 8192,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|eot_id|>' + message['role'] + '\n\n' + message['content'] | trim %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{{ '<|eot_id|>assistant\n\n' }}",
}  # fmt: skip


def write(folder: Path, **files: Any) -> Path:
    """A folder with a config.json and these files; a name's double underscores stand for dots."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config__json": {"model_type": "mixtral"}} | files
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, Path):
            shutil.copy(content, path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "mixtral": lambda f: write(f, tokenizer__json=sentencepiece_json(), tokenizer_config__json=LLAMA),
    "mixtral, both files": lambda f: write(
        f, tokenizer__json=sentencepiece_json(), tokenizer_config__json=LLAMA, tokenizer__model=V1
    ),
    "instruct": lambda f: write(
        f, tokenizer__json=sentencepiece_json(), tokenizer_config__json=LLAMA | {"chat_template": INSTRUCT}
    ),
    "chatml, added tokens": lambda f: write(
        f, tokenizer__json=sentencepiece_json(), tokenizer_config__json=DOLPHIN, tokenizer__model=V1
    ),
    "chatml, template alone": lambda f: write(
        f, tokenizer__json=sentencepiece_json(), chat_template__jinja=CHATML,
        tokenizer_config__json={name: value for name, value in DOLPHIN.items() if name != "chat_template"},
    ),
    "chatml, template listed": lambda f: write(
        f, tokenizer__json=sentencepiece_json(),
        tokenizer_config__json=DOLPHIN | {
            "chat_template": [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": CHATML}]
        },
    ),
    "added, strips": lambda f: write(
        f, tokenizer__json=sentencepiece_json(),
        tokenizer_config__json=DOLPHIN | {
            "added_tokens_decoder": CONTROL | {"32000": token("<|im_end|>", lstrip=True, rstrip=True)}
            | {"32001": token("<|im_start|>", special=False, normalized=True)},
        },
    ),
    "added, older file": lambda f: write(
        f, tokenizer__json=sentencepiece_json(), added_tokens__json={"<|im_end|>": 32000, "<|im_start|>": 32001},
        tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", "chat_template": CHATML},
        special_tokens_map__json={"bos_token": "<s>", "eos_token": token("<|im_end|>"), "unk_token": "<unk>"},
    ),
    "an end that is not special": lambda f: write(
        f, tokenizer__json=sentencepiece_json(), tokenizer_config__json=DOLPHIN | {"eos_token": "<|im_start|>"}
    ),
    "llama 3": lambda f: write(f, tokenizer__json=byte_level_json(), tokenizer_config__json=LLAMA3),
    "llama 3, special map": lambda f: write(
        f, tokenizer__json=byte_level_json(), tokenizer_config__json=LLAMA3,
        special_tokens_map__json={"bos_token": token("<|begin_of_text|>"), "eos_token": token("<|eot_id|>")},
    ),
}  # fmt: skip
"""Folders that are to be read, each by the function that writes it."""
