"""One contract for every environment: native ones and a cheap set of adapters by default, all ids with `-m slow`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import envs
from jaxstack.envs import vector
from jaxstack.envs.base import Environment, Spec, TimeStep, action_limits, global_state, sample_action

T = 30
CHEAP = (
    *envs.ids("native"),
    "jaxmarl/MPE_simple_spread_v3",
    "jaxmarl/MPE_simple_speaker_listener_v4",
    "jaxmarl/switch_riddle",
    "jaxmarl/overcooked/cramped_room",
    "gymnax/CartPole-v1",
    "gymnax/Pendulum-v1",
)
SHORT = {"overcooked": {"max_steps": 20}, "gymnax": {"max_steps_in_episode": 20}, "brax": {"episode_length": 20}}
"""Options that end an episode within T steps, by family."""


def short(id: str) -> Environment:
    parts = id.split("/")
    family = parts[1] if len(parts) == 3 else parts[0]
    return envs.make(id, **SHORT.get(family, {}))


def check_dtypes(spec: Spec, ts: TimeStep, lead: tuple[int, ...]) -> None:
    a = spec.num_agents
    assert ts.obs.shape == (*lead, a, *spec.obs_shape)
    assert ts.reward.shape == (*lead, a)
    assert ts.reward.dtype == jnp.float32
    for flag in (ts.terminated, ts.truncated):
        assert flag.shape == lead
        assert flag.dtype == bool
    assert ts.agent_mask.shape == (*lead, a)
    assert ts.agent_mask.dtype == bool
    assert (ts.action_mask is not None) == spec.has_action_mask
    if ts.action_mask is not None:
        assert ts.action_mask.shape == (*lead, a, spec.action_space.n)  # pyright: ignore
        assert ts.action_mask.dtype == bool
        assert bool(ts.action_mask.any(-1).all()), "an agent without a legal action"
    assert (ts.state is not None) == (spec.state_shape is not None)
    assert global_state(spec, ts).shape == (*lead, spec.state_dim)


def unroll(env: Environment):
    """jit(key -> (start state, its TimeStep, TimeSteps [T])) with a count of its traces."""
    traces = []

    @jax.jit
    def run(key):
        traces.append(1)
        k_reset, k_run = jax.random.split(key)
        state, ts = env.reset(k_reset)

        def body(carry, k):
            state, ts = carry
            k_act, k_step = jax.random.split(k)
            new = env.step(k_step, state, sample_action(env.spec, k_act, ts))
            return new, new[1]

        return state, ts, jax.lax.scan(body, (state, ts), jax.random.split(k_run, T))[1]

    return run, traces


def check(id: str) -> None:
    env = short(id)
    spec = env.spec
    assert hash(env) == hash(short(id))
    assert env == short(id)
    assert spec.id == id
    for sizes in (spec.obs_sizes, spec.action_sizes):
        assert not sizes or len(sizes) == spec.num_agents
    limits = action_limits(spec)
    assert limits is None or limits.any(-1).all()

    run, traces = unroll(env)
    start, first, steps = run(jax.random.key(1))
    again = run(jax.random.key(1))
    other = run(jax.random.key(2))
    assert len(traces) == 1
    jax.tree.map(np.testing.assert_array_equal, (first, steps), again[1:])
    for random, x, y in zip(*map(jax.tree.leaves, (vector.random_parts(env), (start, first), other[:2]))):
        assert random or bool(jnp.all(x == y)), "what does not depend on the key is the same in every start"

    check_dtypes(spec, first, ())
    check_dtypes(spec, steps, (T,))
    assert steps.obs.dtype == first.obs.dtype
    assert first.info.keys() == steps.info.keys()
    assert not np.any(first.reward)
    assert not (first.terminated | first.truncated)
    assert bool(jnp.isfinite(steps.reward).all())
    assert bool(jnp.isfinite(steps.obs.astype(jnp.float32)).all())
    if spec.obs_sizes:
        for i, size in enumerate(spec.obs_sizes):
            assert not np.any(steps.obs[:, i, size:])

    done = np.asarray(steps.terminated | steps.truncated)
    assert not np.any(steps.terminated & steps.truncated)
    assert spec.can_terminate or not np.any(steps.terminated)
    assert spec.can_truncate or not np.any(steps.truncated)
    if spec.horizon is not None and spec.horizon <= T:
        assert done.any()
        assert int(done.argmax()) + 1 <= spec.horizon
        if not np.any(steps.terminated):
            assert int(done.argmax()) + 1 == spec.horizon
    end = int(done.argmax())
    if spec.horizon is not None and steps.truncated[end]:  # learners count on it: see team_ppo.value_of_cut
        assert end + 1 == spec.horizon


def check_vector(id: str) -> None:
    """vmap equals single calls; auto-reset shows a start and keeps the true last observation."""
    env, n = short(id), 2
    vec = envs.vectorise(env, n, "exact")

    @jax.jit
    def run(key):
        vs = vector.init(vec, key)

        def body(vs, k):
            k_act, k_step = jax.random.split(k)
            action = jax.vmap(lambda k, ts: sample_action(env.spec, k, ts))(jax.random.split(k_act, n), vs.ts)
            new, last, _ = vector.step(vec, jax.random.split(k_step, n), vs, action, None)
            return new, (vs, action, k_step, new, last)

        return jax.lax.scan(body, vs, jax.random.split(jax.random.key(3), T))[1]

    single, reset = jax.jit(env.step), jax.jit(env.reset)
    before, action, k_step, after, last = run(jax.random.key(4))
    done = np.asarray(last.terminated | last.truncated)
    ends = [tuple(x) for x in np.argwhere(done)[:2]]
    for t, i in [(0, 1), *ends]:
        k_one, k_new = jax.random.split(jax.random.split(k_step[t], n)[i])
        state = jax.tree.map(lambda x, t=t, i=i: x[t, i], before.env)
        _, ts = single(k_one, state, action[t, i])
        close(ts.obs, last.obs[t, i])
        close(ts.reward, last.reward[t, i])
        if done[t, i]:
            _, start = reset(k_new)
            close(start.obs, after.ts.obs[t, i])
            assert bool(after.first[t, i])
            assert int(after.episode_length[t, i]) == 0


def close(a, b) -> None:
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("id", CHEAP)
def test_contract(id: str):
    check(id)


@pytest.mark.parametrize("id", CHEAP)
def test_vector_contract(id: str):
    check_vector(id)


@pytest.mark.slow
@pytest.mark.parametrize("id", [i for i in envs.ids() if i not in CHEAP])
def test_contract_everywhere(id: str):
    check(id)
    check_vector(id)
