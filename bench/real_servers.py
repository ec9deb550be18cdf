# SPDX-License-Identifier: Apache-2.0
"""Known bugs behind real servers: each is planted, served, judged over HTTP, and compared with the table of servers.

    python -m bench.real_servers                             # half an hour; needs xllamacpp and transformers[serving]
    python -m bench.real_servers --server llama.cpp --bug rope-theta-default

Behind `transformers serve` a bug is a patch of its code. Behind llama-server it is the file of a wrong converter.
Writes ``bench/results/real_servers.json``: per server and bug the verdict, whether tokens alone show it, and whether it
changes any answer. With ``--server`` or ``--bug`` the others keep what was measured before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import Any

from refmoe.engines.server.interview import GENERATED, PROMPT, Said
from refmoe.engines.server.verdict import Verdict
from refmoe.files.atomic import replacing
from refmoe.verifier.findings import NOT_CONFORMANT
from tests.engines.server import planted
from tests.engines.server.planted import HEALTHY

RESULTS = Path(__file__).parent / "results" / "real_servers.json"
Judge = Callable[[str], Verdict]
"""From a bug to the verdict on a server with it."""


def free_port() -> int:
    """A port on which nothing listens."""
    with socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextmanager
def llama(folder: Path) -> Iterator[Judge]:
    """llama-server, a process for each bug."""
    yield lambda bug: planted.judged_file(bug, folder / bug, free_port())


@contextmanager
def transformers(folder: Path) -> Iterator[Judge]:
    """`transformers serve`, one process for all bugs."""
    planted.write_models(folder / "models")
    with planted.transformers(folder / "models", free_port()) as address:
        yield partial(planted.judged_by_name, address, folder / "models")


SERVERS: dict[str, tuple[str, Any, Callable[[], Sequence[str]]]] = {
    "llama.cpp": ("xllamacpp", llama, planted.wrong_files),
    "transformers": ("transformers", transformers, lambda: [*planted.patches()]),
}
"""Per server its package, the server with bugs, and the bugs."""


def facts(found: Verdict, healthy: Verdict) -> dict[str, Any]:
    """The verdict, whether tokens alone show that the server is wrong, and whether the bug changes any answer."""
    return {
        "verdict": found.verdict, "level": found.level, "by tokens": bool(found.judgement.wrong),
        "changes": found.verdict == NOT_CONFORMANT or main_answers(found) != main_answers(healthy),
    }  # fmt: skip


def main_answers(found: Verdict) -> list[Said]:
    """The answers to the main questions, which are asked one after another."""
    return [each for each in found.answers.said if each.way in (PROMPT, GENERATED)]


def main() -> None:
    """Measure, and write the file after each bug anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=SERVERS, action="append", default=[], help="only this server; repeatable")
    parser.add_argument("--bug", metavar="NAME", action="append", default=[], help="only this bug; repeatable")
    arguments = parser.parse_args()
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in arguments.server or SERVERS:
        package, serving, bugs = SERVERS[name]
        order = [HEALTHY, *bugs()]
        before = found.get(name, {}).get("bugs", {})
        with TemporaryDirectory() as folder, serving(Path(folder)) as judge:
            healthy = judge(HEALTHY)
            for bug in arguments.bug or order:
                before[bug] = facts(judge(bug), healthy)
                print(name, bug, before[bug], flush=True)
                kept = {each: before[each] for each in order if each in before}
                found[name] = {"package": f"{package} {version(package)}", "bugs": kept}
                with replacing(RESULTS) as temporary:
                    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
