# SPDX-License-Identifier: Apache-2.0
"""The checks of a tokenizer, a sampler or a loss against `golden/vectors/`.

Each implementation consists of parts that can be replaced one by one; a bug replaces one part. `wrong` lists the
vectors of a file that an implementation gets wrong. The comparison of values is loose: an implementation in float32
passes, and every mistake is larger than the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.arithmetic.native.ops import NativeOps
from refmoe.errors import InputError
from refmoe.files.json_file import read_json
from refmoe.routers.literature.losses import router_z_loss
from refmoe.text import sampling
from refmoe.text.chat import encode_chat
from refmoe.text.stream import TextStream
from refmoe.text.tokenizer import Tokenizer

Vector = Mapping[str, Any]

FORMAT_VERSION = "1"
NEAR = Fraction(1, 1000)
"""The tolerance. Six float32 roundings are a ten-thousandth of it, and every mistake in the vectors is larger."""


class Text(Tokenizer):
    """The operations that a file of tokenizer vectors tests, with the methods of `refmoe.text`. Made by `Text.over`."""

    @classmethod
    def over(cls, tokenizer: Tokenizer) -> Text:
        """The operations over the vocabulary of a tokenizer."""
        return cls(tokenizer.path, tokenizer.processor)

    def continued(self, prompt: str, continuation: str) -> list[int]:
        """The ids of a prompt and its continuation."""
        return self.encode(prompt + continuation)

    def chat(self, messages: Any) -> list[int]:
        """The ids of the prompt for a dialogue."""
        return encode_chat(self, messages)

    def stream(self, ids: Iterable[int]) -> tuple[list[str], str]:
        """The text that each id adds, and the text that is added at the end."""
        stream = TextStream(self)
        return [stream.feed(token) for token in ids], stream.finish()


class Sampler:
    """The stages that the file of sampler vectors tests, with the functions of `refmoe.text.sampling`."""

    def penalise(self, logits: sampling.Logits, seen: Iterable[int], penalty: float) -> sampling.Logits:
        """SAMPLE-3, the repetition penalty. logits: [V]   returns: [V]"""
        return sampling.penalise_repetition(logits, seen, penalty)

    def keep_top_p(self, logits: sampling.Logits, p: float) -> sampling.Logits:
        """SAMPLE-6, the nucleus. logits: [V], -inf for excluded tokens   returns: [V]"""
        return sampling.keep_top_p(logits, p)

    def kept(self, penalised: sampling.Logits, settings: sampling.SamplingSettings) -> sampling.Logits:
        """All filters in their order. penalised: [V]   returns: [V]"""
        kept = sampling.apply_temperature(penalised, settings.temperature)
        if settings.top_k is not None:
            kept = sampling.keep_top_k(kept, settings.top_k)
        return self.keep_top_p(kept, settings.top_p)


def wrong(implementation: Any, content: Mapping[str, Any]) -> list[str]:
    """The names of the vectors that an implementation gets wrong.

    implementation: a `Text` for a file of kind ``tokenizer``, a `Sampler` for ``sampler``, a function like
    `load_balancing_loss` for ``losses``   content: the content of the file
    Raises InputError when the kind or the version is not known.
    """
    kind, version = str(content.get("kind")), content.get("format_version")
    if version != FORMAT_VERSION or kind not in ANSWERS:
        raise InputError(f"vectors of kind {kind!r} in version {version!r} are not known")
    return [vector["name"] for vector in content["vectors"] if not ANSWERS[kind](implementation, vector)]


def read_vectors(path: Path) -> dict[str, Any]:
    """The content of a file of vectors. Raises InputError when the file is missing or is not JSON."""
    return read_json(path).values


def right_text(text: Text, vector: Vector) -> bool:
    """Whether a tokenizer gives the ids and texts of a vector."""
    expected = vector["expected"]
    if vector["kind"] == "text":
        parts = vector.get("parts")
        ids = text.continued(*parts) if parts else text.encode(vector["text"])
        return bool(ids == expected["ids"] and text.decode(expected["ids"]) == expected["decoded"])
    if vector["kind"] == "chat":
        return bool(text.chat(vector["messages"]) == expected["ids"])
    if vector["kind"] == "decode":
        return bool(text.decode(vector["ids"]) == expected["decoded"])
    return text.stream(vector["ids"]) == (expected["pieces"], expected["rest"])


def right_sample(sampler: Sampler, vector: Vector) -> bool:
    """Whether a sampler gives the penalties, order, kept tokens and draws of a vector."""
    expected = vector["expected"]
    settings = sampling.SamplingSettings(
        temperature=float(vector["temperature"]),
        top_k=vector["top_k"],
        top_p=float(vector["top_p"]),
        repetition_penalty=float(vector["repetition_penalty"]),
    )
    logits = np.array([float(text) for text in vector["logits"]])
    penalised = sampler.penalise(logits, vector["seen"], settings.repetition_penalty)
    order = [int(token) for token in sampling.falling_order(penalised) if penalised[token] > -np.inf]
    if penalised.tolist() != [float(text) for text in expected["penalised"]] or order != expected["order"]:
        return False
    if settings.temperature == 0:
        return sampling.greedy(penalised) == int(expected["token"])
    kept = sampler.kept(penalised, settings)
    if np.flatnonzero(kept > -np.inf).tolist() != expected["kept"]:
        return False
    return all(sampling.draw(kept, float(draw["u"])) == draw["token"] for draw in expected["draws"])


def right_loss(loss: Callable[..., Any], vector: Vector) -> bool:
    """Whether a load-balancing loss gives the value of a vector. Vectors of the router z-loss test refmoe's own
    function."""
    ops: Any = NativeOps()
    tables = vector["layers"] if "layers" in vector else [vector["logits"]]
    layers = [np.array([[float(v) for v in row] for rows in layer for row in rows]) for layer in tables]
    mask = None if vector["mask"] is None else np.array([flag == 1 for row in vector["mask"] for flag in row])
    if vector["kind"] == "router-z":
        return near(vector["expected"]["loss"], router_z_loss(ops, layers[0], mask))
    return near(vector["expected"]["loss"], loss(ops, layers, vector["top_k"], mask))


def near(stated: Mapping[str, str], value: Any) -> bool:
    """Whether a value equals the stated number, up to the error of float32."""
    middle = Fraction(stated.get("exact", stated.get("midpoint", "0")))
    return bool(np.isfinite(value)) and abs(Fraction(float(value)) - middle) <= NEAR * max(Fraction(1), abs(middle))


ANSWERS: Mapping[str, Callable[[Any, Vector], bool]] = {
    "tokenizer": right_text, "sampler": right_sample, "losses": right_loss,
}  # fmt: skip
