"""Embeddings on disk: each format comes back as it was written, other programs read it, and damage is told by name."""

import importlib.util
import json
import os
import re
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from spkfast.data import embeddings as module
from spkfast.data.embeddings import (
    StoredEmbeddings,
    embedding_files,
    keeps_origin,
    key_obstacle,
    read_embeddings,
    write_embeddings,
)
from spkfast.errors import InputError

KEYS = ["s0/r0/a.wav", "s0/r1/ä.wav", "s1/r0/a.wav"]
KINDS = ("x.safetensors", "x.npz", "x.npy", "x.parquet", "x.ark", "x.scp", "x")
FOREIGN_BYTES = ("x.safetensors", "x.npz", "x.npy", "x.parquet", "x.ark")
PACKAGES = {".parquet": "pyarrow", ".ark": "kaldiio", ".scp": "kaldiio", ".safetensors": "safetensors"}


@pytest.fixture(params=KINDS)
def path(request, tmp_path):
    return checked(tmp_path / request.param)


def checked(path):
    package = PACKAGES.get(path.suffix)
    if package:
        pytest.importorskip(package)
    return path


def some(keys=KEYS, **known):
    return StoredEmbeddings(keys, np.random.default_rng(0).normal(size=(len(keys), 5)).astype(np.float32), **known)


def error_of(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_comes_back(path):
    want = some(model="m", frontend="f", sources=["/a b.wav", "/b.wav", "/c.wav"])
    write_embeddings(path, want)
    got = read_embeddings(path)
    assert got.keys == KEYS and got.embeddings.dtype == np.float32
    np.testing.assert_array_equal(got.embeddings, want.embeddings)
    known = (want.model, want.frontend, want.sources) if keeps_origin(path) else (None, None, None)
    assert (got.model, got.frontend, got.sources) == known
    assert sorted(path.parent.iterdir()) == sorted(embedding_files(path))


def test_replaces_a_file(path):
    write_embeddings(path, some())
    if path.suffix:
        write_embeddings(path, some(["other", "names"]))
        assert read_embeddings(path).keys == ["other", "names"]
    else:
        assert "is a folder that holds something" in error_of(write_embeddings, path, some())
        assert read_embeddings(path).keys == KEYS


def test_other_users_may_read_what_is_written(path):
    write_embeddings(path, some())
    mask = os.umask(0)
    os.umask(mask)
    for file in (file for file in path.parent.rglob("*") if file.is_file()):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file


def test_nothing_is_left_of_what_a_full_disk_cuts_off(path):
    before = some(["before"])
    if path.suffix:
        write_embeddings(path, before)
    there = sorted(path.parent.iterdir())
    noise = np.random.default_rng(0).normal(size=(1, 100_000))  # which no format compresses
    many = StoredEmbeddings(["key"], noise)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            write_embeddings(path, many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.parent.iterdir()) == there
    if path.suffix:
        np.testing.assert_array_equal(read_embeddings(path).embeddings, before.embeddings)


@pytest.mark.parametrize("name", FOREIGN_BYTES)
def test_damage_is_told(tmp_path, name):
    path = checked(tmp_path / name)
    write_embeddings(path, some())
    whole = path.read_bytes()
    for content in (b"", b"not embeddings\n" * 20, whole[: len(whole) // 2], whole[:-3]):
        path.write_bytes(content)
        assert error_of(read_embeddings, path).startswith(f"{path}: ")
    path.unlink()
    assert error_of(read_embeddings, path) == f"{path}: no such file"


@pytest.mark.parametrize("name", ["x.safetensors", "x.npy"])
def test_reading_a_mapped_file_leaves_the_matrix_on_disk(tmp_path, name):
    path, rows = checked(tmp_path / name), 50_000
    stored = StoredEmbeddings([str(i) for i in range(rows)], np.ones((rows, 192), np.float32))
    write_embeddings(path, stored)
    read_embeddings(path)  # loads libraries
    before = mapped_bytes()
    got = read_embeddings(path)
    read = mapped_bytes() - before
    got.check_finite()
    touched = mapped_bytes() - before
    assert read < stored.embeddings.nbytes / 3 and touched > stored.embeddings.nbytes * 0.9
    got.embeddings[0] = 7.0
    assert read_embeddings(path).embeddings[0, 0] == 1.0


def mapped_bytes():
    """Resident pages of files."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")


def test_rows():
    stored = some()
    for keys in ([KEYS[2], KEYS[0], KEYS[2]], np.array([KEYS[2], KEYS[0], KEYS[2]])):
        rows = stored.rows(keys)
        assert rows.dtype == np.int64 and rows.tolist() == [2, 0, 2]
    assert KEYS[1] in stored and "s9" not in stored and len(stored) == 3
    assert error_of(stored.rows, [KEYS[0], "s0/r0/b.wav", "s9"]) == (
        "'s0/r0/b.wav' has no embedding (did you mean 's0/r0/a.wav'?)"
    )
    many = some([f"key{i}" for i in range(module._MOST_TO_COMPARE + 1)])
    assert error_of(many.rows, ["key"]) == "'key' has no embedding; the first key is 'key0'"


@pytest.mark.parametrize(
    ("keys", "embeddings", "sources", "error"),
    [
        (["a", "b", "a"], np.ones((3, 2)), None, "the key 'a' comes twice"),
        (["a"], np.ones((2, 2)), None, "keys have shape (1,), embeddings (2, 2); expected (U,) and (U, E)"),
        (["a"], np.ones(1), None, "keys have shape (1,), embeddings (1,); expected (U,) and (U, E)"),
        ([], np.ones((0, 2)), None, "holds no embeddings: their shape is (0, 2)"),
        (["a"], np.ones((1, 0)), None, "holds no embeddings: their shape is (1, 0)"),
        (["a"], np.ones((1, 2), int), None, "embeddings must be floating, got int64"),
        (["a"], np.ones((1, 2)), [], "there are 0 sources of 1 embeddings"),
    ],
)
def test_bad_contents(keys, embeddings, sources, error):
    assert error_of(lambda: StoredEmbeddings(keys, embeddings, sources=sources)) == error


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_written(path, value):
    stored = some()
    stored.embeddings[1, 3] = value
    assert error_of(write_embeddings, path, stored) == (
        f"{path}: the embedding of 's0/r1/ä.wav' is not finite; nothing was written"
    )
    assert not list(path.parent.iterdir())


def test_values_too_large_for_float32_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", keys=["a", "b"], embeddings=[[1.0], [1e300]])
    assert error_of(read_embeddings, tmp_path / "x.npz") == f"{tmp_path}/x.npz: the embedding of 'b' is not finite"


@pytest.mark.parametrize(
    ("name", "key", "error"),
    [
        ("x.npz", "a\0", "holds NUL, which an npz file cannot keep in a key"),
        ("x.safetensors", "a\0b", "holds NUL, which a safetensors file cannot keep in a key"),
        ("x.npy", "a\nb", "holds an end of a line, which an npy file cannot keep in a key"),
        ("x.ark", "a b", "holds white space, which a Kaldi archive cannot keep in a key"),
        ("x", "a/../../b", "holds white space, or leads out of the folder, which a folder of npy files cannot"),
        ("x", "/a", "holds white space, or leads out of the folder, which a folder of npy files cannot"),
        ("x.npz", "", "is an empty key"),
        ("x.parquet", "\udcff", "is not UTF-8"),
    ],
)
def test_keys_that_a_format_cannot_keep(tmp_path, name, key, error):
    path = checked(tmp_path / name)
    assert key_obstacle(path, key).startswith(error)
    assert error_of(write_embeddings, path, some([key])).startswith(f"{path}: {key!r} {error}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("x.ark", "x.scp", "x")])
def test_keys_with_spaces(tmp_path, name):
    path = checked(tmp_path / name)
    keys = ["a b", " a", "a\tb", "日本"]
    write_embeddings(path, some(keys))
    assert read_embeddings(path).keys == keys


def test_unknown_suffix_and_missing_packages(tmp_path, monkeypatch):
    for function in (read_embeddings, embedding_files, keeps_origin):
        assert error_of(function, "x.pkl") == (
            "x.pkl: embeddings are kept in files that end with .safetensors, .npz, .npy, .parquet, .ark, .scp, or in a "
            "folder without a suffix"
        )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package, extra in (("x.parquet", "pyarrow", "parquet"), ("x.scp", "kaldiio", "kaldi")):
        error = f"{tmp_path / name}: needs the package {package!r}: pip install 'spkfast[{extra}]'"
        assert error_of(read_embeddings, tmp_path / name) == error
        assert error_of(write_embeddings, tmp_path / name, some()) == error


def test_npz_of_another_program(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, keys=np.array([b"a", b"b"]), embeddings=np.ones((2, 3)), more=np.zeros(2))
    got = read_embeddings(path)
    assert (got.keys, got.model, got.sources) == (["a", "b"], None, None) and got.embeddings.dtype == np.float32
    for arrays, error in (
        ({"numbers": np.ones(2)}, "holds no arrays 'keys' and 'embeddings'"),
        ({"keys": np.array([["a"]]), "embeddings": np.ones((1, 3))}, "keys must have shape (U,), got (1, 1)"),
        ({"keys": np.array(["a", "a"]), "embeddings": np.ones((2, 3))}, "the key 'a' comes twice"),
        ({"keys": np.array(["a", None]), "embeddings": np.ones((2, 3))}, "not an npz file, or a damaged one"),
    ):
        np.savez(path, **arrays)
        assert error_of(read_embeddings, path).startswith(f"{path}: {error}")


def test_npy_of_another_program(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3)))
    assert "x.keys.txt is missing" in error_of(read_embeddings, path)
    names = tmp_path / "x.keys.txt"
    names.write_bytes(b"a\r\nb b")  # without an end of the last line
    got = read_embeddings(path)
    assert got.keys == ["a", "b b"] and got.embeddings.tolist() == [[0, 1, 2], [3, 4, 5]]
    names.write_text("a\nb\nc\n")
    assert "keys have shape (3,), embeddings (2, 3)" in error_of(read_embeddings, path)
    names.write_bytes(b"a\n\xff\n")
    assert "0xff" in error_of(read_embeddings, path)
    names.write_text("a\nb\n")
    np.save(path, np.array([{"a": 1}, 2]), allow_pickle=True)
    assert "not an npy file, or a damaged one" in error_of(read_embeddings, path)


def test_safetensors_of_another_program(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    save_file({"weight": np.ones((2, 3))}, path)
    assert "holds no tensors 'embeddings' and 'keys' written by spkfast" in error_of(read_embeddings, path)
    tensors = {"embeddings": np.ones((1, 3), np.float32), "keys": np.frombuffer(b"a", np.uint8)}
    save_file(tensors, path, metadata={"spkfast": json.dumps({"format_version": 9})})
    assert "format version 9, this spkfast reads version 1" in error_of(read_embeddings, path)
    save_file(tensors, path, metadata={"spkfast": "[]"})
    assert "not a safetensors file, or a damaged one" in error_of(read_embeddings, path)


def test_parquet_of_another_program(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"

    def write(embedding, key=("a", "b")):
        parquet.write_table(pyarrow.table({"key": list(key), "embedding": embedding}), path, row_group_size=1)

    write(pyarrow.array([[1.0, 2.0], [3.0, 4.0]], pyarrow.list_(pyarrow.float64())))
    assert read_embeddings(path).embeddings.tolist() == [[1, 2], [3, 4]]
    for embedding, error in (
        ([[1.0, 2.0], [3.0]], "b: has 1 values, a has 2"),
        ([[1.0, 2.0], None], "the column 'embedding' has 1 rows without a value"),
        ([[1.0, 2.0], [3.0, None]], "the embeddings have 1 missing values"),
        ([[1, 2], [3, 4]], "embeddings must be floating, got int64"),
        ([1.0, 2.0], "not a Parquet file, or a damaged one"),
    ):
        write(embedding)
        assert error_of(read_embeddings, path).startswith(f"{path}: {error}")
    write([[1.0], [2.0]], key=("a", "a"))
    assert error_of(read_embeddings, path) == f"{path}: the key 'a' comes twice"
    parquet.write_table(pyarrow.table({"id": ["a"]}), path)
    assert error_of(read_embeddings, path) == f"{path}: holds no columns 'key' and 'embedding', but id"


def test_kaldi_reads_what_is_written(tmp_path, monkeypatch):
    kaldiio = pytest.importorskip("kaldiio")
    monkeypatch.chdir(tmp_path)
    stored = some()
    write_embeddings("x.scp", stored)
    for vectors in (dict(kaldiio.load_ark("x.ark")), dict(kaldiio.load_scp("x.scp"))):
        assert list(vectors) == KEYS and vectors[KEYS[1]].dtype == np.float32
        np.testing.assert_array_equal(np.stack(list(vectors.values())), stored.embeddings)


def test_kaldi_files_of_other_programs(tmp_path):
    kaldiio = pytest.importorskip("kaldiio")
    path, script = tmp_path / "x.ark", tmp_path / "x.scp"
    vectors = {"a": np.array([1.0, 2.0]), "b": np.array([3.0, 4.0], np.float32), "c": np.array([5.0, 6.0])}
    kaldiio.save_ark(str(path), vectors, scp=str(script))
    assert read_embeddings(path).embeddings.tolist() == [[1, 2], [3, 4], [5, 6]]

    # Out of order, from two archives, one of which is a single vector.
    kaldiio.save_mat(str(tmp_path / "one.ark"), vectors["b"])
    a, _, c = script.read_text().splitlines()
    script.write_text(f"{c}\nb {tmp_path}/one.ark\n{a}\n")
    got = read_embeddings(script)
    assert got.keys == ["c", "b", "a"] and got.embeddings.tolist() == [[5, 6], [3, 4], [1, 2]]

    # What is not there at its path may lie beside the script file.
    moved = (tmp_path / "moved").with_suffix(".scp")
    moved.write_text(script.read_text().replace(str(tmp_path), "/nowhere"))
    np.testing.assert_array_equal(read_embeddings(moved).embeddings, got.embeddings)
    moved.write_text("a /nowhere/else.ark:4\n")
    assert error_of(read_embeddings, moved) == f"{moved}: a: there is neither /nowhere/else.ark nor {tmp_path}/else.ark"


def test_kaldi_files_that_are_refused(tmp_path):
    kaldiio = pytest.importorskip("kaldiio")
    path, script = tmp_path / "x.ark", tmp_path / "x.scp"
    one, two = np.ones(2, np.float32), np.ones(3, np.float32)
    for vectors, options, error in (
        ({"a": one, "b": two}, {}, "b: has 3 values, a has 2"),
        ({"a": np.ones((2, 2), np.float32)}, {}, "a: expected a vector, got a matrix of shape (2, 2)"),
        ({"a": one}, {"text": True}, "a: no binary vector at byte 2 (text archives are not read), or a damaged one"),
        ({"a": one}, {"write_function": "pickle"}, "a: no binary vector at byte 2"),
        ({"a": np.array([1, np.nan], np.float32)}, {}, "the embedding of 'a' is not finite"),
        ({}, {}, "holds no embeddings"),
    ):
        kaldiio.save_ark(str(path), vectors, **options)
        assert error_of(read_embeddings, path).startswith(f"{path}: {error}")
    kaldiio.save_ark(str(path), {"a": one})
    path.write_bytes(path.read_bytes() * 2)
    assert error_of(read_embeddings, path) == f"{path}: the key 'a' comes twice"
    path.write_bytes(path.read_bytes()[:-4])  # at the end of a value
    assert error_of(read_embeddings, path) == f"{path}: a: the file is cut off in its vector"
    path.write_bytes(b"\xff \0BFV \4")
    assert error_of(read_embeddings, path).startswith(f"{path}: not a Kaldi archive, or a damaged one")
    ran = tmp_path / "ran"
    for line, error in (
        (f"a touch {ran} |", "is a command or a range"),
        (f"a |touch {ran}", "is a command or a range"),
        (f"a {path}:2[0:1]", "is a command or a range"),
        ("a", "line 1: expected 2 columns 'key path', got 1"),
    ):
        script.write_text(line + "\n")
        assert error in error_of(read_embeddings, script)
    assert not ran.exists()


def test_folder_of_npy_files(tmp_path):
    stored, path = some(), tmp_path / "x"
    write_embeddings(path, stored)
    for line, key, row in zip((path / "npy.scp").read_text().splitlines(), KEYS, stored.embeddings, strict=True):
        name, file = line.split()
        assert name == key and file == str(path / f"{key}.npy")
        np.testing.assert_array_equal(np.load(file), row)
    (path / f"{KEYS[0]}.npy").unlink()
    with pytest.raises(FileNotFoundError):
        read_embeddings(path)
    assert "holds no npy.scp" in error_of(read_embeddings, tmp_path)


def test_a_file_that_must_not_be_read_is_no_damaged_one(tmp_path):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(IsADirectoryError):
        read_embeddings(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.ark", "x.npy"])
def test_an_old_companion_never_stands_beside_a_new_file(tmp_path, name, monkeypatch):
    """The names of other embeddings would be read with them."""
    path = checked(tmp_path / name)
    write_embeddings(path, some())
    first, second = embedding_files(path)
    replace = type(path).replace

    def interrupted(self, target):
        if target == second:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(type(path), "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(path, some(["other"]))
    assert first.exists() and not second.exists() and list(tmp_path.iterdir()) == [first]


def test_reading_imports_no_torch(tmp_path):
    import subprocess

    write_embeddings(tmp_path / "x.npz", some())
    code = (
        "import sys; from spkfast.data.embeddings import read_embeddings; "
        f"read_embeddings({str(tmp_path / 'x.npz')!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_page_runs(tmp_path, monkeypatch):
    """The examples of docs/embeddings.md, one after another."""
    pytest.importorskip("usearch")
    page = Path(__file__).parents[2] / "docs/embeddings.md"
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(code, names)
    np.testing.assert_array_equal(names["stored"].embeddings, names["vectors"])
    assert names["rows"].tolist() == [2, 1] and names["groups"]["amy"].tolist() == [0, 1]
    assert names["found"].names == [["amy"], ["amy"]] and len(names["index"]) == 1
