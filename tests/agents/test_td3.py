"""TD3: targets in closed form and beside soft actor-critic's, one update against NumPy, what is played, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_updates as ref

from jaxstack import agents
from jaxstack.agents import sac, soft, td3, td3_online
from jaxstack.agents.offline import Batch
from jaxstack.core.errors import UserError
from jaxstack.core.learner import as_hypers
from jaxstack.core.metrics import on_host

TINY = dict(env="gymnax/Pendulum-v1", env_args=("max_steps_in_episode=3",), num_envs=2, rounds=4, updates=2)
TINY |= dict(learning_starts=6, batch_size=6, buffer_size=20, total_steps=800, eval_episodes=2)
TINY |= dict(actor_hidden=(5,), critic_hidden=(4,))
ONE_HOT = dict(batch_size=2, actor_hidden=(), critic_hidden=())


def begun(name, key=0, **options):
    """Networks and the state of TD3 or of SAC."""
    one = agents.make(name, **(TINY | options))
    method, updates = (td3_online, td3) if name == "td3" else (sac, soft)
    nets = method.nets_of(one.config)
    return nets, jax.jit(lambda key: updates.init(nets, key, one.hypers))(jax.random.key(key))


def test_targets_in_closed_form_and_those_of_sac_without_entropy():
    """Two states: from the first the second follows with reward 1, from the second the end with reward 2."""
    first, second = np.float32([1, 0, 0]), np.float32([0, 1, 0])
    obs, after = np.stack([first, second]), np.stack([second, second])
    batch = Batch(obs, np.float32([[0.5], [0.5]]), np.float32([1, 2]), after, np.float32([0, 1]))
    nets, s = begun("td3", **ONE_HOT, gamma=0.9, policy_noise=0.0)
    slope = np.float32([[0.0], [0.3], [0.0]])
    actor = {"Dense_0": {"kernel": slope, "bias": np.zeros(1, np.float32)}}
    # Q_1 = 5 + 2 a in the second state, Q_2 half of it
    kernel = np.float32([[[9], [5], [0], [2]], [[9], [2.5], [0], [1]]])
    critic = {"Dense_0": {"kernel": kernel, "bias": np.zeros((2, 1), np.float32)}}
    s = s._replace(target={"actor": actor, "critic": critic})
    noise = np.float32([[0.4], [-3.0]])
    want = 1 + 0.9 * (2.5 + np.tanh(0.3))
    np.testing.assert_allclose(td3.target_values(nets, s, batch, noise), [want, 2.0], rtol=1e-6)
    # the noise is clipped, then the action
    noisy = s._replace(hypers=s.hypers._replace(policy_noise=10.0, noise_clip=0.25))
    want = [1 + 0.9 * (2.5 + np.tanh(0.3) + 0.25), 2.0]
    np.testing.assert_allclose(td3.target_values(nets, noisy, batch, noise), want, rtol=1e-6)
    far = s._replace(hypers=s.hypers._replace(policy_noise=10.0, noise_clip=2.0))
    np.testing.assert_allclose(td3.target_values(nets, far, batch, noise), [1 + 0.9 * 3.5, 2.0], rtol=1e-6)
    # soft actor-critic with temperature 0 and hardly a deviation: the same targets
    free, other = begun("sac", **ONE_HOT, gamma=0.9)
    wide = {"Dense_0": {"kernel": np.append(slope, 0 * slope, 1), "bias": np.float32([0, -99])}}
    other = other._replace(params=other.params | {"actor": wide, "log_alpha": np.float32(-np.inf)})
    other = other._replace(target={"critic": critic})
    mine, theirs = td3.target_values(nets, s, batch, noise), soft.target_values(free, other, batch, noise)
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_an_update_equals_numpy():
    nets, s = begun("td3", lr=1e-2, gamma=0.9, tau=0.1)
    bigger = lambda tree: jax.tree.map(lambda x: x + 0.4 * jax.random.normal(jax.random.key(x.size), x.shape), tree)
    s = s._replace(params=bigger(s.params), target=bigger(s.target))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    batch = Batch(draw(6, 3), np.tanh(draw(6, 1)), draw(6), draw(6, 3), np.float32([0, 1, 0, 0, 1, 0]))
    noise = draw(6, 1)
    update = jax.jit(lambda s, number: td3_online.learn(nets, s, batch, number, noise)[0])
    new, waited = update(s, 1), update(s, 0)
    p, target = ref.double(s.params), ref.double(s.target)
    b = ref.double({k: v for k, v in batch._asdict().items() if len(v)})
    action = np.tanh(ref.net(target["actor"], b["next_obs"])) + np.clip(0.2 * np.float64(noise), -0.5, 0.5)
    goal = b["reward"] + 0.9 * (1 - b["last"]) * ref.values(
        target["critic"], b["next_obs"], np.clip(action, -1, 1)
    ).min(0)
    fit = lambda critic: ((ref.values(critic, b["obs"], b["action"]) - goal) ** 2).mean(-1).sum()
    critic = ref.adam(p["critic"], ref.gradient(fit, p["critic"]), 1e-2)
    value = lambda actor: -ref.values(critic, b["obs"], np.tanh(ref.net(actor, b["obs"])))[0].mean()
    actor = ref.adam(p["actor"], ref.gradient(value, p["actor"]), 1e-2)
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=5e-5)
    jax.tree.map(same, new.params, {"actor": actor, "critic": critic})
    jax.tree.map(same, new.target, ref.polyak(target, {"actor": actor, "critic": critic}, 0.1))
    jax.tree.map(np.testing.assert_array_equal, (waited.params["actor"], waited.target), (s.params["actor"], s.target))


def test_play_adds_noise_within_the_bounds():
    nets, s = begun("td3")
    obs, normal = jnp.zeros((2000, 3)), jax.random.normal(jax.random.key(1), (2000, 1))
    mean = float(nets.actor(s.params["actor"], obs)[0, 0])
    act = lambda std: td3_online.task_of(nets).explore(
        s._replace(hypers=s.hypers._replace(exploration=std)), obs, normal
    )
    assert float(act(0.1).std()) == pytest.approx(0.1, rel=0.05)
    assert float(act(0.1).mean()) == pytest.approx(mean, abs=0.01)
    assert float(jnp.abs(act(3.0)).max()) == 1.0


def test_it_finds_the_best_action():
    options = dict(batch_size=64, actor_hidden=(24,), critic_hidden=(24, 24), lr=1e-2, eval_episodes=64)
    one = agents.make("td3", env="probe", env_args=("kind=target",), learning_starts=100, total_steps=700, **options)

    @jax.jit
    def run(key):
        s, _ = jax.lax.scan(lambda s, _: one.step(s), one.init(key, as_hypers(one.hypers)), None, one.num_steps)
        return one.evaluate(s, key)["eval/return"]

    # far from random play, -1/12 and more
    assert float(on_host(run(jax.random.key(0)))) > -0.02


def test_bad_input_is_named():
    for options, message in (
        (dict(env="gymnax/CartPole-v1", env_args=()), "expected real actions"),
        (dict(exploration=-0.1), "hypers.exploration=-0.1: expected a number >= 0"),
    ):
        with pytest.raises(UserError, match=message):
            agents.make("td3", **(TINY | options))
