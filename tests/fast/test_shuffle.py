import jax
import numpy as np
import pytest
import scipy.stats

from jaxstack.fast import shuffle


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100, 1000, 2**17 + 3])
def test_rows_are_different_orders_of_all_numbers(count):
    got = np.asarray(jax.jit(shuffle.permutations, static_argnums=(1, 2))(jax.random.key(count), 3, count))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(np.sort(got), np.broadcast_to(np.arange(count), (3, count)))
    assert count < 8 or len({row.tobytes() for row in got}) == 3


@pytest.mark.parametrize("packed", [True, False])
def test_every_order_is_as_likely(packed, monkeypatch):
    if not packed:
        monkeypatch.setattr(shuffle, "PACKED", 0)
    got = np.asarray(shuffle.permutations(jax.random.key(0), 24_000, 4))
    counts = np.unique(got @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_where_an_entry_lands_does_not_depend_on_its_number():
    # the longest packed order: most entries share their random bits with others
    got = np.asarray(shuffle.permutations(jax.random.key(3), 40, shuffle.PACKED))
    first = got[:, : shuffle.PACKED // 4]  # a minibatch: 2^16 of 2^18 without replacement
    spread = np.std((first < shuffle.PACKED // 2).mean(1))
    assert abs((first < shuffle.PACKED // 2).mean() - 0.5) < 2e-3
    assert spread < 2.5 * (0.25 * 0.75 / first.shape[1]) ** 0.5
    # neighbours that tie come in either order
    assert abs((got[:, :-1] < got[:, 1:]).mean() - 0.5) < 0.1
