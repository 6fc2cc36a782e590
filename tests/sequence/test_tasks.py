import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence import tasks
from jaxstack.sequence.state_tasks import group_table

SMALL = {
    "mqar": dict(vocab=32, length=24, pairs=4),
    "induction": dict(length=12, vocab=8),
    "recall": dict(length=20),
    "noisy_recall": dict(length=40, noise=0.5),
    "fuzzy_recall": dict(length=48),
    "selective_copy": dict(length=24, copies=5),
    "compression": dict(length=8),
    "memorisation": dict(length=8, vocab=32),
    "parity": dict(length=10),
    "modular_arithmetic": dict(length=12),
    "group": dict(length=8, group="S3"),
    "dyck": dict(length=16, depth=3, kinds=3),
    "tracking": dict(length=32),
}


def draw(name, count=64, test=False, seed=0, **changes):
    task = tasks.make(name, **(SMALL[name] | changes))
    batch = jax.jit(lambda k: task.sample(k, count, test))(jax.random.key(seed))
    return task, tasks.Batch(*map(np.asarray, batch))


@pytest.mark.parametrize("name", SMALL)
def test_examples_have_the_declared_shapes_and_ranges_and_follow_the_key(name):
    task, batch = draw(name)
    assert batch.mask.shape == batch.targets.shape == (64, task.length)
    assert batch.mask.any(1).all()
    if task.num_inputs:
        assert batch.tokens.shape == (64, task.length, task.num_inputs)
    else:
        assert batch.tokens.min() >= 0
        assert batch.tokens.max() < task.num_tokens
        assert batch.targets[batch.mask].min() >= 0
        assert batch.targets[batch.mask].max() < task.num_targets
        assert (batch.targets[~batch.mask] == 0).all()
    again, other = draw(name)[1], draw(name, seed=1)[1]
    np.testing.assert_array_equal(again.tokens, batch.tokens)
    assert (other.tokens != batch.tokens).any()
    one = task.example(jax.random.split(jax.random.key(0), 64)[3], False)
    np.testing.assert_allclose(one.tokens, batch.tokens[3], rtol=1e-5, atol=1e-6)


def test_mqar_asks_each_key_for_its_value():
    task, batch = draw("mqar", 256)
    n = task.pairs
    for x, y, m in zip(*batch):
        keys, values = x[: 2 * n : 2], x[1 : 2 * n : 2]
        assert len(set(keys)) == len(set(values)) == n
        assert ((keys >= 1) & (keys < 16)).all()
        assert ((values >= 16) & (values < 32)).all()
        at = np.flatnonzero(m)
        assert len(at) == n
        assert (at >= 2 * n).all()
        assert (at % 2 == 0).all()
        known = dict(zip(keys, values))
        assert sorted(x[at]) == sorted(keys)
        assert [known[k] for k in x[at]] == list(y[at])
        rest = np.setdiff1d(np.arange(2 * n, 24), at)
        assert (x[rest] == 0).all()


def test_mqar_distances_follow_the_power_law():
    batch = draw("mqar", 4096, pairs=1, length=22, vocab=64, power=0.5)[1]
    slot = (batch.mask.argmax(1) - 2) // 2
    weight = np.arange(1, 11) ** (0.5 - 1.0)
    np.testing.assert_allclose(np.bincount(slot, minlength=10) / 4096, weight / weight.sum(), atol=0.03)
    filled = draw("mqar", filler=True)[1]
    assert (filled.tokens[:, 8:] == 0).mean() < 0.2


def test_induction_asks_for_what_followed_the_special_token():
    _, batch = draw("induction", 512)
    for x, y, m in zip(*batch):
        first = int(np.argmax(x == 7))
        assert first < 10
        assert list(np.flatnonzero(m)) == [11]
        assert (x == 7).sum() == 2 + (first == 10)
        assert x[-1] == 7
        assert y[-1] == x[first + 1]


@pytest.mark.parametrize("name", ["recall", "noisy_recall"])
def test_recall_scores_the_values_of_known_keys(name):
    task, batch = draw(name, test=True)
    train = draw(name)[1]
    total = task.vocab - task.noise_vocab
    noisy = 0
    for x, y, m in zip(*batch):
        known, scored = {}, []
        for i in range(0, 20 if name == "recall" else 40, 2):
            k, v = x[i : i + 2]
            if k >= total:
                noisy += 1
                assert v >= total
                continue
            assert k < total // 2 <= v < total
            if k in known:
                assert known[k] == v
                scored.append(i)
            known[k] = v
        assert scored == list(np.flatnonzero(m))
        assert scored[-1] == len(x) - 2
        np.testing.assert_array_equal(y[scored], x[np.array(scored) + 1])
    assert (0.4 < noisy / (64 * 20) < 0.55) if name == "noisy_recall" else noisy == 0
    np.testing.assert_array_equal(train.tokens, batch.tokens)
    np.testing.assert_array_equal(train.targets[:, :-1], train.tokens[:, 1:])
    assert train.mask[:, :-1].all()


def pairs_of(sequence):
    """[(key, value, place of the value)] of a fuzzy sequence with 7 key tokens, 8 value tokens and the pad 15."""
    out, i = [], int(np.argmax(sequence != 15))
    while i < len(sequence):
        j = i
        while j < len(sequence) and sequence[j] < 7:
            j += 1
        end = j
        while end < len(sequence) and sequence[end] >= 7:
            end += 1
        out.append((tuple(sequence[i:j]), tuple(sequence[j:end]), j))
        i = end
    return out


@pytest.mark.parametrize("test", [False, True])
def test_fuzzy_recall_repeats_values_of_known_keys(test):
    task, batch = draw("fuzzy_recall", test=test)
    sizes, scored_pairs = [], 0
    for x, y, m in zip(*batch):
        sequence = np.append(x, y[-1])
        pairs = pairs_of(sequence)
        known, scored = {}, []
        for k, v, place in pairs:
            sizes.append(len(k))
            assert 1 <= len(k) <= 3
            assert 1 <= len(v) <= 3
            assert len(set(k)) == len(k)
            assert len(set(v)) == len(v)
            if k in known:
                assert known[k] == v
                scored += range(place - 1, place - 1 + len(v))
                scored_pairs += 1
            known[k] = v
        assert pairs[-1][0] in {k for k, _, _ in pairs[:-1]}  # the probe was shown
        assert list(np.flatnonzero(m)) == (scored if test else list(range(task.length)))
    assert scored_pairs >= 64
    assert set(sizes) == ({3} if test else {1, 2, 3})


def test_selective_copy_asks_for_the_tokens_in_order():
    batch = draw("selective_copy")[1]
    for x, y, m in zip(*batch):
        content = x[x < 14]
        assert len(content) == 5
        assert x[24 - 6] == 15
        assert x[24 - 7] < 14  # the last token stands right before the copy token
        np.testing.assert_array_equal(np.flatnonzero(m), np.arange(19, 24))
        np.testing.assert_array_equal(y[19:], content)
        assert (x[19:] == 14).all()


def test_compression_rebuilds_its_input_from_the_last_state():
    task, batch = draw("compression")
    assert task.readout == "last"
    np.testing.assert_array_equal(batch.tokens, batch.targets)
    assert (batch.tokens[:, -1] == 15).all()
    assert batch.tokens[:, :-1].max() < 15


def test_memorisation_has_one_fixed_map():
    first, second = draw("memorisation", seed=0)[1], draw("memorisation", seed=1, test=True)[1]
    maps = []
    for batch in (first, second):
        assert (batch.tokens[:, 1::2] == 31).all()
        assert (batch.mask == (np.arange(8) % 2 == 1)).all()
        maps.append(dict(zip(batch.tokens[:, ::2].ravel(), batch.targets[:, 1::2].ravel())))
    assert maps[0] == maps[1]
    assert sorted(maps[0].values()) == list(range(15, 30))
    assert draw("memorisation", map_seed=1)[1].targets.tolist() != first.targets.tolist()


def test_parity_counts_bits():
    batch = draw("parity")[1]
    np.testing.assert_array_equal(batch.targets, np.cumsum(batch.tokens, 1) % 2)
    sparse = draw("parity", dense=False)[1]
    assert (sparse.tokens[:, -1] == 2).all()
    np.testing.assert_array_equal(sparse.targets[:, -1], sparse.tokens[:, :-1].sum(1) % 2)
    assert (sparse.mask.sum(1) == 1).all()


def test_modular_arithmetic_has_the_value_python_computes():
    batch = draw("modular_arithmetic", 128)[1]
    signs = "01234+-*"
    for x, y in zip(batch.tokens, batch.targets):
        assert x[-1] == 8
        assert y[-1] == eval("".join(signs[i] for i in x[:-1])) % 5
    assert set(np.unique(batch.tokens)) == set(range(9))


@pytest.mark.parametrize(("name", "size", "commuting"), [("S3", 6, 0.5), ("A4", 12, 4 / 12), ("A5", 60, 5 / 60)])
def test_group_tables_are_groups(name, size, commuting):
    table = group_table(name)
    assert table.shape == (size, size)
    np.testing.assert_array_equal(table[0], np.arange(size))
    np.testing.assert_array_equal(table[:, 0], np.arange(size))
    assert all(len(set(row)) == size for row in [*table, *table.T])
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, size, (3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table == table.T).mean() == pytest.approx(commuting)  # conjugacy classes over elements


def test_group_products_and_permutations():
    elements = list(itertools.permutations(range(3)))
    table = group_table("S3")
    a, b = elements[3], elements[4]
    assert elements[table[3, 4]] == tuple(a[b[i]] for i in range(3))
    product = group_table("Z2xZ3")
    assert len(product) == 6
    assert product[1 * 3 + 2, 1 * 3 + 2] == 0 * 3 + 1
    batch = draw("group")[1]
    for x, y in zip(batch.tokens, batch.targets):
        state = 0
        for t in range(8):
            state = table[state, x[t]]
            assert y[t] == state


def test_dyck_words_are_balanced_and_bounded():
    batch = draw("dyck", 256)[1]
    deepest = 0
    for x, y in zip(batch.tokens, batch.targets):
        stack = []
        for token, target in zip(x, y):
            if token < 3:
                stack.append(token)
            else:
                assert stack.pop() == token - 3
            deepest = max(deepest, len(stack))
            assert len(stack) <= 3
            assert target == (stack[-1] if stack else 3)
        assert not stack
    assert deepest == 3


def test_the_optimum_of_tracking_is_calibrated_and_best():
    task, batch = draw("tracking", 4096)
    mean, var = task.optimal(jnp.asarray(batch.tokens))
    error = np.square(mean - batch.targets)
    np.testing.assert_allclose(error.mean(), np.mean(var), rtol=0.03)
    assert error.mean() < 0.1 * np.square(batch.tokens[..., 0] - batch.targets).mean()
    inside = np.abs(mean - batch.targets) < 1.645 * np.sqrt(var)
    assert inside.mean() == pytest.approx(0.9, abs=0.01)


def test_a_finite_training_set_repeats_its_examples():
    task = tasks.make("parity", length=24)
    batch = jax.jit(lambda k: tasks.finite(task, 5)(k, 64))(jax.random.key(0))
    assert len({tuple(x) for x in np.asarray(batch.tokens)}) == 5
    with pytest.raises(UserError, match="examples=0"):
        tasks.finite(task, 0)


def test_loss_and_accuracy_look_at_scored_positions_only():
    targets = jnp.array([[1, 0, 2, 0]])
    mask = jnp.array([[True, False, True, False]])
    logits = jnp.log(jnp.array([[[0.2, 0.5, 0.3], [0.0, 0.0, 1.0], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]]) + 1e-9)
    batch = tasks.Batch(jnp.zeros((1, 4), jnp.int32), targets, mask)
    total, count = tasks.loss_terms(logits, batch)
    np.testing.assert_allclose(total, -np.log(0.5) - np.log(0.1), rtol=1e-5)
    assert (count, tasks.accuracy(logits, batch)) == (2, 0.5)
    real = tasks.Batch(jnp.zeros((1, 4, 1)), jnp.array([[1.0, 5.0, 2.0, 0.0]]), mask)
    assert tasks.loss_terms(jnp.zeros((1, 4)), real)[0] == 5.0


def test_what_stands_at_unscored_positions_reaches_neither_loss_nor_gradient():
    mask = jnp.array([[True, False, True, False]])
    total = lambda out, batch: tasks.loss_terms(out, batch)[0]
    graded = jax.jit(jax.value_and_grad(total))
    logits = jax.random.normal(jax.random.key(0), (1, 4, 3))
    for out, targets, dirt in (
        (logits, jnp.array([[1, 0, 2, 0]]), -100),
        (logits[..., 0], jnp.array([[1.0, 0.0, 2.0, 0.0]]), jnp.nan),
    ):
        clean = graded(out, tasks.Batch(None, targets, mask))
        at = mask[..., None] if out.ndim == 3 else mask
        for filler in (jnp.nan, jnp.inf):
            dirty = tasks.Batch(None, jnp.where(mask, targets, dirt), mask)
            found = graded(jnp.where(at, out, filler), dirty)
            np.testing.assert_array_equal(found[0], clean[0])
            np.testing.assert_array_equal(found[1], clean[1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mqar", dict(pairs=8, length=24), "length=24"),
        ("mqar", dict(vocab=20, length=24, pairs=2), "vocab=20"),
        ("recall", dict(length=7), "length=7"),
        ("recall", dict(noise=0.5), "noise=0.5"),
        ("selective_copy", dict(length=8, copies=4), "length=8"),
        ("fuzzy_recall", dict(vocab=6), "vocab=6"),
        ("modular_arithmetic", dict(length=7), "length=7"),
        ("group", dict(group="B3"), "group='B3'"),
        ("dyck", dict(length=5), "length=5"),
        ("tracking", dict(fine=3.0), "coarse=2.0"),
        ("parity", dict(lenght=5), "did you mean 'length'"),
        ("parrity", {}, "did you mean 'parity'"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        tasks.make(name, **options)
