"""The synthetic corpus: its layout and lists, that it repeats, and that it sounds as it was asked to."""

import json
from pathlib import Path

import numpy as np
import pytest

from spkfast.data import synthetic
from spkfast.data.audio import audio_info, read_audio
from spkfast.data.lists import read_train_list, read_trials, speaker_of
from spkfast.data.synthetic import make_corpus
from spkfast.errors import InputError

SMALL = {"num_speakers": 3, "test_speakers": 4, "utterances_per_speaker": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("synthetic") / "corpus", **SMALL)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_lists_name_exactly_the_files(corpus):
    train, trials = read_train_list(corpus / "train_list.txt"), read_trials(corpus / "trials.txt")
    on_disk = {path.relative_to(corpus).as_posix() for path in corpus.rglob("*.flac")}
    trained = {utterance.path for utterance in train}
    tried = {path for trial in trials for path in (trial.enrol, trial.test)}
    assert len(train) == len(trained) == 12
    assert trained | tried == on_disk and len(on_disk) == 28
    assert all(speaker_of(utterance.path) == utterance.speaker for utterance in train)
    assert not {utterance.speaker for utterance in train} & {speaker_of(path) for path in tried}
    assert {len(Path(path).parts) for path in on_disk} == {3}


def test_trials_are_balanced_and_cross_sessions(corpus):
    trials = read_trials(corpus / "trials.txt")
    targets = [trial for trial in trials if trial.target]
    assert len(targets) == 4 * 4  # of six pairs of a speaker's four utterances, four cross the two sessions
    assert len(trials) == 2 * len(targets)
    assert len({frozenset((trial.enrol, trial.test)) for trial in trials}) == len(trials)
    for trial in trials:
        assert trial.target == (speaker_of(trial.enrol) == speaker_of(trial.test))
        assert Path(trial.enrol).parent != Path(trial.test).parent
        kinds = {int(speaker_of(path)[1:]) % 2 for path in (trial.enrol, trial.test)}
        assert len(kinds) == 1  # high voices against high ones, low against low


def test_audio_is_what_the_docs_say(corpus):
    seconds = []
    for path in corpus.rglob("*.flac"):
        samples, rate = read_audio(path)
        assert rate == 16000 == audio_info(path)[1]
        seconds.append(len(samples) / rate)
        assert 10 ** (-40 / 20) < samples.std() < 10 ** (-15 / 20)
        assert abs(samples).max() < 1
    assert min(seconds) > 1.7 and max(seconds) < 5


def test_same_seed_same_bytes(corpus, tmp_path):
    again = files(make_corpus(tmp_path / "again", **SMALL))
    assert again == files(corpus)
    other = files(make_corpus(tmp_path / "other", **SMALL, seed=1))
    flac = [name for name in again if name.endswith(".flac")]
    assert flac == [name for name in other if name.endswith(".flac")]
    assert all(again[name] != other[name] for name in flac)


def test_a_speaker_does_not_depend_on_how_many_there_are(corpus, tmp_path):
    fewer = files(make_corpus(tmp_path / "fewer", num_speakers=1, test_speakers=2, utterances_per_speaker=4))
    more = files(corpus)
    assert all(more[name] == content for name, content in fewer.items() if name.endswith(".flac"))


def test_second_run_does_nothing_and_other_arguments_replace(tmp_path):
    folder, few = tmp_path / "corpus", {"num_speakers": 1, "test_speakers": 2, "utterances_per_speaker": 2}
    calls = []
    make_corpus(folder, **few, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (6, 6) and [done for done, _ in calls] == sorted({done for done, _ in calls})
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make_corpus(folder, **few, progress=lambda *_: pytest.fail("nothing should be made"))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make_corpus(folder, **few, seed=5)
    assert json.loads((folder / "synthetic.json").read_text())["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path / "corpus", **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="holds other files"):
        make_corpus(tmp_path, **SMALL)
    with pytest.raises(InputError, match="is a file"):
        make_corpus(tmp_path / "mine.txt", **SMALL)
    assert files(tmp_path) == {"mine.txt": b"precious"}


@pytest.mark.parametrize(
    ("name", "value"), [("num_speakers", 0), ("test_speakers", 1), ("utterances_per_speaker", 1), ("seed", -1)]
)
def test_counts_that_make_no_corpus(tmp_path, name, value):
    with pytest.raises(InputError, match=f"{name} must be at least {value + 1}, got {value}"):
        make_corpus(tmp_path / "corpus", **{**SMALL, name: value})


def test_pitch_is_the_one_asked_for():
    """The strongest period of a steady vowel is the pitch of the voice, with jitter and all."""
    rng = np.random.default_rng(0)
    for speaker in range(6):
        voice = synthetic._draw_voice(np.random.default_rng(speaker), short_tract=speaker % 2 == 0)
        channel = synthetic._draw_session(rng)
        phones = np.full(100, synthetic._NAMES.index("a"))
        samples = synthetic._synthesise(rng, voice, channel, phones, np.full(100, voice.f0))
        # The window keeps two periods from matching as well as one.
        period = np.fft.irfft(np.abs(np.fft.rfft(samples[4000:5024] * np.hanning(1024), 4096)) ** 2)
        lags = np.arange(int(16000 / 400), int(16000 / 60))
        assert 16000 / lags[period[lags].argmax()] == pytest.approx(voice.f0, rel=0.03)


def test_formants_are_the_ones_asked_for():
    hz, width = np.array([[500.0, 1500.0, 2500.0]]), np.array([[60.0, 80.0, 100.0]])
    response = np.abs(synthetic._resonators(hz, width)[0])
    peaks = np.flatnonzero((response[1:-1] > response[:-2]) & (response[1:-1] > response[2:])) + 1
    np.testing.assert_allclose(peaks * 16000 / 1024, hz[0], atol=16)
    assert response[0] == pytest.approx(1)


def test_frames_add_up_to_the_signal():
    signal = np.random.default_rng(0).standard_normal(40 * 128)
    np.testing.assert_allclose(
        synthetic._overlap_add(synthetic._spectra(signal))[: 39 * 128], signal[: 39 * 128], atol=1e-12
    )


def test_the_channel_belongs_to_the_session_and_not_to_the_speaker(corpus):
    """Long-term spectra of one session are closer than those of two sessions of the same speaker."""

    def spectrum(path: Path) -> np.ndarray:
        samples, _ = read_audio(path)
        power = np.abs(np.fft.rfft(samples[: len(samples) // 512 * 512].reshape(-1, 512) * np.hanning(512))) ** 2
        level = 10 * np.log10(np.quantile(power, 0.1, axis=0).reshape(-1)[1:].reshape(16, 16).mean(axis=1))
        return level - level.mean()

    within, across = [], []
    for speaker in sorted(path for path in corpus.iterdir() if path.is_dir()):
        first, second = ([spectrum(path) for path in sorted(folder.iterdir())] for folder in sorted(speaker.iterdir()))
        within += [np.linalg.norm(pair[0] - pair[1]) for pair in (first, second)]
        across += [np.linalg.norm(a - b) for a in first for b in second]
    assert np.mean(within) < 0.6 * np.mean(across)
