"""Manifests of every form: what is read, and where one is wrong."""

from __future__ import annotations

import gzip
import json
import math
import sys
import types

import pytest

from spkfast.data.corpus import Corpus, Entry
from spkfast.data.manifests import read_corpus
from spkfast.errors import InputError


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(corpus):
    """Speaker, id, path, start and length of each utterance, None for a length that only the audio tells."""
    return [(e.speaker, e.id, e.path, e.start, None if math.isnan(e.seconds) else e.seconds) for e in corpus]


def refuse(match, *args, **options):
    with pytest.raises(InputError, match=match) as caught:
        read_corpus(*args, **options)
    assert "\n" not in str(caught.value)


def test_list(tmp_path):
    source = write(tmp_path, "train.txt", "\ufeffid1 id1/a/1.wav\r\n\n  id2\t/abs/é/2.wav \nid1 id1/a/2.wav")
    base = f"{tmp_path}/"
    assert rows(read_corpus(source)) == [
        ("id1", "id1/a/1.wav", base + "id1/a/1.wav", 0, None),
        ("id2", "/abs/é/2.wav", "/abs/é/2.wav", 0, None),
        ("id1", "id1/a/2.wav", base + "id1/a/2.wav", 0, None),
    ]
    assert read_corpus(source, root="/data/vox")[0].path == "/data/vox/id1/a/1.wav"
    assert read_corpus(str(source)).speakers == ["id1", "id2"]


def test_list_without_a_folder_in_its_name(tmp_path, monkeypatch):
    write(tmp_path, "train.txt", "id1 a.wav\n")
    monkeypatch.chdir(tmp_path)
    assert read_corpus("train.txt")[0].path == "a.wav"


def test_any_manifest_may_be_compressed(tmp_path):
    assert read_corpus(write(tmp_path, "list.txt.gz", gzip.compress(b"id1 a.wav\n")))[0].id == "a.wav"
    table = gzip.compress(b"path,speaker\na.wav,s\n")
    assert read_corpus(write(tmp_path, "table.csv.gz", table))[0].speaker == "s"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id1 a.wav\nid1\n", r"train\.txt:2: expected 2 columns 'speaker path', got 1"),
        ("1 a.wav b.wav\n", r"train\.txt:1: expected 2 columns 'speaker path', got 3"),
        ("a.wav id1\n", r"train\.txt:1: expected 'speaker path', got 'path speaker'"),
        ("id1 a.wav\nid1 b.wav\n\nid2 a.wav\n", r"train\.txt:4: the utterance 'a.wav' is there twice, first in line 1"),
        ("id1 http://x/a.wav\n", r"train\.txt:1: 'http://x/a.wav' is an address"),
        ("", r"train\.txt: the manifest is empty"),
        (" \n\n", r"train\.txt: the manifest is empty"),
        (b"id1 a.wav\nid1 \xe9.wav\n", r"train\.txt:2: not UTF-8 text"),
        ("id1 a.wav\n".encode("utf-16"), r"train\.txt:1: not UTF-8 text"),
        (b"id1 a\0.wav\n", r"train\.txt:1: not a text file"),
        ("[\n", r"train\.txt: is one JSON array"),
        ("a/0.tar\na/1.tar\n", r"train\.txt: is a list of shards"),
    ],
)
def test_list_errors(tmp_path, content, message):
    refuse(message, write(tmp_path, "train.txt", content))


def test_what_is_no_manifest(tmp_path):
    refuse("none: no such file or folder", tmp_path / "none")
    refuse(r"a\.flac: is an audio file", write(tmp_path, "a.flac", b"fLaC"))
    refuse(r"wav\.scp: is one file of a Kaldi directory", write(tmp_path, "wav.scp", "u a.wav\n"))
    refuse(r"train\.scp: is one file of a Kaldi directory", write(tmp_path, "train.scp", "u a.wav\n"))
    whole = gzip.compress(b"id1 a.wav\n" * 1000)
    refuse(r"cut\.txt\.gz: cannot be read", write(tmp_path, "cut.txt.gz", whole[: len(whole) // 2]))
    damaged = bytearray(whole)
    damaged[12:16] = b"\xff\xff\xff\xff"
    refuse(r"bad\.txt\.gz: cannot be read", write(tmp_path, "bad.txt.gz", bytes(damaged)))


@pytest.mark.parametrize("address", ["https://host/shards.tar", "http://host/x", "pipe:cat x.tar", "s3://bucket/x"])
def test_addresses_are_streamed(address):
    refuse(r"is streamed \(spkfast.data.streaming\)", address)


def test_tells_where_the_first_file_is_missing(tmp_path):
    source = write(tmp_path, "train.txt", "id1 a.wav\nid1 b.wav\n")
    told = []
    read_corpus(source, warn=told.append)
    assert len(told) == 1 and "a.wav: no such file; relative paths start from" in told[0]
    write(tmp_path, "a.wav", "")
    told.clear()
    read_corpus(source, warn=told.append)
    assert told == []


def test_speakers_go_before_the_manifest(tmp_path):
    source = write(tmp_path, "train.csv", "id,path,spk\nu1,a.wav,x\nu2,b.wav,y\nu3,/abs/c.wav,z\nu4,d.wav,w\n")
    speakers = write(tmp_path, "speakers", f"u1 one\nb.wav two\n/abs/c.wav three\n\nu1 one\n{tmp_path}/z.wav other\n")
    told = []
    corpus = read_corpus(source, speakers=speakers, warn=told.append)
    assert [entry.speaker for entry in corpus] == ["one", "two", "three", "w"]
    assert corpus.speakers == ["one", "three", "two", "w"]
    assert [message for message in told if "1 of 4 utterances are not in it" in message]


def test_speakers_make_up_for_a_manifest_without_them(tmp_path):
    speakers = write(tmp_path, "speakers", "a.wav one\nb c.wav two\n")
    assert [e.speaker for e in read_corpus(write(tmp_path, "list.txt", "a.wav\n"), speakers=speakers)] == ["one"]
    table = write(tmp_path, "t.csv", "path\na.wav\n")
    assert [e.speaker for e in read_corpus(table, speakers=speakers)] == ["one"]
    refuse(r"t\.csv:2: the utterance 'a.wav' has no speaker; name it there or in a file of speakers", table)
    other = write(tmp_path, "u.csv", "path\na.wav\nx.wav\n")
    refuse(r"u\.csv:3: the utterance 'x.wav' has no speaker; name it there or in .*speakers", other, speakers=speakers)


def test_speakers_errors(tmp_path):
    source = write(tmp_path, "train.txt", "x a.wav\n")
    refuse("none: no such file of speakers", source, speakers=tmp_path / "none")
    refuse(r"s1:1: expected 2 columns 'utterance speaker', got 1", source, speakers=write(tmp_path, "s1", "a.wav\n"))
    twice = write(tmp_path, "s2", "a.wav one\na.wav two\n")
    refuse(r"s2:2: 'a.wav' is there twice, first in line 1", source, speakers=twice)
    wrong_way = write(tmp_path, "s3", "one a.wav\n")
    refuse(r"s3: names none of the utterances of .*train.txt", source, speakers=wrong_way)
    refuse(r"s4: the file is empty", source, speakers=write(tmp_path, "s4", ""))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "path,speaker,start,seconds\na.wav,s,1.5,2\n"),
        ("t.csv", '\ufeffDuration, Offset ,WAV,spk_id,text\r\n2.0,1.5,a.wav,s,"one, two\nthree"\r\n'),
        ("t.tsv", "file\tlabel\tdur\toffset\tnote\na.wav\ts\t2\t1.50\t\n"),
        ("t.csv", "audio_filepath;spk;start_seconds;stop_seconds\na.wav;s;1.5;3.5\n"),
        ("t.csv", "path,spk,start_samples,stop_samples,sample_rate\na.wav,s,12000,28000,8000\n"),
        ("t.txt", "path,speaker,start,seconds\na.wav,s,1.5,2\n"),
    ],
)
def test_table(tmp_path, name, content):
    corpus = read_corpus(write(tmp_path, name, content))
    assert rows(corpus) == [("s", "a.wav@1.5+2.0", f"{tmp_path}/a.wav", 1.5, 2.0)]


def test_table_without_segments_and_with_ids(tmp_path):
    content = "ID,wav,spk,start,duration\nu1,a.wav,s,,\n,b.wav,t,,3\nu3,a.wav,s,4,\n"
    assert rows(read_corpus(write(tmp_path, "t.csv", content), root="/r/")) == [
        ("s", "u1", "/r/a.wav", 0, None),
        ("t", "b.wav", "/r/b.wav", 0, 3),
        ("s", "u3", "/r/a.wav", 4, None),
    ]


def test_table_of_speechbrain_counts_samples(tmp_path):
    content = (
        "ID,duration,wav,start,stop,spk_id\n"
        "id1--a--1_3.0_6.0,7.5,/v/id1/a/1.wav,48000,96000,id1\n"
        "id1--a--2,7.5000625,/v/id1/a/2.wav,0,120001,id1\n"
    )
    assert rows(read_corpus(write(tmp_path, "t.csv", content))) == [
        ("id1", "id1--a--1_3.0_6.0", "/v/id1/a/1.wav", 3, 3),
        ("id1", "id1--a--2", "/v/id1/a/2.wav", 0, 7.5000625),
    ]


def test_table_of_3d_speaker_counts_seconds(tmp_path):
    content = "ID,dur,path,start,stop,spk\nu_3.0_6.0,7.5,/v/1.wav,3.0,6.0,s\nu_6.0_7.5,7.5,/v/1.wav,6.0,7.5,s\n"
    assert rows(read_corpus(write(tmp_path, "t.csv", content))) == [
        ("s", "u_3.0_6.0", "/v/1.wav", 3, 3),
        ("s", "u_6.0_7.5", "/v/1.wav", 6, 1.5),
    ]


def test_length_beside_a_stop_may_be_that_of_the_segment(tmp_path):
    content = "path,spk,start,stop_seconds,duration\na.wav,s,5,8,3\na.wav,s,5,8,60\n"
    refuse("twice, first in line 2", write(tmp_path, "t.csv", content))
    assert rows(read_corpus(write(tmp_path, "t.csv", content[: content.index("a.wav,s,5,8,60")])))[0][3:] == (5, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,spk\na.wav,s\nb.wav\n", r"t\.csv:3: expected 2 columns as in the header, got 1"),
        ('path,spk,text\na.wav,s,"x\ny"\nb.wav,s\n', r"t\.csv:4: expected 3 columns as in the header, got 2"),
        ("path,spk\na.wav,\n", r"t\.csv:2: the utterance 'a.wav' has no speaker"),
        ("path,spk\n,s\n", r"t\.csv:2: 'path' is empty"),
        ("pth,spk\na.wav,s\n", r"t\.csv:1: no column or key for the audio file \(did you mean 'path'\?\)"),
        ("path,wav,spk\na,b,s\n", r"t\.csv:1: 'path' and 'wav' both name the path"),
        ("path,speaker,label\na,b,s\n", r"t\.csv:1: 'speaker' and 'label' both name the speaker"),
        ("path,Path,spk\na,b,s\n", r"t\.csv:1: a column is there twice"),
        ("path,spk,start\na.wav,s,-1\n", r"t\.csv:2: 'start' must be a finite number, at least 0, got '-1'"),
        ("path,spk,start\na.wav,s,nan\n", r"t\.csv:2: 'start' must be a finite number"),
        ("path,spk,start\na.wav,s,1_0\n", r"t\.csv:2: 'start' must be a finite number"),
        ("path,spk,dur\na.wav,s,inf\n", r"t\.csv:2: 'dur' must be a finite number"),
        ("path,spk,dur\na.wav,s,3s\n", r"t\.csv:2: 'dur' must be a finite number, at least 0, got '3s'"),
        ("path,spk,dur\na.wav,s,0\n", r"t\.csv:2: 'dur' must be above 0"),
        ("path,spk,start,stop\na.wav,s,0,3\n", r"t\.csv:1: 'stop' may be seconds or samples; name it stop_seconds"),
        ("path,spk,start,End\na.wav,s,0,3\n", r"t\.csv:1: 'End' may be seconds or samples"),
        ("path,spk,start,stop_samples\na.wav,s,0,3\n", r"t\.csv:1: 'start' and 'stop_samples' have two units"),
        ("path,spk,start_samples\na.wav,s,0\n", r"t\.csv:1: positions in samples need a column sample_rate"),
        ("path,spk,start_samples,sample_rate\na.wav,s,0.5,8000\n", r"t\.csv:2: 'start_samples' must be a whole number"),
        ("path,spk,start_samples,sample_rate\na.wav,s,0,0\n", r"t\.csv:2: 'sample_rate' must be a rate in Hz"),
        ("path,spk,start_samples,sample_rate\na.wav,s,0,\n", r"t\.csv:2: 'sample_rate' must be a rate in Hz"),
        (
            "path,spk,start,stop_seconds\na.wav,s,3,3\n",
            r"t\.csv:2: the segment ends at 3 s, not after its start at 3 s",
        ),
        (
            "ID,duration,wav,start,stop,spk_id\nu,7.5,a.wav,0,3,s\n",
            r"t\.csv:2: the segment has 3 samples; if these are",
        ),
        (
            "ID,duration,wav,start,stop,spk_id\nu,7.5,a.wav,0,3.5,s\n",
            r"t\.csv:2: 'stop' must be a whole number of samples",
        ),
        (
            "ID,duration,wav,start,stop,spk_id\nu,2,a.wav,0,48000,s\n",
            r"t\.csv:2: the segment ends at 3 s, 'duration' says",
        ),
        (
            "ID,dur,path,start,stop,spk\nu,7.5,a.wav,0,48000,s\n",
            r"t\.csv:2: the segment ends at 48000 s, 'dur' says 7.5 s",
        ),
        ("id,path,spk\nu,a.wav,s\nu,b.wav,s\n", r"t\.csv:3: the utterance 'u' is there twice, first in line 2"),
        ('path,spk\n"a.wav,s\n', r"t\.csv:2: not a table"),
        ("path,spk\nsox a.wav - |,s\n", r"t\.csv:2: 'sox a.wav - \|' is a command"),
        ("path,spk\n", r"t\.csv: the manifest is empty"),
        ("", r"t\.csv: the manifest is empty"),
        (b"path,spk\na.wav,\xff\n", r"t\.csv:2: not UTF-8 text"),
    ],
)
def test_table_errors(tmp_path, content, message):
    refuse(message, write(tmp_path, "t.csv", content))


@pytest.mark.parametrize("name", ["m.json", "m.jsonl", "raw.list"])
def test_json_lines(tmp_path, name):
    content = (
        '{"audio_filepath": "a.wav", "offset": 1.5, "duration": 2.0, "label": "s"}\n'
        '{"audio_filepath": "b.wav", "offset": null, "duration": 4, "label": 7, "text": "-"}\n'
        '  {"key": "u3", "wav": "/v/c\\u00a0d.wav", "spk": "\\u00e9"}\n'
    )
    assert rows(read_corpus(write(tmp_path, name, content))) == [
        ("s", "a.wav@1.5+2.0", f"{tmp_path}/a.wav", 1.5, 2),
        ("7", "b.wav", f"{tmp_path}/b.wav", 0, 4),
        ("é", "u3", "/v/c\u00a0d.wav", 0, None),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"path": "a", "spk": "s"}\n{"path": "b", "spk": "s"\n', r"m\.json:2: not a JSON object in one line"),
        ('{\n"path": "a"}\n', r"m\.json:1: not a JSON object in one line"),
        ('{"path": "a", "spk": "s"}\n[1]\n', r"m\.json:2: expected a JSON object, got list"),
        ('{"spk": "s"}\n', r"m\.json:1: no column or key for the audio file; expected one of path, wav"),
        ("{}\n", r"m\.json:1: no column or key for the audio file.* got none"),
        ('{"path": "a"}\n', r"m\.json:1: the utterance 'a' has no speaker"),
        ('{"path": 1.5, "spk": "s"}\n', r"m\.json:1: 'path' must be text, got 1.5"),
        ('{"path": "a", "spk": true}\n', r"m\.json:1: 'spk' must be text, got True"),
        ('{"path": "a", "spk": ["s"]}\n', r"m\.json:1: 'spk' must be text, got \['s'\]"),
        ('{"path": "a", "spk": "s", "offset": NaN}\n', r"m\.json:1: 'offset' must be a finite number"),
        ('{"path": "a", "spk": "s", "offset": true}\n', r"m\.json:1: 'offset' must be a finite number"),
        ('{"path": "a", "spk": "s", "duration": -1}\n', r"m\.json:1: 'duration' must be a finite number"),
        (
            '{"path": "a", "spk": "s", "duration": 1' + "0" * 400 + "}\n",
            r"m\.json:1: 'duration' must be a finite number",
        ),
        ('{"path": "a", "spk": "\\ud800"}\n', r"m\.json:1: 'spk' holds half a character"),
        ('{"path": "a\\u0000", "spk": "s"}\n', r"m\.json:1: 'path' holds a null character"),
        ('{"path": "a", "spk": "s"}\n{"path": "a", "spk": "s"}\n', r"m\.json:2: the utterance 'a' is there twice"),
        ("[" * 100000 + "\n", r"m\.json: is one JSON array"),
        ('{"a":' * 100000 + "\n", r"m\.json:1: not a JSON object"),
    ],
)
def test_json_errors(tmp_path, content, message):
    refuse(message, write(tmp_path, "m.json", content))


def cut(**changes):
    recording = {
        "id": "rec1",
        "sources": [{"type": "file", "channels": [0], "source": "a/b/1.flac"}],
        "sampling_rate": 16000,
        "num_samples": 80000,
        "duration": 5.0,
        "channel_ids": [0],
    } | changes.pop("recording", {})
    supervision = {"id": "s1", "recording_id": "rec1", "start": 0.0, "duration": 2.5, "channel": 0, "speaker": "spk1"}
    whole = {
        "id": "c1",
        "start": 1.0,
        "duration": 2.5,
        "channel": 0,
        "supervisions": [supervision],
        "recording": recording,
        "type": "MonoCut",
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def test_lhotse_cuts(tmp_path):
    same = cut()["supervisions"] * 2
    resampled = cut(id="c2", start=0, supervisions=same, recording={"transforms": [{"name": "Resample", "kwargs": {}}]})
    content = "".join(json.dumps(one) + "\n" for one in (cut(), resampled)).encode()
    for name, packed in (("cuts.jsonl", content), ("cuts.jsonl.gz", gzip.compress(content))):
        assert rows(read_corpus(write(tmp_path, name, packed), root="/r")) == [
            ("spk1", "c1", "/r/a/b/1.flac", 1, 2.5),
            ("spk1", "c2", "/r/a/b/1.flac", 0, 2.5),
        ]


SOURCE = {"type": "file", "channels": [0], "source": "a.wav"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (cut(supervisions=None), "the utterance 'c1' has no speaker"),
        (cut(supervisions=[{"speaker": "a"}, {"speaker": "b"}]), "the cut 'c1' has 2 speakers: a, b"),
        (cut(supervisions="spk"), "the supervisions of the cut 'c1' must be a list"),
        ({"id": "m", "tracks": [], "type": "MixedCut"}, "the cut 'm' is a MixedCut; only MonoCut is read"),
        ({"id": "p", "duration": 5.0, "type": "PaddingCut"}, "the cut 'p' is a PaddingCut"),
        (cut(type="MultiCut", channel=[0, 1]), "the cut 'c1' is a MultiCut"),
        (cut() | {"recording": None, "features": {}}, "the cut 'c1' has no recording"),
        (cut(recording={"sources": [SOURCE | {"type": "command"}]}), "the source of the cut 'c1' is of type 'command'"),
        (cut(recording={"sources": [SOURCE, SOURCE]}), "the recording of the cut 'c1' must have one source"),
        (
            cut(recording={"sources": [SOURCE | {"channels": [0, 1]}]}),
            r"the audio of the cut 'c1' has channels \[0, 1\]",
        ),
        (cut(recording={"transforms": [{"name": "Speed"}]}), "the recording of the cut 'c1' is changed by Speed"),
        (cut(recording={"sources": [SOURCE | {"source": ""}]}), "the cut has no id or its source no path"),
        (cut(id=None), "the cut has no id or its source no path"),
        (cut(start=-0.5), "'start' must be a finite number, at least 0, got -0.5"),
        (cut(duration=0), "'duration' must be above 0"),
        (cut(duration=None), "'duration' must be a finite number"),
        (cut()["recording"], "is a recording or a supervision of lhotse"),
        (cut()["supervisions"][0], "is a recording or a supervision of lhotse"),
    ],
)
def test_lhotse_errors(tmp_path, row, message):
    content = json.dumps(cut(id="fine")) + "\n" + json.dumps(row) + "\n"
    refuse(rf"cuts\.jsonl:2: {message}", write(tmp_path, "cuts.jsonl", content))


def kaldi(folder, **files):
    given = {"wav.scp": "u2 /v/b b.wav \nu1 a.wav\n", "utt2spk": "u1 s1\nu2 s2\n"}
    for name, content in (given | {name.replace("wav_scp", "wav.scp"): text for name, text in files.items()}).items():
        if content is not None:
            write(folder, name, content)
    return folder


def test_kaldi_directory(tmp_path):
    folder = kaldi(tmp_path, spk2utt="s1 u1\ns2 u2\n", utt2dur="u2 3.25\n")
    assert rows(read_corpus(folder)) == [
        ("s2", "u2", "/v/b b.wav", 0, 3.25),
        ("s1", "u1", f"{tmp_path}/a.wav", 0, None),
    ]
    assert read_corpus(folder, root="/r")[1].path == "/r/a.wav"


def test_kaldi_segments(tmp_path):
    folder = kaldi(
        tmp_path,
        wav_scp="r1 a.wav\nr2 b.wav\n",
        segments="u2 r1 1.5 4\nu1 r1 0 -1\n",
        utt2spk="u1 s\nu2 s\n",
    )
    assert rows(read_corpus(folder, root="/r")) == [
        ("s", "u2", "/r/a.wav", 1.5, 2.5),
        ("s", "u1", "/r/a.wav", 0, None),
    ]


def test_kaldi_speakers(tmp_path):
    assert [e.speaker for e in read_corpus(kaldi(tmp_path / "a", utt2spk=None, spk2utt="x u1 u2\n"))] == ["x", "x"]
    folder = kaldi(tmp_path / "b", utt2spk=None)
    refuse(r"wav\.scp:1: the utterance 'u2' has no speaker", folder)
    speakers = write(tmp_path, "speakers", "u1 one\nu2 two\n")
    assert [e.speaker for e in read_corpus(folder, speakers=speakers)] == ["two", "one"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"utt2spk": "u1 s1\n"}, r"wav\.scp:1: the utterance 'u2' has no speaker"),
        ({"utt2spk": "u1 s\nu2 s\nu3 s\n"}, r"utt2spk:3: the utterance 'u3' has no audio; name it in .*wav\.scp"),
        ({"utt2spk": "u1 s\nu2\n"}, r"utt2spk:2: expected 2 columns 'utterance speaker', got 1"),
        ({"utt2spk": "u1 s\nu2 s t\n"}, r"utt2spk:2: 'u2' has more than one speaker"),
        ({"utt2spk": "u1 s\nu2 s\nu1 s\n"}, r"utt2spk:3: 'u1' is there twice, first in line 1"),
        ({"utt2spk": ""}, r"utt2spk: the file is empty"),
        ({"spk2utt": "s1 u1\ns2 u2\ns3\n"}, r"spk2utt:3: empty speaker: 's3' has no utterances"),
        ({"spk2utt": "s1 u1 u2\n"}, r"spk2utt:1: 'u2' is of 's1' here, but of 's2' in .*utt2spk"),
        ({"spk2utt": "s1 u1\ns2 u2 u9\n"}, r"spk2utt:2: 'u9' is of 's2' here, but of 'nobody' in .*utt2spk"),
        ({"utt2spk": None, "spk2utt": "a u1 u2\nb u1\n"}, r"spk2utt:2: 'u1' is of 'b' here, but of 'a' in .*spk2utt"),
        ({"wav_scp": "u1 a.wav\nu2 sph2pipe b.sph |\n"}, r"wav\.scp:2: 'sph2pipe b.sph \|' is a command"),
        ({"wav_scp": "u1 a.wav\nu2 b.ark:12\n"}, r"wav\.scp:2: 'b.ark:12' is a place in an archive"),
        ({"wav_scp": "u1 a.wav\nu2\n"}, r"wav\.scp:2: expected 2 columns 'recording path', got 1"),
        ({"wav_scp": "u1 a.wav\nu2 b.wav\nu1 c.wav\n"}, r"wav\.scp:3: 'u1' is there twice, first in line 1"),
        ({"wav_scp": b"u1 a.wav\nu2 \xe9.wav\n"}, r"wav\.scp:2: not UTF-8 text"),
        ({"utt2dur": "u1 0\n"}, r"utt2dur:1: the length must be above 0"),
        ({"utt2dur": "u1 long\n"}, r"utt2dur:1: the length must be a finite number, at least 0, got 'long'"),
        (
            {"segments": "u1 u1 0 1\nu2 u2 2 1.5\n"},
            r"segments:2: the segment ends at 1.5 s, not after its start at 2 s",
        ),
        ({"segments": "u1 u1 0 1\nu2 u2 2 2\n"}, r"segments:2: the segment ends at 2 s, not after its start at 2 s"),
        ({"segments": "u1 u1 0 1\nu2 u2 -1 1\n"}, r"segments:2: the start must be a finite number"),
        ({"segments": "u1 u1 0 1\nu2 u2 nan 1\n"}, r"segments:2: the start must be a finite number"),
        ({"segments": "u1 u1 0 1\nu2 u2 0 -2\n"}, r"segments:2: the end must be a finite number"),
        ({"segments": "u1 u1 0 1\nu2 r9 0 1\n"}, r"segments:2: the recording 'r9' is not in .*wav\.scp"),
        ({"segments": "u1 u1 0 1\nu2 u2 0 1 1\n"}, r"segments:2: expected 4 columns .*, got 5"),
        ({"segments": "u1 u1 0 1\n"}, r"utt2spk:2: the utterance 'u2' has no audio; name it in .*segments"),
        ({"segments": "u1 u1 0 1\nu2 u2 0 1\nu3 u2 0 1\n"}, r"segments:3: the utterance 'u3' has no speaker"),
    ],
)
def test_kaldi_errors(tmp_path, files, message):
    refuse(message, kaldi(tmp_path, **files))


def test_folder(tmp_path):
    for name in ("b/1/x.wav", "a/2/y.flac", "a/loose.wav"):
        write(tmp_path, name, "")
    told = []
    assert rows(read_corpus(tmp_path, warn=told.append)) == [
        ("a", "a/2/y.flac", f"{tmp_path}/a/2/y.flac", 0, None),
        ("b", "b/1/x.wav", f"{tmp_path}/b/1/x.wav", 0, None),
    ]
    assert len(told) == 1 and "loose.wav: passed over" in told[0]
    refuse(r"root: .* is no manifest", tmp_path, root="/r")
    speakers = write(tmp_path, "speakers", "a/2/y.flac b\n")
    assert read_corpus(tmp_path, speakers=speakers).speakers == ["b"]
    write(tmp_path, "train_list.txt", "z a/loose.wav\n")
    assert rows(read_corpus(tmp_path)) == [("z", "a/loose.wav", f"{tmp_path}/a/loose.wav", 0, None)]
    assert read_corpus(tmp_path, root="/r")[0].path == "/r/a/loose.wav"
    refuse("no audio files", write(tmp_path, "empty/x", "").parent)


def test_an_archive_beside_the_folders_of_a_corpus(tmp_path):
    for name in ("vox.tar", "a/1/x.wav"):
        write(tmp_path, name, "")
    assert [entry.id for entry in read_corpus(tmp_path)] == ["a/1/x.wav"]


@pytest.fixture
def shards(monkeypatch):
    """The reader of shards, which here gives two utterances and notes what it was asked for."""
    asked = []

    def read_index(path):
        asked.append(str(path))
        return Corpus([Entry("s", f"u{k}", "/x/0.tar", seconds=2.0, offset=512 * k, size=9) for k in (1, 2)], str(path))

    module = types.ModuleType("spkfast.data.shards")
    module.read_index = read_index
    monkeypatch.setitem(sys.modules, "spkfast.data.shards", module)
    return asked


def test_shards(tmp_path, shards):
    folder = write(tmp_path, "shards/0.tar", "").parent
    index = write(tmp_path, "index.csv", "id,speaker,shard,member,offset\n")
    corpus = read_corpus(folder)
    assert [entry.offset for entry in corpus] == [512, 1024] and corpus.speakers == ["s"]
    read_corpus(index)
    read_corpus(folder / "0.tar")
    speakers = write(tmp_path, "speakers", "u1 one\nu2 two\n")
    assert [(e.speaker, e.offset, e.size) for e in read_corpus(folder, speakers=speakers)] == [
        ("one", 512, 9),
        ("two", 1024, 9),
    ]
    assert shards == [str(folder), str(index), str(folder / "0.tar"), str(folder)]
    refuse(r"root: .* is no manifest", folder, root="/r")
