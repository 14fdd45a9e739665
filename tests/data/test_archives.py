"""Archives: what is extracted, and that nothing is where a member would leave the folder."""

import io
import os
import tarfile
import zipfile

import numpy as np
import pytest

from spkfast.data.archives import extract, is_archive
from spkfast.errors import InputError

CONTENT = {"wav/a/1.wav": b"one" * 1000, "wav/a/2.wav": b"two", "wav/b/語り.wav": b"", "./c/3.wav": b"three"}


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write(path, content, members=()):
    """An archive of files with this content and of other members after them."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in content.items():
                file.writestr(name, data)
        return path
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as file:
        for name, data in content.items():
            info = member(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for info in members:
            file.addfile(info)
    return path


def found(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip"])
def test_extracts(tmp_path, suffix):
    archive = write(tmp_path / f"x.{suffix}", CONTENT)
    done = []
    assert extract(archive, tmp_path / "deep/out", progress=lambda *p: done.append(p)) == tmp_path / "deep/out"
    assert found(tmp_path / "deep/out") == {name.removeprefix("./"): data for name, data in CONTENT.items()}
    assert done == [(k, 4) for k in (1, 2, 3, 4)] and is_archive(archive)
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert not is_archive(tmp_path) and not is_archive(tmp_path / "none.tar")


def test_links_that_stay_inside(tmp_path):
    links = [
        member("wav/a/soft", tarfile.SYMTYPE, "../b/語り.wav"),
        member("folder", tarfile.SYMTYPE, "wav/a"),
        member("chain", tarfile.SYMTYPE, "folder"),
        member("hard", tarfile.LNKTYPE, "wav/a/1.wav"),
        member("wav", tarfile.DIRTYPE),
        member("empty", tarfile.DIRTYPE),
        member("empty", tarfile.DIRTYPE),
    ]
    out = extract(write(tmp_path / "x.tar", CONTENT, links), tmp_path / "out")
    assert (out / "wav/a/soft").resolve() == out / "wav/b/語り.wav"
    assert (out / "chain/1.wav").read_bytes() == (out / "hard").read_bytes() == CONTENT["wav/a/1.wav"]
    assert (out / "empty").is_dir()


OUTSIDE, LEADS_OUT = "would be written outside the folder", "leads out of the folder"
SOFT, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize(
    ("members", "name", "message"),
    [
        ([member("../evil")], "../evil", OUTSIDE),
        ([member("a/../../evil")], "a/../../evil", OUTSIDE),
        ([member("/tmp/evil")], "/tmp/evil", OUTSIDE),
        ([member("evil", SOFT, "/etc/passwd")], "evil", LEADS_OUT),
        ([member("a/evil", SOFT, "../../x")], "a/evil", LEADS_OUT),
        ([member("a/evil", SOFT, "../b/../..")], "a/evil", LEADS_OUT),
        # By letters this stays inside; but "a/b/up" is the root, and its parent is not.
        ([member("a/b/up", SOFT, "../.."), member("evil", SOFT, "a/b/up/../x")], "evil", LEADS_OUT),
        ([member("down", SOFT, "wav"), member("down/evil")], "down", "members lie below"),
        ([member("down/evil"), member("down", SOFT, "wav")], "down", "members lie below"),
        ([member("wav/a/1.wav/evil")], "wav/a/1.wav", "members lie below"),
        ([member("evil", HARD, "../x")], "evil", "no earlier file"),
        ([member("evil", HARD, "later"), member("later")], "evil", "no earlier file"),
        # A link of two levels up is harmless where it is, and leads out from the root.
        ([member("a/b/up", SOFT, "../../c"), member("evil", HARD, "a/b/up")], "evil", "no earlier file"),
        ([member("evil", tarfile.CHRTYPE)], "evil", "is no file, folder or link"),
        ([member("evil", tarfile.FIFOTYPE)], "evil", "is no file, folder or link"),
        ([member("wav/a/1.wav")], "wav/a/1.wav", "comes twice"),
        ([member("./wav//a/1.wav")], "./wav//a/1.wav", "comes twice"),
        ([member("wav/a/1.wav", tarfile.DIRTYPE)], "wav/a/1.wav", "comes twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name_before_anything_is_written(tmp_path, members, name, message):
    archive = write(tmp_path / "x.tar", CONTENT, members)
    with pytest.raises(InputError, match=message) as caught:
        extract(archive, tmp_path / "out")
    assert repr(name) in str(caught.value) and "nothing was extracted" in str(caught.value)
    assert os.listdir(tmp_path) == ["x.tar"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refused_zip_members(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    for name, message in (("../evil", OUTSIDE), ("/evil", OUTSIDE), (link, "no file, folder"), ("ok", "comes twice")):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
            file.writestr("ok", b"ok")
            file.writestr(name, b"evil")
        with pytest.raises(InputError, match=message):
            extract(tmp_path / "x.zip", tmp_path / "out")
        assert os.listdir(tmp_path) == ["x.zip"]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "no archive"])
def test_damaged_archives(tmp_path, suffix, damage):
    noise = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    archive = write(tmp_path / f"x.{suffix}", {"a": noise, "b": noise})
    data = bytearray(archive.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 4]
    elif damage == "no archive":
        data = noise[:5000]
    else:
        data[len(data) // 4 : len(data) // 4 + 5000] = bytes(5000)
        if suffix == "tar":  # has no checksum over the content, only over its headers
            data[data.index(b"b" + bytes(99))] = ord("c")
    archive.write_bytes(data)
    with pytest.raises(InputError, match=rf"x\.{suffix}: not an archive, or a damaged one") as caught:
        extract(archive, tmp_path / "out")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == [f"x.{suffix}"]


def test_places(tmp_path):
    archive = write(tmp_path / "x.tar", CONTENT)
    with pytest.raises(InputError, match=r"none\.tar: no such file"):
        extract(tmp_path / "none.tar", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter").touch()
    with pytest.raises(InputError, match="full: is there already"):
        extract(archive, tmp_path / "full")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(InputError, match=r"out\.partial: is in the way"):
        extract(archive, tmp_path / "out")
    (tmp_path / "out.partial/.spkfast-extract").touch()  # as a killed run leaves it
    (tmp_path / "out.partial/rest").touch()
    extract(archive, tmp_path / "out")
    assert found(tmp_path / "out").keys() == {name.removeprefix("./") for name in CONTENT}
    assert (tmp_path / "full/letter").exists() and not (tmp_path / "out.partial").exists()


def test_interrupted_run_cleans_up(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(write(tmp_path / "x.zip", CONTENT), tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path) == ["x.zip"]
