# SPDX-License-Identifier: Apache-2.0
"""The readers of three languages: right values pass, and each planted error is found at its place."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.spec.taps import step_of
from refmoe.suite.pack.contents import FILES, Judged
from refmoe.suite.pack.legal import DTYPES, MAY, MUST, SLOTTED
from tests.pack.conftest import Known
from tests.pack.packs import EXAMPLES, LANGUAGES, Answer, Asked, ask, driver

MANTISSAS = [Fraction(2.0 ** (i / 8)) for i in range(8)]


def interval(tap: Judged, dtype: str, i: int) -> tuple[Fraction, Fraction] | None:
    """The interval of value i, in rational numbers, as PACK.md defines it; None where it is not judged."""
    place, size = DTYPES.index(dtype), int(np.prod(tap.shape))
    centre = Fraction(float(np.frombuffer(tap.data, "<f4", size)[i]))
    code = tap.data[size * (4 + place) + i]
    if code == 255:
        return None
    steps, octaves = (code - 1) % 8, tap.bases[place] + (code - 1) // 8
    radius = MANTISSAS[steps] * Fraction(2) ** octaves if code else Fraction(0)
    return centre - radius, centre + radius


def centres(tap: Judged) -> Any:
    """The centres of a tap, float32 [n]."""
    return np.frombuffer(tap.data, "<f4", int(np.prod(tap.shape)))


def beyond(end: Fraction, upwards: bool) -> Any:
    """The first float32 outside an end."""
    value = np.float32(float(end))
    while (Fraction(float(value)) <= end) if upwards else (Fraction(float(value)) >= end):
        value = np.nextafter(value, np.float32(np.inf if upwards else -np.inf))
    return value


def planted(known: Known) -> Iterator[tuple[Asked, str, int, int]]:
    """Values of taps, with the status, the number of wrong values and the first one's index that are right."""
    drawn = np.random.default_rng(7)
    for (run, tap), each in known.taps.items():
        if not each.bases:
            continue
        for dtype in DTYPES:
            right = centres(each)
            yield Asked(run, tap, dtype, right), "pass", 0, 0
            yield Asked(run, tap, dtype, right[:-1]), "length", 0, 0
            inside = [i for i in range(len(right)) if interval(each, dtype, i) is not None]
            if not inside:
                yield Asked(run, tap, dtype, np.full_like(right, np.nan)), "pass", 0, 0
                continue
            first, last = sorted(int(i) for i in drawn.choice(inside, 2))
            for upwards in (False, True):
                low, high = interval(each, dtype, first) or (Fraction(0), Fraction(0))
                wrong = right.copy()
                wrong[first] = beyond(high if upwards else low, upwards)
                yield Asked(run, tap, dtype, wrong), "outside", 1, first
                wrong = wrong.copy()
                wrong[last] = np.nan
                yield Asked(run, tap, dtype, wrong), "outside", 2 - (first == last), first
            infinite = right.copy()
            infinite[last] = np.inf
            yield Asked(run, tap, dtype, infinite), "outside", 1, last


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_planted_error_is_found_at_its_place(language: str, known: Known, tmp_path: Path) -> None:
    """The interval that a reader gives is the one of rational arithmetic, rounded once."""
    expected = [*planted(known)]
    answers = ask(driver(language, tmp_path), known.folder, [asked for asked, *_ in expected], tmp_path)
    assert len(answers) == len(expected) > 500
    for (asked, status, outside, index), answer in zip(expected, answers, strict=True):
        assert (answer.status, answer.outside) == (status, outside), asked
        if status == "outside":
            found = interval(known.taps[asked.run, asked.tap], asked.dtype, index)
            assert found is not None
            assert answer.index == index
            assert np.array_equal(answer.found, asked.values[index], equal_nan=True)
            assert (answer.low, answer.high) == (float(found[0]), float(found[1]))
        if status == "length":
            assert answer.judged == len(asked.values) + 1


def shuffled_slots(known: Known) -> Iterator[tuple[Asked, Asked]]:
    """Values of taps with slots in an order of an engine's own, and the same in ascending order."""
    drawn = np.random.default_rng(8)
    for (run, tap), each in known.taps.items():
        if step_of(tap) in SLOTTED:
            tokens, k, *rest = each.shape
            values = centres(each).reshape(tokens, k, *rest).copy()
            values[-1, 0] += 1  # wrong, where it is judged
            ids = np.stack([drawn.permutation(8)[:k] for _ in range(tokens)])
            order = np.argsort(ids, axis=1)
            own = np.empty_like(values)
            for t in range(tokens):
                own[t, order[t]] = values[t]
            yield Asked(run, tap, "float32", own, ids), Asked(run, tap, "float32", values)


@pytest.mark.parametrize("language", LANGUAGES)
def test_slots_follow_the_ids_of_the_engine(language: str, known: Known, tmp_path: Path) -> None:
    pairs = [*shuffled_slots(known)]
    command = driver(language, tmp_path)
    own = ask(command, known.folder, [one for one, _ in pairs], tmp_path)
    ascending = ask(command, known.folder, [other for _, other in pairs], tmp_path)
    assert any(answer.outside for answer in own)
    assert [(a.judged, a.outside) for a in own] == [(a.judged, a.outside) for a in ascending]
    for (asked, _), answer in zip(pairs, own, strict=True):
        if answer.outside:
            assert asked.values.reshape(-1)[answer.index] == np.float32(answer.found)


def choices(known: Known) -> Iterator[tuple[Asked, str, int, tuple[float, float]]]:
    """Choices of experts: right ones, and one of each wrong kind, with the found id and the missing one."""
    k = known.case.config.experts_per_token
    for (run, tap), each in known.taps.items():
        if each.bases:
            continue
        for dtype in DTYPES:
            states = known.legal[dtype].experts[run, tap]
            right = np.stack([np.argsort(-row.astype(int), kind="stable")[:k] for row in states]).astype("<i4")
            yield Asked(run, tap, dtype, right[:, ::-1]), "pass", 0, (np.nan, np.nan)
            yield Asked(run, tap, dtype, right.reshape(-1)[1:]), "length", 0, (np.nan, np.nan)
            forced = [t for t, row in enumerate(states) if (row != MAY).all()]
            if not forced:
                continue
            t = forced[0]
            refused = next(e for e in range(len(states[t])) if states[t][e] not in (MAY, MUST))
            for bad in (refused, -1, len(states[t]), int(right[t, 0])):
                wrong = right.copy()
                wrong[t, 1] = bad
                yield Asked(run, tap, dtype, wrong), "outside", t * k + 1, (bad, float(right[t, 1]))


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_wrong_choice_is_found(language: str, known: Known, tmp_path: Path) -> None:
    """A refused expert, ids out of range, and one expert twice."""
    expected = [*choices(known)]
    answers = ask(driver(language, tmp_path), known.folder, [asked for asked, *_ in expected], tmp_path)
    assert sum(status == "outside" for _, status, *_ in expected) > 8
    for (asked, status, index, (found, missing)), answer in zip(expected, answers, strict=True):
        assert answer.status == status, asked
        if status == "outside":
            assert (answer.outside, answer.index, answer.found) == (1, index, found)
            assert answer.low == answer.high == missing


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_pack_does_not_have_is_no_failure(language: str, known: Known, tmp_path: Path) -> None:
    values = np.zeros(4, np.float32)
    asked = [Asked("prefill", "layers.9.residual", "float32", values), Asked("decode99", "logits", "float32", values)]
    answers = ask(driver(language, tmp_path), known.folder, asked, tmp_path)
    assert answers == [Answer("absent", 0, 0, 0, np.nan, np.nan, np.nan)] * 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_values_that_are_cut_off_are_broken(language: str, known: Known, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    shutil.copytree(known.folder, folder)
    content = (folder / "values.bin").read_bytes()
    (folder / "values.bin").write_bytes(content[:-8])
    (run, tap), last = [*known.taps.items()][-1]
    answers = ask(driver(language, tmp_path), folder, [Asked(run, tap, "float32", centres(last))], tmp_path)
    assert [answer.status for answer in answers] == ["broken"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_missing_or_foreign_file_is_one_sentence(language: str, known: Known, tmp_path: Path) -> None:
    command = driver(language, tmp_path)
    for name in FILES:
        whole = (known.folder / name).read_bytes()
        other = whole.replace(b'"format":"1"', b'"format":"2"')
        for content in (None, b"{}", b"[1", other)[: (4 if other != whole else 3) if name.endswith("json") else 1]:
            folder = tmp_path / "case"
            shutil.copytree(known.folder, folder)
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            done = subprocess.run([*command, str(folder)], input="", capture_output=True, text=True, check=False)
            assert done.returncode == 2, (name, content, done.stdout, done.stderr)
            assert len(done.stdout.strip().splitlines()) == 1
            shutil.rmtree(folder)


def test_the_header_is_short_and_alone() -> None:
    lines = (EXAMPLES / "refmoe_pack.h").read_text().splitlines()
    assert len(lines) < 300
    assert {line.split("<")[1] for line in lines if line.startswith("#include")} == {
        "math.h>", "stdint.h>", "stdio.h>", "stdlib.h>", "string.h>",
    }  # fmt: skip
