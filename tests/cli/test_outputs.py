# SPDX-License-Identifier: Apache-2.0
"""No output replaces an input. The tests walk the tree of commands, so no new command can miss them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.cli.guard import GuardedCommand, Output, OutputFolder
from refmoe.cli.options import PATH
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.writable import protecting, refuse_outputs
from tests.cli.every_command import COMMANDS, EXAMPLES, arguments
from tests.command_line import Refmoe
from tests.models import SMALL

WRITES = ("--out", "--html", "--junit", "--sarif", "--badge", "--summary", "--keep", "--write-ci")
"""Options that write, whichever command has them."""


def kinds(parameter: click.Parameter) -> list[click.ParamType[object]]:
    """The types of the values of an option."""
    return [*parameter.type.types] if isinstance(parameter.type, click.Tuple) else [parameter.type]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_is_declared_as_input_or_output(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, GuardedCommand)
    for parameter in command.params:
        for kind in kinds(parameter):
            assert not isinstance(kind, click.File)
            assert not isinstance(kind, click.Path) or kind is PATH or isinstance(kind, Output | OutputFolder)
        writes = parameter.opts[0] in WRITES
        assert not writes or any(isinstance(kind, Output | OutputFolder) for kind in kinds(parameter)), parameter.opts


def symbolic(path: Path, source: Path) -> None:
    path.symlink_to(source)


def hard(path: Path, source: Path) -> None:
    os.link(source, path)


LINKS: dict[str, Callable[[Path, Path], None] | None] = {"itself": None, "symbolic link": symbolic, "hard link": hard}
WRITERS = [name for name, example in EXAMPLES.items() if re.search(r"\{out\}/(?!golden|model|pack)", example.works)]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_is_an_input_is_refused(
    given: Path, tmp_path: Path, refmoe: Refmoe, name: str, link: str
) -> None:
    """Each output of each command at each file of each of its inputs. Nothing changes."""
    inputs = tmp_path / "in"
    shutil.copytree(given, inputs)
    (tmp_path / "out").mkdir()
    words = arguments(name, EXAMPLES[name].works, inputs, tmp_path / "out")
    read = [Path(word) for word in words if word.startswith(str(inputs))]
    found = [file for path in read for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    files = [file for file in found if file.is_file()]
    before = {file: file.read_bytes() for file in files}
    outputs = [i for i, word in enumerate(words) if word.startswith(str(tmp_path / "out"))]
    assert outputs
    for at in outputs:
        for number, file in enumerate(files):
            target = file
            make = LINKS[link]
            if make is not None:
                target = tmp_path / f"{at}-{number}{file.suffix}"
                make(target, file)
            status, _, err = refmoe(*words[:at], target, *words[at + 1 :])
            assert (status, err.count("\n")) == (2, 1), err
            assert str(target) in err
    assert {file: file.read_bytes() for file in files} == before


def test_a_file_of_one_s_own_program_is_an_input(given: Path, tmp_path: Path, refmoe: Refmoe) -> None:
    """An adapter, a policy with changes, a policy of a dtype, and a harness after ``--``."""
    (tmp_path / "mine.toml").write_text('[mine]\nabout = "a"\nsource = "b"\nbase = "float32"\n')
    (tmp_path / "engine.py").write_text("class Adapter: ...\n")
    model = ("emit", "--checkpoint", given / "model", "--tokens", "1")
    for words in (
        (*model, "--policy", f"{tmp_path}/mine.toml+cache=float16", "--out", tmp_path / "mine.toml"),
        ("conform", "--adapter", tmp_path / "engine.py", "--out", tmp_path / "engine.py"),
        ("conform", "--adapter", "x", "--policy", f"float32={tmp_path}/mine.toml", "--out", tmp_path / "mine.toml"),
        ("conform", "--out", tmp_path / "engine.py", "--", "python", tmp_path / "engine.py"),
        ("conform", "--known", tmp_path / "mine.toml", "--out", tmp_path / "mine.toml", "--adapter", "x"),
    ):  # fmt: skip
        status, _, err = refmoe(*words)
        assert (status, "is an input of this command" in err) == (2, True), err


def test_two_outputs_are_two_files(given: Path, tmp_path: Path, refmoe: Refmoe) -> None:
    status, _, err = refmoe(
        "verify",
        given / "trace",
        "--checkpoint",
        given / "model",
        "--html",
        tmp_path / "a",
        "--junit",
        f"{tmp_path}/./a",
    )
    assert (status, list(tmp_path.iterdir())) == (2, []), err


@pytest.mark.parametrize("special", ["folder", "pipe", "device", "no folder", "below a file"])
@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_cannot_be_written_is_known_before_the_work(
    given: Path, tmp_path: Path, refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch, name: str, special: str
) -> None:
    target = tmp_path / "target"
    if special == "folder":
        target.mkdir()
    elif special == "pipe":
        os.mkfifo(target)
    elif special == "device":
        target = Path("/dev/null")
    elif special == "no folder":
        target = tmp_path / "none" / "target"
    else:
        (tmp_path / "file").touch()
        target = tmp_path / "file" / "target"
    words = arguments(name, EXAMPLES[name].works, given, tmp_path / "out")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(COMMANDS[name], "callback", lambda **_: pytest.fail("the work has begun"))
    for at in (i for i, word in enumerate(words) if word.startswith(str(tmp_path / "out"))):
        status, _, err = refmoe(*words[:at], target, *words[at + 1 :])
        assert (status, err.count("\n")) == (2, 1), err
    assert Path("/dev/null").is_char_device()


def test_the_goldens_are_no_folder_for_models(tmp_path: Path, refmoe: Refmoe) -> None:
    shutil.copytree(Path(__file__).parents[2] / "golden" / "one-pair", tmp_path / "golden" / "one-pair")
    before = sorted(tmp_path.rglob("*"))
    for words in (
        ("materialise", "one-pair", tmp_path / "golden" / "one-pair"),
        ("materialise", "one-pair", tmp_path / "golden" / "one-pair", "--golden", tmp_path / "golden"),
        ("emit", "--case", "one-pair", "--out", tmp_path / "golden" / "one-pair" / "new.safetensors"),
    ):
        assert refmoe(*words)[0] == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_of_anybody_else_are_not_replaced(tmp_path: Path) -> None:
    weights = synthetic_checkpoint(SMALL, 1).parameters
    write_checkpoint(tmp_path / "m", SMALL, weights)
    write_checkpoint(tmp_path / "m", SMALL, weights)
    whole = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(whole.replace(b"written_by_refmoe", b"written_by_nobody"))
    with pytest.raises(InputError, match=r"model\.safetensors"):
        write_checkpoint(tmp_path / "m", SMALL, weights)
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        write_checkpoint(tmp_path / "m", SMALL, weights)


def test_a_model_in_use_is_not_replaced(tmp_path: Path) -> None:
    """In Python too, where no command names the inputs; only while the model is alive."""
    write_checkpoint(tmp_path / "m", SMALL, synthetic_checkpoint(SMALL, 1).parameters)
    model = load_checkpoint(tmp_path / "m")
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(InputError, match="a loaded model reads"), replacing(tmp_path / "m" / name):
            pytest.fail("the body ran")
    del model
    with replacing(tmp_path / "m" / "config.json") as temporary:
        temporary.write_text("{}")


def test_pages_may_lie_beside_results(tmp_path: Path) -> None:
    """A page in the folder of results is written anew at every run, and a folder in use is no new model's."""
    for name in ("board.html", "results.json"):
        (tmp_path / name).touch()
    with protecting([tmp_path]):
        refuse_outputs([tmp_path / "board.html", tmp_path / "new.json"])
        with pytest.raises(InputError):
            refuse_outputs([tmp_path / "results.json"])
        for folder in (tmp_path, tmp_path / "below"):
            with pytest.raises(InputError):
                refuse_outputs([], [folder])
    refuse_outputs([tmp_path / "results.json"], [tmp_path])


def test_a_disk_without_room_is_known_before_the_work(
    given: Path, tmp_path: Path, refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    status, _, err = refmoe("emit", "--checkpoint", given / "model", "--tokens", "1,2", "--out", tmp_path / "t")
    assert (status, "bytes are free" in err) == (2, True)
    status, _, err = refmoe("materialise", "one-pair", tmp_path / "m")
    assert (status, "bytes are free" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []
