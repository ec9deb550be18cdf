# SPDX-License-Identifier: Apache-2.0
"""The model as files that a server loads, the commands that serve them, and a server that refmoe starts and ends."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic

from refmoe.checkpoints.gguf_file import FILE_TYPES, words, write_gguf
from refmoe.checkpoints.write import new_folder, write_checkpoint, write_json
from refmoe.engines.harness import HarnessUnusable
from refmoe.engines.process import BROKEN, Process, ending
from refmoe.engines.server.asking import Address, Client, ServerFault, Unwilling
from refmoe.engines.server.replies import spelled
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.json_file import read_json
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters

CHECKPOINT, GGUF, DECISION = "checkpoint", "model.gguf", "decision.json"
"""The names of the files in a folder."""
PLACES = {"{checkpoint}": CHECKPOINT, "{gguf}": GGUF, "{decision}": DECISION}
"""The words of a command that stand for a file."""
LOOK = 0.2
"""Seconds between two looks at a server that starts."""
LONGEST = 4096
"""The most tokens of a text that a server is started for."""


@dataclass(frozen=True)
class Command:
    """A command that serves the files."""

    server: str
    about: str
    words: str
    """The command, with ``{checkpoint}``, ``{gguf}``, ``{decision}``, ``{host}``, ``{port}`` and ``{dtype}``."""

    def filled(self, folder: Path, address: Address, dtype: str) -> str:
        """The command for a shell."""
        values = {word: shlex.quote(str(folder / name)) for word, name in PLACES.items()}
        values |= {"{host}": address.host, "{port}": str(address.port), "{dtype}": dtype}
        text = self.words
        for word, value in values.items():
            text = text.replace(word, value)
        return text


COMMANDS = (
    Command(
        "vllm", "gives whole distributions of prompt and generated tokens",
        "vllm serve {checkpoint} --host {host} --port {port} --dtype {dtype} --max-logprobs -1 --max-model-len 256 "
        "--generation-config vllm",
    ),
    Command(
        "llama-server", "float32 cache and no flash attention: with the defaults, small bugs are not seen",
        "llama-server -m {gguf} --host {host} --port {port} -c 4096 -ctk f32 -ctv f32 -fa off",
    ),
    Command(
        "xllamacpp", "llama-server of the Python package, which has no command of its own",
        "python -m refmoe.engines.server.llama_server {gguf} {port}",
    ),
    Command(
        "transformers", "the decision config makes it give whole distributions of a prompt",
        "transformers serve {checkpoint} --host {host} --port {port} --dtype {dtype} --decision-config {decision}",
    ),
    Command("mlx-lm", "gives the 11 largest entries", "mlx_lm.server --model {checkpoint} --host {host} --port {port}"),
)  # fmt: skip
"""The commands that `refmoe conform --server-files` prints."""


def write_files(folder: Path, config: Config, parameters: Parameters, dtype: str, gguf: bool = True) -> list[Path]:
    """Write all files that servers load into a folder, new or of an earlier call. Returns them.

    dtype: of the weights: some of ``float32``, ``bfloat16``, ``float16``   gguf: whether to write a GGUF file as well
    Raises InputError when the folder cannot be written, holds another model, or the dtype cannot hold a weight.
    """
    with new_folder(folder):
        checkpoint = folder / CHECKPOINT
        write_checkpoint(checkpoint, config, parameters, dtype)
        write_vocabulary(checkpoint, config.vocab)
        write_json(folder / DECISION, decision(config.vocab))
        written = [checkpoint, folder / DECISION]
        if gguf:
            if dtype not in FILE_TYPES:
                raise InputError(f"a GGUF file has no {dtype}, but one of {', '.join(FILE_TYPES)} was expected")
            with replacing(folder / GGUF) as temporary:
                write_gguf(temporary, config, parameters, dtype, words(pieces(config.vocab)))
            written.append(folder / GGUF)
    return written


def pieces(vocab: int) -> list[str]:
    """The words of the tokens: ``<0>``, ``<1>``, ..."""
    return [spelled([token]) for token in range(vocab)]


def write_vocabulary(checkpoint: Path, vocab: int) -> None:
    """Give a checkpoint a tokenizer under which text is ids, and no token that ends a text."""
    path = checkpoint / "config.json"
    write_json(path, {**read_json(path).values, "bos_token_id": None, "eos_token_id": None})
    write_json(checkpoint / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "<[0-9]+>"}, "behavior": "Isolated", "invert": False,
        },
        "post_processor": None, "decoder": None,
        "model": {
            "type": "WordLevel", "vocab": {word: i for i, word in enumerate(pieces(vocab))}, "unk_token": "<0>",
        },
    })  # fmt: skip
    write_json(checkpoint / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768, "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "add_eos_token": False,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    })  # fmt: skip


def decision(vocab: int) -> dict[str, object]:
    """The decision config by which `transformers serve` gives the distribution after each token of a prompt.

    It has a question for each position, whose labels are all tokens.
    """
    return {
        "labels": {"choice": pieces(vocab)},
        "sanitize_control_tokens": False,
        "chat_template": "{% for q in questions %}{{ state[loop.index0] }}<|mark|>{% endfor %}",
    }


# ---- a server that refmoe starts


def filled(command: Sequence[str], folder: Path) -> list[str]:
    """A command in which the words for files are their paths."""
    found = []
    for word in command:
        for place, name in PLACES.items():
            word = word.replace(place, str(folder / name))
        found.append(word)
    return found


class Started:
    """A server that runs as a process. What it prints is read all the time, so that it never waits for a reader."""

    def __init__(self, command: Sequence[str]) -> None:
        """Raises InputError when there is no such program."""
        self._process = Process(command)
        self._ended = Event()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()
        self.log = ""
        """The end of its standard error, after `stop`."""

    @property
    def lives(self) -> bool:
        return self._process.lives

    def stop(self) -> None:
        """End it with all that it has started."""
        self._ended.set()
        self._reader.join()
        self._process.kill()
        self.log = self._process.errors.strip()

    def ending(self) -> str:
        """How it ended, in words."""
        return ending(self._process.status)

    def _read(self) -> None:
        while not self._ended.wait(LOOK):
            _ = self._process.errors


@contextmanager
def started(command: Sequence[str], address: Address, limit: float) -> Iterator[Started]:
    """A server that answers.   limit: seconds for its start

    Raises HarnessUnusable where it ends before it answers, or does not answer in time.
    """
    server = Started(command)
    try:
        why = wait(Client(address, limit), limit, lambda: server.lives)
        if why:
            state = f" ({server.ending()})" if not server.lives else ""
            server.stop()
            raise HarnessUnusable(f"server '{command[0]}' cannot be used: {why}{state}", server.log)
        yield server
    finally:
        server.stop()


def wait(client: Client, limit: float, lives: Callable[[], bool]) -> str:
    """Wait until a server answers any request. Returns a sentence where it does not, else nothing.

    limit: seconds   lives: whether its process does
    """
    deadline = monotonic() + limit
    pause = Event()
    while True:
        try:
            client.get("/health", min(5.0, limit))
            return ""
        except Unwilling:
            return ""
        except ServerFault as fault:  # a server that loads its model has no time
            if fault.kind == BROKEN:
                return ""
        if not lives():
            return "it ended before it answered"
        if monotonic() > deadline:
            return f"it did not answer within {limit:g} seconds"
        pause.wait(LOOK)


def shown_commands(folder: Path, address: Address, dtype: str) -> Mapping[str, tuple[str, str]]:
    """Per server the command that serves the files, and a remark."""
    return {each.server: (each.filled(folder, address, dtype), each.about) for each in COMMANDS}
