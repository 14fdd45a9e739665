"""Lists in the VoxCeleb format: what is read, and where a line is wrong."""

import pytest

from spkfast.data.lists import Trial, Utterance, read_train_list, read_trials, speaker_of
from spkfast.errors import InputError


def write(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_reads_both_kinds(tmp_path):
    assert read_train_list(write(tmp_path, "id1 id1/a/1.flac\n\nid2\tid2/b/2.flac  \r\n")) == [
        Utterance("id1", "id1/a/1.flac"),
        Utterance("id2", "id2/b/2.flac"),
    ]
    assert read_trials(write(tmp_path, "1 id1/a/1.wav id1/b/1.wav\n0 id1/a/1.wav id2/a/1.wav")) == [
        Trial(True, "id1/a/1.wav", "id1/b/1.wav"),
        Trial(False, "id1/a/1.wav", "id2/a/1.wav"),
    ]
    assert speaker_of("id1/a/1.wav") == "id1"


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_train_list, "id1 a.wav\nid1\n", r"list\.txt:2: expected 2 columns 'speaker path', got 1"),
        (read_train_list, "id1 a.wav b.wav\n", r"list\.txt:1: expected 2 columns 'speaker path', got 3"),
        (read_trials, "\n\n1 a.wav\n", r"list\.txt:3: expected 3 columns 'label enrol test', got 2"),
        (read_trials, "1 a b\ntrue a b\n", r"list\.txt:2: the label must be 0 or 1, got 'true'"),
        (read_trials, "", r"list\.txt: the list is empty"),
        (read_train_list, "\n \n", r"list\.txt: the list is empty"),
        (read_train_list, b"\xff\xd8\xff\xe0", r"list\.txt: not a text file"),
    ],
)
def test_names_file_and_line(tmp_path, read, content, message):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path, content))


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: no such list file"):
        read_trials(tmp_path / "none.txt")
