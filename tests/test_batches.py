"""Batches: every row once, the same for any step asked and any number of ranks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albor.batches import Batches, fits, load
from albor.shards import (
    FORMAT,
    DataError,
    TokenStream,
    folder_for,
    write_meta,
    write_shard,
)


def counting(length):
    """A stream whose tokens are their own places."""
    return np.arange(length, dtype=np.uint16)


@given(
    length=st.integers(12, 700),
    seq_len=st.integers(1, 11),
    batch_size=st.integers(1, 5),
    more=st.integers(0, 9),
    rows=st.sampled_from(["pack", "truncate"]),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_an_epoch_reads_every_row_once(
    length, seq_len, batch_size, more, rows, seed, epoch
):
    make = {"seed": seed, "rows": rows, "row_tokens": seq_len + more}
    try:
        batches = Batches(counting(length), seq_len, batch_size, **make)
    except DataError as error:
        assert "too few for one batch" in str(error)
        return
    stride = seq_len if rows == "pack" else seq_len + more
    seen = []
    for step in range(batches.steps_per_epoch):
        step += epoch * batches.steps_per_epoch
        inputs, targets = batches.step(step)
        assert inputs.shape == targets.shape == (batch_size, seq_len)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(targets, inputs + 1)
        starts = inputs[:, 0].tolist()
        assert [row * stride for row in batches.rows_of(step)] == starts
        seen += starts
    possible = range(0, batches.sequences * stride, stride)
    assert len(set(seen)) == len(seen) and set(seen) <= set(possible)
    assert len(possible) - len(seen) == batches.sequences % batch_size
    last = (batches.sequences - 1) * stride
    assert last + seq_len < length  # the last target exists; no row is forgotten:
    assert last + stride + max(stride, seq_len + 1) > length


def test_a_batch_is_a_function_of_seed_and_step():
    def fresh(seed=5):
        return Batches(counting(900), 7, 6, seed=seed)

    walked = fresh()
    walk = [walked.step(step)[0] for step in range(70)]
    for step in (69, 3, 40, 21, 20, 0):  # any order, across epochs
        assert torch.equal(fresh().step(step)[0], walk[step])
        assert torch.equal(walked.step(step)[0], walk[step])
    assert not torch.equal(fresh(6).step(0)[0], walk[0])
    per_epoch = walked.steps_per_epoch
    assert per_epoch == 21 and not torch.equal(walk[0], walk[per_epoch])


def test_global_random_state_is_neither_read_nor_moved():
    batches = Batches(counting(900), 7, 6)
    np.random.seed(1)
    torch.manual_seed(1)
    first = batches.step(0)[0]
    after = np.random.random(), torch.rand(())
    np.random.seed(1)
    torch.manual_seed(1)
    assert (np.random.random(), torch.rand(())) == after
    assert torch.equal(Batches(counting(900), 7, 6).step(0)[0], first)


def test_the_order_is_pinned():
    """A change here breaks the resume of every run that exists."""
    batches = Batches(counting(25), 2, 1, seed=0)
    assert batches.permutation(0).tolist() == [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]
    batches = Batches(counting(25), 2, 1, seed=2**64 - 1)
    assert sorted(batches.permutation(2**40).tolist()) == list(range(12))


def test_the_permutation_is_uniform():
    """Chi-square over all orders of four rows: 24 cells, 99.99% point about 57."""
    stream = counting(5)
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(2_400):
        order = Batches(stream, 1, 1, seed=3).permutation(epoch)
        counts[tuple(order.tolist())] += 1
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 57


@pytest.mark.parametrize(("rows", "expected"), [("truncate", 43), ("pack", 86)])
def test_the_card_v1(rows, expected):
    stream = np.broadcast_to(np.uint16(0), (22_079 * 2048,))
    batches = Batches(stream, 1024, 4 * 128, rows=rows, row_tokens=2048)
    assert batches.steps_per_epoch == expected


@pytest.mark.parametrize(("rows", "expected"), [("truncate", 132), ("pack", 265)])
def test_the_card_v2(rows, expected):
    stream = np.broadcast_to(np.uint16(0), (67_977 * 2048,))
    batches = Batches(stream, 1024, 4 * 128, rows=rows, row_tokens=2048)
    assert batches.steps_per_epoch == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seq_len": 0}, "seq_len=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, f"seed={2**64}"),
        ({"rows": "pad"}, "got 'pad'"),
        ({"rows": "truncate", "row_tokens": 6}, "seq_len=7; got 'truncate'"),
        ({"seq_len": 100}, "100 tokens make 0 rows of 100"),
        ({"batch_size": 15}, "14 rows of 7, too few for one batch of 15"),
    ],
)
def test_impossible_batches_are_refused(bad, message):
    options = {"seq_len": 7, "batch_size": 3} | bad
    with pytest.raises(DataError) as error:
        Batches(counting(100), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "stream", [np.arange(99), np.zeros((9, 9), np.uint16), np.zeros(99, np.int16)]
)
def test_other_arrays_are_refused(stream):
    with pytest.raises(DataError, match="tokens: expected uint16"):
        Batches(stream, 7, 3)


def test_steps_before_zero_are_refused():
    with pytest.raises(DataError, match="at least 0, got -1"):
        Batches(counting(100), 7, 3).step(-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("resident", [None, True, False])
def test_batches_on_a_device_are_the_same(resident):
    stream = np.arange(2**16, dtype=np.uint16)[::-1].copy()  # ids above 32,767 too
    here = Batches(stream, 7, 6, seed=2)
    there = Batches(stream, 7, 6, seed=2, device="cuda", resident=resident)
    assert (there.resident is None) == (resident is False)
    for step in (0, 1, 2, 3, 5_000):
        for a, b in zip(here.step(step), there.step(step), strict=True):
            assert b.device.type == "cuda" and torch.equal(a, b.cpu())


def test_the_branch_for_devices_keeps_large_ids():
    """The same arithmetic as on an accelerator, made to run on the CPU."""
    stream = np.arange(2**16, dtype=np.uint16)[::-1].copy()
    plain, resident = (
        Batches(stream, 7, 6, seed=2, resident=kept) for kept in (False, True)
    )
    assert plain.resident is None and resident.resident.dtype == torch.int16
    for step in (0, 1_555, 5_000):
        for a, b in zip(plain.step(step), resident.step(step), strict=True):
            assert torch.equal(a, b)


def test_the_pinned_buffers_take_turns(monkeypatch):
    """The branch for streams larger than a device, with stand-ins for its parts."""

    class Event:
        def __init__(self):
            self.said = []

        def synchronize(self):
            self.said.append("wait")

        def record(self, stream):
            self.said.append(f"copied on {stream}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    batches = Batches(counting(900), 7, 6, seed=5, ranks=2)
    batches.pinned = [
        (torch.empty((3, 8), dtype=torch.int16), Event()) for _ in range(2)
    ]
    first, second = (buffer for buffer, _ in batches.pinned)
    plain = Batches(counting(900), 7, 6, seed=5, ranks=2)
    for step in range(4):
        expected, _ = plain.step(step)
        assert torch.equal(batches.step(step)[0], expected)
        used = first if step % 2 == 0 else second
        assert torch.equal(used[:, :-1].long(), expected)
    assert [event.said for _, event in batches.pinned] == [
        ["wait", "copied on cpu"] * 2
    ] * 2


def test_only_small_streams_stay_on_a_device(monkeypatch):
    gb = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * gb, 80 * gb))
    cpu, cuda, other = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert fits(cuda, 2 * gb) and not fits(cuda, 2 * gb + 1)
    assert fits(other, gb) and not fits(other, gb + 1)
    assert not fits(cpu, 8)


# --- shards, ranks, rows with samples ---------------------------------------


def sharded(home, lengths, **inputs):
    """A folder of shards whose tokens are their own places."""
    inputs = {"format": FORMAT, "tokenizer": "", "vocab_size": 2**16, **inputs}
    target = folder_for(home, inputs)
    ids = np.arange(sum(lengths), dtype=np.uint16)
    made = []
    for number, piece in enumerate(np.split(ids, np.cumsum(lengths)[:-1])):
        stem = target / f"train-{number:05}"
        made.append(
            write_shard(stem, piece, [0, len(piece)], [("a", 0, len(piece))])
        )
    write_meta(target, inputs, {"train": made})
    return TokenStream.open(target, "train")


@pytest.mark.parametrize("resident", [False, True])
def test_shards_are_read_as_one_stream(tmp_path, resident):
    stream = sharded(tmp_path, [300, 0, 5, 295, 300])
    batches = Batches(stream, 7, 6, seed=5, resident=resident)
    plain = Batches(counting(900), 7, 6, seed=5)
    assert batches.steps_per_epoch == plain.steps_per_epoch
    for step in range(2 * plain.steps_per_epoch):
        for a, b in zip(batches.step(step), plain.step(step), strict=True):
            assert torch.equal(a, b)
    assert load(stream, torch.device("cpu")).tolist() == list(range(900))


@given(
    ranks=st.integers(1, 9),
    each=st.integers(1, 4),
    step=st.integers(0, 200),
    seed=st.integers(0, 2**64 - 1),
)
def test_ranks_read_the_batches_of_one(ranks, each, step, seed):
    size = ranks * each
    alone = Batches(counting(900), 7, size, seed=seed)
    parts = [
        Batches(counting(900), 7, size, seed=seed, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    assert [part.batch_size for part in parts] == [size] * ranks
    for i, whole in enumerate(alone.step(step)):
        together = [part.step(step)[i] for part in parts]
        assert all(part.shape == (each, 7) for part in together)
        assert torch.equal(torch.cat(together), whole)
    rows = [row for part in parts for row in part.rows_of(step)]
    assert rows == alone.rows_of(step) and len(set(rows)) == size


def test_an_epoch_over_all_ranks_has_no_gap_and_no_repeat():
    readers = [
        Batches(counting(900), 7, 8, seed=1, rank=r, ranks=8) for r in range(8)
    ]
    seen = [
        row
        for step in range(readers[0].steps_per_epoch)
        for reader in readers
        for row in reader.rows_of(step)
    ]
    assert len(seen) == len(set(seen)) == readers[0].sequences // 8 * 8


@pytest.mark.parametrize(
    ("rank", "ranks"), [(0, 4), (0, 12), (1, 1), (-1, 2), (2, 2), (0, 0), (0, -1)]
)
def test_impossible_ranks_are_refused(rank, ranks):
    with pytest.raises(DataError, match=rf"rank {rank} of {ranks}.*batches of 6"):
        Batches(counting(900), 7, 6, rank=rank, ranks=ranks)


def test_samples_are_not_cut(tmp_path):
    stream = sharded(tmp_path, [480, 96], row_tokens=48)
    for how in ((48, {}), (96, {}), (40, {"rows": "truncate", "row_tokens": 48})):
        assert Batches(stream, how[0], 2, **how[1]).sequences
    for length in (24, 47, 72):
        with pytest.raises(DataError, match=f"rows of 48.*row_tokens={length}"):
            Batches(stream, length, 2)
