"""Files are written whole or not at all."""

import errno
from pathlib import Path

import pytest

from llama_fast.reports.jsonfile import write_whole


def test_a_full_disk_leaves_what_was_there_and_is_named(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    write_whole(file, "before")

    def full(path, text, **_):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*page\.html."):
        write_whole(file, "after")
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"] and file.read_text() == "before"
