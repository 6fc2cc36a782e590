"""Observations that are no real numbers reach every network in the form that `nn.observations` gives them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents, envs
from jaxstack.agents import AGENTS, seps, team_ppo
from jaxstack.core import running
from jaxstack.core.bundle import save_policy
from jaxstack.core.errors import UserError
from jaxstack.core.metrics import on_host
from jaxstack.envs.base import Discrete, Environment, Image, Spec, first_step
from jaxstack.learners import load_policy
from jaxstack.measures import crossplay
from jaxstack.nn import team

TINY = dict(num_envs=2, num_steps=4, num_minibatches=2, hidden=(8,), total_steps=64, eval_episodes=2)
RIDDLE = dict(TINY, env="jaxmarl/switch_riddle")  # three agents see two categories of two values each
LAKE = dict(TINY, env="gymnax/FrozenLake-misc")


@dataclass(frozen=True)
class Bright(Environment):
    """One step; action 1 is right where the picture is bright. `declared` off: the bytes have no name."""

    declared: bool = True

    @property
    def spec(self):
        space = Image((4, 4, 1)) if self.declared else None
        return Spec("bright", ("a",), (4, 4, 1), Discrete(2), obs_space=space, horizon=1, can_truncate=False)

    def reset(self, key):
        light = jax.random.bernoulli(key).astype(jnp.int32)
        return light, first_step(self.spec, jnp.broadcast_to(255 * light, (1, 4, 4, 1)).astype(jnp.uint8))

    def step(self, key, state, action):
        ts = self.reset(key)[1]
        reward = jnp.where(action == state, 1.0, 0.0)
        return state, ts._replace(reward=reward, terminated=jnp.bool_(True))


@pytest.fixture(autouse=True)
def bright(monkeypatch):
    monkeypatch.setitem(envs.NATIVE._table, "bright", f"{__name__}:Bright")


TEAMS = [name for name in AGENTS if issubclass(agents.config_class(name), team_ppo.PPOConfig)]
# HAPPO, DiCo and so on have networks of their own; PPO plays alone
SCHEMES = {name: {} for name in TEAMS if name not in ("ppo", "dico")} | {
    "mate": {},
    "mappo": {"sharing": "full+id"},
    "hypermarl": {"algorithm": "mappo"},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_reads_categories_as_one_hot(name):
    sizes = {k: v for k, v in RIDDLE.items() if k in agents.config_class(name).__dataclass_fields__}
    one = agents.make(name, **sizes, **SCHEMES[name])
    state = jax.eval_shape(one.init, jax.random.key(0), one.hypers)
    kernels = [x.shape for x in jax.tree.leaves(state.params) if len(x.shape) > 1]
    widths = {shape[-2] for shape in kernels}
    assert not widths & {2}, "a network over the two bare numbers"
    new, metrics = jax.eval_shape(one.step, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert "rollout/lost_cuts" in metrics
    # rollouts keep the small form
    assert state.vec.ts.obs.dtype == jnp.int32


def test_ppo_learns_a_lake_whose_cells_are_names(tmp_path):
    """As one real number the index of the cell gave .09 of 1."""
    updates = 30
    size = dict(num_envs=32, num_steps=64, num_minibatches=4, hidden=(16,), eval_episodes=256)
    one = agents.make("ppo", **(LAKE | size | dict(lr=2e-2, total_steps=32 * 64 * updates)))

    def train(key):
        k_init, k_eval = jax.random.split(key)
        state, _ = jax.lax.scan(lambda s, _: one.step(s), one.init(k_init), None, length=updates)
        return state, one.evaluate(state, k_eval)["eval/return"]

    states, returns = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))
    assert on_host(returns).mean() > 0.5
    state = jax.tree.map(lambda x: x[0], states)
    policy = load_policy(save_policy(tmp_path / "p", one, state))
    cells = jnp.arange(16)[:, None]
    _, action = policy.act(cells)
    assert action.shape == (16, 1)
    assert len(np.unique(action)) > 1
    with pytest.raises(UserError, match="found float32, expected integers for Discrete"):
        policy.act(cells.astype(jnp.float32))


def test_images_are_scaled_once_also_when_standardised():
    for normalise in (False, True):
        cfg = agents.make("ppo", **(TINY | dict(env="bright", cnn=True, normalise_obs=normalise))).config
        env = team_ppo.make_env(cfg)
        shape = team_ppo.team_shape(env, cfg, False)
        # a network that shows what it is given
        net = team.shared(shape, cfg.arch, with_id=False)._replace(actor=lambda w, carry, x, first: (carry, x))
        task = team_ppo.make_task(cfg, env, shape, net)
        obs = jnp.full((2, 1, 4, 4, 1), 255, jnp.uint8)
        x = team_ppo.observe(task, running.init(shape.obs_shape) if normalise else (), obs)
        np.testing.assert_allclose(task.team.actor((), (), x[None], jnp.zeros((1, 2), bool))[1], 1.0, rtol=1e-6)


def test_categories_cannot_be_standardised_and_nameless_bytes_not_be_read():
    with pytest.raises(UserError, match=r"normalise_obs=True: expected off.*Discrete\(n=16\)"):
        agents.make("ppo", **LAKE, normalise_obs=True)
    with pytest.raises(UserError, match=r"found uint8, expected .*Image\(shape\)"):
        agents.make("ppo", **TINY, env="bright", env_args=("declared=false",))
    with pytest.raises(UserError, match="cnn"):
        agents.make("ppo", **LAKE, cnn=True)


def test_groups_and_other_tasks_see_the_kind_too():
    env = envs.make("jaxmarl/switch_riddle")
    obs, _, nxt, _ = jax.eval_shape(lambda k: seps.transitions(env, k, 20), jax.random.key(0))
    assert obs.shape[1] == nxt.shape[1] == 4
    one = agents.make("ppo", **(TINY | dict(env="bright")))
    members = {"x": jnp.zeros(1)}  # never played
    with pytest.raises(UserError, match="observation="):
        crossplay.evaluate_many(one, members, {"other": Bright(declared=False)})
