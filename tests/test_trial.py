"""The card's trial as a job: three arms on the same rows."""

import numpy as np
import pytest

from albor.batches import Batches
from albor.config import load_recipe
from albor.shards import TokenStream
from benchmarks.trial import rows_of, run

RECIPE = load_recipe("pretrain-tiny").with_training(
    max_steps=3, warmup_steps=1, mixed_precision="bf16", save_interval=0
)


@pytest.fixture(scope="module")
def curves():
    tokens = np.random.default_rng(0).integers(1000, size=5000).astype(np.uint16)
    batches = Batches(tokens, RECIPE.data.seq_len, 4, seed=1)
    val = TokenStream.of(tokens[:500])
    arms = ("albor", "transformers", "sequences")
    return {arm: run(arm, RECIPE, batches, val, seed=0) for arm in arms}


def test_arms_start_alike_and_two_programs_agree(curves):
    ours, theirs = curves["albor"]["losses"], curves["transformers"]["losses"]
    assert len(ours) == len(theirs) == 3
    assert ours == pytest.approx(theirs, abs=2e-2)
    assert ours[-1] != ours[0]


def test_one_sequence_at_a_time_is_four_times_the_updates(curves):
    one = curves["sequences"]["losses"]
    assert len(one) == 12
    # The first sequence is judged by the same weights as in the whole batch.
    assert one[0] == pytest.approx(curves["albor"]["losses"][0], abs=0.2)
    assert np.isfinite(curves["sequences"]["val_loss"])


def test_rows_are_the_same_ones_in_the_same_order():
    batches = Batches(np.arange(2000, dtype=np.uint16), 64, 4, seed=1)
    whole = [rows[0] for _, rows in rows_of(batches, RECIPE, one=False)]
    single = [rows[0] for _, rows in rows_of(batches, RECIPE, one=True)]
    numbers = [number for number, _ in rows_of(batches, RECIPE, one=True)]
    assert numbers == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(np.concatenate(whole), np.concatenate(single))
