"""Extracting downloaded archives: nothing is written where a member would leave the folder or write over another."""

from __future__ import annotations

import contextlib
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

from spkfast.errors import InputError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")


class _Member(NamedTuple):
    """Name and kind of a member; a link has the path that it leads to, counted from the root of the archive."""

    name: str
    kind: str
    target: str = ""


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file that :func:`extract` takes, by its name."""
    return os.path.isfile(path) and os.fspath(path).lower().endswith(SUFFIXES)


def extract(
    archive: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Path:
    """Extracts a tar file (plain, gzip, bzip2 or xz) or a zip file.

    All members are looked at before anything is written. They go into ``<folder>.partial``, which is renamed at the
    end; the rest of a killed run goes when the next one begins.

    Args:
        archive: The file.
        folder: Where its members go; must not exist, or be empty.
        progress: Called with the number of members done and their total.

    Returns:
        The folder.

    Raises:
        InputError: If the archive is missing or damaged, ``folder`` holds something, or a member has an absolute path
            or one with ``..``, leads out of the folder by a link, is a device or a pipe, or comes twice.
    """
    source, target = Path(archive), Path(folder)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: is there already; name another folder to extract into")
    is_zip = zipfile.is_zipfile(source)
    with _damage_named(source):
        total = _check(source, _zip_members(source) if is_zip else _tar_members(source))
    partial = target.with_name(f"{target.name}.partial")
    marker = partial / ".spkfast-extract"
    if partial.exists() and not marker.is_file():
        raise InputError(f"{partial}: is in the way; move it")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    marker.touch()
    try:
        with _damage_named(source):
            for done, _ in enumerate((_extract_zip if is_zip else _extract_tar)(source, partial / "members"), start=1):
                progress(done, total)
        (partial / "members").mkdir(exist_ok=True)
        os.replace(partial / "members", target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check(archive: Path, members: Iterator[_Member]) -> int:
    """Refuses what must not be extracted and returns the number of members.

    Paths are judged by their letters alone, which is right as long as none goes through a link.
    """
    kinds: dict[str, str] = {}
    links: dict[str, str] = {}
    above: set[str] = set()
    count = 0
    for name, kind, target in members:
        count += 1
        said = f"{archive}: the member {name!r}"
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{said} would be written outside the folder; nothing was extracted")
        if kind == "other":
            raise InputError(f"{said} is no file, folder or link; nothing was extracted")
        path = os.path.normpath(name)
        if path in kinds and not kind == kinds[path] == "folder":
            raise InputError(f"{said} comes twice; nothing was extracted")
        if kind == "hard link" and kinds.get(os.path.normpath(target)) != "file":
            raise InputError(f"{said} links to {target!r}, which is no earlier file; nothing was extracted")
        kinds[path] = kind
        if kind == "link":
            links[path] = target
        while (path := os.path.dirname(path)) and path not in above:
            above.add(path)
    for path in sorted(above):
        if kinds.get(path, "folder") != "folder":
            raise InputError(f"{archive}: members lie below {path!r}, which is no folder; nothing was extracted")
    for path, target in links.items():
        if target.startswith("/") or not _stays(target, links):
            raise InputError(f"{archive}: the link {path!r} leads out of the folder; nothing was extracted")
    return count


def _stays(target: str, links: Container[str]) -> bool:
    """Whether a path from the root never leaves it and goes through no link, whose target its letters do not tell."""
    place: list[str] = []
    parts = [part for part in target.split("/") if part not in ("", ".")]
    for number, part in enumerate(parts):
        if part != "..":
            place.append(part)
        elif place:
            place.pop()
        else:
            return False
        if "/".join(place) in links and number + 1 < len(parts):
            return False
    return True


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive) as tar:
        for member in _each(tar):
            if member.isreg():
                yield _Member(member.name, "file")
            elif member.isdir():
                yield _Member(member.name, "folder")
            elif member.issym():
                yield _Member(member.name, "link", os.path.join(os.path.dirname(member.name), member.linkname))
            elif member.islnk():
                yield _Member(member.name, "hard link", member.linkname)
            else:
                yield _Member(member.name, "other")


def _extract_tar(archive: Path, folder: Path) -> Iterator[None]:
    with tarfile.open(archive) as tar:
        for member in _each(tar):
            tar.extract(member, folder, filter="data")
            yield


def _each(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members of an open tar file, forgotten one by one: a million of them take a gigabyte."""
    while (member := tar.next()) is not None:
        yield member
        tar.members = []  # type: ignore[attr-defined]
    # A header that is damaged looks like the end; and compressed files have their checksum behind that.
    while rest := tar.fileobj.read(1 << 20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("members after the end, or a damaged header")


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            mode = member.external_attr >> 16
            plain = not stat.S_IFMT(mode) or stat.S_ISREG(mode)
            kind = "folder" if member.is_dir() else "file" if plain else "other"
            yield _Member(member.filename, kind)


def _extract_zip(archive: Path, folder: Path) -> Iterator[None]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            file.extract(member, folder)
            yield


@contextlib.contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; those of gzip and bzip2 have none
            raise
        raise InputError(f"{archive}: not an archive, or a damaged one ({' '.join(str(error).split())})") from error
