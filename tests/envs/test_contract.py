"""One contract for every environment: native ones and a cheap set of adapters by default, all ids with `-m slow`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.envs import vector
from jaxstack.envs.base import (
    Box,
    Discrete,
    Environment,
    Image,
    MultiDiscrete,
    Spec,
    TimeStep,
    action_limits,
    global_state,
    sample_action,
)
from jaxstack.envs.jaxmarl import mabrax
from jaxstack.nn.observations import inputs_of

T = 30
CHEAP = (
    *envs.ids("native"),
    "jaxmarl/MPE_simple_spread_v3",
    "jaxmarl/MPE_simple_speaker_listener_v4",
    "jaxmarl/switch_riddle",
    "jaxmarl/overcooked/cramped_room",
    "gymnax/CartPole-v1",
    "gymnax/Pendulum-v1",
    "gymnax/FrozenLake-misc",
)
SHORT = {
    "dispersion": {"horizon": 12},
    "navigation": {"horizon": 12},
    "blind_particle_spread": {"horizon": 12},
    "lbf": {"horizon": 12},
    "boulder_push": {"horizon": 12},
    "zone_spread": {"horizon": 12},
    "rware": {"horizon": 12},
    "cliff_walking": {"horizon": 12, "eps": 0.2, "eps_spread": 0.1},
    "taxi": {"horizon": 12, "eps": 0.2},
    "jaxmarl/MPE": {"max_steps": 12},
    "jaxmarl/smax": {"max_steps": 12},
    "jaxmarl/overcooked": {"max_steps": 12},
    "jaxmarl/jaxnav": {"max_steps": 12},
    "jaxmarl/coin_game": {"num_inner_steps": 6, "num_outer_steps": 2},
    "jaxmarl/storm": {"num_inner_steps": 6, "num_outer_steps": 2},
    **{f"jaxmarl/{id}": {"episode_length": 12} for id in mabrax.IDS},
    "gymnax": {"max_steps_in_episode": 12},
    "brax": {"episode_length": 12},
}
"""Options that end two episodes within T steps, by the start of an id."""


def short(id: str) -> Environment:
    return envs.make(id, **next((options for start, options in SHORT.items() if id.startswith(start)), {}))


def check_dtypes(spec: Spec, ts: TimeStep, lead: tuple[int, ...]) -> None:
    a = spec.num_agents
    assert ts.obs.shape == (*lead, a, *spec.obs_shape)
    check_kind(spec, np.asarray(ts.obs))
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


def check_kind(spec: Spec, obs: np.ndarray) -> None:
    """The observations are of the kind that the spec names."""
    inputs_of(spec, obs.dtype)  # networks can read them
    space = spec.observation
    if isinstance(space, Image):
        assert obs.dtype == np.uint8
    elif isinstance(space, Box):
        assert obs.dtype == space.dtype
    else:
        assert isinstance(space, (Discrete, MultiDiscrete))
        assert obs.dtype == np.int32
        assert bool((obs >= 0).all())
        assert bool((obs < np.asarray(space.n if isinstance(space, Discrete) else space.nvec)).all())


def check_promise(spec: Spec, terminated: np.ndarray, truncated: np.ndarray) -> None:
    """Episodes of N environments with auto-reset, flags [T, N]: none is longer than the horizon, and what promises to
    be truncated there is truncated nowhere else. Rollouts and pools count on it."""
    age = np.zeros(terminated.shape[1], int)
    for t in range(len(terminated)):
        age += 1
        if spec.horizon is not None:
            assert bool((age <= spec.horizon).all()), f"an episode of {age.max()} steps, horizon {spec.horizon}"
        if spec.truncates_at_horizon:
            assert bool((age[truncated[t]] == spec.horizon).all()), f"truncated after {age[truncated[t]]} steps"
        age[terminated[t] | truncated[t]] = 0


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
    check_promise(env.spec, np.asarray(last.terminated), np.asarray(last.truncated))
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


def test_a_broken_promise_is_an_error():
    spec = Spec("x", ("a",), (1,), Discrete(2), horizon=3, truncates_at_horizon=True)
    never, cut = np.zeros((6, 1), bool), np.zeros((6, 1), bool)
    cut[2::3] = True
    check_promise(spec, never, cut)
    with pytest.raises(AssertionError, match="truncated after"):
        check_promise(spec, never, np.roll(cut, -1))
    check_promise(replace(spec, truncates_at_horizon=False), never, np.roll(cut, -1))
    with pytest.raises(AssertionError, match="an episode of 4 steps"):
        check_promise(spec, never, never)
    with pytest.raises(UserError, match="truncates_at_horizon"):
        replace(spec, horizon=None)
    with pytest.raises(UserError, match="obs_space has shape"):
        replace(spec, obs_space=Discrete(4))


@pytest.mark.slow
@pytest.mark.parametrize("id", [i for i in envs.ids() if i not in CHEAP])
def test_contract_everywhere(id: str):
    check(id)
    check_vector(id)
