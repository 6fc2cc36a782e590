"""IQL and CQL: each update against NumPy in float64, and the papers' identities."""

import jax
import jax.numpy as jnp
import numpy as np
import offline_data
import pytest
import reference_updates as ref

from jaxstack import agents
from jaxstack.agents import conservative, cql, iql, offline, soft
from jaxstack.core.errors import UserError
from jaxstack.core.learner import as_hypers

SMALL = dict(env=offline_data.ENV, batch_size=6, num_updates=10, actor_hidden=(5,), critic_hidden=(4,))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return offline_data.write(tmp_path_factory.mktemp("data") / "tiny.npz")


def begin(name, file, **options):
    """(learner, a state with larger weights, batch)."""
    one = agents.make(name, **(SMALL | dict(dataset=file) | options))
    s = jax.jit(one.init)(jax.random.key(0), as_hypers(one.hypers))
    bigger = lambda tree: jax.tree.map(lambda x: x + 0.4 * jax.random.normal(jax.random.key(x.size), x.shape), tree)
    s = s._replace(params=bigger(s.params), target=bigger(s.target))
    source = one.source(one.config)
    return one, s, source.batch(source.constants(), np.int32(0), jax.random.key(5))[0]


def close(mine, theirs, **tolerance):
    for path, x in jax.tree_util.tree_leaves_with_path(mine):
        y = theirs
        for part in path:
            y = y[part.key]
        np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))


def double(tuple_):
    return {k: np.asarray(v, np.float64) for k, v in tuple_._asdict().items()}


def test_the_update_of_iql_equals_numpy(file):
    one, s, batch = begin("iql", file, lr=1e-2, expectile=0.8, beta=2.0)
    nets = iql.nets_of(one.config, offline.make_task(one.config))
    s = s._replace(step=jnp.int32(4))
    new, metrics = jax.jit(lambda s: iql.update(nets, s, batch))(s)
    b, p, h = double(batch), ref.double(s.params), {k: float(v) for k, v in s.hypers._asdict().items()}
    known = ref.values(ref.double(s.target)["critic"], b["obs"], b["action"]).min(0)
    value_of = lambda params, obs: ref.net(params, obs)[:, 0]
    advantage = known - value_of(p["value"], b["obs"])

    def value_loss(value):
        u = known - value_of(value, b["obs"])
        return (np.where(u < 0, 1 - h["expectile"], h["expectile"]) * u**2).mean()

    goal = b["reward"] + h["gamma"] * (1 - b["last"]) * value_of(p["value"], b["next_obs"])
    critic_loss = lambda critic: ((ref.values(critic, b["obs"], b["action"]) - goal) ** 2).mean(-1).sum()

    def actor_loss(actor):
        z = (b["action"] - np.tanh(ref.net(actor["mean"], b["obs"]))) / np.exp(actor["log_std"])
        logp = (-0.5 * z**2 - actor["log_std"] - 0.5 * np.log(2 * np.pi)).sum(-1)
        return -(np.minimum(np.exp(h["beta"] * advantage), 100.0) * logp).mean()

    rate = 1e-2 * 0.5 * (1 + np.cos(np.pi * 4 / 10))
    for name, loss, lr in (("value", value_loss, 1e-2), ("critic", critic_loss, 1e-2), ("actor", actor_loss, rate)):
        np.testing.assert_allclose(metrics[f"loss/{name}"], loss(p[name]), rtol=1e-3)
        close(new.params[name], ref.adam(p[name], ref.gradient(loss, p[name]), lr), rtol=2e-3, atol=5e-5)
    target = ref.polyak(ref.double(s.target)["critic"], ref.double(new.params)["critic"], h["tau"])
    close(new.target["critic"], target, rtol=1e-4, atol=1e-6)
    # a schedule of another length
    assert int(one.with_length(s, 33).aux) == 33


def test_expectiles_are_means_and_tend_to_maxima():
    x = jnp.float32([0.0, 1.0, 5.0])
    fit = lambda tau: jax.lax.fori_loop(
        0, 4000, lambda _, v: v - 0.2 * jax.grad(lambda v: iql.expectile_loss(x - v, tau))(v), jnp.float32(0.5)
    )
    half, high = jax.jit(fit)(0.5), jax.jit(fit)(0.999)
    assert float(half) == pytest.approx(2.0, abs=1e-3)
    assert 4.9 < float(high) < 5.0


def test_the_update_of_cql_equals_numpy_and_without_weight_sac(file):
    one, s, batch = begin("cql", file, lr=1e-2, num_actions=2)
    nets = soft.nets_of(offline.make_task(one.config), (5,), (4,), 2, "none")
    noise, more = soft.draw(nets, jax.random.key(1), 6), conservative.draw(nets, jax.random.key(2), 6, 2)

    @jax.jit
    def both(s):
        actions, density = conservative.candidates(nets, s, batch, more)
        new, metrics = cql.update(nets, s, batch, noise, more)
        free = s._replace(hypers=s.hypers._replace(weight=0.0))
        plain = soft.update(
            nets, free, batch, noise, critic_loss=lambda c, goal: soft.regression(nets, c, batch, goal)
        )[0]
        return actions, density, new, metrics, cql.update(nets, free, batch, noise, more)[0], plain

    actions, density, new, metrics, unweighted, sac = both(s)
    close(unweighted.params, ref.double(sac.params), rtol=1e-5, atol=1e-7)
    b, p = double(batch), ref.double(s.params)
    n, m = double(noise), double(more)
    now = [ref.tanh_normal(p["actor"], b["obs"], z) for z in m["now"]]
    then = [ref.tanh_normal(p["actor"], b["next_obs"], z) for z in m["then"]]
    tried = [*m["uniform"], *(a for a, _ in now), *(a for a, _ in then)]
    logs = [np.full(6, -np.log(2.0))] * 2 + [x for _, x in now] + [x for _, x in then]
    np.testing.assert_allclose(actions, tried, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(density, logs, rtol=1e-3, atol=1e-4)
    # the base's part is parity-tested with EDAC: actor and temperature after the update are taken from there
    alpha, actor = np.exp(float(new.params["log_alpha"])), ref.double(new.params)["actor"]
    a, logp = ref.tanh_normal(actor, b["next_obs"], n["target"])
    value = ref.values(ref.double(s.target)["critic"], b["next_obs"], a).min(0) - alpha * logp
    goal = b["reward"] + 0.99 * (1 - b["last"]) * value

    def loss(critic):
        q = ref.values(critic, b["obs"], b["action"])
        others = np.stack([ref.values(critic, b["obs"], a) - x for a, x in zip(tried, logs)], 1)
        gap = (np.log(np.exp(others).sum(1)) - q).mean(-1).sum()
        return ((q - goal) ** 2).mean(-1).sum() + 5.0 * gap

    np.testing.assert_allclose(metrics["loss/critic"], loss(p["critic"]), rtol=1e-3)
    close(new.params["critic"], ref.adam(p["critic"], ref.gradient(loss, p["critic"]), 1e-2), rtol=2e-3, atol=5e-5)


def test_the_conservative_term_moves_values_without_changing_their_sum():
    values, density, own = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((2, 5, 4), (5, 4), (2, 4))))
    there, here = jax.grad(conservative.gap, (0, 2))(values, density, own)
    np.testing.assert_allclose(there.sum(1) + here, 0, atol=1e-6)


def test_bad_input_is_named(file):
    for name, options, message in (
        ("iql", dict(expectile=1.0), r"hypers.expectile=1.0: expected a number in \(0, 1\)"),
        ("cql", dict(num_actions=0), "num_actions=0"),
        ("cql", dict(weight=-1.0), "hypers.weight=-1.0"),
    ):
        with pytest.raises(UserError, match=message):
            agents.make(name, **SMALL, dataset=file, **options)
