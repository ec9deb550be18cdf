# SPDX-License-Identifier: Apache-2.0
"""A harness that returns stored goldens, and misbehaves once: ``python hostile_engine.py``, settings in a variable.

`hostile_engines` runs it. Each behaviour below is a function of the situation `Now`. Its decorator states the verdicts
that it may get in the case in which it acts. It needs no refmoe, and NumPy only to change values, so that it starts
quickly: an honest answer is a copy of the golden trace.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SETTINGS = "REFMOE_HOSTILE"
"""The variable with the settings, as JSON: the fields of `Now` that are no result of the conversation."""
CONFORMANT, WRONG, UNJUDGED, SKIPPED = "conformant", "not conformant", "cannot judge", "skipped"
CRASHED, TIMED_OUT, BROKEN = "crashed", "timed out", "broken answer"
PRECIOUS = "precious.txt"
"""A file of the user, in a folder to which an engine makes links."""
LONG = 600.0
"""Seconds that a behaviour sleeps which shall be ended by others."""

Answer = dict[str, Any]
Arrays = dict[str, Any]


@dataclass
class Now:
    """The situation in which a behaviour acts."""

    behaviour: str
    phase: str
    seed: int
    state: str
    """A folder for the state that outlives this process."""
    golden: str
    temporary: str
    """The folder for temporary files, to which damage is limited."""
    results: str
    request: dict[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    dice: random.Random = field(default_factory=random.Random)

    @property
    def out(self) -> Path:
        """The file of the answer, or one beside the checkpoint."""
        return Path(self.request.get("out") or self.checkpoint.parent / "out.safetensors")

    @property
    def checkpoint(self) -> Path:
        return Path(loaded.get("checkpoint") or Path(self.temporary, "nothing", "nothing"))


@dataclass(frozen=True)
class Behaviour:
    """One way to misbehave."""

    act: Callable[[Now], Any]
    kind: str
    verdicts: frozenset[str]
    lasting: bool
    """Whether later cases may get these verdicts too."""
    spoils_results: bool
    """Whether the file of results cannot be written at the end."""
    needs_small_disk: bool


BEHAVIOURS: dict[str, Behaviour] = {}
PHASES = {
    "values": ("smoke", "first", "run"),
    "file": ("smoke", "first", "run"),
    "line": ("start", "smoke", "load", "run", "stop"),
    "act": ("start", "smoke", "first", "load", "run", "written", "answered", "stop"),
}
"""Per kind of behaviour the moments at which it acts: before the smoke test ends, after it, in the middle of a case.

first: the request `load`, for values and files `run`, of the first case. load, run: of the second case.
written: between its file and its answer. answered: after its answer.
"""
loaded: dict[str, Any] = {}


def behaviour(
    kind: str, *verdicts: str, lasting: bool = False, spoils_results: bool = False, small_disk: bool = False
) -> Callable[[Callable[[Now], Any]], Callable[[Now], Any]]:
    def register(act: Callable[[Now], Any]) -> Callable[[Now], Any]:
        BEHAVIOURS[act.__name__] = Behaviour(act, kind, frozenset(verdicts), lasting, spoils_results, small_disk)
        return act

    return register


# ---- values: the arrays are changed


def real(now: Now) -> Arrays:
    """The arrays of real numbers; the others are choices of experts."""
    return {key: array for key, array in now.arrays.items() if array.dtype.kind not in "iu"}


def everywhere(value: float) -> Callable[[Now], None]:
    def act(now: Now) -> None:
        import numpy as np

        for array in real(now).values():
            array[...] = np.float64(value).astype(array.dtype)

    return act


def at_one_place(value: float) -> Callable[[Now], None]:
    def act(now: Now) -> None:
        import numpy as np

        array = now.arrays[now.dice.choice(sorted(real(now)))]
        array[tuple(now.dice.randrange(n) for n in array.shape)] = np.float64(value).astype(array.dtype)

    return act


STRANGE = {
    "nan": math.nan, "infinity": math.inf, "minus_infinity": -math.inf, "ten_to_200": 1e200, "ten_to_300": 1e300,
    "ten_to_308": 1e308, "minus_ten_to_308": -1e308, "largest": 1.7976931348623157e308, "largest_float32": 3.4028e38,
    "subnormal": 5e-324, "smallest_normal": 2.2250738585072014e-308, "minus_zero": -0.0, "one": 1.0,
}  # fmt: skip
for _name, _value in STRANGE.items():
    for _suffix, _make in (("everywhere", everywhere), ("once", at_one_place)):
        _act = _make(_value)
        _act.__name__ = f"{_name}_{_suffix}"
        behaviour("values", WRONG, UNJUDGED, CONFORMANT)(_act)


@behaviour("values", WRONG)
def random_values(now: Now) -> None:
    import numpy as np

    generator = np.random.default_rng(now.seed)
    for array in real(now).values():
        array[...] = generator.normal(size=array.shape)


@behaviour("values", WRONG)
def random_bits(now: Now) -> None:
    import numpy as np

    generator = np.random.default_rng(now.seed)
    for key, array in real(now).items():
        raw = generator.integers(0, 256, array.nbytes, np.uint8)
        now.arrays[key] = raw.view(array.dtype).reshape(array.shape)


@behaviour("values", WRONG)
def a_little_off(now: Now) -> None:
    for key, array in real(now).items():
        now.arrays[key] = (array * 1.25).astype(array.dtype)


@behaviour("values", WRONG)
def other_signs(now: Now) -> None:
    for key, array in real(now).items():
        now.arrays[key] = -array


@behaviour("values", WRONG)
def reversed_rows(now: Now) -> None:
    import numpy as np

    for key, array in real(now).items():
        now.arrays[key] = np.ascontiguousarray(array[..., ::-1])


@behaviour("values", WRONG, UNJUDGED)
def alternating_huge(now: Now) -> None:
    import numpy as np

    for array in real(now).values():
        flat = array.reshape(-1)
        flat[::2], flat[1::2] = (np.float64(x).astype(array.dtype) for x in (1e38, -1e38))


@behaviour("values", BROKEN)
def integers(now: Now) -> None:
    import numpy as np

    for key in now.arrays:
        now.arrays[key] = np.zeros(now.arrays[key].shape, np.int64)


@behaviour("values", BROKEN)
def truth_values(now: Now) -> None:
    import numpy as np

    for key in now.arrays:
        now.arrays[key] = np.ones(now.arrays[key].shape, bool)


@behaviour("values", BROKEN)
def one_row_more(now: Now) -> None:
    import numpy as np

    for key in now.arrays:
        now.arrays[key] = np.concatenate([now.arrays[key], now.arrays[key][:1]])


@behaviour("values", BROKEN)
def one_dimension_more(now: Now) -> None:
    for key in now.arrays:
        now.arrays[key] = now.arrays[key][None]


@behaviour("values", BROKEN)
def no_elements(now: Now) -> None:
    for key in now.arrays:
        now.arrays[key] = now.arrays[key][:0]


@behaviour("values", WRONG, UNJUDGED, CONFORMANT, BROKEN)
def a_narrower_dtype(now: Now) -> None:
    import numpy as np

    for key, array in real(now).items():
        now.arrays[key] = array.astype(np.float16)


@behaviour("values", CONFORMANT)
def another_order_of_memory(now: Now) -> None:
    import numpy as np

    for key in now.arrays:
        now.arrays[key] = np.asfortranarray(now.arrays[key])


# ---- the file


@behaviour("file", BROKEN)
def no_file(now: Now) -> None:
    """Promise a file, and write none."""


@behaviour("file", BROKEN)
def empty_file(now: Now) -> None:
    now.out.touch()


@behaviour("file", BROKEN)
def cut_file(now: Now) -> None:
    write(now)
    os.truncate(now.out, now.dice.randrange(os.path.getsize(now.out)))


@behaviour("file", BROKEN)
def longer_file(now: Now) -> None:
    write(now)
    with now.out.open("ab") as file:
        file.write(bytes(now.dice.randrange(1, 100)))


@behaviour("file", BROKEN, WRONG, UNJUDGED, CONFORMANT)
def flipped_bits(now: Now) -> None:
    write(now)
    content = bytearray(now.out.read_bytes())
    for _ in range(now.dice.randrange(1, 9)):
        content[now.dice.randrange(len(content))] ^= 1 << now.dice.randrange(8)
    now.out.write_bytes(content)


def with_header(now: Now, header: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    now.out.write_bytes(size.to_bytes(8, "little") + header + bytes(64))


@behaviour("file", BROKEN)
def endless_header(now: Now) -> None:
    with_header(now, b"{}", (1 << 63) - 1)


@behaviour("file", BROKEN)
def nested_header(now: Now) -> None:
    with_header(now, b'{"a":' * 50_000 + b"1" + b"}" * 50_000)


@behaviour("file", BROKEN)
def header_that_is_a_list(now: Now) -> None:
    with_header(now, b"[1, 2, 3]")


@behaviour("file", BROKEN)
def overlapping_tensors(now: Now) -> None:
    entry = {"dtype": "F64", "shape": [8], "data_offsets": [0, 64]}
    with_header(now, json.dumps({key: entry for key in now.arrays}).encode())


@behaviour("file", BROKEN)
def huge_shape(now: Now) -> None:
    entry = {"dtype": "F64", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 64]}
    with_header(now, json.dumps({sorted(now.arrays)[0]: entry}).encode())


@behaviour("file", BROKEN)
def many_tensors(now: Now) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({f"t{i}": np.zeros(0) for i in range(20_000)}, now.out)


@behaviour("file", BROKEN)
def escape_sequences_in_names(now: Now) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file(now.arrays | {"\x1b]0;t\x07\u202e": np.zeros(1)}, now.out)


@behaviour("file", BROKEN)
def link_to_a_golden(now: Now) -> None:
    now.out.symlink_to(golden_file(now, loaded["case"]))


@behaviour("file", BROKEN)
def link_to_itself(now: Now) -> None:
    now.out.symlink_to(now.out)


@behaviour("file", BROKEN)
def link_to_a_device(now: Now) -> None:
    now.out.symlink_to("/dev/zero")


@behaviour("file", BROKEN)
def pipe(now: Now) -> None:
    os.mkfifo(now.out)


@behaviour("file", BROKEN)
def folder(now: Now) -> None:
    now.out.mkdir()


@behaviour("file", BROKEN)
def unix_socket(now: Now) -> None:
    os.chdir(now.out.parent)
    socket.socket(socket.AF_UNIX).bind(now.out.name)


@behaviour("file", BROKEN)
def sparse_terabyte(now: Now) -> None:
    write(now)
    os.truncate(now.out, 1 << 40)


@behaviour("file", BROKEN)
def another_tensor(now: Now) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file(now.arrays | {"secret": np.zeros(3)}, now.out)


@behaviour("file", BROKEN)
def a_tensor_less(now: Now) -> None:
    now.arrays.pop(sorted(now.arrays)[now.seed % len(now.arrays)])
    write(now)


@behaviour("file", CONFORMANT, BROKEN, WRONG, UNJUDGED)
def file_that_goes_on_changing(now: Now) -> None:
    write(now)
    content = now.out.read_bytes()
    if os.fork() == 0:
        while True:
            with suppress(OSError):
                now.out.write_bytes(content[: now.dice.randrange(len(content))])
                now.out.write_bytes(content)


@behaviour("file", CONFORMANT, BROKEN)
def file_that_is_removed_at_some_time(now: Now) -> None:
    write(now)
    if os.fork() == 0:
        time.sleep(now.dice.random() / 50)
        now.out.unlink(missing_ok=True)
        os._exit(0)


# ---- lines: an answer other than the expected one


def say(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def line(data: bytes) -> Callable[[Now], None]:
    def act(now: Now) -> None:
        say(data)
        time.sleep(LONG)

    return act


LINES = {
    "rubbish": b"loading: 10%\n", "no_utf8": bytes(range(128, 256)) + b"\n", "empty_line": b"\n",
    "nested_answer": b"[" * 100_000 + b"\n", "list_answer": b'["ok", true]\n', "null_answer": b"null\n",
    "unknown_field": b'{"ok": true, "speed": 9000}\n', "not_ok": b'{"ok": false}\n', "number_ok": b'{"ok": 1e400}\n',
    "yes_and_no": b'{"ok": false, "ok": true}\n', "two_answers": b'{"ok": true}\n{"ok": true}\n',
    "nul_bytes": b"\0\0\0\n", "byte_order_mark": b'\xef\xbb\xbf{"ok": true}\n',
    "lone_surrogate": b'{"ok": "\\ud800"}\n',
    "long_integer": b'{"ok": ' + b"9" * 6000 + b"}\n", "long_line": b'{"ok": "' + b"x" * (2 << 20) + b'"}\n',
    "script_link": b'{"skipped": "see there", "issue": "javascript:alert(1)"}\n',
    "escape_in_a_skip": b'{"skipped": "\\u001b[2J"}\n', "escape_in_an_error": b'{"error": "\\u001b[2J\\u0007"}\n',
}  # fmt: skip
for _name, _data in LINES.items():
    _line = line(_data)
    _line.__name__ = _name
    behaviour("line", BROKEN)(_line)


@behaviour("line", CRASHED)
def half_an_answer(now: Now) -> None:
    say(b'{"ok": tr')
    os._exit(1)


@behaviour("line", CRASHED, BROKEN, TIMED_OUT, lasting=True)
def its_own_error(now: Now) -> None:
    """After the error it hangs, which is seen only at the next request."""
    say(json.dumps({"error": "out of memory " * 20}).encode() + b"\n")
    time.sleep(LONG)


@behaviour("line", BROKEN)
def endless_line(now: Now) -> None:
    while True:
        say(b"x" * 65536)


# ---- acts: a side effect, and then an honest answer


@behaviour("act", CRASHED)
def exits(now: Now) -> None:
    os._exit(now.dice.choice([0, 1, 3, 255]))


@behaviour("act", CRASHED)
def ends_by_a_signal(now: Now) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    number = now.dice.choice([signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    time.sleep(LONG)


@behaviour("act", CRASHED)
def ends_its_group(now: Now) -> None:
    os.killpg(0, signal.SIGKILL)


@behaviour("act", CRASHED)
def ends_its_parent(now: Now) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(LONG)


@behaviour("act", CONFORMANT)
def annoys_its_parent(now: Now) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        os.kill(os.getppid(), number)


@behaviour("act", CONFORMANT)
def stops_its_parent(now: Now) -> None:
    os.kill(os.getppid(), signal.SIGSTOP)


@behaviour("act", TIMED_OUT)
def hangs(now: Now) -> None:
    time.sleep(LONG)


@behaviour("act", TIMED_OUT)
def hangs_and_ignores_signals(now: Now) -> None:
    for number in range(1, signal.NSIG):
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(LONG)


@behaviour("act", TIMED_OUT)
def stops_itself(now: Now) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(LONG)


@behaviour("act", CRASHED, BROKEN)
def becomes_another_program(now: Now) -> None:
    os.execv("/bin/true", ["true"])


@behaviour("act", CRASHED, BROKEN, TIMED_OUT)
def closes_its_output(now: Now) -> None:
    os.close(1)
    time.sleep(LONG)


@behaviour("act", CONFORMANT)
def closes_its_errors(now: Now) -> None:
    os.close(2)


@behaviour("act", CRASHED, CONFORMANT, lasting=True)
def closes_its_input(now: Now) -> None:
    os.close(0)


@behaviour("act", CRASHED, BROKEN, TIMED_OUT)
def closes_everything(now: Now) -> None:
    os.closerange(0, 1024)
    time.sleep(LONG)


@behaviour("act", BROKEN, TIMED_OUT)
def a_gigabyte_of_output(now: Now) -> None:
    for _ in range(1 << 14):
        say(bytes(1 << 16))


@behaviour("act", CONFORMANT, TIMED_OUT)
def a_gigabyte_of_errors(now: Now) -> None:
    for _ in range(1 << 14):
        os.write(2, b"\x1b[31m" + b"x" * ((1 << 16) - 5))


@behaviour("act", CONFORMANT)
def child_with_the_pipes(now: Now) -> None:
    if os.fork() == 0:
        time.sleep(LONG)
        os._exit(0)


@behaviour("act", CRASHED)
def child_with_the_pipes_of_the_dead(now: Now) -> None:
    if os.fork() == 0:
        time.sleep(LONG)
    os._exit(1)


def leave_a_daemon() -> None:
    """A process in a session of its own, whose parent has ended, and that ignores signals."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.closerange(0, 64)
        time.sleep(LONG)
    os._exit(0)


@behaviour("act", CONFORMANT)
def leaves_a_daemon(now: Now) -> None:
    leave_a_daemon()


@behaviour("act", CONFORMANT, TIMED_OUT)
def leaves_thirty_daemons(now: Now) -> None:
    for _ in range(30):
        leave_a_daemon()


@behaviour("act", CRASHED)
def leaves_a_daemon_and_ends(now: Now) -> None:
    leave_a_daemon()
    os._exit(2)


@behaviour("act", TIMED_OUT)
def leaves_a_daemon_and_hangs(now: Now) -> None:
    leave_a_daemon()
    time.sleep(LONG)


@behaviour("act", CONFORMANT, TIMED_OUT)
def leaves_a_family(now: Now) -> None:
    """Processes that go on starting others for a while."""
    if os.fork():
        return
    os.setsid()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        if os.fork() == 0:
            time.sleep(LONG)
            os._exit(0)
        time.sleep(0.02)
    time.sleep(LONG)
    os._exit(0)


@behaviour("act", CONFORMANT, BROKEN, lasting=True)
def goes_on_writing(now: Now) -> None:
    """A child fills every folder that it can find with files, as fast as it can."""
    if os.fork():
        return
    os.setsid()
    names = iter(range(20_000))
    while True:
        for each in Path(now.temporary).glob("refmoe-*/*/"):
            with suppress(OSError):
                (each / f"junk{next(names, 0)}").write_bytes(b"junk")
        time.sleep(0.001)


@behaviour("act", BROKEN, CONFORMANT, CRASHED)
def removes_the_folder_of_its_answer(now: Now) -> None:
    shutil.rmtree(now.out.parent, ignore_errors=True)


@behaviour("act", BROKEN, CONFORMANT, CRASHED)
def removes_a_folder_above(now: Now) -> None:
    """One, two or three folders above its checkpoint, but none beyond the folder for temporary files."""
    target = now.checkpoint.parents[now.seed % 3]
    if Path(now.temporary) in target.parents:
        shutil.rmtree(target, ignore_errors=True)


@behaviour("act", BROKEN, CONFORMANT, CRASHED, UNJUDGED)
def removes_all_temporary_files(now: Now) -> None:
    for each in Path(now.temporary).iterdir():
        shutil.rmtree(each, ignore_errors=True)


@behaviour("act", BROKEN, CONFORMANT, CRASHED, UNJUDGED)
def removes_the_folder_of_temporary_files(now: Now) -> None:
    shutil.rmtree(now.temporary, ignore_errors=True)


@behaviour("act", BROKEN, CONFORMANT, CRASHED, UNJUDGED)
def puts_files_in_the_place_of_folders(now: Now) -> None:
    for each in Path(now.temporary).glob("refmoe-*"):
        shutil.rmtree(each, ignore_errors=True)
        each.write_text("a file")


@behaviour("act", BROKEN, CONFORMANT, CRASHED, UNJUDGED)
def puts_links_in_the_place_of_folders(now: Now) -> None:
    target = Path(now.state, "precious")
    target.mkdir(exist_ok=True)
    (target / PRECIOUS).write_text("of the user")
    for each in Path(now.temporary).glob("refmoe-*"):
        shutil.rmtree(each, ignore_errors=True)
        each.symlink_to(target, target_is_directory=True)


@behaviour("act", BROKEN, CONFORMANT, CRASHED, UNJUDGED)
def closes_the_folders(now: Now) -> None:
    for each in [now.checkpoint, *Path(now.temporary).glob("refmoe-*/*/"), *Path(now.temporary).glob("refmoe-*/")]:
        with suppress(OSError):
            each.chmod(0)


@behaviour("act", CONFORMANT, CRASHED)
def deletes_the_checkpoint(now: Now) -> None:
    shutil.rmtree(now.checkpoint, ignore_errors=True)


@behaviour("act", CONFORMANT)
def changes_the_weights(now: Now) -> None:
    for each in now.checkpoint.glob("*.safetensors"):
        content = bytearray(each.read_bytes())
        content[-1 - now.seed % 100] ^= 0x40
        each.write_bytes(content)


@behaviour("act", CONFORMANT)
def changes_the_weights_secretly(now: Now) -> None:
    """The size and the time of change stay."""
    for each in now.checkpoint.glob("*.safetensors"):
        before = each.stat()
        content = bytearray(each.read_bytes())
        content[-1 - now.seed % 100] ^= 0x40
        each.write_bytes(content)
        os.utime(each, ns=(before.st_atime_ns, before.st_mtime_ns))


@behaviour("act", CONFORMANT)
def adds_to_the_checkpoint(now: Now) -> None:
    with suppress(OSError):
        (now.checkpoint / "\udcff\x1b[31mjunk\n").write_bytes(bytes(1000))


@behaviour("act", CONFORMANT, TIMED_OUT)
def nests_folders(now: Now) -> None:
    """More deeply than a path can be long."""
    with suppress(OSError):
        os.chdir(now.out.parent)
        for _ in range(3000):
            os.mkdir("deep")
            os.chdir("deep")
    os.chdir("/")


@behaviour("act", CONFORMANT, TIMED_OUT)
def thousands_of_files(now: Now) -> None:
    for i in range(5000):
        with suppress(OSError):
            (now.out.parent / f"{i}").touch()


@behaviour("act", CONFORMANT)
def lowers_its_limits(now: Now) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)
    os.umask(0o077)
    os.chdir("/")


@behaviour("act", CONFORMANT, CRASHED, BROKEN, UNJUDGED, small_disk=True)
def fills_the_disk_with_its_answer(now: Now) -> None:
    fill(now.out.parent / "junk")


@behaviour("act", CONFORMANT, CRASHED, BROKEN, UNJUDGED, lasting=True, small_disk=True)
def fills_the_disk(now: Now) -> None:
    fill(Path(now.temporary, "junk"))


@behaviour("act", CONFORMANT, CRASHED, BROKEN, UNJUDGED, lasting=True, small_disk=True)
def fills_the_disk_but_for_a_little(now: Now) -> None:
    path = Path(now.temporary, "junk")
    fill(path)
    os.truncate(path, max(0, path.stat().st_size - now.dice.randrange(1, 100_000)))


def fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@behaviour("act", CONFORMANT)
def deletes_the_results(now: Now) -> None:
    Path(now.results).unlink(missing_ok=True)


@behaviour("act", CONFORMANT, spoils_results=True)
def puts_a_folder_in_the_place_of_the_results(now: Now) -> None:
    Path(now.results).unlink(missing_ok=True)
    Path(now.results, "folder").mkdir(parents=True, exist_ok=True)


@behaviour("act", CONFORMANT, spoils_results=True)
def removes_the_folder_of_the_results(now: Now) -> None:
    shutil.rmtree(Path(now.results).parent, ignore_errors=True)


# ---- the conversation


def golden_file(now: Now, case: str) -> Path:
    return next(Path(now.golden, case).glob("trace-*.safetensors"))


def write(now: Now) -> None:
    """Write the arrays, or where they have not been touched the golden trace as it is."""
    if not now.arrays:
        shutil.copyfile(golden_file(now, loaded["case"]), now.out)
        return
    import numpy as np
    from safetensors.numpy import save_file

    save_file({key: np.ascontiguousarray(array) for key, array in now.arrays.items()}, now.out)


TAPS = (
    "embedding", "attention_norm", "attention.q", "attention.k", "attention.v", "attention.q_rope",
    "attention.k_rope", "attention.scores", "attention.probs", "attention.context", "attention.output",
    "attention_residual", "moe_norm", "router.logits", "router.experts", "router.weights", "expert.gate", "expert.up",
    "expert.hidden", "expert.output", "moe.output", "residual", "final_norm", "logits",
)  # fmt: skip
"""All of them: between two neighbours one step is judged by itself, which is quick."""


def echo(now: Now) -> Arrays:
    """The golden's values, to be changed."""
    import numpy as np
    from safetensors.numpy import load_file

    return {key: np.array(array) for key, array in load_file(golden_file(now, loaded["case"])).items()}


def once(now: Now) -> bool:
    """Whether the behaviour has not acted yet, in this process or one before it."""
    try:
        os.close(os.open(f"{now.state}/acted", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def place(now: Now) -> int:
    """The number of the case that is loaded: 0 for the smoke test, 1 for the first case of the suite."""
    return int(Path(now.state, "place").read_text() or 0) if Path(now.state, "place").exists() else 0


def loads(now: Now) -> None:
    """Count the models: the smoke test loads the smallest one, which is in no suite here."""
    case = Path(now.request["checkpoint"]).name
    loaded.update(checkpoint=now.request["checkpoint"], case=case)
    order = json.loads(Path(now.state, "cases").read_text())
    Path(now.state, "place").write_text(str(order.index(case) + 1 if case in order else 0))


def moment(now: Now) -> str | None:
    """The phase in which a request falls, before it is answered."""
    command, at = now.request["command"], place(now)
    if command == "start":
        return "start"
    if command == "stop":
        return "stop"
    values = BEHAVIOURS[now.behaviour].kind in ("values", "file")
    if at == 0:
        return "smoke" if command == "run" else None
    if at == 1:
        return "first" if command == ("run" if values else "load") else None
    return command if at == 2 else None


def answer(now: Now) -> Answer:
    command = now.request["command"]
    if command == "load":
        loads(now)
    acts = moment(now) == now.phase and once(now)
    found = BEHAVIOURS[now.behaviour]
    now.arrays = echo(now) if acts and found.kind in ("values", "file") else {}
    if acts:
        found.act(now)
    if command == "run" and not (acts and found.kind == "file"):
        write(now)
        if now.phase == "written" and place(now) == 2 and once(now):
            found.act(now)
    if command == "start":
        return {
            "protocol": "1", "name": "hostile", "version": "1", "dtypes": ["float64"], "taps": [*TAPS],
            "abilities": ["chunk", "decode", "sequences"], "policies": {}, "layouts": ["hf"],
        }  # fmt: skip
    return {"ok": True}


def main() -> None:
    now = Now(**json.loads(os.environ[SETTINGS]))
    now.dice = random.Random(f"{now.behaviour} {now.phase} {now.seed}")
    for text in sys.stdin:
        now.request = json.loads(text)
        say(json.dumps(answer(now)).encode() + b"\n")
        if now.phase == "answered" and now.request["command"] == "run" and place(now) == 2 and once(now):
            BEHAVIOURS[now.behaviour].act(now)
        if now.request["command"] == "stop":
            return


if __name__ == "__main__":
    main()
