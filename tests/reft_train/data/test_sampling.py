"""Orders of examples: complete, a function of seed and epoch, and the same when a run is resumed
through accelerate.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from reft_train.data.sampling import GroupedSampler, ShuffledSampler, epoch_seed
from torch.utils.data import BatchSampler, DataLoader

GROUP, BATCH = 12, 3


def _lengths(count):
    return torch.randint(1, 300, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def _grouped(count=500, seed=0):
    return GroupedSampler(_lengths(count), GROUP, seed)


def _shuffled(count=500, seed=0):
    return ShuffledSampler(count, seed)


BOTH = pytest.mark.parametrize("make", [_grouped, _shuffled])


@BOTH
@pytest.mark.parametrize("count", [0, 1, 11, 12, 13, 192, 193, 500])
def test_every_index_comes_once(make, count):
    sampler = make(count)
    assert sorted(sampler) == list(range(count)) and len(sampler) == count


@BOTH
def test_the_order_is_a_function_of_seed_and_epoch_alone(make):
    one, two = make(), make()
    for _ in range(3):
        list(one)  # what was drawn before does not matter
    torch.manual_seed(99)
    one.set_epoch(5)
    two.set_epoch(5)
    assert list(one) == list(two)


@BOTH
def test_epochs_and_seeds_differ(make):
    orders = []
    for seed in range(3):
        sampler = make(seed=seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.append(tuple(sampler))
    assert len(set(orders)) == 9


@BOTH
def test_the_global_generator_is_left_alone(make):
    before = torch.get_rng_state()
    list(make())
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_neighbouring_epochs_are_not_shared():
    assert len({epoch_seed(seed, epoch) for seed in range(100) for epoch in range(100)}) == 10_000


def test_a_group_has_examples_of_similar_length():
    lengths = _lengths(500)
    order = list(_grouped())
    groups = [[lengths[i] for i in order[start : start + GROUP]] for start in range(0, 492, GROUP)]
    padded = sum(max(group) * len(group) for group in groups)
    plain = list(_shuffled())
    unsorted = [
        [lengths[i] for i in plain[start : start + GROUP]] for start in range(0, 492, GROUP)
    ]
    # padding that is left, against what batches drawn without grouping have
    assert (
        padded - sum(map(sum, groups))
        < (sum(max(g) * len(g) for g in unsorted) - sum(map(sum, unsorted))) / 4
    )


def test_groups_come_in_no_order_of_length():
    lengths, order = _lengths(500), list(_grouped())
    longest = [
        max(lengths[i] for i in order[start : start + GROUP]) for start in range(0, 192, GROUP)
    ]
    rising = sum(a < b for a, b in pairwise(longest))
    assert 0 < rising < len(longest) - 1


def test_what_is_left_over_comes_last_and_is_drawn_at_random():
    sampler, lengths, rests = _grouped(), _lengths(500), []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        rests += [lengths[i] for i in list(sampler)[-(500 % GROUP) :]]
    assert min(rests) < 100 and max(rests) > 200  # neither the shortest nor the longest only


def _loader(sampler, processes, index):
    loader = DataLoader(
        list(range(len(sampler))), batch_sampler=BatchSampler(sampler, BATCH, drop_last=False)
    )
    return prepare_data_loader(
        loader, device=torch.device("cpu"), num_processes=processes, process_index=index
    )


def _epochs(sampler, loader, epochs):
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)  # as the program's callback does, then
        loader.set_epoch(epoch)  # Trainer
        found.append([batch.tolist() for batch in loader])
    return found


def _uninterrupted(make, processes, index, epochs=3):
    sampler = make()
    return _epochs(sampler, _loader(sampler, processes, index), range(epochs))


@BOTH
@pytest.mark.parametrize("processes, index", [(1, 0), (2, 0), (2, 1)])
def test_accelerate_passes_the_epoch_on(make, processes, index):
    loader = _loader(make(), processes, index)
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found.append([batch.tolist() for batch in loader])
    assert found == _uninterrupted(make, processes, index, 2)
    assert found[0] != found[1]


@BOTH
@pytest.mark.parametrize("processes, index", [(1, 0), (2, 0), (2, 1)])
def test_a_resumed_run_sees_the_rest_of_its_epoch(make, processes, index):
    uninterrupted = _uninterrupted(make, processes, index)[2]
    sampler = make()
    (tail,) = _epochs(sampler, skip_first_batches(_loader(sampler, processes, index), 7), [2])
    assert tail == uninterrupted[7:] and tail


def test_processes_share_a_group():
    order = list(_grouped())
    first = [_uninterrupted(_grouped, 2, index, 1)[0][:2] for index in range(2)]
    assert sorted(i for process in first for batch in process for i in batch) == sorted(
        order[:GROUP]
    )
