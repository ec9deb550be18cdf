# SPDX-License-Identifier: Apache-2.0
"""Write `golden/vectors/`: `python -m tests.vectors.generate`, by hand. Needs the extra `test`.

Nothing here uses refmoe: the tokenizers' values come from mistral-common, the samplers' and the losses' from
rational numbers and Arb.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.vectors import losses, sampler, tokenizer
from tests.vectors.files import FOLDER, dumps

FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "tokenizer-v1.json": partial(tokenizer.build, "v1"),
    "tokenizer-v3.json": partial(tokenizer.build, "v3"),
    "sampler.json": sampler.build,
    "losses.json": losses.build,
}


if __name__ == "__main__":
    for name, build in FILES.items():
        content = build()
        (FOLDER / name).write_text(dumps(content), encoding="ascii", newline="\n")
        print(f"{name}: {len(content['vectors'])} vectors")
