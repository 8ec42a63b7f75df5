"""The previous file survives a full disk and a kill."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest

from flexvar.writing import write_together, write_whole, write_whole_folder


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def fill(beside: Path) -> None:
        beside.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, fill)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_kill_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    script = f"""
        import os, pathlib, signal
        from flexvar.writing import write_whole

        def kill(beside):
            beside.write_text("ne")
            os.kill(os.getpid(), signal.SIGKILL)

        write_whole(pathlib.Path({str(path)!r}), kill)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_files_that_belong_together_are_all_old_or_all_new(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_together({one: lambda path: path.write_text("old"), two: lambda path: path.write_text("old")})

    def fail(beside: Path) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(OSError, match=r"two could not be written \(Disk quota exceeded\); make room"):
        write_together({one: lambda path: path.write_text("new"), two: fail})
    assert (one.read_text(), two.read_text(), sorted(os.listdir(tmp_path))) == ("old", "old", ["one", "two"])


@pytest.mark.parametrize(
    "name", ["a" * 251 + ".png", "\u8c93" * 83 + ".png", "\U0001f408" * 62 + ".png"], ids=["ascii", "3 bytes", "4 bytes"]
)
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    hidden = []
    write_whole(tmp_path / name, lambda beside: hidden.append(beside.name))
    assert write_whole_folder(tmp_path / f"{name[:-4]}.set", fill_folder) == 7
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"{name[:-4]}.set"])
    assert hidden[0].startswith(".")
    assert hidden[0].endswith(".unfinished")


@pytest.mark.parametrize(
    ("name", "why"),
    [("a" * 300, "File name too long"), ("file/state", "Not a directory"), ("no/state", "No such file"), ("folder", "Is a")],
    ids=["too long", "in a file", "in no folder", "a folder"],
)
def test_what_cannot_be_written_is_told_by_its_own_name(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=rf"/{name} could not be written \({why}.*\); make room or choose another folder$") as caught:
        write_whole(tmp_path / name, lambda beside: beside.write_text("new"))
    assert "unfinished" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_what_cannot_be_removed_hides_no_reason(tmp_path: Path, monkeypatch) -> None:
    def fill(beside: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError, match=r"state could not be written \(No space left on device\); make room"):
        write_whole(tmp_path / "state", fill)


def test_no_two_writers_choose_the_same_name(tmp_path: Path) -> None:
    """Not even those with the same process number, on two machines that share a disk."""
    names = []
    for _ in range(3):
        write_whole(tmp_path / "state", lambda beside: names.append(beside.name))
    assert len(set(names)) == 3


def test_the_umask_decides_who_may_read_a_file_and_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    def write(beside: Path) -> None:
        beside.unlink()
        beside.touch(0o600)  # as writers do that rename a file of their own

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda mask: pytest.fail("the umask is the whole process's"))
            write_whole(tmp_path / "state", write)
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o640


def fill_folder(folder: Path) -> int:
    folder.mkdir()
    (folder / "new").write_text("new")
    return 7


def interrupted(folder: Path) -> None:
    fill_folder(folder)
    raise KeyboardInterrupt


def test_a_folder_is_replaced_as_a_whole_or_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "folder"
    with pytest.raises(KeyboardInterrupt):
        write_whole_folder(folder, interrupted)
    assert os.listdir(folder.parent) == []
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_whole_folder(folder, interrupted)
    assert os.listdir(folder) == ["old"]
    assert write_whole_folder(folder, fill_folder) == 7
    assert (os.listdir(folder), os.listdir(folder.parent)) == (["new"], ["folder"])
    with pytest.raises(FileExistsError, match="new is a file; name a folder"):
        write_whole_folder(folder / "new", fill_folder)
    assert os.listdir(folder) == ["new"]


def test_a_folder_comes_back_where_its_place_cannot_be_taken(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(OSError, match=r"/folder could not be written \(No such file or directory\); make room or choose another folder$"):
        write_whole_folder(tmp_path / "folder", lambda beside: None)  # nothing is there to be put in its place
    assert (os.listdir(tmp_path / "folder"), os.listdir(tmp_path)) == (["old"], ["folder"])


def test_errors_within_a_folder_name_the_one_that_was_asked_for(tmp_path: Path) -> None:
    def full(beside: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(folder: Path) -> None:
        folder.mkdir()
        write_whole(folder / "picture", full)

    with pytest.raises(OSError, match=r"/folder/picture could not be written \(No space left on device\); make room") as caught:
        write_whole_folder(tmp_path / "folder", fill)
    assert "unfinished" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no font; install one"):  # nothing of the folder's
        write_whole_folder(tmp_path / "folder", mock.Mock(side_effect=FileNotFoundError("there is no font; install one")))
    assert os.listdir(tmp_path) == []


def test_a_folder_in_which_someone_is_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    for folder in (Path(), tmp_path, Path("/")):
        with pytest.raises(OSError, match="is in use and cannot be replaced as a whole; name a folder in it"):
            write_whole_folder(folder, fill_folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be made"):
        write_whole_folder(tmp_path / "file" / "folder", fill_folder)
