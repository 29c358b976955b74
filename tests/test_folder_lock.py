"""A folder of results has one writer at a time, and none once that ended, however it ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from softprompts.errors import StorageError
from softprompts.folder_lock import LOCK_FILE, alone_in

HOLDER = """
import sys, time
from pathlib import Path
from softprompts.folder_lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path):
    folder = tmp_path / "runs" / "own"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StorageError, match="another run writes to") as refused, alone_in(folder):
                pass
            assert str(folder) in str(refused.value)
        finally:
            holder.kill()
    with alone_in(folder):
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


def test_a_failure_within_lets_go_of_the_folder(tmp_path: Path):
    with pytest.raises(KeyError), alone_in(tmp_path):
        raise KeyError
    with alone_in(tmp_path), pytest.raises(StorageError, match="choose another folder"), alone_in(tmp_path):
        pass


def test_a_folder_that_cannot_be_is_an_error_of_ours(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), alone_in(tmp_path / "file"):
        pass
