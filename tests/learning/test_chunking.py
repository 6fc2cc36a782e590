"""Chunking: streams, memories, the losses of methods against forgetting, averages of weights, the linear case."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstack
from jaxstack.core.errors import UserError
from jaxstack.data.mixtures import Mixture
from jaxstack.learning import chunking, continual, streams

LABELS = np.random.default_rng(0).integers(0, 5, 203)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_chunks_are_disjoint_and_stratified(count):
    stream = streams.iid_chunks(np.random.default_rng(1), LABELS, count)
    kinds = np.bincount(LABELS)
    for rows in stream.rows:
        np.testing.assert_array_equal(np.bincount(LABELS[rows]), kinds // count)
    assert stream.mask.all()
    assert len(np.unique(stream.rows)) == stream.rows.size == sum(count * (kinds // count))
    random = streams.iid_chunks(np.random.default_rng(1), LABELS, count, stratified=False)
    assert len(np.unique(random.rows)) == random.rows.size == count * (203 // count)


def test_groups_of_classes_cover_the_set_and_are_cut_into_pieces():
    groups = streams.class_groups(np.random.default_rng(2), LABELS, 5, 3)
    stream = streams.of_groups(groups)
    np.testing.assert_array_equal(np.sort(stream.rows[stream.mask]), np.arange(203))
    assert [len(np.unique(LABELS[g])) for g in groups] == [2, 2, 1]
    online = streams.in_pieces(stream, 20)
    assert online.rows.shape[1] == 20
    assert online.mask.any(1).all()
    assert len(np.unique(online.rows[online.mask])) == online.mask.sum() > 203 - 3 * 20
    with pytest.raises(UserError, match="pieces of 300: expected 1 to"):
        streams.in_pieces(stream, 300)
    with pytest.raises(UserError, match="chunks=300: expected 1 or more"):
        streams.iid_chunks(np.random.default_rng(0), LABELS, 300)


def test_points_of_a_mixture_are_those_of_its_seed():
    easy = Mixture(spread=1e-3, clusters=1)
    x, y = easy.draw(60)
    other, z = easy.draw(40, part=1)
    assert set(np.bincount(y)) == {3}
    # one cluster without noise: both draws have the same 20 points
    nearest = np.square(other[:, None] - x[None]).sum(-1).argmin(1)
    np.testing.assert_array_equal(y[nearest], z)
    np.testing.assert_array_equal(easy.draw(60)[0], x)


def test_a_reservoir_keeps_every_example_alike_and_each_place_once():
    def offered(key):
        memory = streams.empty(6, np.zeros(1, np.float32), 2)

        def one(m, given):
            key, x = given
            return streams.reservoir(m, key, x[:, None], jnp.zeros(5, int), jnp.zeros((5, 2)), jnp.arange(5) < 4), None

        xs = jnp.arange(1.0, 51).reshape(10, 5)
        return jax.lax.scan(one, memory, (jax.random.split(key, 10), xs))[0]

    found = jax.jit(jax.vmap(offered))(jax.random.split(jax.random.key(0), 4000))
    assert (found.count == 40).all()  # every fifth one was not offered
    stored = np.asarray(found.x[..., 0], int)
    assert all(len(set(row)) == 6 for row in stored[:200])
    times = np.bincount(stored.ravel(), minlength=51)[1:].reshape(10, 5)
    assert (times[:, 4] == 0).all()
    expected = 4000 * 6 / 40
    chi2 = (np.square(times[:, :4] - expected) / (expected * (1 - 6 / 40))).sum()
    assert chi2 < 73  # 39 degrees of freedom: p < 0.001
    drawn = streams.draw(jax.tree.map(lambda a: a[0], found), jax.random.key(1), 6)
    assert sorted(drawn.x[:, 0].tolist()) == sorted(stored[0].tolist())
    few = streams.draw(streams.empty(6, np.zeros(1, np.float32), 2)._replace(count=jnp.int32(2)), jax.random.key(2), 4)
    assert few.mask.sum() == 2


def test_a_greedy_memory_gives_up_what_is_alike():
    memory = streams.empty(4, np.zeros(1, np.float32), 2)
    x, y = jnp.arange(4.0)[:, None], jnp.arange(4) % 2
    scores, everyone = jnp.asarray([1.9, 0.0, 0.0, 0.0]), jnp.ones(4, bool)
    full = streams.greedy_diverse(memory, jax.random.key(0), x, y, scores, everyone)
    np.testing.assert_array_equal(full.x, x)
    # unlike the rest (score 0): takes the place of the one that is like others
    new = streams.greedy_diverse(full, jax.random.key(1), x[:1] + 9, y[:1], jnp.zeros(1), everyone[:1])
    np.testing.assert_array_equal(new.x[:, 0], [9, 1, 2, 3])
    # like the rest: is not stored
    same = streams.greedy_diverse(full, jax.random.key(1), x[:1] + 9, y[:1], jnp.ones(1), everyone[:1])
    np.testing.assert_array_equal(same.x, x)
    assert same.count == 5


def state_of(method, **changes):
    config = continual.Config(data="mixture", method=method, hidden=(6,), memory=8, replay=4, batch_size=5, **changes)
    s = continual.init(config, jax.random.key(0), config.hypers)
    x, y = Mixture().draw(200)
    return config, continual.model_of(config), s, jnp.asarray(x), jnp.asarray(y)


def test_losses_against_forgetting_are_those_of_their_papers():
    config, model, s, x, y = state_of("er")
    seen = jnp.zeros(20, bool).at[y[5:20]].set(True)
    rows = [streams.Replay(x[a:b], y[a:b], jnp.ones((4, 20)) * a, jnp.arange(4) < 3) for a, b in ((5, 9), (9, 13))]
    mask = jnp.arange(5) < 4
    values = {}
    s, batch = s._replace(seen=seen, step=jnp.int32(1)), (x[:5], y[:5], mask)
    for method in ("er", "er-ace", "der++", "sgd", "a-gem"):
        config = dataclasses.replace(config, method=method)
        values[method] = float(continual.objective(config, model, s, s.params, jax.random.key(1), batch, *rows)[0])
    f = lambda rows: np.asarray(model.apply(continual.variables(s), x[rows]), np.float64)
    log_softmax = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))
    cross = lambda z, rows: -log_softmax(z)[np.arange(len(z)), np.asarray(y)[rows]]
    new, one, two = np.arange(4), np.arange(5, 8), np.arange(9, 12)
    plain = cross(f(new), new).mean()
    assert values["sgd"] == pytest.approx(plain, rel=1e-5)
    assert values["a-gem"] == pytest.approx(plain, rel=1e-5)
    assert values["er"] == pytest.approx(np.r_[cross(f(new), new), cross(f(one), one)].mean(), rel=1e-5)
    stored = np.square(f(one) - 5).mean()
    assert values["der++"] == pytest.approx(plain + 0.5 * stored + 0.5 * cross(f(two), two).mean(), rel=1e-5)
    absent = np.asarray(seen) & ~np.isin(np.arange(20), np.asarray(y)[new])
    assert absent.any()
    masked = np.where(absent, -1e9, f(new))
    assert values["er-ace"] == pytest.approx(cross(masked, new).mean() + cross(f(one), one).mean(), rel=1e-5)
    first = s._replace(step=jnp.int32(0))
    config = dataclasses.replace(config, method="er-ace")
    value = continual.objective(config, model, first, s.params, jax.random.key(1), batch, *rows)[0]
    assert float(value) == pytest.approx(plain, rel=1e-5)


def test_elastic_weights_and_likeness_of_gradients_equal_brute_force():
    config, model, s, x, y = state_of("ewc")
    mask = jnp.arange(12) < 11
    after = continual.finished(config, model, s, x[:12], y[:12], mask)
    after = continual.finished(config, model, after, x[:12], y[:12], mask)  # decay 1: twice as much
    one = jax.grad(lambda p, i: jax.nn.log_softmax(model.apply({"params": p}, x[i : i + 1]))[0, y[i]])
    grads = [one(s.params, i) for i in range(11)]
    expected = jax.tree.map(lambda *g: 2 * jnp.square(jnp.stack(g)).mean(0), *grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.anchor[1], expected)
    moved = jax.tree.map(lambda p: p + 0.1, s.params)
    loss = lambda p, s: continual.objective(config, model, s, p, jax.random.key(0), (x[:5], y[:5], mask[:5]), (), ())[0]
    penalty = 0.01 * sum(float(e.sum()) for e in jax.tree.leaves(expected))
    assert float(loss(moved, after) - loss(moved, s)) == pytest.approx(penalty, rel=1e-3)
    flat = np.stack([np.concatenate([np.ravel(v) for v in jax.tree.leaves(g)]) for g in grads])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    stored = streams.Replay(x[5:9], y[5:9], jnp.zeros((4, 20)), jnp.arange(4) < 3)
    found = continual.likeness(model, s, (x[:5], y[:5]), stored)
    np.testing.assert_allclose(found, (flat[:5] @ flat[5:8].T).max(1) + 1, rtol=1e-4)
    nothing = stored._replace(mask=jnp.zeros(4, bool))
    np.testing.assert_allclose(continual.likeness(model, s, (x[:5], y[:5]), nothing), 0.1)


def test_averages_of_weights():
    stack = jax.random.normal(jax.random.key(0), (7, 5))
    trees = [{"params": {"w": row}, "stats": {"var": row**2, "batches": jnp.int32(i)}} for i, row in enumerate(stack)]

    def fold(past):
        average = jax.tree.map(jnp.zeros_like, trees[0])
        for k, tree in enumerate(trees, start=1):
            average = chunking.averaged(average, tree, past(jnp.float32(k)))
        return average

    mean = fold(chunking.past_of_mean)
    np.testing.assert_allclose(mean["params"]["w"], stack.mean(0), atol=1e-6)
    np.testing.assert_allclose(mean["stats"]["var"], (stack**2).mean(0), atol=1e-6)
    assert mean["stats"]["batches"] == 6  # a counter
    np.testing.assert_array_equal(fold(lambda k: chunking.past_of_ema(k, 0.0))["params"]["w"], stack[-1])
    np.testing.assert_array_equal(fold(lambda k: chunking.past_of_ema(k, 1.0))["params"]["w"], stack[0])
    expected = 0.25 * stack[0] + 0.25 * stack[1] + 0.5 * stack[2]
    average = stack[0]
    for k in (2, 3):
        average = chunking.averaged(average, stack[k - 1], chunking.past_of_ema(k, 0.5))
    np.testing.assert_allclose(average, expected, atol=1e-6)


def test_the_chunking_proportion():
    assert chunking.proportion(0.9, 0.5, 0.5) == 1
    assert chunking.proportion(0.9, 0.7, 0.5) == pytest.approx(0.5)
    np.testing.assert_array_equal(np.isnan(chunking.proportion([0.9, 0.9], 0.7, [0.9, 0.5])), [True, False])


def test_bayesian_regression_does_not_depend_on_chunks_and_averages_come_near_it():
    with jax.enable_x64():
        rng = np.random.default_rng(0)
        x, true = rng.normal(size=(600, 5)), rng.normal(size=5)
        y = x @ true + 0.5 * rng.normal(size=600)
        start = chunking.Belief(jnp.eye(5), jnp.zeros(5))
        means, errors = [], {}
        for count in (1, 2, 10, 60):
            belief = start
            for a, b in zip(np.split(x, count), np.split(y, count)):
                belief = chunking.believe(belief, jnp.asarray(a), jnp.asarray(b), 0.25)
            means.append(np.asarray(belief.mean))
            xs, ys = jnp.asarray(x.reshape(count, -1, 5)), jnp.asarray(y.reshape(count, -1))
            each = np.asarray(jax.vmap(chunking.least_squares)(xs, ys))
            errors[count] = [np.square(w - true).sum() for w in (each[-1], each.mean(0))]
    exact = np.linalg.solve(np.eye(5) + x.T @ x / 0.25, x.T @ y / 0.25)
    np.testing.assert_allclose(means, np.tile(exact, (4, 1)), rtol=1e-10)
    np.testing.assert_allclose(each[3], np.linalg.lstsq(x[30:40], y[30:40])[0], rtol=1e-8)
    assert errors[60][1] < errors[60][0] / 3
    assert errors[1][0] == pytest.approx(errors[1][1])


def test_one_chunk_is_offline_training_and_settings_are_traced():
    config, model, s, x, y = state_of("sgd", epochs=3, drops=(0.5,))
    rows, mask = jnp.arange(17)[None], jnp.ones((1, 17), bool)
    run = jax.jit(lambda h: chunking.study(config, jax.random.key(0), h, (x, y), rows, mask))
    found = run(config.hypers)
    jax.tree.map(np.testing.assert_array_equal, found.last, found.averages["mean"])
    # by hand, in the same order
    params, s = s.params, continual.init(config, jax.random.key(0), config.hypers)
    loss = lambda p, at: -jax.nn.log_softmax(model.apply({"params": p}, x[at]))[jnp.arange(5), y[at]].mean()
    for epoch in range(3):
        k_order, _ = jax.random.split(jax.random.fold_in(jax.random.fold_in(s.key, 0), epoch))
        order = jax.random.permutation(k_order, 17)[:15].reshape(3, 5)
        for i, at in enumerate(order):
            rate = 0.1 if 3 * epoch + i < 4.5 else 0.01
            params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, jax.grad(loss)(params, at))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.last["params"], params)
    other = run(config.hypers._replace(lr=0.2))
    assert run._cache_size() == 1
    assert float(other.moved[0]) > float(found.moved[0])


def test_a_stream_is_learned_from_the_command_s_options():
    found = jaxstack.train("chunking", chunks=8, hidden=(32,), epochs=10, batch_size=10, progress=False)
    last = found.metrics[found.metrics.step == 8]
    assert float(last["eval/accuracy"].iloc[0]) > 0.8
    assert (found.metrics["train/accuracy"] > 0.9).all()
    assert float(last["eval/accuracy"].iloc[0]) != float(last["eval/last_accuracy"].iloc[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(chunks=11, order="classes"), "chunks=11: expected at most the 10 classes with order=classes"),
        (dict(replay=300), "replay=300: expected at most memory=200"),
        (dict(chunks=100), "batch_size=25: expected at most the 10 examples of a chunk"),
        (dict(drops=(1.5,)), "drops=.*: expected shares between 0 and 1"),
        (dict(ema=1.5), "hypers.ema=1.5: expected a number in"),
        (dict(method="era"), "method='era': expected one of 'sgd'"),
        (dict(data="mixture", model="lenet"), "model='lenet': expected mlp with data=mixture"),
    ],
)
def test_wrong_options_of_chunking_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        jaxstack.make_learner("chunking", **changes)
