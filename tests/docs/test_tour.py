# SPDX-License-Identifier: Apache-2.0
"""The machinery that runs pages fails when a page is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tour import difference, files, marked, run_tour, steps

RIGHT = """
<!-- file: lib/two.txt -->
```text
2 apples
```

```console
$ cat lib/two.txt
2 apples
```

```python
>>> open("lib/two.txt").read()
'2 apples…'
```
"""


def test_a_page_that_is_right_passes(tmp_path: Path) -> None:
    run_tour(RIGHT, tmp_path)
    assert files(RIGHT) == {"lib/two.txt": "2 apples\n"}
    assert len(steps(RIGHT)) == 2


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("$ cat lib/two.txt", "$ cat lib/three.txt"),
        ("$ cat lib/two.txt\n2 apples", "$ cat lib/two.txt\n3 apples"),
        ("'2 apples…'", "'2 pears…'"),
    ],
)
def test_a_page_that_is_wrong_fails(right: str, wrong: str, tmp_path: Path) -> None:
    assert RIGHT.count(right) == 1
    with pytest.raises(AssertionError):
        run_tour(RIGHT.replace(right, wrong), tmp_path)


def test_a_command_that_fails_says_so(tmp_path: Path) -> None:
    run_tour("```console\n$ false\n$ echo $?\n1\n```\n", tmp_path)


def test_a_command_that_fails_and_does_not_say_so(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_tour("```console\n$ false\n```\n", tmp_path)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("129 arrays, 48,306 bytes", "129 arrays, 48,306 bytes", True),
        ("129 arrays, 48,306 bytes", "129 arrays, 48,307 bytes", False),
        ("found -0.00622, sigma 4.23e-06", "found -0.00623, sigma 4.19e-06", True),
        ("is 5896 standard deviations from", "is 5912 standard deviations from", True),
        ("a b", "a    b", True),
        ("a … d", "a b c d", True),
        ("a … d", "a b c", False),
    ],
)
def test_words_and_whole_numbers_count(shown: str, printed: str, same: bool) -> None:
    assert (difference([shown], printed) is None) == same


def test_lines_are_looked_for_in_their_order() -> None:
    assert difference(["a", "…", "c"], "a\nb\nc") is None
    assert difference(["c", "a"], "a\nb\nc") == "a"


def test_a_marked_block() -> None:
    assert marked("<!-- main -->\n```bash\nls\n```\n", "main") == "ls"
