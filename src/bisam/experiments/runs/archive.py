"""Archive: the finished runs of a study in one file, without their checkpoints.

    digits.tar.xz
        digits/sam-noise-0.4-1f0c22e9/seed-0/recipe.json, result.json, metrics.csv, stats.csv, analysis.json
        ...

`tar xf` unpacks it into run folders: recipes, results with the versions, machine and commit of each run, the metrics of
each epoch, and where they exist the statistics and the analyses. All runs are compressed together, because they repeat
each other's names, recipes and learning rates: 1,700 runs of 30 epochs take 1.8 MB, mostly the digits of losses and
times (in a zip archive, which compresses each file alone, 5.4 MB). A file of columns would be a third smaller, and the
readers of run folders could not read it.

Equal runs give equal bytes with one version of liblzma: entries are in order, and have no time, owner or other mode.
"""

from __future__ import annotations

import io
import lzma
import re
import tarfile
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bisam.experiments.errors import DamagedError, RunError, reason
from bisam.experiments.runs.files import read_bytes, write

SUFFIX = ".tar.xz"
"""File name suffix of an archive."""

REQUIRED = ("recipe.json", "result.json", "metrics.csv")
"""The files of each run in an archive."""
OPTIONAL = ("stats.csv", "analysis.json")
"""Files of the runs that have them."""

_PART = r"(?!\.{1,2}/)[A-Za-z0-9_.+-]+"  # of a path, which leads to no other folder
_ENTRY = re.compile(rf"{_PART}/{_PART}/seed-[0-9]+/(?:{'|'.join(map(re.escape, (*REQUIRED, *OPTIONAL)))})")
_LARGEST = 2**30  # bytes that an archive may unpack to: a hundred times as many as those of 1,700 runs
_REMEDY = "get it again, or write it again from the run folders with `bisam archive`"


@dataclass(frozen=True)
class Source:
    """The location of finished runs: a folder or an archive.

    Attributes:
        given: as the user named it: a folder, or an archive.
        folder: with a folder for each study; of an archive, where it is unpacked.
    """

    given: Path
    folder: Path

    @property
    def archived(self) -> bool:
        """Whether the runs are in an archive: they have no weights, and cannot be resumed or analysed."""
        return self.folder != self.given

    @property
    def beside(self) -> Path:
        """The folder for what is made of the runs."""
        return self.given.parent if self.archived else self.given

    def fault(self, error: RunError) -> RunError:
        """Return the error for a file of a run: of an archive, that the archive is damaged."""
        if not self.archived:
            return error
        if isinstance(error, DamagedError):
            place = error.path.relative_to(self.folder).as_posix()
            return DamagedError(self.given, f"{place}: {error.reason}", _REMEDY)
        return RunError(str(error).replace(f"{self.folder}/", f"{self.given}: "))


@contextmanager
def source(path: Path) -> Generator[Source]:
    """A folder of runs, or an archive, which is unpacked into a temporary folder for as long as the context lasts.

    Args:
        path: a folder, which need not exist, or an archive.

    Raises:
        RunError: the archive is damaged, holds something other than finished runs, or cannot be read.
    """
    if not path.is_file():
        yield Source(path, path)
        return
    files = _files(path)
    with TemporaryDirectory(prefix="bisam-") as folder:
        for name, content in files.items():
            place = Path(folder, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        yield Source(path, Path(folder))


def is_archive(path: Path) -> bool:
    """Whether it is a file with the name of an archive."""
    return path.is_file() and path.name.endswith(SUFFIX)


def write_archive(path: Path, root: Path, folders: Iterable[Path], without: Collection[Path] = ()) -> int:
    """Write the archive of some runs atomically, and return its size in bytes.

    Args:
        path: the archive.
        root: folder of the study's runs; its name is that of the folder in the archive.
        folders: of finished runs, in `root`.
        without: files to leave out, such as damaged analyses.

    Raises:
        RunError: a run has no result any more, a file cannot be read, or a folder has a name that is not read.
        OSError: the disk is full or read-only.
    """
    files = dict[str, bytes]()
    for folder in folders:
        for name in (*REQUIRED, *OPTIONAL):
            if folder / name in without or (content := read_bytes(folder / name)) is None:
                continue
            entry = f"{root.name}/{folder.relative_to(root).as_posix()}/{name}"
            if not _ENTRY.fullmatch(entry):  # it could not be read
                raise RunError(
                    f"no archive was written: {folder} is not named as in RECIPE/seed-0, of letters, digits and _.+-: "
                    "rename it"
                )
            files[entry] = content
    if (fault := _fault(files)) is not None:
        raise RunError(f"no archive was written: {fault}")
    content = _packed(files)
    write(path, content)
    return len(content)


def _packed(files: dict[str, bytes]) -> bytes:
    """The content of an archive. Files of one kind follow each other, which compresses better."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(files, key=lambda name: (name.rpartition("/")[2], name)):
            entry = tarfile.TarInfo(name)  # with mode 0644 and time 0, and without an owner
            entry.size = len(files[name])
            archive.addfile(entry, io.BytesIO(files[name]))
    return lzma.compress(out.getvalue(), preset=6 | lzma.PRESET_EXTREME)


def _files(path: Path) -> dict[str, bytes]:
    """The content of each file in an archive, by its path in it; checked."""
    content = read_bytes(path)
    try:
        files = {} if content is None else _unpacked(content)
    except (EOFError, lzma.LZMAError, tarfile.TarError, UnicodeError, ValueError) as error:
        raise DamagedError(path, reason(error), _REMEDY) from error
    if (fault := _fault(files)) is not None:
        raise DamagedError(path, fault, _REMEDY)
    return files


def _unpacked(content: bytes) -> dict[str, bytes]:
    with lzma.open(io.BytesIO(content)) as compressed:
        # To its end, where the checksum is: tarfile would stop before it.
        if len(raw := compressed.read(_LARGEST + 1)) > _LARGEST:
            raise ValueError(f"it unpacks to more than {_LARGEST:,} bytes")
    files = dict[str, bytes]()
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
        for entry in archive:
            if not entry.isreg() or entry.size > len(raw):  # a sparse file unpacks to more than it has
                raise ValueError(f"{entry.name!r} is not an ordinary file")
            if not _ENTRY.fullmatch(entry.name):
                raise ValueError(f"{entry.name!r} is no file of a finished run")
            if entry.name in files:
                raise ValueError(f"{entry.name!r} is in it twice")
            stored = archive.extractfile(entry)
            assert stored is not None  # of a regular file
            files[entry.name] = stored.read()
    return files


def _fault(files: Collection[str]) -> str | None:
    """Return what is missing among the files of an archive, or None."""
    if not files:
        return "it has no run"
    for folder in sorted({name.rpartition("/")[0] for name in files}):
        for name in REQUIRED:
            if f"{folder}/{name}" not in files:
                return f"{folder} has no {name}"
    return None
