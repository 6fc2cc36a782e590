"""Forward-mode differentiation with sharing: tangents are those of reverse mode and of closed forms; the outer loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstack
from jaxstack.core import stages
from jaxstack.core.errors import UserError
from jaxstack.nn.supervised import linen
from jaxstack.optim import fds, fds_training

T = 12


@pytest.fixture
def x64():
    with jax.enable_x64():
        yield


def values(lr, momentum, decay):
    return fds.Schedules(*(jnp.asarray(x, jnp.float64) for x in (lr, momentum, decay)))


THREE = lambda: values([0.1, 0.3, 0.2], [0.8], [0.01])


class Net(nn.Module):
    """Whose training changes statistics beside the weights."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.tanh(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
        return nn.Dense(3)(x)


def problem(seed=0):
    """(loss, first weights, step -> batch, validation batches) of a small classifier."""
    k_x, k_y, k_init = jax.random.split(jax.random.key(seed), 3)
    x, y = jax.random.normal(k_x, (T, 6, 5), jnp.float64), jax.random.randint(k_y, (T, 6), 0, 3)
    model = linen(Net(), np.zeros((1, 5)))
    loss = fds_training.loss_of(model)
    now = fds_training.weights_of(model, k_init)
    now = jax.tree.map(lambda a: a.astype(jnp.float64), now)
    keys = jax.random.split(k_x, T)
    return loss, now, lambda t: (x[t], y[t], keys[t]), (x[:2] + 1.0, y[:2], keys[:2])


def test_forward_mode_is_reverse_mode_with_cut_gradients_and_batch_statistics(x64):
    loss, now, batches, valid = problem()
    limits = fds.Limits(gradient=0.2)
    forward = jax.jit(lambda steps: fds.forward_mode(loss, now, batches, valid, THREE(), steps, limits))(T)
    backward = jax.jit(lambda most: fds.reverse_mode(loss, now, batches, valid, THREE(), T, fds.Limits(most)))
    reverse, free = backward(0.2), backward(1e9)
    assert abs(free.gradient.lr / reverse.gradient.lr - 1).max() > 0.01  # gradients were cut
    for a, b in zip(jax.tree.leaves(forward), jax.tree.leaves(reverse), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)
    assert (jnp.abs(jnp.concatenate(forward.gradient)) > 1e-6).all()
    # the weights are those of plain training; the validation loss is what its gradient is of
    end, value = jax.jit(lambda: fds.train(loss, now, batches, THREE(), T, limits))()
    np.testing.assert_allclose(value, forward.train_loss)
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(forward.weights), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    halves = [loss(end.params, jax.tree.map(lambda x, i=i: x[i], valid), end.extra)[0] for i in range(2)]
    np.testing.assert_allclose(forward.valid_loss, np.mean(halves))


def quadratic(seed=0, size=4):
    """Loss w^T H_t w / 2 + b_t^T w, whose Hessians and gradients are known: (loss, step -> (H, b), H [T, P, P])."""
    k_h, k_b = jax.random.split(jax.random.key(seed))
    a = jax.random.normal(k_h, (T, size, size), jnp.float64)
    h, b = a @ a.mT / size, jax.random.normal(k_b, (T, size), jnp.float64)
    loss = lambda w, batch, extra: (w @ batch[0] @ w / 2 + batch[1] @ w, extra)
    return loss, lambda t: (h[t], b[t]), h


def tangents(loss, now, batches, schedules, limits=fds.Limits()):
    """(weights, Z [n, P], C [n, P]) after T steps."""

    def body(c, t):
        new, tangents, _ = fds.forward_step(loss, *c, batches(t), schedules, t, T, limits)
        return (new, tangents), None

    first = (now, fds.tangents_of(now.params, schedules))
    end, (z, c) = jax.jit(lambda: jax.lax.scan(body, first, jnp.arange(T))[0])()
    return end, z, c


def written(batches, h, schedules, limits, released=False):
    """(Z, C) [5, 4] of the written recursion. The Hessian-vector product is D H Z, D 1 where a gradient is not cut; the
    released code takes the transposed one, H D Z."""
    w, v = np.arange(1.0, 5.0), np.zeros(4)
    z, c = np.zeros((5, 4)), np.zeros((5, 4))
    for t in range(T):
        k = 3 * t // T
        lr, momentum, decay = float(schedules.lr[k]), 0.8, 0.01
        g = np.asarray(h[t]) @ w + np.asarray(batches(t)[1])
        free = np.ones(4) if limits.gradient is None else np.abs(g) < limits.gradient
        hz = (z * free) @ np.asarray(h[t]) if released else (z @ np.asarray(h[t])) * free
        hz = hz if limits.tangent is None else np.clip(hz, -limits.tangent, limits.tangent)
        g = g if limits.gradient is None else np.clip(g, -limits.gradient, limits.gradient)
        new_c = momentum * c + hz + decay * z
        new_z = z - lr * new_c
        new_z[k] -= g + decay * w + momentum * v
        new_z[3] -= lr * v
        new_c[3] += v
        new_z[4] -= lr * w
        new_c[4] += w
        v = momentum * v + g + decay * w
        w = w - lr * v
        z, c = new_z, new_c
    return z, c


@pytest.mark.parametrize("limits", [fds.Limits(), fds.Limits(None, 0.5), fds.Limits(1.0, 0.5)])
def test_tangents_follow_the_written_recursion(x64, limits):
    loss, batches, h = quadratic()
    _, *found = tangents(loss, fds.start(jnp.arange(1.0, 5.0)), batches, THREE(), limits)
    want, released = (written(batches, h, THREE(), limits, way) for way in (False, True))
    np.testing.assert_allclose(found[0], want[0], rtol=1e-9)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-9)
    # without cut gradients the released code finds the same tangents, with them others
    if limits.gradient is None:
        np.testing.assert_allclose(released, want, rtol=1e-12, atol=1e-12)
    else:
        assert np.abs(np.subtract(released, want)).max() > 0.1


def test_closed_forms_of_plain_gradient_descent(x64):
    none = dict(momentum=[0.0], decay=[0.0])
    # one weight, one rate: w_T = w_0 (1 - a h)^T
    loss = lambda w, batch, extra: (1.5 * w @ w / 2, extra)
    end, z, _ = tangents(loss, fds.start(jnp.asarray([2.0])), lambda t: t, values([0.1], **none))
    np.testing.assert_allclose(end.params, 2 * 0.85**T)
    np.testing.assert_allclose(z[0], -T * 1.5 * 2 * 0.85 ** (T - 1))
    # a rate per step: column t is -(product over s > t of (I - a_s H_s)) g_t
    loss, batches, h = quadratic()
    rates = np.linspace(0.05, 0.3, T)
    _, z, _ = tangents(loss, fds.start(jnp.ones(4)), batches, values(rates, **none))
    w, seen = np.ones(4), []
    for t in range(T):
        seen.append(np.asarray(h[t]) @ w + np.asarray(batches(t)[1]))
        w = w - rates[t] * seen[-1]
    for t in range(T):
        column = -seen[t]
        for s in range(t + 1, T):
            column = column - rates[s] * np.asarray(h[s]) @ column
        np.testing.assert_allclose(z[t], column, rtol=1e-9, atol=1e-12)


def test_one_shared_value_is_the_mean_of_its_steps(x64):
    loss, batches, _ = quadratic()
    valid = jax.tree.map(lambda x: x[None], batches(0))
    now = fds.start(jnp.ones(4))
    of = lambda n: fds.forward_mode(loss, now, batches, valid, values(np.full(n, 0.1), [0.5], [0.1]), T)
    alone, shared = of(T).gradient, of(3).gradient
    np.testing.assert_allclose(shared.lr, alone.lr.reshape(3, -1).mean(1), rtol=1e-9)
    np.testing.assert_allclose(shared.momentum, alone.momentum, rtol=1e-9)
    # seeds side by side, and a number of steps that is traced
    both = jax.vmap(lambda w: fds.forward_mode(loss, fds.start(w), batches, valid, THREE(), jnp.int32(T)))
    two = both(jnp.stack([jnp.zeros(4), jnp.ones(4)]))
    one = fds.forward_mode(loss, now, batches, valid, THREE(), T)
    np.testing.assert_allclose(two.gradient.lr[1], one.gradient.lr, rtol=1e-9)
    assert np.abs(two.gradient.lr[0] / one.gradient.lr - 1).max() > 0.01


def test_greedy_hypergradients_look_one_step_ahead(x64):
    loss, batches, _ = quadratic()
    now = fds.Weights(jnp.ones(4), jnp.arange(4.0))
    hyper = fds.Schedules(*map(jnp.float64, (0.1, 0.8, 0.01)))
    found, new, _ = fds.greedy_step(loss, now, batches(0), batches(1), hyper)
    g = jax.grad(lambda w: loss(w, batches(0), ())[0])(now.params)
    ahead = jax.grad(lambda w: loss(w, batches(1), ())[0])(new.params)
    want = (-(g + 0.8 * now.velocity + 0.01 * now.params), -0.1 * now.velocity, -0.1 * now.params)
    np.testing.assert_allclose(jnp.stack(found), [z @ ahead for z in want], rtol=1e-9)
    # averaged over the steps that share a value, whose validation batches take turns
    valid = jax.tree.map(lambda *x: jnp.stack(x), batches(1), batches(2))
    mode = fds.greedy_mode(loss, fds.start(jnp.ones(4)), batches, valid, THREE(), T)
    now, sums = fds.start(jnp.ones(4)), np.zeros(3)
    for t in range(T):
        h, now, _ = fds.greedy_step(loss, now, batches(t), batches(1 + t % 2), fds.at(THREE(), t, T))
        sums[3 * t // T] += h.lr
    np.testing.assert_allclose(mode.gradient.lr, sums / 4, rtol=1e-9)
    np.testing.assert_allclose(mode.weights.params, now.params)


def test_signs_move_values_and_halve_their_steps():
    outer = fds.outer_start(fds.Schedules(0.4, 0.9, 0.0), fds.Schedules(0.1, 0.1, 1e-3), counts=fds.Schedules(2, 1, 1))
    steps, rates = [], []
    for sign in (1, 1, -1, -1, 1):
        h = fds.Schedules(jnp.asarray([sign * 7.0, 0.0]), jnp.asarray([-1.0]), jnp.asarray([1.0]))
        outer = fds.sign_update(outer, h)
        steps.append(float(outer.sizes.lr[0]))
        rates.append(float(outer.schedules.lr[0]))
    np.testing.assert_allclose(steps, [0.1, 0.1, 0.05, 0.05, 0.025], rtol=1e-6)
    np.testing.assert_allclose(rates, [0.3, 0.2, 0.25, 0.3, 0.275], rtol=1e-6)
    # 0 moves nothing and turns nothing; values stay where they make sense
    assert outer.schedules.lr[1] == np.float32(0.4)
    assert outer.sizes.lr[1] == np.float32(0.1)
    assert outer.schedules.momentum[0] == np.float32(0.999)
    assert outer.schedules.weight_decay[0] == 0.0
    lost = fds.sign_update(outer, jax.tree.map(lambda x: x * jnp.nan, outer.signs))
    np.testing.assert_array_equal(lost.schedules.lr, outer.schedules.lr)
    assert not fds.settled(outer)
    small = outer._replace(sizes=jax.tree.map(lambda x: 0.049 * x, outer.schedules))
    assert not fds.settled(small)  # a value of 0 has no share
    assert fds.settled(small._replace(schedules=outer.schedules._replace(weight_decay=jnp.ones(1))))


def test_the_error_of_sharing():
    np.testing.assert_allclose(fds.sharing_error(0.25, 0.08, 40), (0.0015625, 0.8543625), rtol=1e-6)
    np.testing.assert_allclose(fds.sharing_error(0.5, 0.1, 1, 0.7), (0.25, 0.25), rtol=1e-6)
    np.testing.assert_allclose(fds.sharing_error(0.5, 0.0, 1e6, 0.3)[0], 0.25 * 0.3, rtol=1e-4)
    best = float(fds.best_window(0.25, 0.001))
    error = [float(fds.sharing_error(0.25, 0.001, w)[1]) for w in (0.9 * best, best, 1.1 * best)]
    assert error[1] < min(error[0], error[2])


def test_parts_are_disjoint_and_each_epoch_is_whole():
    rows = jnp.arange(23)
    batches, valid = jax.jit(
        lambda key: (lambda b, v: (jax.vmap(b)(jnp.arange(6)), v))(*fds.draw(key, rows, 5, 6, 2, 2))
    )(jax.random.key(0))
    assert valid.shape == (2, 2)
    assert batches.shape == (6, 6)
    for epoch in np.asarray(batches).reshape(2, 18):
        assert len({*epoch}) == 18
        assert not {*epoch} & {*np.ravel(valid)}
    assert not np.array_equal(batches[0], batches[3])


def test_the_search_finds_schedules_that_train():
    method = jaxstack.make_learner(
        "fds", hidden=(16,), epochs=4, outer_steps=4, retrain_epochs=6, lr_values=3, valid_share=0.1
    )
    result = stages.train(method, 2, progress=False)
    last = result.metrics[result.metrics.stage == "retrain"]
    assert (last[last.step == last.step.max()]["eval/accuracy"] > 0.9).all()
    outer = result.states["search"].outer
    assert (outer.schedules.lr > 0.05).any(1).all()
    # the first training has rates of 0: nothing moves, so nothing but the rate is told apart
    first = result.metrics[(result.metrics.stage == "search") & (result.metrics.step == 1)]
    np.testing.assert_allclose(first["search/lr_1"], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(first["search/momentum_1"], 0.0)
    # the second stage reads the schedules from its state, stretched to its length
    rates = last[last.step == last.step.max()]["train/lr"]
    np.testing.assert_allclose(np.sort(rates), np.sort(outer.schedules.lr[:, -1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=5000), "batch_size=5000: expected at most the 1195 images left for training"),
        (dict(first_epochs=20), "first_epochs=20: expected at most epochs=10"),
        (dict(valid_share=1.0), "valid_share=1.0: expected a number between 0 and 1"),
        (dict(momentum=1.0), "hypers.momentum=1.0: expected 0 or more, below 1"),
        (dict(shrink=0.0), "hypers.shrink=0.0"),
        (dict(clip_tangent=0.0), "hypers.clip_tangent=0.0: expected a number > 0"),
        (dict(lr_values=0), "lr_values=0: expected a number >= 1"),
        (dict(model="mlpp"), "model='mlpp': expected one of mlp"),
    ],
)
def test_wrong_options_of_the_search_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        jaxstack.make_learner("fds", **changes)
