# SPDX-License-Identifier: Apache-2.0
"""Hostile traces: files that strangers may give to ``refmoe verify``, and the expected end of each.

Every function below makes one hostile trace. It gets the parts of an honest trace of the case walking-skeleton. It
changes these parts, or returns the bytes of the whole file, or writes at `draft.path` itself. Its decorator gives the
exit status, and the words that the sentence or the verdict must contain. Status 0: the trace looks odd but is legal.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.files.safetensors_file import DTYPES
from refmoe.profiles.load import policy
from refmoe.spec.model import Model
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import read_case, trace_path
from refmoe.traces.script import execute
from refmoe.traces.trace import Recorder, read_trace

GOLDEN = Path(__file__).parents[2] / "golden"
CASE = "walking-skeleton"
CONFORMANT, WRONG, REFUSED = 0, 1, 2
"""Exit statuses."""

CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
Tensor = tuple[str, tuple[int, ...], bytes]
"""Dtype in the format's words, shape, data."""

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x1b[31m\u202eevil"
"""Sets a terminal's title, clears it, turns red, and writes from right to left."""


@dataclass
class Draft:
    """An honest trace in parts."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata entries beside the one made from `header`, or in its place."""

    def run(self, i: int) -> dict[str, Any]:
        """One run of the header."""
        found: dict[str, Any] = self.header["runs"][i]
        return found

    def array(self, key: str) -> np.ndarray[Any, Any]:
        """A tensor's values, to be changed and put back."""
        code, shape, data = self.tensors[key]
        return np.frombuffer(data, DTYPES[code]).reshape(shape).copy()

    def put(self, key: str, array: Any) -> None:
        self.tensors[key] = tensor(array)

    def change(self, change: Callable[[Any], Any], end: str = "") -> None:
        """Apply a function to every float tensor whose key has this end."""
        for key in self.tensors:
            if key.endswith(end) and not key.endswith("router.experts"):
                self.put(key, change(self.array(key)))

    def keep(self, *ends: str) -> None:
        """Drop every tensor whose key has another end."""
        self.tensors = {key: found for key, found in self.tensors.items() if key.endswith(ends)}

    def text(self) -> str:
        """The JSON header of the file."""
        table: dict[str, Any] = {"__metadata__": {"refmoe": json.dumps(self.header), **self.metadata}}
        offset = 0
        for key, (code, shape, data) in self.tensors.items():
            table[key] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + len(data)]}
            offset += len(data)
        return json.dumps(table)

    def data(self) -> bytes:
        return b"".join(data for _, _, data in self.tensors.values())

    def whole(self) -> bytes:
        """The bytes of the file."""
        return file(self.text(), self.data())


def tensor(array: Any) -> Tensor:
    array = np.ascontiguousarray(array)
    return CODES[array.dtype], array.shape, array.tobytes()


def file(text: str | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header and data.   length: a false length of the header"""
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + data


@cache
def honest(arithmetic: str) -> tuple[str, dict[str, Tensor]]:
    """Header, as JSON, and tensors of an honest trace: the golden, or the ideal run of a policy."""
    golden = read_trace(trace_path(GOLDEN / CASE))
    if arithmetic == "exact":
        arrays = {key: stored.map() for key, stored in golden.tensors.items()}
    else:
        case, recorder = read_case(GOLDEN / CASE), Recorder()
        model = Model(case.config, case.checkpoint().parameters, CUT_STEPS)
        execute(PolicyOps(policy(arithmetic), recorder), model, case.runs(), recorder)
        arrays = recorder.arrays
    header = json.dumps(asdict(golden.header) | {"policy": arithmetic})
    return header, {key: tensor(array) for key, array in arrays.items()}


def draft(path: Path, arithmetic: str) -> Draft:
    header, tensors = honest(arithmetic)
    return Draft(path, json.loads(header), dict(tensors))


# ---- the catalogue


@dataclass(frozen=True)
class Hostile:
    """A hostile trace and its expected end."""

    name: str
    make: Callable[[Draft], bytes | None]
    status: int
    words: tuple[str, ...]
    """The words that the sentence or the report must contain."""
    arithmetic: str
    """The arithmetic of the honest trace that it is made from."""
    against: str
    """The subject; empty: the case that the trace names, ``{checkpoint}``: the same model as a checkpoint."""

    def write(self, path: Path) -> None:
        parts = draft(path, self.arithmetic)
        whole = self.make(parts)
        if whole is not None:
            path.write_bytes(whole)
        elif not os.path.lexists(path) and self.make not in ABSENT:
            path.write_bytes(parts.whole())


TRACES: dict[str, Hostile] = {}
ABSENT: set[Callable[[Draft], bytes | None]] = set()
Make = Callable[[Draft], bytes | None]
AGAINST_CASE = f"--case {CASE}"
AGAINST_CHECKPOINT = "--checkpoint {checkpoint}"


def hostile(status: int, *words: str, arithmetic: str = "exact", against: str = AGAINST_CASE) -> Callable[[Make], Make]:
    """Enter a function into the catalogue under its own name."""

    def enter(make: Make) -> Make:
        assert make.__name__ not in TRACES
        TRACES[make.__name__] = Hostile(
            name=make.__name__, make=make, status=status, words=words, arithmetic=arithmetic, against=against
        )
        return make

    return enter


# ---- files that are no trace


@hostile(REFUSED, "no such file")
def missing_file(draft: Draft) -> None:
    ABSENT.add(missing_file)


@hostile(REFUSED, "is a folder")
def folder(draft: Draft) -> None:
    draft.path.mkdir()


@hostile(REFUSED, "is no ordinary file")
def pipe_that_nobody_writes_to(draft: Draft) -> None:
    os.mkfifo(draft.path)


@hostile(REFUSED, "is no ordinary file")
def link_to_endless_zeros(draft: Draft) -> None:
    draft.path.symlink_to("/dev/zero")


@hostile(REFUSED, "symbolic links")
def link_to_itself(draft: Draft) -> None:
    draft.path.symlink_to(draft.path)


@hostile(REFUSED, "not a whole safetensors file")
def empty_file(draft: Draft) -> bytes:
    return b""


@hostile(REFUSED, "not a whole safetensors file")
def text_file(draft: Draft) -> bytes:
    return b"hello, this is my trace, it is conformant\n" * 100


@hostile(REFUSED, "not a whole safetensors file")
def cut_in_its_header(draft: Draft) -> bytes:
    return draft.whole()[:500]


@hostile(REFUSED, "not a whole safetensors file")
def cut_by_one_byte(draft: Draft) -> bytes:
    return draft.whole()[:-1]


@hostile(REFUSED, "not a whole safetensors file")
def bytes_left_over(draft: Draft) -> bytes:
    return draft.whole() + b"\0"


@hostile(REFUSED, "not a whole safetensors file")
def header_longer_than_the_file(draft: Draft) -> bytes:
    return file(draft.text(), draft.data(), 10_000_000)


@hostile(REFUSED, "not a whole safetensors file")
def header_of_exabytes(draft: Draft) -> bytes:
    return file(draft.text(), draft.data(), 1 << 62)


@hostile(REFUSED, "not a whole safetensors file")
def header_of_negative_length(draft: Draft) -> bytes:
    return file(draft.text(), draft.data(), -1)


@hostile(REFUSED, "the safetensors header has 41,943,041 bytes, but at most 41,943,040 were expected")
def header_too_long_for_the_memory_promised(draft: Draft) -> bytes:
    return file(draft.text().ljust((40 << 20) + 1), draft.data())


@hostile(REFUSED, "not a whole safetensors file")
def header_is_an_array(draft: Draft) -> bytes:
    return file("[]", b"")


@hostile(REFUSED, "not a whole safetensors file")
def header_nested_without_end(draft: Draft) -> bytes:
    return file('{"a":' + "[" * 1_000_000, b"")


@hostile(REFUSED, "not a whole safetensors file")
def header_is_not_text(draft: Draft) -> bytes:
    return file(b'{"\xff\xfe": 1}', b"")


@hostile(REFUSED, "'prefill/logits' is there more than once")
def tap_given_twice(draft: Draft) -> bytes:
    """A key that stands twice in the file: readers differ in the entry that they take."""
    draft.keep("prefill/logits")
    entry = draft.text().partition('"prefill/logits": ')[2][:-1]
    other = entry.replace("F64", "I64")
    return file(f'{draft.text()[:-1]}, "prefill/logits": {other}}}', draft.data())


@hostile(REFUSED, "not a whole safetensors file", "offset")
def taps_that_overlap(draft: Draft) -> bytes:
    draft.keep("prefill/embedding", "prefill/layers.0.attention_norm")
    table = json.loads(draft.text())
    table["prefill/layers.0.attention_norm"]["data_offsets"] = table["prefill/embedding"]["data_offsets"]
    return file(json.dumps(table), draft.data())


@hostile(REFUSED, "not a whole safetensors file")
def tap_beyond_the_file(draft: Draft) -> bytes:
    draft.keep("prefill/embedding")
    data = draft.data()
    return file(draft.text().replace(str(len(data)), str(1 << 40)), data)


@hostile(REFUSED, "not a whole safetensors file")
def shape_that_overflows(draft: Draft) -> bytes:
    draft.keep("prefill/embedding")
    return file(draft.text().replace("[12, 48]", f"[{1 << 63}, 2]"), draft.data())


@hostile(REFUSED, "not a whole safetensors file")
def shape_below_zero(draft: Draft) -> bytes:
    draft.keep("prefill/embedding")
    return file(draft.text().replace("[12, 48]", "[-12, -48]"), draft.data())


@hostile(REFUSED, "not a whole safetensors file", "u001b")
def escape_sequences_in_a_dtype(draft: Draft) -> bytes:
    draft.keep("prefill/embedding")
    return file(draft.text().replace('"F64"', json.dumps(ESCAPE)), draft.data())


@hostile(REFUSED, "not a whole safetensors file", "u001b")
def escape_sequences_in_a_name_with_a_wrong_offset(draft: Draft) -> bytes:
    draft.keep("prefill/embedding")
    draft.tensors = {"prefill/x": ("U8", (1,), b"x"), **draft.tensors}
    name = json.dumps(f"prefill/{ESCAPE}")
    return file(draft.text().replace('"prefill/x"', name).replace("[0, 1]", "[1, 2]"), draft.data())


@hostile(CONFORMANT)
def tensors_at_odd_addresses(draft: Draft) -> None:
    draft.tensors = {"prefill/odd": ("U8", (3,), b"odd"), **draft.tensors}


# ---- metadata


@hostile(CONFORMANT)
def no_metadata(draft: Draft) -> bytes:
    """The arrays of a file that is no trace, whose names are those of the runs and taps of the case."""
    table = json.loads(draft.text())
    del table["__metadata__"]
    return file(json.dumps(table), draft.data())


@hostile(REFUSED, "not JSON")
def metadata_in_words(draft: Draft) -> None:
    draft.metadata["refmoe"] = "a trace of walking-skeleton"


@hostile(REFUSED, "'refmoe' is [], but an object was expected")
def metadata_is_a_list(draft: Draft) -> None:
    draft.metadata["refmoe"] = "[]"


@hostile(REFUSED, "'format_version' is \"7\"", '"1" was expected')
def version_of_the_future(draft: Draft) -> None:
    draft.header["format_version"] = "7"


@hostile(REFUSED, "nested too deeply")
def metadata_nested_without_end(draft: Draft) -> None:
    draft.metadata["refmoe"] = '{"x":' + "[" * 1_000_000 + "]" * 1_000_000 + "}"


@hostile(REFUSED, "'runs[0]' is")
def metadata_nested_to_the_brink(draft: Draft) -> None:
    """JSON as deep as a parser can read it, but deeper than a writer can write it."""
    draft.metadata["refmoe"] = json.dumps(draft.header | {"runs": "?"}).replace('"?"', "[" * 900 + "]" * 900)


@hostile(REFUSED, "'policy' is there more than once")
def two_policies(draft: Draft) -> None:
    draft.metadata["refmoe"] = json.dumps(draft.header)[:-1] + ', "policy": "bfloat16"}'


@hostile(REFUSED, "an integer from 0 was expected")
def number_of_a_million_digits(draft: Draft) -> None:
    draft.run(0)["past"] = "?"
    draft.metadata["refmoe"] = json.dumps(draft.header).replace('"?"', "9" * 1_000_000)


@hostile(REFUSED, "'runs[0].past'", "integer from 0")
def past_is_infinite(draft: Draft) -> None:
    draft.run(0)["past"] = float("inf")


@hostile(REFUSED, "'policy'", "characters")
def policy_of_a_megabyte(draft: Draft) -> None:
    draft.header["policy"] = "float64" * 150_000


@hostile(REFUSED, "'policy'", "printable", "u001b")
def escape_sequences_in_the_policy(draft: Draft) -> None:
    draft.header["policy"] = ESCAPE


@hostile(REFUSED, "'producer.name'", "printable", "ud800")
def lone_surrogate_in_the_producer(draft: Draft) -> None:
    """A lone surrogate has no encoding, so printing it fails."""
    draft.header["producer"]["name"] = "\ud800"


@hostile(REFUSED, "'runs[0].run'", "printable", "u001b")
def escape_sequences_in_a_run(draft: Draft) -> None:
    draft.run(0)["run"] = ESCAPE


@hostile(REFUSED, "belongs to no run", "u001b")
def escape_sequences_in_a_key(draft: Draft) -> None:
    draft.put(f"{ESCAPE}/logits", np.zeros(1))


@hostile(REFUSED, "belongs to no run")
def key_of_a_megabyte(draft: Draft) -> None:
    draft.put("x" * 1_000_000, np.zeros(1))


@hostile(CONFORMANT, "keys that name no tap")
def escape_sequences_in_a_tap(draft: Draft) -> None:
    draft.put(f"prefill/{ESCAPE}", np.zeros(1))


@hostile(CONFORMANT, "keys that name no tap")
def tap_name_of_a_megabyte(draft: Draft) -> None:
    draft.put("prefill/" + "x" * 1_000_000, np.zeros(1))


@hostile(CONFORMANT, "keys that name no tap", "and 29970 more")
def thirty_thousand_unknown_taps(draft: Draft) -> None:
    draft.tensors |= {f"prefill/{i}": ("U8", (0,), b"") for i in range(30_000)}


@hostile(REFUSED, "'runs'", "a list of at least one run")
def runs_are_a_number(draft: Draft) -> None:
    draft.header["runs"] = 4


@hostile(REFUSED, "'producer'", "an object of strings")
def producer_is_a_number(draft: Draft) -> None:
    draft.header["producer"] = {"name": 3}


@hostile(REFUSED, "metadata field 'policy'", "'int4' is unknown", "one of", "bfloat16")
def unknown_policy(draft: Draft) -> None:
    draft.header["policy"] = "int4"


@hostile(REFUSED, "metadata field 'policy'", "int8", "float16")
def policy_with_an_impossible_change(draft: Draft) -> None:
    draft.header["policy"] = "float32+cache=int8"


@hostile(REFUSED, "metadata field 'policy'", "given with --policy")
def policy_of_its_own_making(draft: Draft) -> None:
    """A policy file beside the trace that allows everything."""
    draft.path.with_name("lenient.toml").write_text(
        '[lenient]\nbase = "bfloat16"\nabout = ""\nsource = ""\nexp = {constant = 1e300, slope = 0, source = ""}\n'
    )
    draft.header["policy"] = str(draft.path.with_name("lenient.toml"))[-190:]
    draft.change(np.zeros_like)


@hostile(REFUSED, "case 'nothing' is unknown", against="")
def unknown_case(draft: Draft) -> None:
    draft.header["case"] = "nothing"


@hostile(REFUSED, "'case' is", "the name of a case was expected", against="")
def case_elsewhere(draft: Draft) -> None:
    """A forged case, with a model that fits the trace."""
    draft.header["case"] = f"../golden/{CASE}"


@hostile(REFUSED, "'case' is", "the name of a case was expected", against="")
def case_at_the_root(draft: Draft) -> None:
    draft.header["case"] = "/etc"


@hostile(REFUSED, "'case' is", "printable", against="")
def case_with_a_null_byte(draft: Draft) -> None:
    draft.header["case"] = "walking\0skeleton"


@hostile(REFUSED, "names no case, so --case NAME or --checkpoint DIR was expected", against="")
def no_case(draft: Draft) -> None:
    draft.header["case"] = None


@hostile(REFUSED, "'case' is \"dyadic\"", f'--case is "{CASE}"')
def another_case(draft: Draft) -> None:
    draft.header["case"] = "dyadic"


@hostile(REFUSED, "'checkpoint' is \"sha256:00\"", "the digest of", against=AGAINST_CHECKPOINT)
def another_checkpoint(draft: Draft) -> None:
    draft.header["checkpoint"] = "sha256:00"


# ---- runs


@hostile(REFUSED, "'runs' is []")
def no_runs(draft: Draft) -> None:
    draft.header["runs"] = []


@hostile(REFUSED, "a different name for every run")
def two_runs_of_one_name(draft: Draft) -> None:
    draft.header["runs"].append(draft.run(0))


@hostile(REFUSED, "'decode3' is not one of the case")
def unknown_run(draft: Draft) -> None:
    draft.header["runs"].append(draft.run(3) | {"run": "decode3"})


@hostile(REFUSED, "is not one of the case")
def hundred_thousand_runs(draft: Draft) -> None:
    draft.header["runs"] += [draft.run(3) | {"run": f"x{i}"} for i in range(100_000)]


@hostile(REFUSED, "'prefill' comes after 'chunk1'", "the order of the case was expected")
def runs_in_another_order(draft: Draft) -> None:
    runs = draft.header["runs"]
    runs[0], runs[1] = runs[1], runs[0]


@hostile(REFUSED, "'prefill' has tokens", "the case has", "31, 41")
def other_tokens(draft: Draft) -> None:
    draft.run(0)["tokens"][1:3] = 41, 31


@hostile(REFUSED, "'chunk1' has token 97", "from 0 to 96")
def token_outside_the_vocabulary(draft: Draft) -> None:
    draft.run(1)["tokens"][0] = 97


@hostile(REFUSED, f"has token {(1 << 63) - 1}", against=AGAINST_CHECKPOINT)
def token_of_nineteen_digits(draft: Draft) -> None:
    draft.run(1)["tokens"][0] = (1 << 63) - 1


@hostile(REFUSED, "'runs[1].tokens'", "integer from 0")
def negative_token(draft: Draft) -> None:
    draft.run(1)["tokens"][0] = -1


@hostile(REFUSED, "'prefill' has positions [1,", "the case has [0,")
def other_positions(draft: Draft) -> None:
    draft.run(0)["positions"] = [p + 1 for p in draft.run(0)["positions"]]


@hostile(REFUSED, "'decode1' has positions [25]", "[15] was expected", against=AGAINST_CHECKPOINT)
def positions_with_a_gap(draft: Draft) -> None:
    draft.run(2)["positions"] = [25]


@hostile(REFUSED, "'prefill' has position", "from 0 to 2147483647", against=AGAINST_CHECKPOINT)
def positions_without_an_angle(draft: Draft) -> None:
    for run in draft.header["runs"]:
        run["positions"] = [p + (1 << 62) for p in run["positions"]]


@hostile(REFUSED, "'decode1' has past 14", "the case has 15")
def less_past(draft: Draft) -> None:
    draft.run(2)["past"] = 14


@hostile(REFUSED, "'prefill' has past 1000000000", "at most 0", against=AGAINST_CHECKPOINT)
def past_of_a_billion(draft: Draft) -> None:
    draft.run(0)["past"] = 1_000_000_000
    draft.run(0)["positions"] = [p + 1_000_000_000 for p in draft.run(0)["positions"]]


@hostile(REFUSED, "'chunk1' has past 12", "at most 0", against=AGAINST_CHECKPOINT)
def first_run_left_out(draft: Draft) -> None:
    del draft.header["runs"][0]
    draft.tensors = {key: found for key, found in draft.tensors.items() if not key.startswith("prefill/")}


@hostile(REFUSED, "'prefill' has tokens", "the case has")
def one_token_more(draft: Draft) -> None:
    draft.run(0)["tokens"].append(3)
    draft.run(0)["positions"].append(12)


@hostile(REFUSED, "'runs[0].positions'", "as many positions as tokens")
def fewer_positions_than_tokens(draft: Draft) -> None:
    draft.run(0)["positions"].pop()


@hostile(REFUSED, "'chunk1' has sequence 1", "the case has 0")
def another_sequence(draft: Draft) -> None:
    draft.run(1)["sequence"] = 1


@hostile(REFUSED, "'chunk1' has op \"decode\"", 'the case has "chunk"')
def another_operation(draft: Draft) -> None:
    draft.run(1)["op"] = "decode"


@hostile(REFUSED, "'runs[0].op'")
def operation_is_a_list(draft: Draft) -> None:
    draft.run(0)["op"] = []


@hostile(REFUSED, "'decode2/logits' belongs to no run")
def taps_of_a_run_that_is_not_named(draft: Draft) -> None:
    draft.header["runs"].pop()
    draft.keep("decode2/logits")


# ---- which taps there are


@hostile(REFUSED, "holds no tap of this model, such as embedding or logits")
def no_taps(draft: Draft) -> None:
    draft.tensors = {}


@hostile(REFUSED, "holds no tap of this model")
def only_unknown_taps(draft: Draft) -> None:
    draft.tensors = {"prefill/hidden_states": tensor(np.zeros((12, 48)))}


@hostile(CONFORMANT, "not in the trace: embedding", "lacks")
def only_logits(draft: Draft) -> None:
    draft.keep("logits")
    draft.tensors = {key: found for key, found in draft.tensors.items() if "router" not in key}


@hostile(CONFORMANT, "not in the trace: embedding")
def only_expert_ids(draft: Draft) -> None:
    draft.keep("router.experts")


@hostile(CONFORMANT, "holds nothing of prefill, chunk1, decode1")
def only_the_last_run(draft: Draft) -> None:
    draft.keep(*(key for key in draft.tensors if key.startswith("decode2/")))


@hostile(CONFORMANT, "only in some runs or layers", "attention.q (4 of 8)")
def only_the_first_layer(draft: Draft) -> None:
    draft.tensors = {key: found for key, found in draft.tensors.items() if "layers.1." not in key}


@hostile(CONFORMANT, "attention.q (7 of 8)")
def one_tap_missing(draft: Draft) -> None:
    del draft.tensors["chunk1/layers.1.attention.q"]


@hostile(
    CONFORMANT, "keys that name no tap", "layers.99.attention_norm", "layers.-1", "layers.01", "layers.x", "prefill/"
)
def layers_that_do_not_exist(draft: Draft) -> None:
    for layer in ("99", "-1", "01", "x", "", "1e0", "0.0"):
        draft.put(f"prefill/layers.{layer}.attention_norm", np.full((12, 48), np.nan))
    for name in ("", "layers.0", "layers", "logits.0", "Logits", "layers.0.attention"):
        draft.put(f"prefill/{name}", np.zeros(3))


@hostile(REFUSED, "'prefill/layers.0/attention_norm' belongs to no run")
def slashes_in_a_tap(draft: Draft) -> None:
    draft.put("prefill/layers.0/attention_norm", np.zeros((12, 48)))


# ---- shapes and dtypes


@hostile(REFUSED, "'prefill/embedding' has shape [48, 12]", "[12, 48] was expected")
def transposed(draft: Draft) -> None:
    draft.put("prefill/embedding", draft.array("prefill/embedding").T)


@hostile(REFUSED, "'prefill/logits' has shape [1, 12, 97]", "[12, 97] was expected")
def batch_of_one(draft: Draft) -> None:
    draft.put("prefill/logits", draft.array("prefill/logits")[None])


@hostile(CONFORMANT, "positions")
def logits_of_the_last_token_only(draft: Draft) -> None:
    draft.put("prefill/logits", draft.array("prefill/logits")[-1:])


@hostile(REFUSED, "'prefill/logits' has shape [2, 97]", "12 tokens")
def logits_of_the_last_two_tokens(draft: Draft) -> None:
    draft.put("prefill/logits", draft.array("prefill/logits")[-2:])


@hostile(WRONG, "prefill[11:12]")
def logits_of_the_first_token_only(draft: Draft) -> None:
    draft.put("prefill/logits", draft.array("prefill/logits")[:1])


@hostile(REFUSED, "has shape [13, 48]", "[12, 48] was expected")
def padding_left_in(draft: Draft) -> None:
    draft.put("prefill/embedding", np.zeros((13, 48)))


@hostile(REFUSED, "has shape [6, 3, 3]", "[6, 3, 15] was expected")
def scores_without_the_cache(draft: Draft) -> None:
    draft.put("chunk1/layers.0.attention.scores", draft.array("chunk1/layers.0.attention.scores")[:, :, 12:])


@hostile(REFUSED, "has shape [0, 48]")
def no_elements(draft: Draft) -> None:
    draft.put("prefill/embedding", np.zeros((0, 48)))


@hostile(REFUSED, "has shape []")
def scalar(draft: Draft) -> None:
    draft.tensors["prefill/embedding"] = ("F64", (), b"\0" * 8)


@hostile(REFUSED, "has shape [1, 1, 1", "characters")
def hundred_thousand_dimensions(draft: Draft) -> None:
    draft.tensors["prefill/embedding"] = ("F64", (1,) * 100_000, b"\0" * 8)


@hostile(REFUSED, "'prefill/embedding' has dtype I8", "one of F64, F32, F16, BF16 was expected")
def quantised(draft: Draft) -> None:
    draft.put("prefill/embedding", np.zeros((12, 48), np.int8))


@hostile(REFUSED, "has dtype BOOL")
def booleans(draft: Draft) -> None:
    draft.put("prefill/embedding", np.zeros((12, 48), np.bool_))


@hostile(REFUSED, "has dtype F8_E4M3")
def eight_bit_floats(draft: Draft) -> None:
    draft.tensors["prefill/embedding"] = ("F8_E4M3", (12, 48), b"\0" * 12 * 48)


@hostile(REFUSED, "has dtype C64")
def complex_numbers(draft: Draft) -> None:
    draft.tensors["prefill/embedding"] = ("C64", (12, 48), b"\0" * 12 * 48 * 8)


@hostile(REFUSED, "router.experts' has dtype F64", "integers were expected")
def expert_ids_as_floats(draft: Draft) -> None:
    key = "prefill/layers.0.router.experts"
    draft.put(key, draft.array(key).astype(np.float64))


@hostile(REFUSED, "router.experts' has dtype BOOL", "integers were expected")
def expert_ids_as_booleans(draft: Draft) -> None:
    draft.put("prefill/layers.0.router.experts", np.ones((12, 2), np.bool_))


def recast_experts(draft: Draft, dtype: Any) -> None:
    for key in draft.tensors:
        if key.endswith("router.experts"):
            draft.put(key, draft.array(key).astype(dtype))


@hostile(CONFORMANT)
def expert_ids_in_32_bits(draft: Draft) -> None:
    recast_experts(draft, np.int32)


@hostile(CONFORMANT)
def expert_ids_without_sign(draft: Draft) -> None:
    recast_experts(draft, np.uint64)


@hostile(CONFORMANT)
def expert_ids_in_a_byte(draft: Draft) -> None:
    recast_experts(draft, np.uint8)


# ---- routing


def set_experts(draft: Draft, *ids: int, dtype: Any = np.int64) -> None:
    key = "prefill/layers.0.router.experts"
    array = draft.array(key).astype(dtype)
    array[5] = ids
    draft.put(key, array)


@hostile(WRONG, "first wrong step: layers.0.router.experts, run prefill", "from 0 to 4: token 5 has [0, 5]")
def expert_that_does_not_exist(draft: Draft) -> None:
    set_experts(draft, 0, 5)


@hostile(WRONG, "token 5 has [0, -1]")
def negative_expert(draft: Draft) -> None:
    set_experts(draft, 0, -1)


@hostile(WRONG, "token 5 has")
def expert_that_overflows(draft: Draft) -> None:
    set_experts(draft, 0, (1 << 64) - 1, dtype=np.uint64)


@hostile(WRONG, "token 5 has [-9223372036854775808, 9223372036854775807]")
def experts_at_both_ends(draft: Draft) -> None:
    set_experts(draft, -(1 << 63), (1 << 63) - 1)


@hostile(WRONG, "token 5 has [3, 3]")
def one_expert_twice(draft: Draft) -> None:
    set_experts(draft, 3, 3)


@hostile(WRONG, "first wrong step: layers.0.router.experts, run prefill", "decisions are illegal")
def other_experts(draft: Draft) -> None:
    key = "prefill/layers.0.router.experts"
    draft.put(key, (draft.array(key) + 1) % 5)


@hostile(CONFORMANT)
def slots_in_another_order(draft: Draft) -> None:
    """The order of slots is the engine's own: all later taps follow the order of the ids."""
    for key in draft.tensors:
        if key.endswith(("router.experts", "router.weights")) or ".expert." in key:
            draft.put(key, draft.array(key)[:, ::-1])


# ---- values


@hostile(WRONG, "first wrong step: embedding, run prefill", "not finite")
def all_nan(draft: Draft) -> None:
    draft.change(lambda x: np.full_like(x, np.nan))


@hostile(WRONG, "first wrong step: layers.1.expert.up", "token 2", "hidden unit 7")
def one_nan(draft: Draft) -> None:
    key = "chunk1/layers.1.expert.up"
    array = draft.array(key)
    array[2, 1, 7] = np.nan
    draft.put(key, array)


@hostile(WRONG, "first wrong step: logits", "1 of 97 values")
def one_infinity(draft: Draft) -> None:
    array = draft.array("decode2/logits")
    array[0, 96] = np.inf
    draft.put("decode2/logits", array)


@hostile(WRONG, "first wrong step: embedding, run prefill")
def all_infinite(draft: Draft) -> None:
    draft.change(lambda x: np.full_like(x, -np.inf))


@hostile(WRONG, "first wrong step: logits, run prefill", "not finite", arithmetic="bfloat16")
def nan_logits_alone(draft: Draft) -> None:
    """Values without a bound, because rounding can decide the choice of experts, still may not be NaN."""
    draft.keep("logits")
    draft.tensors = {key: found for key, found in draft.tensors.items() if "router" not in key}
    draft.change(lambda x: np.full_like(x, np.nan))


@hostile(WRONG, "first wrong step: logits, run prefill", arithmetic="bfloat16")
def zero_logits_behind_a_right_embedding(draft: Draft) -> None:
    """One wrong value fails, however many values are right."""
    draft.tensors = {
        key: found for key, found in draft.tensors.items() if "layers.1" not in key and "router" not in key
    }
    draft.change(np.zeros_like, "logits")


@hostile(WRONG, "first wrong step: embedding, run prefill")
def subnormal(draft: Draft) -> None:
    draft.header["policy"] = "float32"
    draft.change(lambda x: np.full_like(x, 5e-324))


@hostile(WRONG, "first wrong step: embedding, run prefill")
def largest_float(draft: Draft) -> None:
    draft.change(lambda x: np.full_like(x, np.finfo(x.dtype).max))


@hostile(WRONG, "first wrong step: embedding, run prefill", arithmetic="float32")
def largest_float32_of_either_sign(draft: Draft) -> None:
    draft.change(lambda x: np.where(np.arange(x.size).reshape(x.shape) % 2, 1, -1) * np.finfo(x.dtype).max)


@hostile(WRONG, "first wrong step: embedding, run prefill")
def all_zero(draft: Draft) -> None:
    draft.change(np.zeros_like)


@hostile(WRONG, "first wrong step: embedding, run prefill", arithmetic="bfloat16")
def all_zero_in_bfloat16(draft: Draft) -> None:
    draft.change(np.zeros_like)


@hostile(WRONG, "first wrong step: embedding, run prefill")
def bytes_of_the_other_endianness(draft: Draft) -> None:
    draft.header["policy"] = "float32"
    draft.change(lambda x: x.byteswap())


@hostile(CONFORMANT)
def minus_zero_for_zero(draft: Draft) -> None:
    draft.change(lambda x: np.where(x == 0, -0.0, x))


@hostile(CONFORMANT)
def nan_where_scores_are_masked(draft: Draft) -> None:
    fill_masked(draft, "scores", np.nan)


@hostile(CONFORMANT)
def minus_infinity_where_scores_are_masked(draft: Draft) -> None:
    fill_masked(draft, "scores", -np.inf)


@hostile(CONFORMANT, arithmetic="bfloat16")
def smallest_bfloat16_where_scores_are_masked(draft: Draft) -> None:
    fill_masked(draft, "scores", float(ml_dtypes.finfo(ml_dtypes.bfloat16).min))


@hostile(WRONG, "attention.probs")
def probs_where_keys_are_masked(draft: Draft) -> None:
    fill_masked(draft, "probs", 1e-3)


@hostile(WRONG, "attention.probs")
def nan_probs_where_keys_are_masked(draft: Draft) -> None:
    fill_masked(draft, "probs", np.nan)


def fill_masked(draft: Draft, step: str, value: float) -> None:
    for key in draft.tensors:
        if key.endswith(f"attention.{step}"):
            array = draft.array(key)
            tokens, cached = array.shape[1:]
            later = np.arange(cached)[None, :] > np.arange(tokens)[:, None] + cached - tokens
            array[np.broadcast_to(later, array.shape)] = value
            draft.put(key, array)


@hostile(WRONG, "first wrong step: layers.1.attention.scores", "head 5, cached position 0")
def minus_infinity_at_a_visible_score(draft: Draft) -> None:
    set_score(draft, -np.inf)


@hostile(WRONG, "first wrong step: layers.1.attention.scores", "head 5, cached position 0")
def nan_at_a_visible_score(draft: Draft) -> None:
    set_score(draft, np.nan)


def set_score(draft: Draft, value: float) -> None:
    key = "decode1/layers.1.attention.scores"
    array = draft.array(key)
    array[5, 0, 0] = value
    draft.put(key, array)


@hostile(WRONG, "attention.probs", arithmetic="float32")
def probs_that_sum_to_more_than_one(draft: Draft) -> None:
    draft.change(lambda x: (x * 1.01).astype(x.dtype), "attention.probs")


@hostile(WRONG, "first wrong step: logits, run prefill", arithmetic="bfloat16")
def logits_with_a_temperature(draft: Draft) -> None:
    draft.change(lambda x: (x.astype(np.float32) / 1.1).astype(x.dtype), "/logits")


@hostile(WRONG, arithmetic="float32")
def off_by_one_part_in_ten_thousand(draft: Draft) -> None:
    draft.change(lambda x: (x * np.float32(1.0001)).astype(x.dtype), "/logits")


# ---- dtypes that differ from the policy


@hostile(CONFORMANT, "policy bfloat16")
def exact_values_declared_bfloat16(draft: Draft) -> None:
    """More precision is always legal."""
    draft.header["policy"] = "bfloat16"


@hostile(CONFORMANT, "policy bfloat16", arithmetic="bfloat16")
def bfloat16_values_in_float64(draft: Draft) -> None:
    draft.change(lambda x: x.astype(np.float64))


@hostile(CONFORMANT, "policy float64")
def exact_declared_float64(draft: Draft) -> None:
    draft.header["policy"] = "float64"


@hostile(WRONG, "policy float32", arithmetic="bfloat16")
def bfloat16_declared_float32(draft: Draft) -> None:
    draft.header["policy"] = "float32"


@hostile(WRONG, "policy float64", arithmetic="float32")
def float32_declared_exact(draft: Draft) -> None:
    draft.header["policy"] = "exact"


@hostile(WRONG, "policy float32", arithmetic="bfloat16")
def bfloat16_in_float32_declared_float32(draft: Draft) -> None:
    """The dump of an engine that computes in bfloat16 and converts its dump."""
    draft.header["policy"] = "float32"
    draft.change(lambda x: x.astype(np.float32))


@hostile(WRONG, "first wrong step: layers.0.attention.probs", arithmetic="float16")
def float16_declared_bfloat16(draft: Draft) -> None:
    """float16 has finer values, but small probabilities that bfloat16 holds become zero in it."""
    draft.header["policy"] = "bfloat16"


@hostile(WRONG, "policy float16", arithmetic="bfloat16")
def bfloat16_declared_float16(draft: Draft) -> None:
    draft.header["policy"] = "float16"


# ---- size


@hostile(CONFORMANT, "keys that name no tap")
def ten_gigabytes_of_something_else(draft: Draft) -> None:
    """A sparse file: it takes a few kilobytes of disk, and is never read."""
    table = json.loads(draft.text())
    size = len(draft.data())
    table["prefill/padding"] = {"dtype": "U8", "shape": [10 << 30], "data_offsets": [size, size + (10 << 30)]}
    draft.path.write_bytes(file(json.dumps(table), draft.data()))
    os.truncate(draft.path, draft.path.stat().st_size + (10 << 30))
