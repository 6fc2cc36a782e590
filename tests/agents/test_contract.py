"""What every agent that learns from its own play must do, beside the contract of all learners (test_learners.py)."""

import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import make

from jaxstack import agents
from jaxstack.agents import AGENTS, config_class
from jaxstack.agents.team_ppo import PPOConfig
from jaxstack.core.bundle import save_policy
from jaxstack.core.learner import as_hypers, with_hypers
from jaxstack.core.metrics import on_host
from jaxstack.core.runner import resume, train
from jaxstack.learners import load_policy

TINY = dict(num_envs=4, num_steps=4, hidden=(8,), total_steps=160, eval_episodes=4, anneal_lr=True)
# those that learn from rollouts of their own
PLAYERS = [name for name in AGENTS if name == "mate" or issubclass(config_class(name), PPOConfig)]
# it learns from a replay buffer
OFF_POLICY = dict(num_envs=4, rounds=2, learning_starts=8, batch_size=8, buffer_size=64)
OFF_POLICY |= dict(total_steps=160, eval_episodes=4, lr=1e-2)
REPLAYERS = {
    "dqn": OFF_POLICY | dict(env_args=("kind=match",), train_every=2, hidden=(8,)),
    "sac": OFF_POLICY | dict(env_args=("kind=target",), updates=2, actor_hidden=(8,), critic_hidden=(8,)),
}
REPLAYERS["td3"] = REPLAYERS["sac"]
ALONE = ("ppo", *REPLAYERS)
VARIANTS = {name: (name, {}) for name in (*PLAYERS, *REPLAYERS)} | {
    "mappo, recurrent": ("mappo", {"gru": 4, "sharing": "full+id"}),
    "hypermarl, recurrent": ("hypermarl", {"gru": 4, "algorithm": "mappo"}),
    "mate": ("mate", {"gru": 4, "encoder_hidden": 8, "decoder_hidden": (8,)}),
    "ippo, normalised": ("ippo", {"normalise_obs": True, "normalise_reward": True, "normalise_value": True}),
}
ALL = pytest.mark.parametrize("name", VARIANTS)
EACH = pytest.mark.parametrize("name", [*PLAYERS, *REPLAYERS])


@functools.cache
def learner(name):
    agent, options = VARIANTS[name]
    if agent not in PLAYERS:
        return agents.make(agent, env="probe", **(REPLAYERS[agent] | options))
    return make(agent, "target" if name == "dico" else "match", 1 if agent in ALONE else 3, **(TINY | options))


@functools.cache
def compiled(name):
    one = learner(name)
    return jax.jit(one.init), jax.jit(one.step)


def leaves(tree):
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@ALL
def test_step_keeps_the_state_and_returns_named_scalars(name):
    init, step = compiled(name)
    state = init(jax.random.key(0), as_hypers(learner(name).hypers))
    new, metrics = step(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert all(x.dtype in (jnp.float32, jnp.int32, jnp.bool_) for x in leaves(state) if x.dtype != jnp.uint32)
    assert int(new.step) == int(state.step) + 1
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), new.params, state.params)
    assert any(jax.tree.leaves(changed))
    for key, value in on_host(metrics).items():
        group, _, rest = key.partition("/")
        assert group in ("rollout", "train", "loss", "check")
        assert rest
        assert value.shape == ()
        assert np.isfinite(value), key
    assert {"loss/total", "rollout/return"} <= set(metrics)
    assert ("train/entropy" in metrics) == (VARIANTS[name][0] in PLAYERS)


@EACH
def test_one_trace_serves_all_steps(name):
    one = learner(name)
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return one.step(state)

    state = compiled(name)[0](jax.random.key(0), as_hypers(one.hypers))
    for _ in range(3):
        state, _ = step(state)
    assert int(state.step) == 3
    assert len(traces) == 1


@EACH
def test_seeds_and_hypers_are_vmapped(name):
    one = learner(name)
    init, step = compiled(name)
    keys = jax.random.split(jax.random.key(7), 2)
    rates = {name: jnp.array([1e-2, 0.0]) for name in one.hypers._fields if name.endswith("lr")}
    hypers = as_hypers(with_hypers(one, **rates, gamma=jnp.array([0.9, 0.5])))
    hypers = jax.tree.map(lambda x: jnp.broadcast_to(x, (2,)), hypers)
    states = [init(k, jax.tree.map(lambda x, i=i: x[i], hypers)) for i, k in enumerate(keys)]
    both, metrics = jax.jit(jax.vmap(one.step))(jax.tree.map(lambda *x: jnp.stack(x), *states))
    for i, state in enumerate(states):
        alone, m = step(state)
        assert_close(jax.tree.map(lambda x, i=i: x[i], both), alone)
        assert_close(jax.tree.map(lambda x, i=i: x[i], metrics), m, rtol=1e-3, atol=1e-4)
    still = jax.tree.map(lambda x: x[1], both.params)
    assert_close(still, states[1].params, rtol=0, atol=0)  # lr 0 leaves its seed alone


@EACH
def test_no_key_is_used_twice(name):
    one = learner(name)
    with jax.debug_key_reuse(True):
        state = jax.jit(one.init)(jax.random.key(0))
        state, _ = jax.jit(one.step)(state)
        jax.jit(one.evaluate)(state, jax.random.key(1))


# what tests/test_learners.py does for the default config of each learner
@pytest.mark.parametrize("name", ["hypermarl, recurrent"])
def test_a_resumed_run_equals_a_whole_one_to_the_bit(name, tmp_path):
    options = dict(seeds=2, progress=False, eval_every=-1, chunk=1)
    whole = train(learner(name), 3, **options)
    train(learner(name), 3, run_dir=tmp_path / "r", checkpoint_every=1, **options)
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "3")  # as if it had been stopped after two steps
    got = resume(learner(name), tmp_path / "r", progress=False, eval_every=-1, chunk=1)
    for a, b in zip(leaves(whole.state), leaves(got.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert got.metrics.equals(whole.metrics)


@ALL
def test_policies_act_and_survive_a_bundle(name, tmp_path):
    one = learner(name)
    state = compiled(name)[0](jax.random.key(0), as_hypers(one.hypers))
    count = 1 if name in ALONE else 3
    many = 40  # so many that a sample equal to the mode everywhere is no chance
    obs, first = jax.random.normal(jax.random.key(1), (many, count, 2)), jnp.zeros(many, bool)
    params = one.policy.params(state)
    carry, action = one.policy.act(params, one.policy.init_carry(params, many), obs, None, first, None)
    assert action.shape == ((many, count, 1) if name in ("dico", "sac", "td3") else (many, count))
    _, drawn = one.policy.act(params, one.policy.init_carry(params, many), obs, None, first, jax.random.key(2))
    assert drawn.shape == action.shape
    assert bool(jnp.any(drawn != action))
    if one.policy.sample is not None:  # the same actions, inside the bounds
        carry0, key = one.policy.init_carry(params, many), jax.random.key(2)
        _, played, log_prob = one.policy.sample(params, carry0, obs, None, first, key)
        space = one.env.spec.action_space
        want = np.clip(drawn, space.low, space.high) if hasattr(space, "low") else drawn
        np.testing.assert_array_equal(played, want)
        assert log_prob.shape == (many, count)
        assert bool(jnp.isfinite(log_prob).all())
    loaded = load_policy(save_policy(tmp_path / "p", one, state))
    carry2, again = loaded.act(obs)
    np.testing.assert_array_equal(again, action)
    assert_close(carry, carry2, 0, 0)
    # compiled, a product and a sum at the end are one operation
    rounding = 1e-6 if name == "td3" else 0
    np.testing.assert_allclose(loaded.act(obs, key=jax.random.key(2))[1], drawn, rtol=rounding)


@EACH
def test_evaluation_is_a_function_of_state_and_key(name):
    one = learner(name)
    state = compiled(name)[0](jax.random.key(0), as_hypers(one.hypers))
    evaluate = jax.jit(one.evaluate)
    a, b = (on_host(evaluate(state, jax.random.key(1))) for _ in range(2))
    assert a == b
    assert a["eval/finished"] == 1.0
    assert a["eval/length"] == 1.0


def test_an_annealed_rate_ends_at_zero_and_stays_there():
    one = make("ppo", "match", **(TINY | dict(total_steps=16)))
    step = jax.jit(one.step)
    state, _ = step(one.init(jax.random.key(0)))
    later, _ = step(state)
    assert_close(later.params, state.params, 0, 0)
