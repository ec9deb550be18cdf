# SPDX-License-Identifier: Apache-2.0
"""Mutations of files that keep enough of their structure to get past the first check of a reader.

Each takes the bytes of a file and a `random.Random`, and returns other bytes. The same dice give the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import struct
import tomllib
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.suite.manifest import NO_DIGEST

Mutation = Callable[[bytes, Random], bytes]

LONG = 20_000
"""Characters of a long text."""


class Raw(str):
    """Text that is written into JSON or TOML as it stands."""


class Table(list[list[Any]]):
    """The pairs of an object: names may be there twice."""


# ---- bytes


def flip(data: bytes, dice: Random) -> bytes:
    """Change some bytes, most often one."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 8, 64))):
        if changed:
            at = dice.randrange(len(changed))
            changed[at] = dice.choice((changed[at] ^ (1 << dice.randrange(8)), dice.randrange(256), 0, 255))
    return bytes(changed)


def cut(data: bytes, dice: Random) -> bytes:
    """Remove the end, the beginning, or a piece in between."""
    a, b = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    return dice.choice((data[:a], data[a:], data[:a] + data[b:], data[:-1], data[1:], b""))


def repeat(data: bytes, dice: Random) -> bytes:
    """Write a piece, or the whole, several times."""
    a, b = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    piece = data[a : min(b, a + 4096)]
    return dice.choice((data + data, data[:a] + piece * dice.choice((2, 3, 50)) + data[a:], piece * 3))


def insert(data: bytes, dice: Random) -> bytes:
    """Insert bytes that mean something to some parser."""
    at = dice.choice((0, len(data), dice.randrange(len(data) + 1)))
    pieces = (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\n", b"\r", b"\x1b[31m", b"#", b"//", b",", b"}", b"]",
    b"\\",
              b'"', b"'''", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04\x95", b"\xed\xa0\x80", bytes(1000),
              b" " * LONG)  # fmt: skip
    return data[:at] + dice.choice(pieces) + data[at:]


def splice(data: bytes, dice: Random) -> bytes:
    """Join two pieces of the file in another order."""
    a, b = (dice.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[b:]


def recoded(data: bytes, dice: Random) -> bytes:
    """Write text in another encoding, or with other ends of lines."""
    text = data.decode("utf-8", "replace")
    codes = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7", "cp037")
    other = (
        text.replace("\n", "\r\n"),
        text.replace("\n", "\r"),
        text.replace(" ", "\u00a0"),
        text.replace('"', "\u201d"),
    )
    return text.encode(dice.choice(codes)) if dice.random() < 0.6 else dice.choice(other).encode()


BYTES: tuple[Mutation, ...] = (flip, flip, cut, repeat, insert, splice)


def any_bytes(data: bytes, dice: Random) -> bytes:
    """One to three mutations of bytes."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        data = dice.choice(BYTES)(data, dice)
    return data


# ---- values in JSON and TOML

NUMBERS = (
    -1, 0, 1, 2, 3, 7, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 53, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 1, 1 << 64,
    10**9, 10**18, -(1 << 63), -(10**18), 0.5, -0.0, 1.0, 1.5, 1e-320, 5e-324, 1e200, 1e300, 1e308, -1e308, 3.5e38,
    65504.0,
)  # fmt: skip
RAW_JSON = (
    "9" * 4301, "-" + "9" * 6000, "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1" + "0" * 400,
    "0." + "0" * 400 + "1",
    "[" * 100_000, "[" * 50_000 + "]" * 50_000, '{"a":' * 20_000, "[" * 30 + "]" * 30, '"\\ud800"', '"\\u0000"', "01",
    "+1", ".5",
    "'a'", "None", "True", "undefined", "1_000", "0x10", "1979-05-27", "/* */ 1", "", '"unclosed', "\u0661", "1.",
    "--1",
)  # fmt: skip
RAW_TOML = (
    "9" * 4301, "-" + "9" * 6000, "1e999", "nan", "inf", "-inf", "+nan", "1979-05-27T07:32:00Z", "1979-05-27",
    "07:32:00",
    "1979-05-27T00:00:00.999999-23:59", "0x7fffffffffffffffffff", "0o777", "0b1", "1_000", "[" * 5_000,
    "[" * 500 + "]" * 500,
    "{a=" * 300 + "1" + "}" * 300, "[" * 30 + "]" * 30, '"\\u0000"', '"\\U0010ffff"', '"""\n\n"""', "'''a'''", "",
    "null", "1.", "+1",
    "[1, 'a', 2.0]", "{}", "[{}]", "[[]]", "{a.b = 1, a.c = 2}", "'", "1" + "0" * 400, "0." + "0" * 400 + "1",
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\x1b]0;t\x07", "\x1b[31mred", "\x9b31m", "\u202egnp", "a\nb", "a\rb", "\u2028", "\x7f", "x" * LONG,
    "\u00e9" * LONG,
    "..", "../../../etc/passwd", "/dev/zero", "/dev/stdin", "/etc/passwd", "C:\\x", "a/b", ".", "~", "\ufeff",
    "\U0010ffff",
    "float32", "bfloat16", "float64", "int64", "*", "layers.*", "layers.0.*", "{}", "%s", "%n", "[red]x[/red]",
    "<script>", "&amp;",
    "{{ 7*7 }}", "None", "nan", "1", "-1", "\u00b2", "\u0663", "prefill", "decode", "default", "linear", "silu",
    "gelu", "F32", "BF16",
    "tensor", "e\u0301", "\U0001f468\u200d\U0001f680", "a" * 300 + "/" + "b" * 300,
)  # fmt: skip


def nasty(dice: Random, raw: tuple[str, ...]) -> Any:
    """A value that readers do not like."""
    kind = dice.randrange(8)
    if kind < 3:
        return dice.choice(NUMBERS)
    if kind < 5:
        return dice.choice(TEXTS)
    if kind < 7:
        return Raw(dice.choice(raw))
    return dice.choice((
        True, False, None, [], Table(), [[]], [0] * 1000, [Table()], Table([["a", 1]]), [None], ["a", 1, None], [1.5],
        [-1], [1 << 62],
        Table([["", ""]]), [[1, 2], [3]], [True, False], Table([["type", "yarn"], ["factor", 4]]),
    ))  # fmt: skip


def tree(value: Any) -> Any:
    """A value with each object as a `Table`."""
    if isinstance(value, dict):
        return Table([name, tree(each)] for name, each in value.items())
    return [tree(each) for each in value] if isinstance(value, list) else value


def nodes(value: Any) -> list[tuple[Any, int]]:
    """Every place in a tree: the list or the table, and the index."""
    found: list[tuple[Any, int]] = []
    for i in range(len(value)) if isinstance(value, list) else ():
        found.append((value, i))
        found += nodes(value[i][1] if isinstance(value, Table) else value[i])
    return found


def edit(value: Any, dice: Random, raw: tuple[str, ...]) -> Any:
    """Change one place of a tree; the top itself in one of thirty."""
    places = nodes(value)
    if not places or dice.random() < 0.03:
        return nasty(dice, raw)
    # a long list of equal things must not get all the attention
    shallow = [place for place in places if isinstance(place[0], Table)]
    parent, i = dice.choice(shallow if shallow and dice.random() < 0.6 else places)
    what = dice.randrange(9)
    in_table = isinstance(parent, Table)
    old = parent[i][1] if in_table else parent[i]
    if what == 0:
        del parent[i]
    elif what == 1:
        parent.insert(dice.randrange(len(parent) + 1), [*parent[i]] if in_table else old)
    elif what == 2 and in_table:
        parent[i][0] = dice.choice(
            (dice.choice(TEXTS), parent[i][0] + "s", parent[i][0].upper(), dice.choice(parent)[0])
        )
    elif what == 3 and in_table:
        parent.append([dice.choice((dice.choice(TEXTS), "extra", parent[i][0] + "_")), nasty(dice, raw)])
    elif what == 4:
        other = dice.choice(parent)
        _put(parent, i, other[1] if in_table else other)
    elif what == 5 and isinstance(old, int | float) and not isinstance(old, bool):
        near = (old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old), old / 2, bool(old), [old])
        _put(parent, i, dice.choice(near))
    elif what == 5 and isinstance(old, str) and not isinstance(old, Raw):
        _put(
            parent,
            i,
            dice.choice(
                (old + "x", old[:-1], old.upper(), old[::-1], old + "\0", old * 2, [old], old.replace("0", "1"))
            ),
        )
    elif what == 6 and isinstance(old, list):
        _put(
            parent,
            i,
            dice.choice((old[:1], old[1:], old + old, old[::-1], [old]))
            if not isinstance(old, Table)
            else Table(old[1:]),
        )
    else:
        _put(parent, i, nasty(dice, raw))
    return value


def _put(parent: Any, i: int, value: Any) -> None:
    if isinstance(parent, Table):
        parent[i] = [parent[i][0], value]
    else:
        parent[i] = value


def json_text(value: Any) -> str:
    """A tree as JSON."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Table):
        return "{" + ", ".join(f"{json.dumps(name)}: {json_text(each)}" for name, each in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value)


def toml_text(value: Any) -> str:
    """A tree as TOML: a line for each name, and all below it inline."""
    if not isinstance(value, Table):
        return f"value = {_inline(value)}\n"
    return "".join(f"{json.dumps(name)} = {_inline(each)}\n" for name, each in value)


def _inline(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Table):
        return "{" + ", ".join(f"{json.dumps(name)} = {_inline(each)}" for name, each in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return '""' if value is None else json.dumps(value)


def json_edits(data: bytes, dice: Random) -> bytes:
    """Edit JSON in one to four places, or as bytes."""
    chance = dice.random()
    if chance < 0.15:
        return any_bytes(data, dice)
    if chance < 0.2:
        return recoded(data, dice)
    value = tree(json.loads(data))
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        value = edit(value, dice, RAW_JSON)
    return json_text(value).encode("utf-8", "surrogatepass")


def toml_edits(data: bytes, dice: Random) -> bytes:
    """Edit TOML in one to four places, or as bytes."""
    chance = dice.random()
    if chance < 0.15:
        return any_bytes(data, dice)
    if chance < 0.2:
        return recoded(data, dice)
    value = tree(tomllib.loads(data.decode()))
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        value = edit(value, dice, RAW_TOML)
    return toml_text(value).encode("utf-8", "surrogatepass")


def signed(data: bytes) -> bytes:
    """A manifest with its digest made right again."""
    own = re.search(rb'"digest": "([0-9a-f]{64})"', data)
    if own is None:
        return data
    right = hashlib.sha256(data.replace(own[1], NO_DIGEST.encode())).hexdigest()
    return data.replace(own[1], right.encode())


def manifest_edits(data: bytes, dice: Random) -> bytes:
    """Edit a manifest, and in nine of ten make its digest right."""
    changed = json_edits(data, dice)
    return signed(changed) if dice.random() < 0.9 else changed


# ---- safetensors and .npy

SPECIAL = (
    1e200, 1e300, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 5e-324, 1e-310, 1.4e-45, 3.4e38,
    65504.0, 1e38,
    -1.0, 1e-30, 1.7976931348623157e308,
)  # fmt: skip
DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "BOOL": np.bool_,
    "U8": np.uint8,
}  # fmt: skip


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytearray]:
    """The header of a safetensors file, and the bytes after it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])


def put_together(header: bytes, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file.   length: of the header, if another than the right one is to be written"""
    header += b" " * (-len(header) % 8)
    return (len(header) if length is None else length).to_bytes(8, "little", signed=False) + header + body


def safetensors_edits(data: bytes, dice: Random) -> bytes:
    """Edit the header, the values or the bytes of a safetensors file."""
    kind = dice.randrange(10)
    if kind == 0:
        return any_bytes(data, dice)
    if kind < 6:
        return values_edited(data, dice)
    header, body = taken_apart(data)
    if kind == 6:
        lengths = (
            0,
            1,
            len(data),
            len(data) - 8,
            1 << 20,
            (1 << 31) - 1,
            1 << 40,
            (1 << 63) - 1,
            1 << 63,
            (1 << 64) - 1,
            100_000_001,
        )
        return put_together(json.dumps(header).encode(), body, dice.choice(lengths))
    names = [name for name in header if name != "__metadata__"]
    if kind == 7 and names:
        _header_edit(header, dice.choice(names), names, len(body), dice)
        return put_together(
            json.dumps(header).encode(), bytes(body[: dice.choice((len(body), len(body), len(body) // 2))])
        )
    value = tree(header)
    for _ in range(dice.choice((1, 1, 2))):
        value = edit(value, dice, RAW_JSON)
    return put_together(json_text(value).encode("utf-8", "surrogatepass"), body)


def _header_edit(header: dict[str, Any], name: str, names: list[str], size: int, dice: Random) -> None:
    entry, other = header[name], header[dice.choice(names)]
    a, b = entry["data_offsets"]
    what = dice.randrange(8)
    if what == 0:
        entry["dtype"] = dice.choice([*DTYPES, "F8_E4M3", "F8_E5M2", "U64", "C64", "F4", "", "f32", "O"])
    elif what == 1:
        entry["shape"] = dice.choice((
            entry["shape"][::-1], [], [0], [*entry["shape"], 1], [1, *entry["shape"]], [-1], [1 << 62, 4], [1] * 40,
            [0, 1 << 40],
            [len(entry["shape"]) + 1],
        ))  # fmt: skip
    elif what == 2:
        entry["data_offsets"] = dice.choice(
            ([0, 0], [b, a], [a, b + 1], [a - 4, b - 4], [0, size], [a, 1 << 62], [-1, b], other["data_offsets"])
        )
    elif what == 3:
        header[
            dice.choice((name + "x", "prefill/layers.99.moe.output", "x/logits", "", "/", "__metadata__ ", "a/b/c/d"))
        ] = header.pop(name)
    elif what == 4:
        del header[name]
    elif what == 5:
        header[name], header[dice.choice(names)] = other, entry
    elif what == 6:
        header["extra" * dice.choice((1, 1, 4000))] = entry
    else:
        header["__metadata__"] = dice.choice(
            ({}, {"refmoe": ""}, {"refmoe": "{}"}, {"refmoe": "[" * 9999}, {"a": "b" * LONG}, {"format": "pt"})
        )


def values_edited(data: bytes, dice: Random) -> bytes:
    """Put special values into one tensor, some tensors or all of a safetensors file."""
    header, body = taken_apart(data)
    names = [name for name in header if name != "__metadata__" and header[name]["dtype"] in DTYPES]
    some = (
        dice.choice(
            (names[:1], [dice.choice(names)], [dice.choice(names)], names, dice.sample(names, min(3, len(names))))
        )
        if names
        else []
    )
    value = dice.choice(SPECIAL)
    whole, sign = dice.random() < 0.3, dice.random() < 0.3
    for name in some:
        a, b = header[name]["data_offsets"]
        dtype = np.dtype(DTYPES[header[name]["dtype"]])
        values = np.frombuffer(body, dtype, (b - a) // dtype.itemsize, a).copy()
        if not len(values):
            continue
        with np.errstate(all="ignore"):
            if dtype.kind in "iub":
                values[dice.randrange(len(values))] = dice.choice(
                    (0, 1, 2 if dtype.kind != "b" else 0, np.iinfo(dtype).max if dtype.kind != "b" else 1)
                )
            elif whole:
                values[:] = (
                    np.where(np.arange(len(values)) % 2, -value, value).astype(dtype)
                    if sign
                    else np.asarray(value).astype(dtype)
                )
            else:
                values[dice.randrange(len(values))] = np.asarray(value).astype(dtype)
        body[a:b] = values.tobytes()
    return put_together(json.dumps(header).encode(), bytes(body))


def widened(data: bytes, dice: Random) -> bytes:
    """All tensors of a safetensors file in float64, so that values beyond float32 fit, and then edited."""
    header, body = taken_apart(data)
    out, wide = bytearray(), {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in ("F32", "F64", "F16", "BF16"):
            continue
        a, b = entry["data_offsets"]
        values = np.frombuffer(
            body, DTYPES[entry["dtype"]], offset=a, count=(b - a) // np.dtype(DTYPES[entry["dtype"]]).itemsize
        )
        start = len(out)
        out += values.astype(np.float64).tobytes()
        wide[name] = {"dtype": "F64", "shape": entry["shape"], "data_offsets": [start, len(out)]}
    for name, entry in header.items():
        if name != "__metadata__" and name not in wide:
            a, b = entry["data_offsets"]
            wide[name] = {**entry, "data_offsets": [len(out), len(out) + b - a]}
            out += body[a:b]
    if "__metadata__" in header:
        wide["__metadata__"] = header["__metadata__"]
    return values_edited(put_together(json.dumps(wide).encode(), bytes(out)), dice)


def trace_edits(data: bytes, dice: Random) -> bytes:
    """Edit a trace: half of all with special values."""
    return widened(data, dice) if dice.random() < 0.4 else safetensors_edits(data, dice)


HEADERS = (
    "(" * 3000, "{" * 3000, "-" * 5000 + "1", "", "{}", "None", "\0",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (-6, 4), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (True, 4), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (9223372036854775808,), }",
    "{'descr': '<f8', 'fortran_order': 3, 'shape': 3, }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
    "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (3,)}",
    "{'descr': '<c16', 'fortran_order': False, 'shape': (3, 1), }",
    "{'descr': '<U9', 'fortran_order': False, 'shape': (3, 1), }",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (3, 2), }",
    "{'descr': '>f8', 'fortran_order': True, 'shape': (0, 0), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': " + "(" * 200 + ")" * 200 + "}",
    "{'descr': '" + "<f8," * 4000 + "', 'fortran_order': False, 'shape': ()}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "1," * 70 + ")}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}",
    "__import__('os').abort()", "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (1, 3), }",
)  # fmt: skip


def npy_edits(data: bytes, dice: Random) -> bytes:
    """Edit the header, the values or the bytes of a .npy file."""
    kind = dice.randrange(4)
    if kind == 0:
        return any_bytes(data, dice)
    length = struct.unpack("<H", data[8:10])[0]
    header, body = data[10 : 10 + length], data[10 + length :]
    if kind == 1:
        return _npy(dice.choice(HEADERS).encode(), body, dice)
    if kind == 2:
        return _npy(any_bytes(header, dice)[:60_000], body, dice)
    fields = ast.literal_eval(header.decode())
    values = np.frombuffer(body, fields["descr"]).copy()
    with np.errstate(all="ignore"):
        values[: dice.choice((1, len(values)))] = dice.choice(SPECIAL)
    return _npy(header, values.tobytes()[: dice.choice((len(body), len(body), len(body) // 2))], dice)


def _npy(header: bytes, body: bytes, dice: Random) -> bytes:
    version = dice.choice((1, 1, 1, 2, 3, 0, 4, 255))
    size = struct.pack("<H", len(header)) if version == 1 else struct.pack("<I", len(header))
    return b"\x93NUMPY" + bytes([version, dice.choice((0, 0, 0, 1))]) + size + header + body


def zip_edits(data: bytes, dice: Random) -> bytes:
    """Edit a member of a .npz or .pt file, or its bytes."""
    if dice.random() < 0.3:
        return any_bytes(data, dice)
    members = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = dice.choice([*members])
    what = dice.randrange(6)
    if what == 0:
        del members[name]
    elif what == 1:
        members[
            dice.choice(("../../x.npy", "/etc/x", "a" * 300 + ".npy", "\x1b[31m.npy", "x", name + ".npy", "logits.npy"))
        ] = members.pop(name)
    elif what < 5 and members[name].startswith(b"\x93NUMPY"):
        members[name] = npy_edits(members[name], dice)
    else:
        members[name] = any_bytes(members[name], dice)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for each, content in members.items():
            archive.writestr(zipfile.ZipInfo(each), content)
    return out.getvalue()
