"""Lists in the VoxCeleb format: what is read, and where a line is wrong."""

import pytest

from spkfast.data import lists
from spkfast.data.lists import Trial, TrialList, Utterance, read_train_list, read_trials, speaker_of, trial_paths
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
    trials = read_trials(write(tmp_path, "1 id1/a/1.wav id1/b/1.wav\n0 id1/a/1.wav id2/a/1.wav"))
    assert trials != list(trials)[:1] and trials != trials[:1] and trials != "no list"
    assert (
        trials
        == list(trials)
        == [
            Trial(True, "id1/a/1.wav", "id1/b/1.wav"),
            Trial(False, "id1/a/1.wav", "id2/a/1.wav"),
        ]
    )
    assert trials.names == ["id1/a/1.wav", "id1/b/1.wav", "id2/a/1.wav"] == trial_paths(trials)
    assert trial_paths(trials[:1]) == trials.names[:2] and list(trials[1:]) == [trials[1]]
    assert speaker_of("id1/a/1.wav") == "id1"


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_train_list, "id1 a.wav\nid1\n", r"list\.txt:2: expected 2 columns 'speaker path', got 1"),
        (read_train_list, "id1 a.wav b.wav\n", r"list\.txt:1: expected 2 columns 'speaker path', got 3"),
        (read_trials, "\n\n1 a.wav\n", r"list\.txt:3: expected 3 columns 'label enrol test', got 2"),
        (read_trials, "1 a b\ntrue a b\n", r"list\.txt:2: the label must be 0 or 1, got 'true'"),
        (read_trials, "a b target\na b\n", r"list\.txt:2: expected 3 columns 'enrol test label', got 2"),
        (read_trials, "a b target\n\na c no\n", r"list\.txt:3: the label must be nontarget or target, got 'no'"),
        (read_trials, "a b\n", r"list\.txt:1: expected 3 columns 'label enrol test', got 2"),
        (read_trials, "0 a b\n\n0 a c\n0 a b\n", r"list\.txt:4: the trial of line 1 again$"),
        (read_trials, "0 a b\n1 a b\n", r"list\.txt:2: the trial of line 1 again, with the other label"),
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


@pytest.mark.parametrize("at_once", [1, 2, 1 << 12])
def test_columns_of_any_form(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(lists, "_LINES_AT_ONCE", at_once)
    for content, options in (
        ("1 a b\n\n0 a c\n0 c b\n", {}),
        ("a b target\n\na c nontarget\nc b nontarget\n", {}),
        ("a b\n\na\tc\n  c b\n", {"labelled": False}),
        ("a b\n\na c\nc b\n", {"labelled": None}),
    ):
        trials = read_trials(write(tmp_path, content), **options)
        assert trials.names == ["a", "b", "c"]
        assert trials.enrol.tolist() == [0, 0, 2] and trials.test.tolist() == [1, 2, 1]
        assert trials.where(1).endswith("list.txt:3")
        if options:
            assert trials.labels is None
            with pytest.raises(InputError, match="the trials have no labels"):
                trials[0]
        else:
            assert trials.labels.tolist() == [True, False, False]


def test_duplicates_may_be_allowed_but_not_contradictions(tmp_path):
    assert len(read_trials(write(tmp_path, "0 a b\n0 a b\n1 a c\n"), duplicates=True)) == 3
    with pytest.raises(InputError, match=r"list\.txt:3: the trial of line 2 again, with the other label"):
        read_trials(write(tmp_path, "0 a b\n0 a b\n1 a b\n"), duplicates=True)
    with pytest.raises(InputError, match=r"expected 2 columns 'enrol test', got 3"):
        read_trials(write(tmp_path, "0 a b\n"), labelled=False)


def test_rows_of_a_matrix(tmp_path):
    trials = read_trials(write(tmp_path, "1 a b\n\n0 a c\n"))
    enrol, test = trials.rows(["c", "b", "a", "x"])
    assert enrol.tolist() == [2, 2] and test.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"^c: .*list\.txt:3 names this path, but it has no embedding"):
        trials.rows(["a", "b"])
    again = TrialList.of(list(trials))
    assert again.names == trials.names and again.labels.tolist() == trials.labels.tolist()
    assert TrialList.of(trials) is trials
    assert [side.tolist() for side in trials.speakers(lambda name: "ab c".index(name) // 2)] == [[0, 0], [0, 1]]


def test_scores_end_lines(tmp_path):
    for content in ("1 a b 0.5\n0 a c -1e-3\n", "a b target 0.5\n\na c nontarget -1e-3\n"):
        trials = read_trials(write(tmp_path, content), scored=True)
        assert trials.scores.tolist() == [0.5, -1e-3] and trials.labels.tolist() == [True, False]
        assert trials[1:].scores.tolist() == [-1e-3]
    assert read_trials(write(tmp_path, "a b 0.5\n"), labelled=None, scored=True).labels is None
    for content, message in (
        ("1 a b 0.5\n0 a c nan\n", r"list\.txt:2: the score must be a finite number, got 'nan'"),
        ("1 a b high\n", "got 'high'"),
        ("1 a b\n", "expected 4 columns 'label enrol test score', got 3"),
    ):
        with pytest.raises(InputError, match=message):
            read_trials(write(tmp_path, content), scored=True)
