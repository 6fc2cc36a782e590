from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Clock, Image

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.envs.base import (
    Box,
    Discrete,
    MultiDiscrete,
    Spec,
    first_step,
    global_state,
    sample_action,
)
from jaxstack.envs.base import (
    Image as Pixels,
)
from jaxstack.envs.wrappers import AgentId, FrameStack, RewardClip, RewardScale, TaskId, TimeLimit


class Pixel(Image):
    """The same image of bytes."""

    @property
    def spec(self):
        return replace(super().spec, obs_space=Pixels((2, 2, 1)))


def play(env, steps, key=0):
    """One episode of random play: TimeSteps with leaves [steps + 1, ...]; the first is the reset's."""

    @jax.jit
    def run(key):
        start = env.reset(key)

        def body(carry, key):
            new = env.step(key, carry[0], sample_action(env.spec, key, carry[1]))
            return new, new[1]

        _, steps_ = jax.lax.scan(body, start, jax.random.split(key, steps))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start[1], steps_)

    return jax.tree.map(np.asarray, run(jax.random.key(key)))


def test_time_limit_truncates_but_never_overrules_an_end():
    even, odd = (TimeLimit(Clock(lengths=(n,)), 4) for n in (4, 5))
    ts = play(even, 4)
    assert ts.terminated.tolist() == [False] * 4 + [True]
    assert not ts.truncated.any()
    ts = play(odd, 4)
    assert ts.truncated.tolist() == [False] * 4 + [True]
    assert not ts.terminated.any()
    inner = play(TimeLimit(Clock(lengths=(3,)), 9), 3)
    assert inner.truncated.tolist() == [False] * 3 + [True], "the inner limit stays"
    assert even.spec.horizon == 4
    assert TimeLimit(Clock(), 9).spec.horizon == 6
    assert TimeLimit(Image(), 9).spec.horizon == 9
    assert TimeLimit(Image(), 9).spec.can_truncate


def test_time_limit_starts_anew_after_each_reset():
    vec = envs.vectorise(TimeLimit(envs.make("dispersion"), 5), 3)
    from jaxstack.envs import rollout, vector

    act = lambda key, carry, vs: (carry, jnp.zeros((3, 4), jnp.int32), ())
    vs = vector.init(vec, jax.random.key(0))
    played = jax.jit(partial(rollout.collect, vec, act, num_steps=15))(key=jax.random.key(1), vs=vs, carry=())
    np.testing.assert_array_equal(played.steps.truncated, np.repeat(np.arange(15)[:, None] % 5 == 4, 3, 1))


def test_agent_ids_tell_equal_agents_apart():
    env = AgentId(envs.make("dispersion"))
    _, ts = env.reset(jax.random.key(0))
    _, plain = env.env.reset(jax.random.key(0))
    assert ts.obs.shape == (4, *env.spec.obs_shape)
    np.testing.assert_array_equal(ts.obs[:, :-4], plain.obs)
    np.testing.assert_array_equal(ts.obs[:, -4:], np.eye(4))
    assert global_state(env.spec, ts).shape == (env.spec.state_dim,)
    with pytest.raises(UserError, match="vectors"):
        AgentId(Image())


def test_frame_stack_shifts_and_repeats_the_first():
    env = FrameStack(Image(), 3)
    ts = play(env, 4)
    assert env.spec.obs_shape == (2, 2, 3)
    seen = ts.obs[:, 0, 0, 0]
    np.testing.assert_array_equal(seen, [[1, 1, 1], [1, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]])
    assert np.all(ts.obs == ts.obs[:, :, :1, :1])
    vectors = play(FrameStack(Clock(lengths=(5,)), 2), 3)
    np.testing.assert_array_equal(vectors.obs[:, 0, 1::2], [[0, 0], [0, 1], [1, 2], [2, 3]])


def test_wrappers_keep_the_kind_of_an_observation():
    lake = envs.make("gymnax/FrozenLake-misc")
    stacked, named = FrameStack(lake, 3), AgentId(lake)
    assert stacked.spec.observation == MultiDiscrete((16, 16, 16))
    assert named.spec.observation == MultiDiscrete((16, 1))
    assert FrameStack(named, 2).spec.observation == MultiDiscrete((16, 1, 16, 1))
    ts, plain = play(stacked, 3), play(lake, 3)
    np.testing.assert_array_equal(ts.obs[:, 0, -1], plain.obs[:, 0])
    np.testing.assert_array_equal(ts.obs[1:, 0, 1], plain.obs[:-1, 0])
    assert ts.obs.dtype == np.int32
    np.testing.assert_array_equal(play(named, 3).obs[:, 0], np.stack([plain.obs[:, 0], 0 * plain.obs[:, 0]], -1))

    pole = envs.make("gymnax/CartPole-v1")
    seen = pole.spec.observation
    assert isinstance(seen, Box)
    assert FrameStack(pole, 2).spec.observation == Box((8,), seen.low * 2, seen.high * 2)
    assert AgentId(pole).spec.observation == Box((5,), (*seen.low, 0.0), (*seen.high, 1.0))
    assert FrameStack(Pixel(), 4).spec.observation == Pixels((2, 2, 4))
    assert TimeLimit(lake, 7).spec.observation == Discrete(16)


def test_rewards_are_scaled_and_clipped():
    plain = play(Image(), 4).reward[:, 0]
    np.testing.assert_array_equal(plain, [0, 1, 2, 3, 4])
    np.testing.assert_allclose(play(RewardScale(Image(), 0.5, -1.0), 4).reward[1:, 0], [-0.5, 0, 0.5, 1])
    np.testing.assert_array_equal(play(RewardClip(Image(), 0.0, 2.5), 4).reward[:, 0], [0, 1, 2, 2.5, 2.5])
    with pytest.raises(UserError, match="low"):
        RewardClip(Image(), 1.0, -1.0)


def test_wrappers_nest_hash_and_pass_the_rest_on():
    build = lambda: FrameStack(AgentId(TimeLimit(RewardScale(Clock(), 2.0), 4)), 2)
    env = build()
    assert hash(env) == hash(build())
    assert env == build()
    assert env != FrameStack(env.env, 3)
    ts, plain = play(env, 3), play(Clock(), 3)
    np.testing.assert_array_equal(ts.obs[:, :, 4:6], plain.obs)
    np.testing.assert_allclose(ts.reward, 2 * plain.reward)
    for field in ("terminated", "agent_mask", "action_mask", "info"):
        jax.tree.map(np.testing.assert_array_equal, getattr(ts, field), getattr(plain, field))
    drawn = TimeLimit(envs.make("dispersion"), 4)
    state, _ = drawn.reset(jax.random.key(0))
    np.testing.assert_array_equal(drawn.frame(state), drawn.env.frame(state.env))
    with pytest.raises(UserError, match="env"):
        TimeLimit("dispersion", 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="steps"):
        TimeLimit(Clock(), 0)


def test_random_actions_are_uniform_over_the_legal_ones():
    count = 30_000
    spec = Spec("x", ("a", "b"), obs_shape=(1,), action_space=Discrete(5), has_action_mask=True)
    mask = jnp.array([[True, False, True, True, False], [False, False, False, True, False]])
    draw = lambda mask: lambda key: sample_action(spec, key, first_step(spec, jnp.zeros((2, 1)), action_mask=mask))
    actions = jax.vmap(draw(mask))(jax.random.split(jax.random.key(0), count))
    shares = np.asarray(jax.nn.one_hot(actions, 5).mean(0))
    np.testing.assert_allclose(shares, [[1 / 3, 0, 1 / 3, 1 / 3, 0], [0, 0, 0, 1, 0]], atol=0.015)
    assert (shares[~np.asarray(mask)] == 0).all()
    free = jax.vmap(draw(None))(jax.random.split(jax.random.key(1), count))
    np.testing.assert_allclose(jax.nn.one_hot(free, 5).mean(0), 0.2, atol=0.015)


def test_task_id_shows_the_task_under_other_wrappers_too():
    env = TaskId(TimeLimit(envs.make("hidden_corner", task_set="all"), 6))
    assert env.spec.obs_shape == (4 + 8,)
    ts = play(env, 6)
    assert (ts.obs[..., 4:].sum(-1) == 1).all()
    assert (ts.obs[..., 4:] == ts.obs[0, 0, 4:]).all()  # one task per episode
    state, ts = env.reset(jax.random.key(0), jax.tree.map(lambda x: x[5], env.tasks("all")))
    assert int(env.task_of(state)) == 5
    assert ts.obs[:, 4:].argmax(-1).tolist() == [5, 5]
    with pytest.raises(UserError, match=r"dispersion.*no sets of tasks"):
        TaskId(envs.make("dispersion"))
    with pytest.raises(UserError, match=r"TaskId: env .* expected real vectors"):
        TaskId(Image())
