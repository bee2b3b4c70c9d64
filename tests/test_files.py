"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fusionsam.errors import InputError
from fusionsam.io import (
    Made,
    OutputFolder,
    State,
    require_writable,
    scratch,
    whole,
    whole_folder,
    write_json,
    write_text,
)


def write_half(path, error, **options):
    with whole(path, **options) as part:
        part.write_text("half")
        raise error


def test_what_stood_there_stays_until_the_new_file_is_whole(tmp_path):
    path = write_json(tmp_path / "deep" / "a.json", {"old": 1})
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert json.loads(path.read_text()) == {"old": 1}
    with whole(path) as part:
        part.write_text("new")
        assert json.loads(path.read_text()) == {"old": 1}
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_by_any_name_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"^.*a: cannot be written \(no room left\); make room$"):
        write_half(tmp_path / "a", RuntimeError("no room\nleft"), remedy="make room", also=(RuntimeError,))
    with pytest.raises(RuntimeError, match="another matter"):
        write_half(tmp_path / "a", RuntimeError("another matter"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/x: cannot be written \(.+\); choose another --out"):
        write_text(tmp_path / "file" / "x", "")


WRITER = """
import sys
from fusionsam.io import whole
with whole(sys.argv[1]) as part:
    part.write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
    part.write_text("whole")
"""


def writer(path):
    """A process in the middle of writing `path`, which it ends at a line of input."""
    command = [sys.executable, "-c", WRITER, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    path, kept = tmp_path / "a", tmp_path / ".mine.fusionsam"
    kept.write_text("no folder of ours")
    dead, living = writer(path), writer(path)
    assert len(list(tmp_path.iterdir())) == 3
    dead.kill()
    dead.wait()
    assert len(list(tmp_path.iterdir())) == 3
    require_writable(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    living.communicate("go on\n")
    assert living.returncode == 0
    assert path.read_text() == "whole"
    again = writer(path)
    again.kill()
    again.wait()
    living = writer(path)  # removes it, as does any process that writes there for the first time
    with scratch(tmp_path) as ours:
        require_writable(tmp_path)
        assert len(list(tmp_path.iterdir())) == 4
        assert ours.is_dir()
    living.communicate("go on\n")
    assert sorted(tmp_path.iterdir()) == [kept, path]


def test_a_file_is_written_under_its_own_name_with_the_rights_of_any_other(tmp_path):
    name = "x" * 250 + ".png"  # a longer one would be no name any more
    (tmp_path / "plain").touch()
    with whole(tmp_path / name) as part:
        assert part.name == name
        part.touch()
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_of_one_moment_whenever_it_is_killed(tmp_path):
    folder = tmp_path / "best"

    def save(step, killed=False):
        with whole_folder(folder) as part:
            (part / "weights").write_text(step)
            if killed:
                raise KeyboardInterrupt
            (part / "card").write_text(step)

    save("1")
    with pytest.raises(KeyboardInterrupt):
        save("2", killed=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"weights": "1", "card": "1"}
    folder.rename(tmp_path / ".best.old")  # killed between the two renames
    (tmp_path / ".best.part").mkdir()
    with pytest.raises(KeyboardInterrupt):
        save("3", killed=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"weights": "1", "card": "1"}
    save("4")
    assert {path.read_text() for path in folder.iterdir()} == {"4"}
    assert list(tmp_path.iterdir()) == [folder]
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(InputError, match=r"file/best: cannot be written \(.+\); choose another --out"),
        whole_folder(tmp_path / "file" / "best"),
    ):
        raise AssertionError("nothing to write into")


MINE = Made({"pair": "a", "list": [1]}, {"weights": "w"})


@pytest.mark.parametrize(
    ("stored", "files", "expected"),
    [
        (None, [], State.NEW),
        (None, ["v.png"], r"v\.png: is there, and no v\.json of ours tells of it; choose another --out"),
        (MINE, ["v.png", "w.png"], State.FINISHED),
        (MINE, ["v.png"], State.UNFINISHED),
        (Made(MINE.inputs, {"weights": "x"}), ["v.png", "w.png"], State.UNFINISHED),
        (Made({"pair": "b", "list": [1]}), [], r"v\.json: is of b, not of a"),
        (Made({"pair": "b", "list": [2]}), [], r"v\.json: was made with another pair, list"),
        (Made({"list": [2]}), [], r"v\.json: was made with another list"),
        (Made({"other": "b"}), [], r"v\.json: is of b, not of a"),
        (Made({"other": [2], "more": "b"}), [], r"v\.json: was made with another other, more"),
        (Made({"other": "a"}), [], State.UNFINISHED),  # the same file by another name
        (Made({"list": [1]}), [], State.UNFINISHED),  # of less
        (Made({**MINE.inputs, "more": "c", "other": [2]}), [], r"v\.json: was made with more, other, too; choose"),
        (Made({"other": "a", "more": "c"}), [], r"v\.json: was made with more, too; choose"),
        (Made({}), ["v.png"], State.UNFINISHED),  # begun, and broken off before it was told what of
    ],
)
def test_what_is_ours_what_is_finished_and_what_may_be_replaced(tmp_path, stored, files, expected):
    for name in files:
        (tmp_path / name).touch()
    folder = OutputFolder(tmp_path, "predict")
    if isinstance(expected, State):
        assert folder.state("v.json", stored, MINE, ["v.png", "w.png"]) is expected
    else:
        with pytest.raises(InputError, match=expected):
            folder.state("v.json", stored, MINE, ["v.png", "w.png"])


def test_a_record_in_another_form_is_somebody_elses(tmp_path):
    folder = OutputFolder(tmp_path, "predict")
    assert folder.read("v.json") is None
    (tmp_path / "v.json").write_text('{"a": 1}')
    assert folder.read("v.json") == {"a": 1}
    for foreign in (b"[1]", b"null", b"\xff", b"{"):
        (tmp_path / "v.json").write_bytes(foreign)
        with pytest.raises(InputError, match=r"v\.json: was not written by predict; choose another --out"):
            folder.read("v.json")
    assert folder.read("v.json", damaged={}) == {}
    with pytest.raises(InputError, match=r"v\.json: tells of image b, c, which would be lost"):
        folder.require_none_lost("v.json", "image", ["a", "b", "c"], ["a"])
