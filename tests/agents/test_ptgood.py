"""PTGOOD: dynamics, bottleneck, rates and planner against NumPy and closed forms."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents
from jaxstack.agents import conservative, planning, ptgood
from jaxstack.agents import ptgood_parts as parts_of
from jaxstack.agents.offline import Batch
from jaxstack.agents.ptgood import Config
from jaxstack.core.errors import UserError
from jaxstack.envs import terminations
from jaxstack.nn import bottleneck, dynamics, ensembles
from jaxstack.nn.bottleneck import Encoders, Gaussian, Mixture
from jaxstack.nn.dynamics import Dynamics, Rows

TAU = 2 * np.pi


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- dynamics


def test_the_loss_of_the_ensemble_equals_numpy():
    mean, raw, y = normal(0, 3, 5, 2), 8 * normal(1, 3, 5, 2), normal(2, 5, 2)
    low, high = np.float32([-10, -9]), np.float32([0.5, 1.0])
    clamped = dynamics.soft_clamp(jnp.asarray(raw), low, high)
    softplus = lambda x: np.log1p(np.exp(np.float64(x)))
    want = high - softplus(high - np.float64(raw))
    want = low + softplus(want - low)
    np.testing.assert_allclose(clamped, want, rtol=1e-4, atol=1e-5)
    assert bool(((clamped > low) & (clamped < high + 1e-4)).all())
    each = (mean - y) ** 2 * np.exp(-want) + want
    total = sum(each[k].mean() for k in range(3)) + 0.01 * (high - low).sum()
    np.testing.assert_allclose(dynamics.nll(mean, clamped, y, low, high), total, rtol=1e-4)
    apart = np.linalg.norm(mean - mean.mean(0), axis=-1).mean(0)
    np.testing.assert_allclose(dynamics.disagreement(jnp.asarray(mean)), apart, rtol=1e-5)
    alone = jax.grad(lambda m: dynamics.disagreement(m).sum())(jnp.ones((1, 4, 2)))
    assert bool((alone == 0).all())


def linear(noise, count=2000):
    """s' = s + B u, reward the first change, with noise on the reward alone."""
    obs, action = normal(3, count, 2), np.tanh(normal(4, count, 1))
    change = action * np.float32([0.5, -0.3])
    return Rows(obs, action, change[:, 0] + noise * normal(5, count), obs + change)


def test_the_ensemble_recovers_a_linear_system_and_its_noise():
    dyn = Dynamics(2, 1, hidden=(16,), members=3, num_elites=2, lr=1e-2)
    rows = jax.tree.map(jnp.asarray, linear(0.1))
    # rows beyond the count are never read
    spoilt = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full_like(x[:100], jnp.nan)]), rows)

    @jax.jit
    def run(key, rows):
        how = dict(patience=5, max_calls=40)
        return dynamics.fit(dyn, dyn.init(key), rows, jnp.int32(2000), key, dynamics.begin(), **how)

    model, how = run(jax.random.key(0), spoilt)
    mean, logvar = dyn.predict(model, rows.obs, rows.action)
    error = np.square(mean[..., :2] - rows.outputs[:, :2]).mean((1, 2))
    assert error[model.elites].max() < 1e-4
    assert float(how.best) < 0.1
    assert 5 < int(how.calls) <= 40
    std = np.exp(0.5 * logvar[model.elites, :, 2]).mean()
    assert std == pytest.approx(0.1, rel=0.1)
    low, high = model.params["low"], model.params["high"]
    assert bool(((logvar > low) & (logvar < low + jax.nn.softplus(high - low) + 1e-5)).all())
    # a mean step of one elite is what the ensemble says of it
    member = dyn.elite(model, jnp.int32(1))
    after = dyn.advance(model, member, rows.obs, rows.action)
    np.testing.assert_allclose(after, rows.obs + mean[model.elites[1], :, :2], rtol=1e-5, atol=1e-5)
    # rollouts: rewards lose the penalty, what follows an end is not valid
    act = lambda obs, key: jnp.full((len(obs), 1), 0.5, jnp.float32)
    ends = lambda obs: obs[:, 0] > 0.6
    play = lambda penalty: dynamics.imagine(dyn, model, act, ends, jnp.zeros((4, 2)), 4, jax.random.key(1), penalty)
    free, paid = play(0.0), play(2.0)
    np.testing.assert_allclose(free.rows.obs[0], 0)
    np.testing.assert_allclose(free.rows.next_obs[:-1], free.rows.obs[1:])
    np.testing.assert_allclose(free.rows.obs[:, 0, 0], [0, 0.25, 0.5, 0.75], atol=0.05)
    assert free.terminated[:, 0].tolist() == [False, False, True, True]
    assert free.valid[:, 0].tolist() == [True, True, True, False]
    out = dyn.predict(model, free.rows.obs[0], free.rows.action[0])[0]
    lost = 2.0 * dynamics.disagreement(out)
    np.testing.assert_allclose(free.rows.reward[0] - paid.rows.reward[0], lost, rtol=1e-3, atol=1e-5)


def test_rows_held_out_are_not_learned_from():
    for count, most in ((1000, 20), (40, 8), (1, 1)):
        held, learned = jax.jit(lambda key, n: dynamics.split(key, 1000, n, 100))(jax.random.key(0), jnp.int32(count))
        assert (len(held), len(learned)) == (20, 980)
        assert max(held.max(), learned.max()) < count
        assert len(set(held.tolist())) == most
        if count > 1:
            assert not set(held.tolist()) & set(learned.tolist())
            assert len(set(learned.tolist())) == min(980, count - most)


def test_inputs_are_standardised_by_valid_rows():
    rows = jax.tree.map(jnp.asarray, linear(0.0, 50))
    rows = rows._replace(action=jnp.zeros((50, 1)))
    mean, std = dynamics.scaler(rows, jnp.int32(30))
    np.testing.assert_allclose(mean, rows.inputs[:30].mean(0), atol=1e-5)
    np.testing.assert_allclose(std[:2], rows.inputs[:30, :2].std(0), rtol=1e-4)
    assert float(std[2]) == 1.0


def test_ends_are_those_of_the_tasks():
    obs = lambda *rows: jnp.float32(rows)
    assert terminations.hopper(obs([1, 0.1, 5], [0.6, 0, 0], [1, 0.3, 0], [1, 0, 101])).tolist() == [False] + [True] * 3
    assert terminations.walker2d(obs([1, 0.9], [0.7, 0], [1, 1.1])).tolist() == [False, True, True]
    assert terminations.ant(obs([0.5, 0], [0.1, 0], [1.1, 0])).tolist() == [False, True, True]
    assert terminations.humanoid(obs([1.5, 0], [0.9, 0])).tolist() == [False, True]
    assert terminations.mountain_car(obs([0.5, 0.01], [0.5, -0.01], [0, 0])).tolist() == [True, False, False]
    for env, can_terminate in (
        ("gymnax/Acrobot-v1", False),
        ("gymnax/Pendulum-v1", True),
        ("gymnax/Reacher-misc", True),
    ):
        assert terminations.of(env, can_terminate) is terminations.never
    assert terminations.of("brax/hopper", can_terminate=True) is terminations.hopper
    with pytest.raises(UserError, match="env='gymnax/CartPole-v1': found no termination function"):
        terminations.of("gymnax/CartPole-v1", can_terminate=True)


# --- bottleneck


def log_density(z, mean, var):
    return float((-0.5 * (z - mean) ** 2 / var - 0.5 * np.log(TAU * var)).sum())


def test_rates_have_their_closed_forms():
    mean, logvar = normal(0, 6, 3), normal(1, 6, 3)
    m = Mixture(normal(2, 4), normal(3, 4, 3), normal(4, 4, 3))
    weight = np.exp(m.logits) / np.exp(m.logits).sum()
    p = [sum(w * np.exp(log_density(z, a, np.exp(v))) for w, a, v in zip(weight, m.mean, m.logvar)) for z in mean]
    np.testing.assert_allclose(m.log_prob(jnp.asarray(mean)), np.log(p), rtol=1e-4)
    want = -0.5 * logvar.sum(-1) - 1.5 * np.log(TAU) - np.log(p)
    np.testing.assert_allclose(bottleneck.rate_of(Gaussian(mean, logvar), m), want, rtol=1e-4)
    unit = bottleneck.rate_of(Gaussian(jnp.asarray(mean), jnp.zeros((6, 3))), bottleneck.standard_normal(3))
    np.testing.assert_allclose(unit, 0.5 * (mean**2).sum(-1), rtol=1e-5, atol=1e-6)


def test_the_bottleneck_loss_equals_numpy_and_its_limits():
    e = Gaussian(normal(0, 5, 2), 0.3 * normal(1, 5, 2))
    b = Gaussian(normal(2, 5, 2), 0.3 * normal(3, 5, 2))
    z_e, z_b = normal(4, 5, 2), normal(5, 5, 2)

    def one(z, own, other, i):
        table = np.array([log_density(z[i], other.mean[j], np.exp(other.logvar[j])) for j in range(5)])
        extra = log_density(z[i], own.mean[i], np.exp(own.logvar[i])) - table[i]
        return 0.7 * extra - (table[i] - np.log(np.exp(table).sum()))

    there, back = bottleneck.losses(*jax.tree.map(jnp.asarray, (e, b, z_e, z_b)), 0.7)
    np.testing.assert_allclose(there, [one(z_e, e, b, i) for i in range(5)], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(back, [one(z_b, b, e, i) for i in range(5)], rtol=1e-4, atol=1e-5)
    # beta = 0, y = x, b = e: both directions are the same
    there, back = bottleneck.losses(e, e, jnp.asarray(z_e), jnp.asarray(z_e), 0.0)
    np.testing.assert_array_equal(there, back)
    same = Gaussian(jnp.ones((8, 2)), jnp.zeros((8, 2)))
    np.testing.assert_allclose(bottleneck.contrast(jnp.ones((8, 2)), same), -np.log(8), rtol=1e-6)
    apart = Gaussian(jnp.arange(8.0)[:, None] * 50.0, jnp.zeros((8, 1)))
    np.testing.assert_allclose(bottleneck.contrast(apart.mean, apart), 0.0, atol=1e-6)


def test_encoders_and_marginal_tell_data_from_uniform_points():
    encoders = Encoders(2, hidden=(32, 32), codes=4)
    angle = np.random.default_rng(0).uniform(0, np.pi, 1500)
    data = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32) + 0.05 * normal(1, 1500, 2)
    centre, deviation = data[:1000].mean(0), data[:1000].std(0)
    data = (data - centre) / deviation
    x = jnp.asarray(data[:1000])

    @jax.jit
    def run(key):
        params, size, how = encoders.init(key), jnp.int32(1000), dict(steps=2000, batch=64)
        start = bottleneck.ADAM.init(params)
        params, _, losses = bottleneck.fit_encoders(encoders, params, start, x, size, key, **how)
        codes = encoders(params["e"], x).mean
        first = bottleneck.first_mixture(codes, size, key, 8, False)
        marginal, _, fitted = bottleneck.fit_marginal(first, bottleneck.ADAM.init(first), codes, size, key, **how)
        released = bottleneck.first_mixture(codes, size, key, 8, True)
        return params, losses, marginal, fitted, released

    params, losses, marginal, fitted, released = run(jax.random.key(0))
    assert float(losses[-100:].mean()) < float(losses[:100].mean()) - 1.0
    assert float(fitted[-100:].mean()) < float(fitted[:100].mean())
    far = jnp.asarray((np.random.default_rng(3).uniform(-2, 2, (500, 2)) - centre) / deviation, jnp.float32)
    rates = lambda m, x: np.asarray(bottleneck.rate(encoders, params, m, x))
    inside, outside = rates(marginal, jnp.asarray(data[1000:])), rates(marginal, far)
    assert (inside[:, None] < outside[None]).mean() > 0.85
    # what the released mixture makes of the same codes: deviations of 0.026, rates in the thousands
    assert float(dynamics.soft_clamp(1.0, dynamics.LOW, dynamics.HIGH)) == pytest.approx(0.026, abs=1e-3)
    assert np.median(rates(released, far)) > 1000


# --- planner

WIDTH, DEPTH, ELITES = 3, 3, 2
PUSH = np.float32([[0.3, -0.2], [0.5, 0.1]])


def toy(ends=lambda obs: obs[:, 0] > 0.4):
    act = lambda obs, z: jnp.tanh(0.5 * obs + z)
    advance = lambda e, obs, action: obs + action * jnp.asarray(PUSH)[e]
    score = lambda obs, action: jnp.sin(3 * obs[:, 0]) + obs[:, 1] * action[:, 0]
    return planning.Parts(act, advance, score, ends)


def brute_force(levels, obs, noise, gamma, released=False):
    """Every path of the tree by itself."""
    levels = jax.tree.map(lambda x: np.asarray(x, np.float64), levels)
    width, depth = len(levels[0].policy), len(levels)
    act = lambda s, k, n: np.clip(np.tanh(0.5 * s + levels[k].policy[n]) + noise * levels[k].jitter[n], -1, 1)
    score = lambda s, a: np.sin(3 * s[0]) + s[1] * a[0]
    totals, firsts = np.zeros(width), []
    for first in range(width):
        a = act(obs, 0, first)
        firsts.append(a)
        totals[first] += abs(score(obs, a)) if released else score(obs, a)
        for k in range(1, depth):
            found = []
            for path in itertools.product(range(width), repeat=k):
                s, node, alive, here = obs, first, True, a
                for level in range(1, k + 1):
                    s = s + here * PUSH[int(levels[level].elite)]
                    over = s[0] > 0.4
                    alive = not over if released else alive and not over
                    node = node * width + path[level - 1]
                    here = act(s, level, node)
                found.append(score(s, here) if alive else 0.0)
            totals[first] += (0.99 ** (k - 1) if released else gamma**k) * np.mean(found)
    return firsts[totals.argmax()], totals


def test_plans_equal_those_of_every_path():
    levels = planning.draw(jax.random.key(0), WIDTH, DEPTH, 2, ELITES)
    assert [len(x.policy) for x in levels] == [3, 9, 27]
    obs = normal(1, 2) * 0.2
    for released in (False, True):
        got = jax.jit(lambda obs, r=released: planning.plan(toy(), levels, obs, 0.3, 0.9, released=r))(obs)
        want = brute_force(levels, obs.astype(np.float64), 0.3, 0.9, released)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)


def test_plans_of_special_shapes():
    obs, no_end = jnp.float32([0.1, -0.2]), lambda obs: jnp.zeros(len(obs), bool)
    parts = toy(no_end)
    # width 1: the policy's action
    levels = planning.draw(jax.random.key(1), 1, 3, 2, ELITES)
    action, _ = planning.plan(parts, levels, obs, 0.0, 0.9)
    np.testing.assert_array_equal(action, parts.act(obs[None], levels[0].policy)[0])
    # depth 1: the best score; as released the largest magnitude
    levels = planning.draw(jax.random.key(2), 6, 1, 2, ELITES)
    actions = jnp.clip(parts.act(jnp.tile(obs, (6, 1)), levels[0].policy) + 0.3 * levels[0].jitter, -1, 1)
    score = parts.score(jnp.tile(obs, (6, 1)), actions)
    for released, key in ((False, score), (True, jnp.abs(score))):
        got = planning.plan(parts, levels, obs, 0.3, 0.9, released=released)
        np.testing.assert_allclose(got[1], key, rtol=1e-6)
        np.testing.assert_array_equal(got[0], actions[key.argmax()])
    # a rate that is its mean everywhere decides nothing
    levels = planning.draw(jax.random.key(3), WIDTH, DEPTH, 2, ELITES)
    flat = parts._replace(score=lambda obs, action: jnp.zeros(len(obs)))
    assert planning.plan(flat, levels, obs, 0.3, 0.9)[1].tolist() == [0.0] * WIDTH
    # first actions in another order: so are their scores
    order = np.array([2, 0, 1])
    moved = []
    for x in levels:
        blocks = lambda v: v.reshape(WIDTH, -1, 2)[order].reshape(v.shape)
        moved.append(x._replace(policy=blocks(x.policy), jitter=blocks(x.jitter)))
    a, b = (planning.plan(parts, tuple(x), obs, 0.3, 0.9) for x in (levels, moved))
    np.testing.assert_allclose(a[1][order], b[1], rtol=1e-6)
    np.testing.assert_array_equal(a[0], b[0])


def test_planning_many_states_at_once_equals_one_after_another():
    dyn = Dynamics(2, 2, hidden=(8,), members=3, num_elites=2)
    model = dyn.init(jax.random.key(0))
    encoders = Encoders(4, hidden=(8,), codes=2)
    codes = encoders.init(jax.random.key(1))
    parts = planning.Parts(
        lambda obs, z: jnp.tanh(obs + z),
        lambda e, obs, action: dyn.advance(model, dyn.elite(model, e), obs, action),
        lambda obs, a: bottleneck.rate(encoders, codes, bottleneck.standard_normal(2), jnp.concatenate([obs, a], -1)),
        terminations.never,
    )

    def one(key, obs):
        return planning.plan(parts, planning.draw(key, WIDTH, DEPTH, 2, ELITES), obs, 0.3, 0.9)

    keys, obs = jax.random.split(jax.random.key(2), 4), jnp.asarray(normal(3, 4, 2))
    actions, scores = jax.jit(jax.vmap(one))(keys, obs)
    alone = jax.jit(one)
    for k in range(4):
        a, s = alone(keys[k], obs[k])
        np.testing.assert_array_equal(actions[k], a)
        # other shapes of products: the last bit may differ
        np.testing.assert_allclose(scores[k], s, rtol=5e-7)


def test_a_plan_that_does_not_fit_names_the_largest_depth():
    planning.check_size(10, 5, 400)
    with pytest.raises(UserError, match=r"plan_depth=9: expected at most 6 with plan_width=10, whose 10\^9 leaves"):
        planning.check_size(10, 9, 400)


# --- stages

SMALL = dict(env="gymnax/MountainCarContinuous-v0", env_args=("max_steps_in_episode=8",), batch_size=5, num_updates=2)
SMALL |= dict(actor_hidden=(4,), critic_hidden=(4,), model_hidden=(4,), members=3, elites=2, rollouts=6, horizon=2)
SMALL |= dict(encoder_hidden=(4,), codes=2, components=2, online_steps=8, random_steps=2, rounds=4, candidates=3)


def begun(**options):
    """(task, state) whose imagined rewards are 2 and whose real ones are 3."""
    task = parts_of.make_task(Config(**(SMALL | options)))
    s = jax.jit(lambda key: parts_of.init(task, key, task.cfg.hypers))(jax.random.key(0))
    valid = jnp.arange(len(s.valid)) % 3 == 1
    s = s._replace(valid=valid, imagined=s.imagined._replace(reward=jnp.where(valid, 2.0, jnp.nan)))
    real = rows(4, 3.0)
    if task.cfg.strategy == "cal_ql":
        real = real._replace(returns=real.reward)
    return task, s._replace(buffer=task.buffer.add(s.buffer, real))


def rows(count, reward):
    """Transitions of one reward."""
    obs, action, after = normal(1, count, 2), np.tanh(normal(2, count, 1)), normal(3, count, 2)
    return jax.tree.map(jnp.asarray, Batch(obs, action, np.full(count, reward, np.float32), after, 0 * obs[:, 0]))


def test_online_batches_are_a_third_each():
    task, s = begun()
    both, real = jax.jit(lambda s, key: ptgood.mixed(task, s, rows(7, 1.0), key))(s, jax.random.key(1))
    assert both.reward.tolist() == [1.0] * 5 + [2.0] * 5 + [3.0] * 5
    assert real.reward.tolist() == [1.0] * 5 + [3.0] * 5
    index = np.asarray(parts_of.sample_valid(s.valid, 3000, jax.random.key(2)))
    found, counts = np.unique(index, return_counts=True)
    assert found.tolist() == np.flatnonzero(s.valid).tolist()
    assert counts.min() > 0.8 * 3000 / len(found)


def test_deviations_are_clipped_and_as_released_squashed():
    obs, raw = normal(0, 5, 2), np.float32([[0.5, -30.0], [0.2, 40.0], [1.0, -3.0]])
    for compat in (False, True):
        nets = parts_of.make_task(Config(**(SMALL | dict(actor_hidden=())), reference_compat=compat)).nets
        layer = {"Dense_0": {"kernel": raw[:2], "bias": raw[2]}}
        out = (obs @ raw[:2] + raw[2])[:, 1:]
        want = -9 + 11 * np.tanh(out) if compat else np.clip(out, -20, 2)
        np.testing.assert_allclose(np.log(nets.actor(layer, obs).before.std), want, rtol=1e-4, atol=1e-5)


def test_imagined_play_never_starts_at_an_end():
    task = begun(reference_compat=True)[0]
    data = rows(8, 0.0)
    data = data._replace(last=jnp.float32([0, 1, 0, 1, 1, 0, 1, 0]))
    # as released: steps that did not end the task, among the valid ones
    starts = np.asarray(parts_of.start_states(task, data, 6, 200, jax.random.key(0)))
    assert {tuple(x) for x in starts} == {tuple(x) for x in np.asarray(data.obs)[[0, 2, 5]]}
    # ours: what was acted on has not ended, also where every step ended the task
    free, _ = begun()
    ends = data._replace(last=jnp.ones(8))
    starts = np.asarray(parts_of.start_states(free, ends, 6, 200, jax.random.key(0)))
    assert {tuple(x) for x in starts} == {tuple(x) for x in np.asarray(data.obs)[:6]}


def test_critics_learn_always_the_actor_when_it_is_due():
    task, s = begun()
    update = jax.jit(lambda s, due: parts_of.learn(task, s, rows(6, 1.0), jax.random.key(3), due)[0])
    moved = lambda a, b: any(bool((x != y).any()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    for due in (False, True):
        new = update(s, jnp.bool_(due))
        assert moved(new.params["critic"], s.params["critic"])
        for name in ("actor", "log_alpha"):
            assert moved(new.params[name], s.params[name]) == due
        assert moved(new.target, s.target) == due
    assert float(jnp.exp(s.params["log_alpha"])) == pytest.approx(0.1)


def test_bonuses_and_bounds_are_what_they_say():
    task, s = begun(strategy="intrinsic")
    batch = rows(6, 1.0)
    mean = task.dyn.predict(s.model, batch.obs, batch.action)[0]
    got = ptgood.rewarded(task, s, batch, batch)[1].reward
    np.testing.assert_allclose(got, 1.0 + np.linalg.norm(mean - mean.mean(0), axis=-1).mean(0), rtol=1e-5)
    naive, s = begun(strategy="naive")
    np.testing.assert_array_equal(ptgood.rewarded(naive, s, batch, batch)[1].reward, batch.reward)
    for strategy in ("ucb_q", "ucb_t"):
        task = naive._replace(cfg=Config(**SMALL, strategy=strategy))
        key, obs = jax.random.key(4), batch.obs[:2]
        many = jnp.repeat(obs, 3, axis=0)
        action = parts_of.policy(task, s, many, key)
        q = np.asarray(task.nets.critics(s.params["critic"], many, action))
        out = np.asarray(task.dyn.predict(s.model, many, action)[0])
        apart = np.linalg.norm(out - out.mean(0), axis=-1).mean(0)
        score = q.mean(0) + q.std(0) if strategy == "ucb_q" else q.min(0) + apart
        best = score.reshape(2, 3).argmax(1)
        np.testing.assert_allclose(ptgood.choose(task, s, obs, key), action.reshape(2, 3, 1)[np.arange(2), best])


def test_random_network_distillation_learns_from_real_steps():
    task, s = begun(strategy="rnd")
    batch, real = rows(6, 1.0), rows(4, 0.0)
    new, paid = jax.jit(lambda s: ptgood.rewarded(task, s, batch, real))(s)
    gap = lambda p, b: np.square(
        ensembles.forward(task.rnd, p, table(b)) - ensembles.forward(task.rnd, s.target["rnd"], table(b))
    ).mean(-1)
    table = lambda b: jnp.concatenate([b.obs, b.action], -1)
    error = gap(s.params["rnd"], batch)
    np.testing.assert_allclose(paid.reward, 1.0 + error / error.mean(), rtol=1e-4)
    assert gap(new.params["rnd"], real).mean() < gap(s.params["rnd"], real).mean()


def test_cal_ql_equals_numpy():
    task, s = begun(strategy="cal_ql", hypers=parts_of.Hypers(conservative=2.0))
    batch = rows(6, 1.0)._replace(returns=jnp.float32([-9, 9, -9, 9, 0.1, parts_of.UNKNOWN]))
    batch = batch._replace(last=jnp.float32([0, 1, 0, 0, 0, 0]))
    key, nets = jax.random.key(5), task.nets

    @jax.jit
    def run(s):
        goal, apart = parts_of.calibrated(task, s, batch, key)
        return goal, apart(s.params["critic"])

    goal, apart = run(s)
    k_term, k_goal = jax.random.split(key)
    actions, density = conservative.candidates(nets, s, batch, conservative.draw(nets, k_term, 6, 3))
    q = lambda params, obs, a: np.asarray(nets.critics(params, obs, a), np.float64)
    after = parts_of.policy(task, s, jnp.tile(batch.next_obs, (3, 1)), k_goal).reshape(3, 6, 1)
    best = np.max([q(s.target["critic"], batch.next_obs, a).min(0) for a in after], 0)
    np.testing.assert_allclose(goal, 1.0 + 0.99 * (1 - batch.last) * best, rtol=1e-4)
    # 3 uniform actions keep their values, 6 of the policy count at least the return-to-go
    values = np.stack([q(s.params["critic"], batch.obs, a) for a in actions], 1)
    values[:, 3:] = np.maximum(values[:, 3:], batch.returns)
    assert (values[:, 3:, [1, 3]] == 9).all()
    gap = np.log(np.exp(values - density).sum(1)) - q(s.params["critic"], batch.obs, batch.action)
    np.testing.assert_allclose(apart, 2.0 * gap.mean(-1).sum(), rtol=1e-4)


def test_steps_of_an_episode_get_their_returns_when_it_ends():
    task, s = begun(strategy="cal_ql", online_steps=12)
    one = lambda flag: jnp.full((1, 1), flag)
    rollout = SimpleNamespace

    def add(s, reward, terminated=False, truncated=False):
        item = rows(1, reward)._replace(returns=jnp.full(1, parts_of.UNKNOWN, jnp.float32))
        s = s._replace(buffer=task.buffer.add(s.buffer, item))
        steps = rollout(done=one(terminated or truncated), terminated=one(terminated))
        return ptgood.with_returns(task, s, rollout(steps=steps))

    s = s._replace(buffer=task.buffer.init(jax.tree.map(lambda x: x[0, 0], s.buffer.experience)))
    for how in (dict(), dict(truncated=True), dict(), dict(terminated=True), dict()):
        s = add(s, 1.0, **how)
    got = s.buffer.experience.returns[0]
    # a cut episode earns its last reward for ever
    np.testing.assert_allclose(got[:4], [1 + 0.99 / 0.01, 1 / 0.01, 1.99, 1.0], rtol=1e-5)
    assert float(got[4]) == parts_of.UNKNOWN


def test_stages_are_those_that_a_strategy_needs():
    names = lambda **options: [x.name for x in ptgood.ptgood(Config(**SMALL, **options)).stages]
    assert names() == ["model", "pretrain", "encode", "explore"]
    assert names(strategy="ucb_t") == ["model", "pretrain", "explore"]
    assert names(strategy="cal_ql") == ["pretrain", "explore"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(elites=9, members=7), "elites=9: expected 1 to 7"),
        (dict(online_steps=9), "online_steps=9: expected a multiple of rounds=4"),
        (dict(random_steps=9), "random_steps=9: expected at most online_steps=8"),
        (dict(actor_lr=-1.0), "actor_lr=-1"),
        (dict(strategy="greedy"), "strategy='greedy': expected one of 'ptgood', 'disagreement'"),
        (dict(dataset="no.npz"), "no.npz"),
        (dict(plan_width=100, plan_depth=6), "plan_depth=6: expected at most 3"),
        (dict(env="gymnax/CartPole-v1", env_args=()), "expected real actions"),
    ],
)
def test_bad_input_is_named(options, message):
    def begin():
        method = agents.make("ptgood", **(SMALL | options))
        return method.stages[0].make({}).source(method.config)

    with pytest.raises(UserError, match=message):
        begin()
