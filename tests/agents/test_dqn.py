"""Deep Q-learning: one update against NumPy, targets and schedules in closed form, learning, stored episodes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents, envs
from jaxstack.agents import dqn
from jaxstack.core.errors import UserError
from jaxstack.core.metrics import on_host
from jaxstack.core.replay import Transition
from jaxstack.core.runner import train
from jaxstack.measures import rationality

TINY = dict(
    env="cliff_walking",
    env_args=("horizon=6", "eps=0.3"),
    num_envs=2,
    train_every=3,
    rounds=2,
    buffer_size=60,
    learning_starts=6,
    batch_size=5,
    target_period=7,
    total_steps=600,
    hidden=(4, 3),
    eval_episodes=2,
)
GAMMA, LR = 0.8, 0.01


# an implementation of its own, float64


def layer(p, x, norm):
    if norm == "weight":
        w = p["direction"]
        return x @ (w / np.sqrt((w**2).sum(0)) * p["length"]) + p["bias"]
    return x @ p["kernel"] + p["bias"]


def network(p, x, norm, dueling):
    dense = sorted((k for k in p if "Dense" in k), key=lambda k: int(k.split("_")[-1]))
    heads = 2 if dueling else 1
    for i, name in enumerate(dense[:-heads]):
        x = layer(p[name], x, norm)
        if norm == "layer":
            s = p[f"LayerNorm_{i}"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * s["scale"] + s["bias"]
        x = np.maximum(x, 0)
    out = layer(p[dense[-heads]], x, norm)
    if dueling:
        out = layer(p[dense[-1]], x, norm) + out - out.mean(-1, keepdims=True)
    return out


def squared_error(p, target, batch, cfg, l2):
    """Mean over the batch, n-step targets stretch by stretch."""
    one_hot = lambda s: np.eye(48)[s]
    q = lambda w, s: network(w, one_hot(s)[None], cfg.norm, cfg.dueling)[0]
    errors = []
    for b in range(len(batch.reward)):
        goal, discount = 0.0, 1.0
        for k in range(batch.reward.shape[1]):
            goal += discount * batch.reward[b, k]
            discount *= GAMMA
            if batch.terminated[b, k] or batch.truncated[b, k]:
                break
        if not batch.terminated[b, k]:
            after = batch.next_obs[b, k]
            best = q(p, after).argmax() if cfg.double else q(target, after).argmax()
            goal += discount * q(target, after)[best]
        errors.append((b, goal))
    goals = np.array([g for _, g in errors])  # no gradient flows through them

    def loss(w):
        taken = np.array([q(w, batch.obs[b, 0])[batch.action[b, 0]] for b in range(len(goals))])
        e = taken - goals
        each = np.where(np.abs(e) <= 1, 0.5 * e**2, np.abs(e) - 0.5) if cfg.loss == "huber" else e**2
        return each.mean() + l2 * sum((x**2).sum() for x in jax.tree.leaves(w))

    return loss


def numeric_gradient(loss, p):
    leaves, tree = jax.tree.flatten(p)
    out = []
    for i, x in enumerate(leaves):
        g = np.zeros(x.size)
        for j in range(x.size):
            ends = []
            for h in (1e-6, -1e-6):
                moved = x.copy().reshape(-1)
                moved[j] += h
                ends.append(loss(jax.tree.unflatten(tree, [*leaves[:i], moved.reshape(x.shape), *leaves[i + 1 :]])))
            g[j] = (ends[0] - ends[1]) / 2e-6
        out.append(g.reshape(x.shape))
    return jax.tree.unflatten(tree, out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"double": True, "dueling": True, "n_step": 3, "loss": "huber"},
        {"norm": "layer", "l2": 0.1},
        {"norm": "weight", "l2": 0.1, "n_step": 2},
    ],
    ids=["plain", "double dueling n-step huber", "layer norm", "weight norm"],
)
def test_an_update_is_that_of_an_independent_implementation(options):
    one = agents.make("dqn", **TINY, gamma=GAMMA, lr=LR, **options)
    cfg, task = one.config, dqn.make_task(one.config)
    state = jax.jit(one.init)(jax.random.key(0))
    once = jax.jit(lambda s, k, n: dqn.one_round(task, s, k, n))
    for n in range(12):
        state, _ = once(state, jax.random.key(n + 100), jnp.int32(n))
    key, number = jax.random.key(5), jnp.int32(12)
    after, metrics = once(state, key, number)
    batch = task.buffer.sample(after.buffer, jax.random.split(key)[1]).items
    assert batch.reward.shape == (5, cfg.n_step)
    batch = jax.tree.map(np.asarray, batch)
    p, target = jax.tree.map(lambda x: np.asarray(x, np.float64), (state.params["params"], state.target["params"]))
    loss = squared_error(p, target, batch, cfg, float(state.hypers.l2))
    np.testing.assert_allclose(on_host(metrics)["loss/total"], loss(p), rtol=1e-4)
    grad = numeric_gradient(loss, p)
    adam = state.opt_state[0]
    t = int(adam.count) + 1

    def moved(x, g, m, v):
        m, v = 0.9 * np.asarray(m, np.float64) + 0.1 * g, 0.999 * np.asarray(v, np.float64) + 0.001 * g**2
        return x - LR * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)

    want = jax.tree.map(moved, p, grad, adam.mu["params"], adam.nu["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), after.params["params"], want)


def test_targets_bootstrap_through_truncation_and_never_over_an_end():
    one = agents.make("dqn", **TINY, n_step=3)
    task = dqn.make_task(one.config)
    params, other = (jax.jit(one.init)(jax.random.key(k)).params for k in (1, 2))
    after = jnp.array([[1, 2, 3]] * 4)
    flags = lambda *rows: jnp.array(rows, bool)
    end, cut = flags([0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]), flags([0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0])
    batch = Transition(after, after, jnp.array([[1.0, 10.0, 100.0]] * 4), after, end, cut)
    got = dqn.targets(task, params, other, jnp.float32(0.5), batch)
    q = dqn.values(task, other, jnp.array([2, 3])).max(-1)
    want = [1 + 5 + 25 + q[1] / 8, 1 + 5, 1 + 5 + q[0] / 4, 1]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # double: the online network chooses, the target network values
    double = dqn.make_task(agents.make("dqn", **TINY, n_step=3, double=True).config)
    chosen = int(dqn.values(task, params, jnp.array([3])).argmax())
    value = dqn.values(task, other, jnp.array([3]))[0, chosen]
    np.testing.assert_allclose(
        dqn.targets(double, params, other, jnp.float32(0.5), batch)[0], 31 + value / 8, rtol=1e-5
    )


def test_normalisations_and_heads_of_the_network():
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (6, 5))
    make = lambda **options: dqn.QNetwork((8, 7), 3, **options)
    plain, weight = make(), make(norm="weight")
    p, w = (jax.jit(net.init)(key, x)["params"] for net in (plain, weight))
    # it begins as the plain layer of the same direction, and the direction's length does not matter
    same = {
        f"WeightNormDense_{i}": w[f"WeightNormDense_{i}"] | {"direction": p[f"Dense_{i}"]["kernel"]} for i in range(3)
    }
    same = {k: v | {"length": jnp.linalg.norm(v["direction"], axis=0)} for k, v in same.items()}
    np.testing.assert_allclose(weight.apply({"params": same}, x), plain.apply({"params": p}, x), atol=1e-5)
    longer = {k: v | {"direction": 3 * v["direction"]} for k, v in same.items()}
    np.testing.assert_allclose(weight.apply({"params": longer}, x), plain.apply({"params": p}, x), atol=1e-5)
    for i, (name, v) in enumerate(w.items()):
        assert v["length"].shape == ((8, 7, 3)[i],), name
        np.testing.assert_allclose(v["length"], jnp.linalg.norm(v["direction"], axis=0), rtol=1e-6)
    assert {k for k in make(norm="layer").init(key, x)["params"] if "Layer" in k} == {"LayerNorm_0", "LayerNorm_1"}
    # dueling: the mean over actions is the value head alone
    net = make(dueling=True)
    d = net.init(key, x)["params"]
    flat = d | {"Dense_2": jax.tree.map(jnp.zeros_like, d["Dense_2"])}
    means = net.apply({"params": d}, x).mean(-1, keepdims=True)
    np.testing.assert_allclose(net.apply({"params": flat}, x), jnp.broadcast_to(means, (6, 3)), atol=1e-5)


def test_exploration_falls_and_the_target_waits_for_its_time():
    one = agents.make("dqn", **(TINY | dict(learning_starts=20, total_steps=240)), eps_end=0.1, eps_share=0.25)
    assert (one.num_steps, one.samples_per_step) == (20, 12)
    task = dqn.make_task(one.config)
    once = jax.jit(lambda s, k, n: dqn.one_round(task, s, k, n))
    state = jax.jit(one.init)(jax.random.key(0))
    eps = [float(dqn.epsilon(task, state, jnp.int32(n))) for n in (0, 5, 10, 39)]
    np.testing.assert_allclose(eps, [1.0, 0.55, 0.1, 0.1], rtol=1e-6)
    longer = one.with_length(state, 40)
    assert float(dqn.epsilon(task, longer, jnp.int32(10))) == pytest.approx(0.55)
    equal = lambda a, b: all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))
    learned, copied = [], []
    for n in range(8):  # 6 environment steps each
        new, metrics = once(state, jax.random.key(n), jnp.int32(n))
        learned.append(not equal(new.params, state.params))
        copied.append(equal(new.target, new.params) and learned[-1])
        assert equal(new.target, state.target) or equal(new.target, new.params)
        assert np.isnan(on_host(metrics)["loss/total"]) != learned[-1]
        state = new
    assert learned == [False] * 3 + [True] * 5  # 24 transitions are the first that suffice
    assert copied == [n >= 3 and (6 * (n + 1)) // 7 > (6 * n) // 7 for n in range(8)]


def test_it_learns_values_and_policies_of_probes():
    """Values in closed form: rewards for ever behind a time limit, a reward after a delay; the best action of a cue."""
    small = dict(env="probe", num_envs=8, train_every=1, rounds=100, learning_starts=32, buffer_size=512, batch_size=32)
    small |= dict(hidden=(32,), target_period=24, gamma=0.9)

    def run(kind, steps, lr=1e-2, **options):
        one = agents.make("dqn", **small, lr=lr, env_args=(f"kind={kind}",), total_steps=800 * steps, **options)
        state, _ = jax.jit(lambda k: jax.lax.scan(lambda s, _: one.step(s), one.init(k), None, length=steps))(
            jax.random.key(0)
        )
        value = lambda obs: dqn.values(dqn.make_task(one.config), state.params, jnp.asarray(obs, jnp.float32)).max(-1)
        return one, state, value

    *_, value = run("endless", 6, lr=5e-2)
    np.testing.assert_allclose(value([[0.0, 0.0]]), 10.0, atol=0.1)
    *_, value = run("delayed", 4, n_step=2, double=True)
    np.testing.assert_allclose(value([[0.0, 0.0], [0.0, 1.0]]), [0.9, 1.0], atol=0.05)
    one, state, value = run("match", 4, dueling=True, norm="layer")
    assert float(on_host(one.evaluate(state, jax.random.key(1)))["eval/return"]) == 1.0


def test_stored_episodes_are_the_states_that_were_visited():
    one = agents.make("dqn", **(TINY | dict(env_args=("horizon=6",), buffer_size=60, train_every=2)))
    result = train(one, 4, seeds=2, progress=False, eval_every=-1)  # 16 steps of each environment
    found = dqn.stored_episodes(one, result.state)
    moves = envs.make("cliff_walking").tables.next_state
    for states in found:
        assert states.shape == (4, 6)
        assert (states[:, 0] == 36).all()
        for s in states:
            assert all(b in moves[a] for a, b in itertools.pairwise(s) if b < 48)
    # a buffer that has wrapped, and the newest steps alone: whole episodes only
    result = train(one, 40, seeds=2, progress=False, eval_every=-1)
    assert result.state.buffer.is_full.all()
    whole, newest = dqn.stored_episodes(one, result.state), dqn.stored_episodes(one, result.state, newest=40)
    for a, b in zip(whole, newest):
        assert (a[:, 0] == 36).all()
        assert (b[:, 0] == 36).all()
        assert 6 <= len(a) <= 10
        assert 4 <= len(b) <= 6
    with pytest.raises(UserError, match="found none in the buffer of row 0, expected at least one"):
        dqn.stored_episodes(one, result.state, newest=8)
    # the measure of a trained learner
    where = envs.make("cliff_walking", horizon=6)
    report = rationality.of_learner(one, result.state, where, states=whole)
    assert report.gap.shape == (2,)
    np.testing.assert_allclose(report.gap, np.abs(report.expected - report.empirical))
    # the best policy of 6 steps costs 6; R is what the learner's costs more
    np.testing.assert_allclose(report.expected, -6 - report.returns, atol=1e-4)
    played = rationality.of_learner(one, result.state, where, episodes=3)
    # in the same environment without slips the greedy policies' own episodes tell their risk
    np.testing.assert_allclose(played.empirical, played.expected, atol=1e-9)
    with pytest.raises(UserError, match="dqn: found environment 'gymnax/CartPole-v1', expected one with tables"):
        rationality.greedy_policy(agents.make("dqn", total_steps=200), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "matrix_game"}, "env='matrix_game': expected one agent, found 4"),
        ({"env": "gymnax/Pendulum-v1"}, "env='gymnax/Pendulum-v1': expected Discrete actions, found Box"),
        ({"buffer_size": 2}, "buffer_size=2: expected at least 4, for num_envs=1, train_every=4 and n_step=1"),
        ({"learning_starts": 200, "buffer_size": 100}, "learning_starts=200: expected at most 100"),
        ({"total_steps": 100}, r"total_steps=100: expected at least one training step.*=200"),
        ({"norm": "batch"}, "norm='batch': expected one of 'none', 'layer', 'weight'"),
        ({"n_step": 0}, "n_step=0"),
        ({"eps_end": 1.5}, "eps_end=1.5"),
        ({"l2": -1.0}, "l2=-1.0"),
        ({"hidden": (0,)}, r"hidden=\(0,\)"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        agents.make("dqn", **options)
