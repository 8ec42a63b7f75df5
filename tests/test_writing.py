"""The previous file survives a full disk and a kill."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flexvar.writing import write_whole


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
