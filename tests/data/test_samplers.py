"""Samplers: rules of the toolkits by enumeration, what every sampler keeps to, ranks, and where a run goes on."""

import itertools
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from spkfast.data import samplers
from spkfast.data.samplers import Draw, LengthSampler, StepSampler, create
from spkfast.errors import InputError


def corpus(counts, seed=0):
    """Speakers with so many utterances each, in mixed order, of 1 to 20 seconds."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return SimpleNamespace(labels=labels, seconds=rng.uniform(1, 20, len(labels)), name="list.txt")


COUNTS = [1, 40, 7, 3, 25, 2, 12, 9, 30, 4, 4, 18]
SAMPLERS = {
    "random": {},
    "balanced": {},
    "category_balanced": {},
    "n_per_speaker": {"utterances_per_speaker": 2, "max_per_speaker": 15},
    "length_buckets": {"num_buckets": 5},
    "length_buckets by seconds": {"batch_seconds": 90.0, "row_multiple": 4, "num_buckets": 5},
}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


def make(name, batch_size=8, seed=1, counts=COUNTS):
    return create(name.split()[0], corpus(counts), batch_size=batch_size, seed=seed, **SAMPLERS[name])


def listed(batches):
    return [batch.tolist() for batch in batches]


@each_sampler
def test_batches_follow_from_seed_and_epoch_and_hold_none_twice(name):
    sampler = make(name)
    epochs = [listed(sampler.batches(epoch)) for epoch in range(4)]
    for epoch, batches in enumerate(epochs):
        indices = [k for batch in batches for k in batch]
        assert len(set(indices)) == len(indices) and set(indices) <= set(range(sum(COUNTS)))
        assert sampler.num_batches(epoch) == len(batches) > 0
        assert all(len(batch) % sampler.row_multiple == 0 and 0 < len(batch) <= 8 for batch in batches)
    assert len({str(batches) for batches in epochs}) == 4
    assert listed(make(name).batches(2)) == epochs[2]  # without the epochs before
    assert listed(make(name, seed=2).batches(2)) != epochs[2]
    if name != "length_buckets by seconds":
        assert {len(batch) for batch in epochs[0]} == {8}


def test_random_drops_less_than_a_batch():
    sampler = make("random")
    dropped = [set(range(sum(COUNTS))) - set(np.ravel(sampler.batches(epoch)).tolist()) for epoch in range(5)]
    assert {len(rest) for rest in dropped} == {sum(COUNTS) % 8} and len({frozenset(rest) for rest in dropped}) > 1


def test_balanced_draws_each_speaker_once_and_utterances_alike():
    data = corpus([1, 2, 7, 30])
    sampler = create("balanced", data, batch_size=4)
    epochs = 4000
    drawn = np.concatenate([sampler.batches(epoch) for epoch in range(epochs)])
    assert drawn.shape == (epochs, 4)
    assert (np.sort(data.labels[drawn], axis=1) == np.arange(4)).all()
    counts = np.bincount(drawn.ravel(), minlength=40)
    share = 1 / np.array([1, 2, 7, 30])[data.labels]
    assert (np.abs(counts - epochs * share) <= 5 * np.sqrt(epochs * share * (1 - share))).all()
    assert len({tuple(row) for row in data.labels[drawn].tolist()}) == 24  # every order of the speakers


def test_balanced_takes_more_of_each_where_speakers_are_few():
    data = corpus([1, 5, 20])
    for epoch in range(20):
        batches = create("balanced", data, batch_size=8).batches(epoch)
        assert len(batches) == 1 and len(set(batches[0].tolist())) == 8
        # 1 + 4 + 4 are there at four of each, the first number that fills a batch.
        assert (np.bincount(data.labels[batches[0]]) <= [1, 4, 4]).all()


def frequencies_agree(sampler, outcomes, epochs=4000):
    """Whether epochs come out as the outcomes of all equally likely orders do, each within five standard deviations."""
    total = sum(outcomes.values())
    seen = Counter(tuple(map(tuple, listed(sampler.batches(epoch)))) for epoch in range(epochs))
    assert set(seen) <= set(outcomes)
    for outcome, ways in outcomes.items():
        share = ways / total
        assert abs(seen[outcome] - epochs * share) <= 5 * np.sqrt(epochs * share * (1 - share)), outcome


@pytest.mark.parametrize("counts,batch_size", [([3, 1, 1], 2), ([2, 2, 1], 3), ([2, 3], 4), ([5], 2)], ids=str)
def test_category_balanced_is_the_rule_of_espnet(counts, batch_size):
    data = corpus(counts)
    most = -(-batch_size // len(counts))
    outcomes = Counter()
    for order in itertools.permutations(range(sum(counts))):
        batches, batch = [], []
        for utterance in order:
            if [data.labels[other] for other in batch].count(data.labels[utterance]) >= most:
                continue
            batch.append(utterance)
            if len(batch) == batch_size:
                batches.append(tuple(batch))
                batch = []
        outcomes[tuple(batches)] += 1
    assert () not in outcomes
    frequencies_agree(create("category_balanced", data, batch_size=batch_size), outcomes)


@pytest.mark.parametrize(
    "counts,most,batch_size", [([3, 4], 4, 4), ([2, 2, 2], 2, 4), ([5, 2], 3, 2), ([1, 3, 2], 9, 4)], ids=str
)
def test_n_per_speaker_is_the_rule_of_clova(counts, most, batch_size):
    data = corpus(counts)
    outcomes = Counter()
    for order in itertools.permutations(range(sum(counts))):
        groups = []
        for speaker in range(len(counts)):
            mine = [utterance for utterance in order if data.labels[utterance] == speaker]
            kept = min(len(mine), most) // 2 * 2
            groups += [mine[place : place + 2] for place in range(0, kept, 2)]
        for shuffled in itertools.permutations(groups):
            rows, speakers = [], []
            for group in shuffled:
                # The batch being filled: what stands behind the last full one.
                if data.labels[group[0]] not in speakers[len(rows) // batch_size * batch_size // 2 :]:
                    rows += group
                    speakers.append(data.labels[group[0]])
            ends = range(batch_size, len(rows) + 1, batch_size)
            outcomes[tuple(tuple(rows[end - batch_size : end]) for end in ends)] += 1
    sampler = create("n_per_speaker", data, batch_size=batch_size, utterances_per_speaker=2, max_per_speaker=most)
    frequencies_agree(sampler, outcomes)


def test_groups_of_random_corpora():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        counts = rng.integers(1, 30, rng.integers(2, 20))
        size, per_batch = int(rng.integers(1, 4)), int(rng.integers(1, 6))
        data = corpus(counts, seed)
        groups = counts // size
        try:
            sampler = create("n_per_speaker", data, batch_size=size * per_batch, utterances_per_speaker=size)
        except InputError:
            assert groups.sum() < per_batch
            continue
        most = next(m for m in itertools.count(1) if np.minimum(groups, m).sum() >= per_batch)
        if (groups > 0).sum() >= per_batch:
            assert most == 1
        for batch in sampler.batches(seed):
            speakers = data.labels[batch].reshape(per_batch, size)
            assert (speakers == speakers[:, :1]).all()
            assert np.bincount(speakers[:, 0]).max() <= most


def test_walk_is_the_rule_and_takes_no_longer_for_larger_batches():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        speakers = rng.integers(0, 9, 60).tolist()
        size, most = int(rng.integers(1, 8)), int(rng.integers(1, 3))
        want = []
        for place, speaker in enumerate(speakers):
            batch = want[len(want) // size * size :]
            if sum(speakers[other] == speaker for other in batch) < most:
                want.append(place)
        assert samplers._walk(speakers, size, most) == want

    speakers = np.random.default_rng(0).integers(0, 50000, 60000).tolist()

    def seconds(size):
        began = time.process_time()
        samplers._walk(speakers, size, 1)
        return time.process_time() - began

    # A search through the batch would take as many times longer as the batch is larger: 256 times.
    assert min(seconds(4096) for _ in range(3)) < 10 * min(seconds(16) for _ in range(3))


def test_length_buckets_pad_little_and_mix():
    data = corpus([50] * 20)
    sampler = create("length_buckets", data, batch_size=10, num_buckets=50)
    seconds = [data.seconds[batch] for batch in sampler.batches(0)]
    # With as many buckets as half the batches, a batch lies in two buckets at most: 4 % of the utterances.
    rank = np.argsort(np.argsort(data.seconds))
    assert max(np.ptp(rank[batch]) for batch in sampler.batches(0)) < 0.04 * 1000
    means = np.array([part.mean() for part in seconds])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.35  # 3.5 standard deviations of 100 batches
    together = [{frozenset(batch.tolist()) for batch in sampler.batches(epoch)} for epoch in range(2)]
    assert len(together[0] & together[1]) < 5  # others beside each other in the next epoch

    sampler = create("length_buckets", corpus([7]), batch_size=4)
    left = Counter(k for epoch in range(300) for k in set(range(7)) - set(sampler.batches(epoch)[0].tolist()))
    assert len(left) == 7 and min(left.values()) > 128 - 5 * np.sqrt(300 * 3 / 7 * 4 / 7)  # long ones no more often


def test_length_buckets_by_seconds():
    data = corpus([50] * 20)
    sampler = LengthSampler(data, 24, batch_seconds=100.0, row_multiple=3, num_buckets=20)
    batches = sampler.batches(3)
    assert sum(map(len, batches)) == 999
    filled = 0
    for batch in batches:
        assert len(batch) % 3 == 0 and len(batch) <= 24
        assert len(batch) * data.seconds[batch].max() <= 100
        filled += len(batch) == 24 or (len(batch) + 3) * (data.seconds[batch].max() + 1) > 100
    assert filled >= len(batches) - 1  # three more of the next bucket, which ends less than a second later, do not fit
    assert {len(batch) for batch in batches} >= {3, 24}


@each_sampler
def test_ranks_together_are_one_process(name):
    one = list(StepSampler(make(name), 40))
    for world_size in (2, 4):
        ranks = [list(StepSampler(make(name), 40, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == one
        assert all(len({len(part) for part in parts}) == 1 for parts in zip(*ranks, strict=True))


@each_sampler
def test_goes_through_epochs_and_restarts_at_any_batch(name):
    sampler = make(name)
    run = StepSampler(sampler, 40)
    assert len(run) == 40
    whole = list(run)
    assert len(run) == 0 and len(whole) == 40
    want = [[Draw(k, epoch) for k in batch] for epoch in range(41) for batch in listed(sampler.batches(epoch))]
    assert whole == want[:40]
    for step in range(41):
        state = run.state_dict(step)
        assert state["step"] == step
        from_state, from_step = StepSampler(make(name), 40), StepSampler(make(name), 40)
        from_state.load_state_dict(state)
        from_step.load_state_dict({"step": step})
        assert from_step.state_dict() == from_state.state_dict() == state
        assert list(from_state) == list(from_step) == whole[step:]


def test_state_is_of_steps_done_not_of_those_read_ahead():
    run = StepSampler(make("random"))
    ahead = list(itertools.islice(run, 50))
    assert run.state_dict()["step"] == 50
    again = StepSampler(make("random"), 50)
    again.load_state_dict(run.state_dict(41))
    assert list(again) == ahead[41:]
    again = StepSampler(make("random"))
    again.load_state_dict(run.state_dict(41))
    with pytest.raises(InputError, match="step 3 has not been handed out"):
        again.state_dict(3)
    with pytest.raises(InputError, match="step 42 has not been handed out"):
        again.state_dict(42)
    with pytest.raises(InputError, match="epoch 0 has 19 batches; batch 20 is of another corpus"):
        again.load_state_dict({"step": 20, "epoch": 0, "batch": 20})


def test_goes_on_without_end():
    run = StepSampler(make("balanced"))
    assert len(list(itertools.islice(run, 1000))) == 1000
    with pytest.raises(TypeError):
        len(run)


def refused(message, name, counts=COUNTS, batch_size=8, **options):
    with pytest.raises(InputError, match=message) as caught:
        create(name, corpus(counts), **{"batch_size": batch_size, **options})
    assert "\n" not in str(caught.value)


def test_refuses_what_cannot_work():
    for name in samplers.names():
        refused(r"batch_size=8 is more than the 7 utterances that list\.txt has", name, counts=[3, 4])
        refused("batch_size must be at least 1, got 0", name, batch_size=0)
        refused("seed must be at least 0, got -1", name, seed=-1)
    refused(r"more than the 6 utterances that list\.txt \(groups of 2\) has", "n_per_speaker", counts=[1, 1, 3, 5])
    refused("utterances_per_speaker=3 does not divide batch_size=8", "n_per_speaker", utterances_per_speaker=3)
    refused("max_per_speaker=1 is less than utterances_per_speaker=2", "n_per_speaker", max_per_speaker=1)
    refused(r"batch_seconds=5.0 does not hold 1 utterances of 19\.\d+ s", "length_buckets", batch_seconds=5.0)
    refused("row_multiple must be 1 to batch_size=8, got 9", "length_buckets", batch_seconds=50.0, row_multiple=9)
    refused("num_buckets must be at least 1, got 0", "length_buckets", num_buckets=0)
    refused("unknown sampler 'balance' .did you mean 'balanced'", "balance")
    refused("unknown option 'max_per_speaker' of sampler random", "random", max_per_speaker=3)
    data = corpus(COUNTS)
    data.seconds[3] = np.nan
    with pytest.raises(InputError, match=r"list\.txt: does not say how long 1 utterances are"):
        create("length_buckets", data, batch_size=8)
    with pytest.raises(InputError, match="batches of 8 rows cannot be shared out among 3 processes"):
        StepSampler(make("random"), world_size=3)
    with pytest.raises(InputError, match="among 8 processes in parts of 2 rows; make them a multiple of 16"):
        StepSampler(make("n_per_speaker"), world_size=8)
