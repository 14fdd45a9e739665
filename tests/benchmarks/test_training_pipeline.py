"""Both ways train on the same crops, compute the same step, and are timed for it alone."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.data import bench_augmentation
from benchmarks.models import bench_training_pipeline as bench
from benchmarks.models.bench_ecapa_training import assess
from benchmarks.peers import pipeline
from benchmarks.timing import Figure

SIZE = pipeline.Size(16, 24, 8, 8, batch=8, seconds=0.4, speakers=5)
THREADS = torch.get_num_threads()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    root = folder / "speech"
    rng = np.random.default_rng(0)
    lines = []

    def write(name, samples):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.clip(samples, -1, 1), pipeline.RATE, subtype="PCM_16")

    # Of speech that differs from one utterance to the next, or batch norm would see little but rounding; and as speech
    # with little near the end of the band, where the two ways filter differently.
    for number in range(60):
        smooth = np.convolve(rng.normal(size=9000), np.hanning(4 + number % 20), "same")
        write(f"{number % 6}/{number}.flac", 0.1 * smooth / smooth.std())
        lines.append(f"{number % 6} {number % 6}/{number}.flac\n")
    for number in range(3):
        write(f"noise/rain/{number}.flac", rng.normal(0, 0.1, 12000))
        write(f"rir/{number}.flac", 0.2 * rng.normal(size=2000) * np.exp(-np.arange(2000) / 300))
    (root / "train_list.txt").write_text("".join(lines))
    bench_augmentation.prepare(root, folder)
    # Draws follow from the paths as they stand in the list, which must not change from run to run.
    list_of_all = folder / "train_list.txt"
    list_of_all.write_text(list_of_all.read_text().replace(str(root.resolve()), "speech"))
    return bench.prepare(folder, SIZE)


def contender(prepared, precision, maker, **options):
    return getattr(pipeline, maker)(prepared.folder, SIZE, precision, THREADS, **options)


MAKERS = {
    "spkfast": {},
    "torch, of a batch": {},
    "torch, of a crop": {"workers": 1},
    "kaldi-native-fbank, of a crop": {},
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.999), ("bf16", 0.95)])  # see test_ecapa_training.py
def test_first_step_and_those_after_it(maker, precision, least, prepared, monkeypatch):
    updates = []
    make = pipeline.Update.__init__

    def remember(self, *arguments):
        make(self, *arguments)
        updates.append(self)

    monkeypatch.setattr(pipeline.Update, "__init__", remember)
    if maker == "spkfast":
        made = contender(prepared, precision, "spkfast")
    else:
        if maker.startswith("kaldi"):
            pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed")
        made = contender(prepared, precision, "usual_way", features=maker, **MAKERS[maker])
    found = assess(made.output, prepared.exact, precision, made.note)
    assert found["cosine"] > least and found["loss_error"] < 1e-2
    (update,) = updates
    weights = torch.load(prepared.folder / "weights.pt")
    for name, value in update.task.state_dict().items():
        assert torch.equal(value, weights[name]), name  # the check has left no trace
    made.call()
    made.call._gate.open()
    assert all(value.grad is None for value in update.task.parameters())
    # Some weights are larger than so small a step.
    assert all("momentum_buffer" in update._optimizer.state[value] for value in update.task.parameters())
    assert not torch.equal(update.task.head.weight, weights["head.weight"])


def test_optimisers_compute_the_same(prepared):
    weights = []
    for implementation in ("fused", "foreach", "loop"):
        update = pipeline.Update(pipeline._plain_task(SIZE), "fp32", implementation)
        update.task.load_state_dict(torch.load(prepared.folder / "weights.pt"))
        _, features, labels = torch.load(prepared.folder / "check.pt")
        update(features, labels, lambda part: None)
        weights.append(torch.cat([value.detach().flatten() for value in update.task.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])


def test_files_hold_the_crops_that_memory_holds(prepared):
    decoded, read = (pipeline.Items(prepared.folder, SIZE, None, source) for source in ("decoded", "FLAC"))
    for index in range(len(decoded)):
        assert np.array_equal(decoded.waveform(index), read.waveform(index)), index
    updates = []
    for source in ("decoded", "FLAC"):
        step, update, _ = pipeline.spkfast_step(prepared.folder, SIZE, "fp32", source)
        step()
        step._gate.open()
        updates.append(update.task.state_dict())
    for name, value in updates[0].items():
        assert torch.equal(value, updates[1][name]), name


def test_all_that_may_happen_does(prepared):
    items = pipeline.load_crops(prepared.folder).items
    assert {item.speed for item in items} == {0.9, 1.0, 1.1}
    noisy, in_room = (
        [bool(value) for value in values]
        for values in zip(*((i.noises and i.noises[0], i.room) for i in items), strict=True)
    )
    assert any(noisy) and any(in_room) and not any(map(all, zip(noisy, in_room, strict=True)))


def test_other_crops_are_not_timed(prepared, monkeypatch):
    waveform = pipeline.Items.waveform
    monkeypatch.setattr(pipeline.Items, "waveform", lambda self, index: np.float32(1.01) * waveform(self, index))
    with pytest.raises(SystemExit, match="not timed: crops of the two ways differ by"):
        bench.prepare(prepared.folder, SIZE)


def test_differences():
    ours = np.array([[1.0, 2.0], [1.0, 0.0]])
    error, cosine = bench.differences(ours, np.array([[1.0, 2.5], [1.0, 1.0]]), np.array([1, 1.1]))
    assert error == pytest.approx(0.5 / 2.5)
    assert cosine == pytest.approx(0.5**0.5)


def test_wrong_features_are_no_contender(prepared):
    _, update, features = pipeline.spkfast_step(prepared.folder, SIZE, "fp32")
    with pytest.raises(ValueError, match="features err by"):
        pipeline._checked(prepared.folder, lambda waveforms: features.fbank(waveforms)[0] * 1.01, update)


class Counted(Dataset):
    """Counts how often it is read."""

    def __init__(self):
        self.count = multiprocessing.Value("i", 0)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        with self.count.get_lock():
            self.count.value += 1
        time.sleep(0.001)
        return index


def test_loader_processes_rest_behind_a_closed_gate():
    dataset, gate = Counted(), pipeline.Gate()
    ahead = 10_000
    loader = DataLoader(
        pipeline.Gated(dataset, gate), batch_sampler=pipeline.Endless([[0]]), num_workers=1, prefetch_factor=ahead
    )
    loaded = iter(loader)
    time.sleep(0.1)
    assert dataset.count.value == 0
    with gate:
        assert next(loaded).tolist() == [0]
    count = dataset.count.value
    time.sleep(0.2)
    assert 1 <= dataset.count.value <= count + 1 < ahead  # one may have been begun
    gate.open()


def test_loader_process_that_is_left_alone_ends(monkeypatch):
    gate = pipeline.Gate()
    monkeypatch.setattr(pipeline, "_PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(gate, "_owner", -1)
    with pytest.raises(SystemExit):
        gate.wait()


def test_figures_leave_out_what_does_not_count():
    times = {"spkfast": 10.0, "usual way": 16.0, "spkfast, from features": 8.0, "usual way, from features": 12.0}
    rows = {name: {"median_ms": value, "counts": True} for name, value in times.items()}
    assert bench.figures_of(rows, 1.5) == [
        Figure("usual way / spkfast", 1.6, 1.5),
        Figure("usual way, from features / spkfast, from features", 1.5),
        Figure("spkfast / spkfast, from features", 1.25),
    ]
    rows["spkfast"]["counts"] = False
    assert bench.figures_of(rows, 1.5)[0].verdict == "missed"
    rows["usual way"]["counts"] = False
    assert len(bench.figures_of(rows, 1.5)) == 1


@pytest.mark.parametrize("name", bench._ROWS)
def test_row_takes_the_fastest_arrangement(name, prepared, monkeypatch):
    started = []

    class Instant:
        def __init__(self, builder, options, threads, keep_memory):
            started.append((builder, options, keep_memory))
            self.absent = "not installed" if options.get("features", "").startswith("kaldi") else ""
            self.output, self.note = prepared.exact.astype(np.float32), "SGD fused"
            self.time = 2.0 if options.get("workers") == 2 else 3.0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def close(self):
            self.time = None

        def seconds(self, steps):
            assert steps == 2
            return self.time

    monkeypatch.setattr(bench, "Worker", Instant)
    kind = bench._ROWS[name]
    result = bench.row(prepared, name, "fp32", kind, repeats=1, steps=2)
    ours = [builder.endswith(":spkfast") for builder, _, _ in started]
    assert any(ours) and [keep for _, _, keep in started] == [own or kind.keep_memory for own in ours]
    assert all(options["source"] == kind.source for _, options, _ in started if not options.get("given"))
    usual = result["contenders"]["usual way"]
    assert usual["note"] == "features by torch, of a batch, loader processes: 2, SGD fused"
    assert (usual["median_ms"], usual["crops_per_s"], usual["max_error"]) == (2000, SIZE.batch / 2, prepared.error)
    assert ("spkfast, from features" in result["contenders"]) == (kind.source == "decoded")
    assert result["contenders"]["tried: features by torch, of a crop, loader processes: 1"]["median_ms"] == 3000
    assert [*result["absent"].values()] == ["not installed"] * 2
    assert result["figures"][0]["at_least"] == kind.goal


def test_parts_are_the_whole_step(prepared):
    found = bench.parts(prepared, "parts", "fp32", repeats=1)["contenders"]
    assert [*found] == [
        "reading", "augmentation", "front-end", "network, forward", "head, forward", "backward", "clipping",
        "optimiser", "rest", "the whole step",
    ]  # fmt: skip
    *parts, whole = [row["median_ms"] for row in found.values()]
    assert sum(parts) == pytest.approx(whole)  # of two steps, of which the median is the mean
