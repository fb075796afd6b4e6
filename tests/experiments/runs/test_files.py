"""Files: atomic and durable writes, and reading."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bisam.experiments.errors import DamagedError, RunError
from bisam.experiments.runs import files


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_return(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        steps.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(path, target):
        steps.append(("rename", path.name, target.name))
        return replace(path, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("names of open files are known on Linux only")
    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    files.write(tmp_path / "new" / "a.txt", "one")
    temporary = f".a.txt.{os.getpid()}.tmp"
    assert steps == [
        ("sync", tmp_path.name),  # the name of the new folder
        ("sync", temporary),
        ("rename", temporary, "a.txt"),
        ("sync", "new"),
    ]
    steps.clear()
    files.write(tmp_path / "new" / "a.txt", "two", keep=tmp_path / "new" / "b.txt")
    assert steps == [
        ("sync", temporary),
        ("rename", "a.txt", "b.txt"),
        ("rename", temporary, "a.txt"),
        ("sync", "new"),
    ]
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {"a.txt": "two", "b.txt": "one"}


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path, monkeypatch):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        files.write(tmp_path / "a.txt", "two")
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "a.txt"), None)
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full") as error:
        files.write(tmp_path / "b.txt", "two")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "b.txt"))


@pytest.mark.parametrize("keep", [None, "b.txt"])
def test_a_write_that_fails_leaves_everything(tmp_path, monkeypatch, keep):
    files.write(tmp_path / "a.txt", "one")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path / "a.txt", "two", keep=None if keep is None else tmp_path / keep)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "one"}


@pytest.mark.parametrize(("code", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_a_folder_is_taken_and_an_error_of_the_disk_is_not(
    tmp_path, monkeypatch, code, passes
):
    fsync = os.fsync

    def refused(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("names of open files are known on Linux only")
    monkeypatch.setattr(files.os, "fsync", refused)
    if passes:
        files.write(tmp_path / "a.txt", "one")
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            files.write(tmp_path / "a.txt", "one")
    assert (tmp_path / "a.txt").read_text() == "one"


def test_a_folder_is_not_made_where_it_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "gone" / "a.txt", "one", make_folder=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"[1]", "it is not an object"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e400}', "1e400 is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "utf-8"),
        (b'{"a": 1', "Expecting"),
    ],
    ids=range(9),
)
def test_a_damaged_json_file_is_named(tmp_path, content, message):
    (path := tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DamagedError, match=rf"x.json is damaged \(.*{message}.*\): delete its folder to run"):
        files.read_json(path)


@pytest.mark.parametrize("content", [b"epoch,a\n1\n", b"epoch,a\n1,2,3\n", b"epoch\n\0\n", b"epoch\n1\xff\n", b'a\n"1'])
def test_a_damaged_table_is_named(tmp_path, content):
    (path := tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DamagedError, match=r"x\.csv is damaged"):
        files.read_rows(path)


@pytest.mark.parametrize("read", [files.read_json, files.read_rows])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, read):
    (tmp_path / "x").mkdir()
    with pytest.raises(DamagedError, match=r"x is damaged \(Is a directory\)"):
        read(tmp_path / "x")


def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(RunError, match=r"x cannot be read \(Permission denied\): give yourself") as raised:
        files.read_json(tmp_path / "x")
    assert not isinstance(raised.value, DamagedError)


def test_the_checksum_does_not_depend_on_order_or_white_space():
    assert files.checksum({"a": 1, "b": [0.1, None]}) == files.checksum({"b": [0.1, None], "a": 1})
    assert files.checksum({"a": 1}) != files.checksum({"a": 2})
