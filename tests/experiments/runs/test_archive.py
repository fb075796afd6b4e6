"""Archives: what they keep, and what is refused."""

from __future__ import annotations

import io
import lzma
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from bisam.experiments.errors import DamagedError, RunError
from bisam.experiments.runs.archive import is_archive, source, write_archive
from bisam.experiments.runs.folder import Finished, Run, finished
from bisam.experiments.training.train import train
from tests.experiments.runs.conftest import MACHINE, flipped

DOCS = Path(__file__).parents[3] / "docs"
NAMES = ["metrics.csv", "recipe.json", "result.json"]


@pytest.fixture
def archive(done, tmp_path) -> Path:
    """An archive of one run, beside its folder."""
    path = tmp_path / "digits.tar.xz"
    write_archive(path, done.folder.parents[1], [done.folder])
    return path


def place(run: Run) -> str:
    """The folder of the run in an archive."""
    return run.folder.relative_to(run.folder.parents[2]).as_posix()


def packed(files: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """An archive of these files, made without the module under test."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as tar:
        for name, content in files.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def files(run: Run) -> dict[str, bytes]:
    return {f"{place(run)}/{name}": (run.folder / name).read_bytes() for name in NAMES}


def test_an_archive_is_read_like_the_folder(done, archive):
    with source(archive) as there, source(done.folder.parents[2]) as here:
        assert (there.archived, here.archived) == (True, False)
        assert (there.beside, here.beside) == (archive.parent, done.folder.parents[2])
        unpacked, own = (list(finished(one.folder / done.folder.parents[1].name)) for one in (there, here))
        assert unpacked == own
        assert len(own) == 1
    assert not there.folder.exists()


def test_it_keeps_what_reports_need_and_no_weights(done, tmp_path):
    for name in ("stats.csv", "analysis.json", "notes.txt", ".lock"):
        (done.folder / name).write_text("x")
    write_archive(tmp_path / "a.tar.xz", done.folder.parents[1], [done.folder], [done.folder / "stats.csv"])
    with tarfile.open(tmp_path / "a.tar.xz") as tar:  # as any tar reads it
        names = {Path(entry.name).name: entry for entry in tar}
    assert sorted(names) == ["analysis.json", *NAMES]
    assert {(one.mtime, one.uid, one.gid, one.uname, one.mode) for one in names.values()} == {(0, 0, 0, "", 0o644)}
    assert names["recipe.json"].name == f"{place(done)}/recipe.json"


def test_equal_runs_give_equal_bytes(done, archive, tmp_path):
    again = tmp_path / "elsewhere" / done.folder.parents[1].name
    shutil.copytree(done.folder, again / done.folder.relative_to(done.folder.parents[1]))
    for path in again.rglob("*"):
        os.utime(path, (1, 1))
    write_archive(tmp_path / "b.tar.xz", again, [again / done.folder.relative_to(done.folder.parents[1])])
    assert (tmp_path / "b.tar.xz").read_bytes() == archive.read_bytes()


def test_an_unpacked_run_is_finished_and_is_not_trained_again(done, archive, tmp_path):
    with tarfile.open(archive) as tar:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
        tar.extractall(tmp_path / "runs", **safe)
    run = Run.under(tmp_path / "runs" / done.folder.parents[1].name, done.recipe)
    epochs = []
    assert train(run, MACHINE, epochs.append) == done.result
    assert epochs == []


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_not_finished_is_not_archived(done, tmp_path, name):
    (done.folder / name).unlink()
    with pytest.raises(RunError, match=rf"no archive was written: \S+/seed-0 has no {name}$"):
        write_archive(tmp_path / "a.tar.xz", done.folder.parents[1], [done.folder])
    assert not (tmp_path / "a.tar.xz").exists()
    with pytest.raises(RunError, match="it has no run"):
        write_archive(tmp_path / "a.tar.xz", done.folder.parents[1], [])


def large(path: Path) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if path.stat().st_size > 200_000 else ()


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=large(path), id=path.name) for path in sorted(DOCS.rglob("*.tar.xz"))]
)
def test_the_archives_of_the_documentation_are_read(path):
    with source(path) as there:
        (folder,) = there.folder.iterdir()
        runs = list(finished(folder))
        assert all(isinstance(run, Finished) for run in runs)
        assert len(runs) == len(list(folder.glob("*/seed-*"))) > 0


# What is refused


def refused(path: Path, content: bytes) -> str:
    """The message for an archive of this content, and nothing was unpacked."""
    path.write_bytes(content)
    with pytest.raises(DamagedError) as error, source(path):
        pytest.fail("it was read")
    assert str(error.value).startswith(f"{path} is damaged (")
    assert "\n" not in str(error.value)
    return error.value.reason


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 1])
def test_a_flipped_bit_and_a_missing_end_are_noticed(archive, share):
    content = archive.read_bytes()
    flipped(archive, int(share * (len(content) - 1)))
    assert refused(archive, archive.read_bytes())
    assert refused(archive, content[: int(share * (len(content) - 1))])


def test_what_is_no_archive_is_refused(archive, done):
    assert "not supported" in refused(archive, b"text")
    assert refused(archive, lzma.compress(b"text")) in {"file could not be opened successfully", "truncated header"}
    assert refused(archive, packed({})) == "it has no run"


@pytest.mark.parametrize(
    "name",
    [
        "../digits/a-noise-0-00000000/seed-0/result.json",
        "/digits/a-noise-0-00000000/seed-0/result.json",
        "digits/../seed-0/result.json",
        "digits/./seed-0/result.json",
        "digits/a/seed-0/../result.json",
        "digits/a/seed-0/checkpoint.pt",
        "digits/a/seed-0/sub/result.json",
        "digits/a/seed-x/result.json",
        "digits/a/result.json",
        "result.json",
        "digits/a b/seed-0/result.json",
        "digits/a\n/seed-0/result.json",
        "digits\\a/seed-0/result.json",
        "C:/a/seed-0/result.json",
    ],
)
def test_an_entry_that_is_no_file_of_a_run_is_refused(archive, done, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    assert refused(archive, packed({**files(done), name: b"{}"})) == f"{name!r} is no file of a finished run"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_link_is_refused_whatever_its_name(archive, done, kind):
    entry = tarfile.TarInfo(f"{place(done)}/analysis.json")
    entry.type, entry.linkname = kind, "/etc/passwd"
    assert refused(archive, packed({**files(done), entry.name: entry})) == f"{entry.name!r} is not an ordinary file"


def test_a_sparse_file_that_would_fill_the_memory_is_refused(archive, done):
    entry = tarfile.TarInfo(f"{place(done)}/analysis.json")
    entry.type = tarfile.REGTYPE
    entry.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40), "GNU.sparse.numblocks": "1"}
    assert "is not an ordinary file" in refused(archive, packed({**files(done), entry.name: entry}))


def test_what_unpacks_to_too_much_is_refused(archive, done, monkeypatch):
    monkeypatch.setattr("bisam.experiments.runs.archive._LARGEST", 1000)
    assert refused(archive, packed(files(done))) == "it unpacks to more than 1,000 bytes"


def test_a_file_that_is_in_it_twice_is_refused(archive, done):
    name = f"{place(done)}/result.json"
    out = io.BytesIO(lzma.decompress(packed(files(done))))
    with tarfile.open(fileobj=out, mode="a:") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert refused(archive, lzma.compress(out.getvalue())) == f"{name!r} is in it twice"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_one_of_its_files_is_refused(archive, done, name):
    kept = {path: content for path, content in files(done).items() if not path.endswith(name)}
    assert refused(archive, packed(kept)) == f"{place(done)} has no {name}"


def test_a_run_that_was_changed_in_it_is_an_error_of_the_archive(archive, done):
    changed = {name: content.replace(b"0.1", b"0.2") for name, content in files(done).items()}
    archive.write_bytes(packed(changed))
    with source(archive) as there:
        (error,) = finished(there.folder / done.folder.parents[1].name)
        assert isinstance(error, RunError)
        said = str(there.fault(error))
        assert said.startswith(f"{archive} is damaged ({place(done)}/")
        assert str(there.folder) not in said
        assert str(there.fault(RunError(f"{there.folder}/digits/a: too new"))) == f"{archive}: digits/a: too new"
    with source(done.folder.parents[2]) as here:
        assert here.fault(error) is error


def test_permission_is_not_damage(archive, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(RunError, match="give yourself the permission") as error, source(archive):
        pass
    assert not isinstance(error.value, DamagedError)


def test_a_file_with_the_name_of_an_archive(archive, tmp_path):
    assert is_archive(archive)
    assert not is_archive(tmp_path)
    assert not is_archive(tmp_path / "none.tar.xz")
    (tmp_path / "folder.tar.xz").mkdir()
    assert not is_archive(tmp_path / "folder.tar.xz")
