"""Learners from data sets: each update against NumPy in float64, the identities of the papers, bad input, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import offline_data
import pytest
import reference_updates as ref

from jaxstack import agents
from jaxstack.agents import bc, offline, rebrac, soft, td3, td3_bc
from jaxstack.core.bundle import save_policy
from jaxstack.core.errors import UserError
from jaxstack.core.learner import as_hypers
from jaxstack.core.runner import train
from jaxstack.learners import load_policy
from jaxstack.nn import ensembles
from jaxstack.nn.distributions import TanhNormal

SMALL = dict(env=offline_data.ENV, batch_size=6, num_updates=3, actor_hidden=(5, 4), critic_hidden=(4, 3))
ADAM = dict(rtol=2e-3, atol=2e-5)
"""Of parameters after a step of Adam: the sign of a gradient near zero decides a whole step."""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return offline_data.write(tmp_path_factory.mktemp("data") / "tiny.npz")


def learner(name, file, **options):
    return agents.make(name, **(SMALL | dict(dataset=file) | options))


def start(one, key=0, scale=3.0, **hypers):
    """A state, and a batch of its data; weights are made larger so that gradients are not near zero."""
    s = one.init(jax.random.key(key), as_hypers(one.hypers._replace(**hypers)))
    wider = lambda tree: jax.tree.map(lambda x: scale * x, tree)
    s = s._replace(params={k: v if k == "log_alpha" else wider(v) for k, v in s.params.items()})
    s = s._replace(target=jax.tree.map(lambda x: 0.7 * x, {k: s.params[k] for k in s.target}))
    source = one.source(one.config)
    drawn = source.batch(source.constants(), np.int32(1), jax.random.key(5))
    return s, drawn


def close(mine, theirs, **tolerance):
    for path, x in jax.tree_util.tree_leaves_with_path(mine):
        y = theirs
        for part in path:
            y = y[part.key]
        np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("name", "norm"), [("td3_bc", "none"), ("td3_bc", "before"), ("rebrac", "after")])
def test_td3_updates_equal_numpy(name, norm, file):
    one = learner(name, file, layer_norm=norm != "none")
    s, (batch, *_) = start(one, lr=1e-2)
    task = offline.make_task(one.config)
    critics = ensembles.Critics(ensembles.Net((4, 3), 1, norm), 2)
    nets = td3.Nets(task, ensembles.Net((5, 4), 1, norm if name == "td3_bc" else "none"), critics, name == "rebrac")
    noise = jax.random.normal(jax.random.key(9), (6, 1))
    update = jax.jit(lambda s, number: td3.update(nets, s, batch, number, noise))
    new, metrics = update(s, 1)
    h, p, target = s.hypers, ref.double(s.params), ref.double(s.target)
    b = {k: np.asarray(v, np.float64) for k, v in batch._asdict().items()}
    h = {k: float(v) for k, v in h._asdict().items()}
    actor_norm = norm if name == "td3_bc" else "none"
    act = lambda params, obs: np.tanh(ref.net(params, obs, actor_norm))
    jitter = np.clip(h["policy_noise"] * np.asarray(noise, np.float64), -h["noise_clip"], h["noise_clip"])
    action = np.clip(act(target["actor"], b["next_obs"]) + jitter, -1, 1)
    value = ref.values(target["critic"], b["next_obs"], action, norm).min(0)
    if name == "rebrac":
        value = value - h["beta2"] * b["next_known"] * ((action - b["next_action"]) ** 2).sum(-1)
    goal = b["reward"] + h["gamma"] * (1 - b["last"]) * value

    def regression(critic):
        return ((ref.values(critic, b["obs"], b["action"], norm) - goal) ** 2).mean(-1).sum()

    np.testing.assert_allclose(metrics["train/target"], goal.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/critic"], regression(p["critic"]), rtol=1e-4)
    critic = ref.adam(p["critic"], ref.gradient(regression, p["critic"]), h["lr"])
    close(new.params["critic"], critic, **ADAM)

    def policy(actor, weight):
        """`weight`: what the values are divided by, a constant of the gradient."""
        a = act(actor, b["obs"])
        q = ref.values(critic, b["obs"], a, norm)
        error = (a - b["action"]) ** 2
        if name == "rebrac":
            return h["beta1"] * error.sum(-1).mean() - q.min(0).mean() / weight
        return error.mean() - h["alpha"] * q[0].mean() / weight

    q = ref.values(critic, b["obs"], act(p["actor"], b["obs"]), norm)
    weight = np.abs(q.min(0) if name == "rebrac" else q[0]).mean()
    np.testing.assert_allclose(metrics["train/actor"].total, policy(p["actor"], weight), rtol=1e-3)
    actor = ref.adam(p["actor"], ref.gradient(lambda a: policy(a, weight), p["actor"]), h["lr"])
    close(new.params["actor"], actor, **ADAM)
    averages = ref.polyak(target, {"actor": actor, "critic": critic}, h["tau"])
    close(new.target, averages, rtol=1e-4, atol=1e-6)
    # the actor and the averages follow every second update
    waited, metrics = update(s, 0)
    jax.tree.map(np.testing.assert_array_equal, waited.params["actor"], s.params["actor"])
    jax.tree.map(np.testing.assert_array_equal, waited.target, s.target)
    jax.tree.map(np.testing.assert_array_equal, waited.params["critic"], new.params["critic"])
    assert float(metrics["train/actor"].count) == 0


@pytest.mark.parametrize("norm", ["none", "before"])
def test_the_update_of_edac_equals_numpy(norm, file):
    one = learner("edac", file, num_critics=3, layer_norm=norm != "none")
    s, (batch, *_) = start(one, lr=1e-2, eta=0.7, scale=2.0)
    # two actions, in which directions can differ
    wide = lambda x: jnp.concatenate([x, 0.3 - 0.5 * x], -1)
    batch = batch._replace(action=wide(batch.action))
    task = offline.make_task(one.config)._replace(action_size=2)
    nets = soft.nets_of(task, (5, 4), (4, 3), 3, norm)
    s = soft.init(nets, jax.random.key(0), s.hypers)
    bigger = lambda tree: jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), tree)
    s = s._replace(params=bigger(s.params), target=bigger(s.target))
    noise = soft.draw(nets, jax.random.key(9), 6)
    new, metrics = jax.jit(lambda s: soft.update(nets, s, batch, noise))(s)
    h = {k: float(v) for k, v in s.hypers._asdict().items()}
    p, target = ref.double(s.params), ref.double(s.target)
    b = {k: np.asarray(v, np.float64) for k, v in batch._asdict().items()}
    n = {k: np.asarray(v, np.float64) for k, v in noise._asdict().items()}
    # temperature
    logp = ref.tanh_normal(p["actor"], b["obs"], n["temperature"], norm)[1]
    slope = -(logp - 2).mean()
    log_alpha = float(p["log_alpha"]) - h["lr"] * np.sign(slope)
    np.testing.assert_allclose(new.params["log_alpha"], log_alpha, rtol=1e-4)
    alpha = np.exp(log_alpha)

    def policy(actor):
        action, logp = ref.tanh_normal(actor, b["obs"], n["actor"], norm)
        return (alpha * logp - ref.values(p["critic"], b["obs"], action, norm).min(0)).mean()

    np.testing.assert_allclose(metrics["loss/actor"], policy(p["actor"]), rtol=1e-4)
    actor = ref.adam(p["actor"], ref.gradient(policy, p["actor"]), h["lr"])
    close(new.params["actor"], actor, **ADAM)
    # critics, with the actor's new weights in the target
    action, logp = ref.tanh_normal(actor, b["next_obs"], n["target"], norm)
    value = ref.values(target["critic"], b["next_obs"], action, norm).min(0) - alpha * logp
    goal = b["reward"] + h["gamma"] * (1 - b["last"]) * value
    np.testing.assert_allclose(metrics["train/target"], goal.mean(), rtol=1e-3)

    def slopes(critic, step=1e-5):
        up = lambda sign, j: ref.values(critic, b["obs"], b["action"] + sign * step * np.eye(2)[j], norm)
        return np.stack([(up(1, j) - up(-1, j)) / (2 * step) for j in range(2)], -1)

    def fit(critic):
        error = ((ref.values(critic, b["obs"], b["action"], norm) - goal) ** 2).mean(-1).sum()
        g = slopes(critic)
        unit = g / (np.linalg.norm(g, axis=-1, keepdims=True) + 1e-10)
        gram = np.einsum("ibk,jbk->bij", unit, unit)
        return error + h["eta"] * (gram.sum((1, 2)) - np.einsum("bii->b", gram)).mean() / 2

    np.testing.assert_allclose(metrics["loss/critic"], fit(p["critic"]), rtol=1e-3)
    critic = ref.adam(p["critic"], ref.gradient(fit, p["critic"], 1e-5), h["lr"])
    close(new.params["critic"], critic, rtol=1e-2, atol=2e-4)
    close(new.target, ref.polyak(target, {"critic": critic}, h["tau"]), rtol=1e-3, atol=1e-4)


def test_diversity_and_conservative_term_have_their_closed_forms():
    rng = np.random.default_rng(0)
    same = np.repeat(rng.normal(size=(1, 7, 3)), 4, 0)
    assert float(ensembles.diversity(jnp.asarray(same, jnp.float32))) == pytest.approx(4.0, rel=1e-5)
    apart = np.zeros((3, 7, 3))
    apart[np.arange(3), :, np.arange(3)] = rng.uniform(1, 5, (3, 7))
    assert float(ensembles.diversity(jnp.asarray(apart, jnp.float32))) == pytest.approx(0.0, abs=1e-5)
    # the corners of a simplex are as far apart as can be: -N / (N - 1)
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32)[:, None]
    assert float(ensembles.diversity(jnp.asarray(corners))) == pytest.approx(-4 / 3, rel=1e-5)
    # a member without any gradient has no direction, and no slope that is NaN
    dead = jnp.asarray(same, jnp.float32).at[0].set(0.0)
    assert bool(jnp.isfinite(jax.grad(ensembles.diversity)(dead)).all())
    critics = ensembles.Critics(ensembles.Net((4,), 1), 2)
    params = jax.jit(lambda k: critics.init(k, 3))(jax.random.key(0))
    obs, action, drawn = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((5, 2), (5, 1), (10, 5, 1))))
    value = jax.jit(lambda *x: critics(*x))
    q = np.stack([value(params, obs, a) for a in drawn]).astype(np.float64)
    found = jax.jit(lambda *x: ensembles.conservative(critics, *x))(params, obs, action, drawn)
    there = (np.log(np.exp(q).sum(0)) - np.asarray(value(params, obs, action))).mean(-1).sum()
    np.testing.assert_allclose(found, there, rtol=1e-5)


def test_identities_of_the_papers(file):
    one = learner("td3_bc", file)
    s, (batch, *_) = start(one)
    task = offline.make_task(one.config)
    nets = td3.Nets(task, ensembles.Net((5, 4), 1), ensembles.Critics(ensembles.Net((4, 3), 1), 2))
    actor, critic = s.params["actor"], s.params["critic"]
    slope = jax.jit(
        lambda critic, alpha: jax.grad(
            lambda a: td3.actor_loss(nets, a, critic, batch, s.hypers._replace(alpha=alpha))
        )(actor)
    )
    cloning = jax.jit(jax.grad(lambda a: jnp.square(nets.actor(a, batch.obs) - batch.action).mean()))(actor)
    alike = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)
    alike(slope(critic, 0.0), cloning)
    # values twice as large leave the actor's gradient: they are divided by their mean magnitude
    twice = critic | {"Dense_2": jax.tree.map(lambda x: 2 * x, critic["Dense_2"])}
    alike(slope(critic, 2.5), slope(twice, 2.5))
    # ReBRAC without penalties is TD3 with normalised values
    free = s.hypers._asdict() | {"beta1": 0.0, "beta2": 0.0}
    free = rebrac.Hypers(**{k: free[k] for k in rebrac.Hypers._fields})
    noise = jax.random.normal(jax.random.key(9), (6, 1))

    @jax.jit
    def both(s):
        penalised = nets._replace(regularised=True)
        values = [
            td3.target_values(n, s._replace(hypers=h), batch, noise) for n, h in ((penalised, free), (nets, s.hypers))
        ]
        q = nets.critics(critic, batch.obs, nets.actor(actor, batch.obs)).min(0)
        return values, td3.actor_loss(penalised, actor, critic, batch, free), -q.mean() / jnp.abs(q).mean()

    (with_penalty, without), loss, normalised = both(s)
    np.testing.assert_array_equal(with_penalty, without)
    assert float(loss) == pytest.approx(float(normalised), rel=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_edac_with_eta_0_is_sac_n(count, file):
    """With two critics it is SAC: nothing of the diversity is left in the update."""
    one = learner("edac", file, num_critics=count)
    s, (batch, *_) = start(one, eta=0.0, scale=1.0)
    nets = soft.nets_of(offline.make_task(one.config), (5, 4), (4, 3), count, "none")
    noise = soft.draw(nets, jax.random.key(3), 6)

    @jax.jit
    def both(s):
        new = soft.update(nets, s, batch, noise)[0]
        after = soft.temper(nets, s, batch, noise.temperature)
        after = after._replace(params=after.params | {"actor": new.params["actor"]})
        goal = soft.target_values(nets, after, batch, noise.target)
        grads = jax.grad(lambda c: soft.regression(nets, c, batch, goal))(s.params["critic"])
        return new, offline.descend(s.params, s.opt_state, "critic", grads, s.hypers.lr)[0]

    new, plain = both(s)
    close(new.params["critic"], plain["critic"], rtol=1e-4, atol=1e-6)


def test_tanh_normal_has_the_density_of_its_samples():
    mean, log_std = jnp.float32([[0.3, -1.0]]), jnp.float32([[-0.5, 0.2]])
    dist = TanhNormal(mean, log_std)
    action, logp = dist.sample_from(jnp.float32([[0.7, -1.1]]))
    before = np.asarray(mean + jnp.exp(log_std) * jnp.float32([[0.7, -1.1]]), np.float64)
    np.testing.assert_allclose(action, np.tanh(before), rtol=1e-6)
    np.testing.assert_allclose(dist.log_prob(action), logp, rtol=1e-4)
    # it integrates to one
    grid = jnp.linspace(-0.99999, 0.99999, 20001)[:, None]
    one = TanhNormal(jnp.float32([0.3]), jnp.float32([-0.5]))
    assert float(jnp.exp(one.log_prob(grid)).mean() * 2) == pytest.approx(1.0, abs=1e-3)
    # where tanh rounds to 1 the correction stays exact, where log(1 - tanh^2 + 1e-6) does not
    far = TanhNormal(jnp.float32([9.0]), jnp.float32([-2.0]))
    _, logp = far.sample_from(jnp.float32([0.0]))
    exact = 2.0 - 0.5 * np.log(2 * np.pi) - 2 * (np.log(2) - 9.0 - np.log1p(np.exp(-18.0)))
    assert float(logp) == pytest.approx(exact, rel=1e-5)
    assert bool(
        jnp.isfinite(jax.grad(lambda m: TanhNormal(m, jnp.zeros(1)).log_prob(jnp.ones(1)).sum())(jnp.ones(1))).all()
    )


def test_rows_are_standardised_scaled_and_cut_where_episodes_end(file):
    task = offline.make_task(td3_bc.Config(**(SMALL | dict(dataset=file))))
    data, raw = offline.read(file), offline_data.rows()
    rows = offline.rows_of(task, data, "tiny", 0.9)
    b = rows.batch
    np.testing.assert_allclose(b.obs.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(b.obs * rows.shared.std + rows.shared.mean, raw["obs"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(b.next_obs * rows.shared.std + rows.shared.mean, raw["next_obs"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(b.action, raw["action"] / 2, rtol=1e-6)  # Pendulum's torque is within +-2
    np.testing.assert_array_equal(b.last, raw["terminated"])
    ends = raw["terminated"] | raw["truncated"]
    np.testing.assert_array_equal(b.next_known, ~ends)
    np.testing.assert_array_equal(b.next_action[:-1][~ends[:-1]], b.action[1:][~ends[:-1]])
    cut = td3_bc.Config(**(SMALL | dict(dataset=file, bootstrap_on_timeout=False, normalise_obs=False)))
    plain = offline.rows_of(task._replace(cfg=cut), data, "tiny", 0.9).batch
    np.testing.assert_array_equal(plain.last, ends)
    np.testing.assert_array_equal(plain.obs, raw["obs"])
    # the best episodes alone
    best = bc.best_episodes(data, 0.25)
    returns = data.episode_returns()
    assert set(best.episode) == {int(returns.argmax())}
    assert best.size == 12


def test_bad_input_is_named(file, tmp_path):
    with pytest.raises(UserError, match="dataset='': expected the path of a data set"):
        train(learner("td3_bc", ""), progress=False)
    with pytest.raises(UserError, match=r"tiny.npz: obs \[48, 3\] do not fit gymnax/MountainCarContinuous-v0"):
        train(learner("td3_bc", file, env="gymnax/MountainCarContinuous-v0"), progress=False)
    with pytest.raises(UserError, match="expected real actions, found Discrete"):
        learner("td3_bc", file, env="gymnax/CartPole-v1")
    with pytest.raises(UserError, match="expected one agent, found 2"):
        learner("td3_bc", file, env="navigation", env_args=("num_agents=2",))
    for options, message in (
        (dict(critic_hidden=(0,)), "critic_hidden=.*expected layer widths >= 1"),
        (dict(tau=1.5), r"hypers.tau=1.5: expected a number in \[0, 1\]"),
        (dict(alpha=-1.0), "hypers.alpha=-1.0: expected a number >= 0"),
    ):
        with pytest.raises(UserError, match=message):
            learner("td3_bc", file, **options)
    with pytest.raises(UserError, match="fraction=0"):
        learner("bc", file, fraction=0.0)
    with pytest.raises(UserError, match="num_critics=0"):
        learner("edac", file, num_critics=0)


def test_a_policy_acts_without_the_data_set(tmp_path):
    path = offline_data.write(tmp_path / "tiny.npz")
    one = learner("edac", path, num_critics=2, eval_episodes=2, env_args=("max_steps_in_episode=4",))
    source = one.source(one.config)
    batch = source.batch(source.constants(), np.int32(0), jax.random.key(0))
    first = jax.jit(lambda key: one.step(one.init(key, as_hypers(one.hypers)), batch)[0])(jax.random.key(0))
    bundle = save_policy(tmp_path / "policy", one, first)
    (tmp_path / "tiny.npz").unlink()
    offline._read.cache_clear()
    loaded = load_policy(bundle)
    obs = jax.random.normal(jax.random.key(0), (40, 1, 3))
    _, action = loaded.act(obs)
    assert action.shape == (40, 1, 1)
    assert float(jnp.abs(action).max()) <= 2.0
    _, drawn = loaded.act(obs, key=jax.random.key(1))
    assert bool(jnp.any(drawn != action))
    mean, std = offline_data.rows()["obs"].mean(0), offline_data.rows()["obs"].std(0) + 1e-3
    np.testing.assert_allclose(first.mean, mean, rtol=1e-4)
    dist = soft.nets_of(offline.make_task(one.config), (5, 4), (4, 3), 2, "none").actor(
        first.params["actor"], (obs[:, 0] - mean) / std
    )
    np.testing.assert_allclose(action[:, 0], 2 * dist.mode(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["bc", "td3_bc", "rebrac", "edac", "iql", "cql"])
def test_with_64_bits_an_update_and_an_evaluation_keep_their_types(name, file):
    one = learner(name, file, env_args=("max_steps_in_episode=3",))
    types = lambda tree: {jax.tree_util.keystr(k): x.dtype for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    with jax.enable_x64():
        source = one.source(one.config)
        batch = jax.eval_shape(lambda k: source.batch(source.constants(), np.int32(0), k), jax.random.key(0))
        state = jax.eval_shape(one.init, jax.random.key(0), one.hypers)
        new, metrics = jax.eval_shape(one.step, state, batch)
        results = jax.eval_shape(one.evaluate, state, jax.random.key(0))
    assert types(new) == types(state)
    wide = {k: d for k, d in types((batch, new, metrics, results)).items() if d in (jnp.float64, jnp.int64)}
    assert not wide
