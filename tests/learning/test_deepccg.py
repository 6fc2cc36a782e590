"""DeepCCG: the Gaussian model's closed forms, the choice of memory, and a stream that is learned in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstack
from jaxstack.core.errors import UserError
from jaxstack.learning import deepccg as ccg


def clouds(seed=0, count=40, dim=3, classes=4):
    keys = jax.random.split(jax.random.key(seed), 3)
    labels = jax.random.randint(keys[0], (count,), 0, classes)
    z = 2 * jax.random.normal(keys[1], (classes, dim))[labels] + jax.random.normal(keys[2], (count, dim))
    return z, labels


def test_the_divergence_of_two_posteriors():
    a, b = jnp.asarray([0.3, -1.0, 2.0]), jnp.asarray([0.0, -0.5, 1.5])
    assert float(ccg.kl(a, 20, b, 5, 2.0)) == pytest.approx(1.69194154, rel=1e-6)
    assert float(ccg.kl(a, 20, a, 20, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_predictive_densities_have_their_closed_forms():
    z, labels = clouds()
    mask = jnp.arange(40) < 30
    model = ccg.posterior(z, labels, mask, 5)
    for c in range(4):
        rows = np.asarray(z)[(np.asarray(labels) == c) & np.asarray(mask)]
        np.testing.assert_allclose(model.mean[c], rows.mean(0), rtol=1e-4, atol=1e-5)
        assert model.count[c] == len(rows)
    scores = ccg.log_predictive(z, model, 2.0)
    assert np.isneginf(scores[:, 4]).all()
    # m_c drawn from its posterior: the mean density, up to the constant that is left out
    n, mean = float(model.count[0]), model.mean[0]
    draws = mean + jnp.sqrt(2.0 / n) * jax.random.normal(jax.random.key(1), (200_000, 3))
    near = mean + jnp.asarray([1.0, -0.5, 0.3])
    density = jnp.exp(-jnp.square(near - draws).sum(-1) / 4.0).mean() / 2.0**1.5
    exact = ccg.log_predictive(near[None], model, 2.0)[0, 0]
    assert float(exact) == pytest.approx(float(jnp.log(density)), abs=1e-2)
    # equal counts: nearest class mean; one example: twice the variance
    even = model._replace(count=jnp.full(5, 7.0).at[4].set(0.0))
    nearest = jnp.square(z[:, None] - model.mean[None, :4]).sum(-1).argmin(1)
    np.testing.assert_array_equal(ccg.log_predictive(z, even, 1.0).argmax(1), nearest)
    one = ccg.Posterior(jnp.zeros((1, 3)), jnp.ones(1))
    at = jnp.asarray([[1.0, 0.0, 0.0]])
    np.testing.assert_allclose(ccg.log_predictive(at, one, 1.0), -1 / 4 - 1.5 * np.log(2.0), rtol=1e-5)
    # of two classes with unequal counts the border is a sphere: where it cuts the line of means, solved by hand
    two = ccg.Posterior(jnp.asarray([[0.0], [4.0]]), jnp.asarray([1.0, 1e9]))
    a, b = ccg.log_predictive(jnp.asarray([[8 - np.sqrt(32 + 2 * np.log(2.0))]]), two, 1.0)[0]
    assert float(a) == pytest.approx(float(b), abs=1e-4)


def test_leave_one_out_equals_brute_force_and_does_not_depend_on_the_order():
    z, labels = clouds()
    labels = labels.at[0].set(4)  # alone in its class
    mask = jnp.arange(40) < 35
    value, scored = jax.jit(lambda z, y, m: ccg.leave_one_out(z, y, m, 5, 1.5))(z, labels, mask)
    assert not scored[0]
    assert not scored[35:].any()
    for i in (1, 7, 20):
        others = mask & (jnp.arange(40) != i)
        scores = ccg.log_predictive(z[i : i + 1], ccg.posterior(z, labels, others, 5), 1.5)[0]
        assert scored[i] == (others & (labels == labels[i])).any()
        np.testing.assert_allclose(value[i], jax.nn.log_softmax(scores)[labels[i]], rtol=1e-4)
    order = jax.random.permutation(jax.random.key(3), 40)
    again, kept = ccg.leave_one_out(z[order], labels[order], mask[order], 5, 1.5)
    np.testing.assert_allclose(again[scored[order]], value[order][scored[order]], rtol=1e-4)
    np.testing.assert_array_equal(kept, scored[order])
    grads = jax.grad(lambda z: jnp.where(scored, ccg.leave_one_out(z, labels, mask, 5, 1.5)[0], 0.0).sum())(z)
    assert np.isfinite(grads).all()
    halves, rows = ccg.split_halves(jax.random.key(0), z, labels, mask, 5, 1.5)
    assert 0 < rows.sum() < 35
    assert np.isfinite(halves[rows]).all()


def test_a_moved_embedding_changes_nothing_once_the_gaussians_are_computed_anew():
    z, labels = clouds()
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(5), (3, 3)))
    moved = z @ q + jnp.asarray([3.0, -1.0, 2.0])
    classify = lambda z, memory: ccg.log_predictive(z, ccg.posterior(memory, labels, jnp.ones(40, bool), 4), 1.0)
    np.testing.assert_allclose(classify(moved, moved), classify(z, z), atol=1e-3)
    assert (classify(moved, z).argmax(1) != classify(z, z).argmax(1)).any()


def test_chosen_subsets_are_near_the_mean():
    wins, ranks_of = 0, jax.jit(ccg.kl_ranks)
    rng = np.random.default_rng(0)
    for _ in range(40):
        z = jnp.asarray(rng.normal(size=(24, 5)), jnp.float32)
        mask = jnp.arange(24) < 20
        ranks = np.asarray(ranks_of(z, mask, 6))
        assert sorted(ranks)[:6] == list(range(6))
        assert (ranks[20:] == 24).all()
        centre = np.asarray(z[:20]).mean(0)
        distance = lambda rows, z=z, centre=centre: np.square(np.asarray(z)[rows].mean(0) - centre).sum()
        random = min(distance(rng.choice(20, 6, replace=False)) for _ in range(50))
        wins += distance(np.flatnonzero(ranks < 6)) <= random
    assert wins >= 38
    everything = np.asarray(ranks_of(z, mask, 20))
    assert (everything[:20] < 20).all()


def test_the_memory_shares_its_places_among_the_classes_seen():
    config = ccg.Config(selection="reservoir", memory=20)
    s = ccg.init(config, jax.random.key(0), config.hypers)
    x = jnp.arange(30 * 64, dtype=jnp.int32).reshape(30, 8, 8, 1).astype(jnp.uint8)
    y = jnp.repeat(jnp.asarray([3, 7]), 15)
    s = s._replace(seen=jnp.zeros(10, bool).at[jnp.asarray([3, 7])].set(True))
    counts = lambda m: {int(c): int((m.used & (m.y == c)).sum()) for c in (3, 7, 1)}
    for selection in ("reservoir", "kl"):
        own = ccg.Config(selection=selection, memory=20)
        memory = ccg.remembered(own, s, jax.random.key(1), x, y)
        assert counts(memory) == {3: 10, 7: 10, 1: 0}
        third = s._replace(memory=memory, seen=s.seen.at[1].set(True))
        smaller = ccg.remembered(own, third, jax.random.key(2), x[:9], jnp.full(9, 1))
        assert counts(smaller) == {3: 6, 7: 6, 1: 6}
        stored = {bytes(np.asarray(row)) for row in smaller.x[smaller.used]}
        assert stored <= {bytes(np.asarray(row)) for row in x}


def test_a_reservoir_keeps_every_example_alike():
    def pass_over(key):
        priority = jax.random.uniform(key, (30,))
        return ccg.ranks_by_class(priority, jnp.zeros(30, jnp.int32), jnp.ones(30, bool)) < 6

    kept = np.asarray(jax.vmap(pass_over)(jax.random.split(jax.random.key(0), 4000))).sum(0)
    assert kept.sum() == 6 * 4000
    expected = 4000 * 0.2
    chi2 = ((kept - expected) ** 2 / (expected * 0.8)).sum()
    assert chi2 < 60  # 29 degrees of freedom: p < 0.001


def test_a_stream_is_learned_in_one_pass_and_the_past_is_kept():
    options = dict(hidden=(32,), embedding=8)
    run = lambda **changes: jaxstack.train("deepccg", progress=False, **options, **changes)
    ours = run()
    last = ours.metrics[ours.metrics.step == ours.metrics.step.max()]
    assert float(last["eval/accuracy"].iloc[0]) > 0.6
    assert float(last["train/stored"].iloc[0]) == 60
    forgets = run(loss="sgd", head="linear")
    assert float(forgets.metrics["eval/accuracy"].iloc[-1]) < 0.5


def test_projected_gradients_do_not_raise_the_memory_s_loss():
    config = ccg.Config(loss="agem", head="linear", hidden=(8,), embedding=4, memory=10)
    x, y = ccg.stream(config)
    s = ccg.init(config, jax.random.key(0), config.hypers)
    step = jax.jit(lambda s, b: ccg.step(config, s, b)[0])
    for i in range(0, 300, 10):
        s = step(s, (jnp.asarray(x[i : i + 10]), jnp.asarray(y[i : i + 10])))
    late = jnp.asarray(x[-10:]), jnp.asarray(y[-10:])
    _, grads = ccg.gradient(config, s, jax.random.key(1), s.params, *late)
    old = jax.grad(lambda p: ccg.objective(config, s, jax.random.key(1), p, *late)[1])(s.params)
    inner = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(old)))
    assert inner > -1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=11), "tasks=11: expected at most the 10 classes"),
        (dict(memory=5), "memory=5: expected at least one example for each of 10 classes"),
        (dict(head="linear"), "head='linear': expected gaussian: loss=loo trains no linear head"),
        (dict(loss="sgd"), "head='gaussian': expected linear: loss=sgd has no memory"),
        (dict(variance=0.0), "variance=0.0"),
        (dict(loss="loot"), "loss='loot': expected one of 'loo'"),
    ],
)
def test_wrong_options_of_deepccg_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        jaxstack.make_learner("deepccg", **changes)
