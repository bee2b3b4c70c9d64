"""Files that appear whole or not at all."""

from __future__ import annotations

import json

import pytest

from fusionsam.errors import InputError
from fusionsam.io import whole, whole_folder, write_json, write_text


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
