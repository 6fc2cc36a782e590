"""Soft actor-critic: one update against NumPy, what is played and stored, learning."""

import jax
import numpy as np
import pytest
import reference_updates as ref

from jaxstack import agents
from jaxstack.agents import off_policy, sac, soft
from jaxstack.agents.offline import Batch
from jaxstack.core import replay
from jaxstack.core.errors import UserError
from jaxstack.core.learner import as_hypers
from jaxstack.core.metrics import on_host

TINY = dict(env="gymnax/Pendulum-v1", env_args=("max_steps_in_episode=3",), num_envs=2, rounds=4, updates=2)
TINY |= dict(learning_starts=6, batch_size=5, buffer_size=20, total_steps=800, eval_episodes=2)
TINY |= dict(actor_hidden=(5,), critic_hidden=(4,))


def close(mine, theirs, **tolerance):
    for path, x in jax.tree_util.tree_leaves_with_path(mine):
        y = theirs
        for part in path:
            y = y[part.key]
        np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))


def test_an_update_equals_numpy():
    one = agents.make("sac", **TINY, lr=1e-2, gamma=0.9, tau=0.1)
    nets = sac.nets_of(one.config)
    s = jax.jit(one.init)(jax.random.key(0), as_hypers(one.hypers))
    bigger = lambda tree: jax.tree.map(lambda x: x + 0.4 * jax.random.normal(jax.random.key(x.size), x.shape), tree)
    s = s._replace(params=bigger(s.params), target=bigger(s.target))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    batch = Batch(draw(6, 3), np.tanh(draw(6, 1)), draw(6), draw(6, 3), np.float32([0, 1, 0, 0, 1, 0]))
    noise = soft.draw(nets, jax.random.key(1), 6)
    new, metrics = jax.jit(lambda s: sac.learn(nets, s, batch, noise))(s)
    p, target, z = ref.double(s.params), ref.double(s.target)["critic"], ref.double(noise._asdict())
    b = ref.double({k: v for k, v in batch._asdict().items() if len(v)})
    act = lambda actor, obs, z: ref.tanh_normal(actor, obs, z, low=-20)
    # temperature, then actor, then critics
    slope = -(act(p["actor"], b["obs"], z["temperature"])[1] - 1.0).mean()
    start = {"x": np.float64(p["log_alpha"])[None]}
    log_alpha = ref.adam(start, {"x": np.array([slope])}, 1e-2)["x"][0]
    np.testing.assert_allclose(new.params["log_alpha"], log_alpha, rtol=1e-4)
    alpha = np.exp(log_alpha)

    def actor_loss(actor):
        action, logp = act(actor, b["obs"], z["actor"])
        return (alpha * logp - ref.values(p["critic"], b["obs"], action).min(0)).mean()

    actor = ref.adam(p["actor"], ref.gradient(actor_loss, p["actor"]), 1e-2)
    close(new.params["actor"], actor, rtol=2e-3, atol=5e-5)
    action, logp = act(ref.double(new.params)["actor"], b["next_obs"], z["target"])
    value = ref.values(target, b["next_obs"], action).min(0) - alpha * logp
    goal = b["reward"] + 0.9 * (1 - b["last"]) * value
    critic_loss = lambda critic: ((ref.values(critic, b["obs"], b["action"]) - goal) ** 2).mean(-1).sum()
    np.testing.assert_allclose(metrics["loss/critic"], critic_loss(p["critic"]), rtol=1e-3)
    np.testing.assert_allclose(metrics["loss/actor"], actor_loss(p["actor"]), rtol=1e-3)
    critic = ref.adam(p["critic"], ref.gradient(critic_loss, p["critic"]), 1e-2)
    close(new.params["critic"], critic, rtol=2e-3, atol=5e-5)
    close(new.target["critic"], ref.polyak(target, ref.double(new.params)["critic"], 0.1), rtol=1e-4, atol=1e-6)


def test_play_is_random_first_and_cut_episodes_keep_their_last_observation():
    one = agents.make("sac", **TINY)
    task = sac.task_of(sac.nets_of(one.config))
    s = jax.jit(one.init)(jax.random.key(0), as_hypers(one.hypers))
    once = jax.jit(lambda s, key: off_policy.one_round(task, s, key, 0))
    found = []
    for n in range(4):
        before = s
        s, metrics = once(s, jax.random.key(n))
        found.append((before, s, on_host(metrics)))
    # 2 transitions a round: the third round fills 6
    assert [int(replay.held(s.buffer)) for _, s, _ in found] == [2, 4, 6, 8]
    moved = [not np.array_equal(a.params["log_alpha"], b.params["log_alpha"]) for a, b, _ in found]
    assert moved == [False, False, True, True]
    assert int(s.opt_state["actor"][0].count) == 4  # two rounds of two updates
    stored = jax.tree.map(lambda x: np.asarray(x)[0, :8], s.buffer.experience)
    # rows of two environments alternate; what follows the third step is not the next episode's start
    for env in range(2):
        rows = jax.tree.map(lambda x, env=env: x[env::2], stored)
        np.testing.assert_allclose(rows.next_obs[:2], rows.obs[1:3], rtol=1e-6)
        assert not np.allclose(rows.next_obs[2], rows.obs[3])
        np.testing.assert_allclose(np.square(rows.next_obs[:, :2]).sum(-1), 1, rtol=1e-5)
    assert stored.last.tolist() == [0.0] * 8  # cut, never terminated
    assert np.abs(stored.action).max() <= 1
    # the first three rounds play uniformly, whatever the actor says
    shifted = found[0][0]._replace(params=jax.tree.map(lambda x: x + 5.0, found[0][0].params))
    same = off_policy.play(task, shifted, jax.random.key(9)).steps.extras
    np.testing.assert_array_equal(same, off_policy.play(task, found[0][0], jax.random.key(9)).steps.extras)
    later = found[3][1]
    other = later._replace(params=jax.tree.map(lambda x: x + 5.0, later.params))
    a, b = (off_policy.play(task, s, jax.random.key(9)).steps.extras for s in (later, other))
    assert not np.allclose(a, b)


def trained(**options):
    """The mean return after training."""
    one = agents.make("sac", **options)

    @jax.jit
    def run(key):
        s, _ = jax.lax.scan(lambda s, _: one.step(s), one.init(key, as_hypers(one.hypers)), None, one.num_steps)
        return one.evaluate(s, key)["eval/return"]

    return float(on_host(run(jax.random.key(0))))


def test_it_finds_the_best_action():
    small = dict(batch_size=64, actor_hidden=(24,), critic_hidden=(24, 24), lr=1e-2, eval_episodes=64)
    target = dict(env="probe", env_args=("kind=target",), learning_starts=100, total_steps=700)
    # far from random play, -1/12 and more
    assert trained(**target, **small) > -0.02


@pytest.mark.slow
def test_it_learns_to_swing_up():
    assert trained(learning_starts=500, batch_size=64, lr=3e-3, total_steps=6000) > -300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(env="gymnax/CartPole-v1", env_args=()), "expected real actions"),
        (dict(batch_size=30), "batch_size=30: expected at most buffer_size=20"),
        (dict(learning_starts=30), "learning_starts=30"),
        (dict(total_steps=4), "total_steps=4: expected at least a training step"),
        (dict(actor_hidden=(0,)), "actor_hidden"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(UserError, match=message):
        agents.make("sac", **(TINY | options))
