from __future__ import annotations

from pathlib import Path

import pytest

from softprompts.cache_folder import cache_folder, find_member, is_member, member_folder
from softprompts.errors import ConfigError, DataNotFoundError


def test_it_is_in_the_home_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOFTPROMPTS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "softprompts"
    monkeypatch.setenv("SOFTPROMPTS_CACHE", "~/elsewhere")
    assert member_folder("family/dec-3m") == tmp_path / "elsewhere" / "models" / "dec-3m"


def test_a_missing_member_names_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path))
    for name, recipe in {
        "dec-3m": "dec_3m",
        "encdec-3m-sc": "encdec_3m",
        "encdec-8m-lm2": "encdec_8m_adapt",
    }.items():
        with pytest.raises(DataNotFoundError, match=rf"recipes/pretraining/family/{recipe}\.yaml"):
            find_member(f"family/{name}")
    there = tmp_path / "models" / "dec-3m"
    there.mkdir(parents=True)
    (there / "config.json").write_text("{}", encoding="utf-8")
    assert find_member("dec-3m") == find_member("family/dec-3m") == there
    with pytest.raises(DataNotFoundError, match=r"there: dec-3m"):
        find_member("dec-1m")
    with pytest.raises(ConfigError, match="no name for a model of the family"):
        find_member("family/../dec-3m")


def test_a_folder_on_disk_is_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_member("family/dec-3m")
    assert not is_member("bundled")
    (tmp_path / "family" / "dec-3m").mkdir(parents=True)
    assert not is_member("family/dec-3m")
