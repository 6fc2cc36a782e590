from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toys import LONGEST, Clock, Image

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Policy
from jaxstack.core.metrics import on_host
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import sample_action
from jaxstack.envs.wrappers import TimeLimit

N, T = 8, 40


def random_act(vec):
    def act(key, carry, vs):
        keys = jax.random.split(key, vec.num_envs)
        return carry + 1, jax.vmap(partial(sample_action, vec.env.spec))(keys, vs.ts), vs.ts.obs[:, :, 1]

    return act


def collect(vec, steps=T, seed=0, rollouts=1, act=None):
    """Consecutive rollouts joined along time, and how many starts were used twice in each."""

    @jax.jit
    def run(vs, carry, key):
        return rollout.collect(vec, act or random_act(vec), key, vs, carry, steps)

    vs, carry = vector.init(vec, jax.random.key(seed)), jnp.int32(0)
    out, reused = [], []
    for i in range(rollouts):
        played = run(vs, carry, jax.random.fold_in(jax.random.key(seed + 1), i))
        vs, carry = played.vec, played.carry
        out.append(played.steps)
        reused.append(int(played.reused))
    assert int(carry) == rollouts * steps
    return jax.tree.map(lambda *x: np.concatenate(x), *out), reused


@pytest.fixture(scope="module", params=["pool", "exact"])
def history(request):
    """Two rollouts of random play in the clock, in both modes."""
    return collect(envs.vectorise(Clock(), N, request.param, 200), rollouts=2)


def starts_of(steps):
    """The number that names each episode's start, in order of time."""
    return steps.ts.obs[:, :, 0, 0][steps.first]


def test_each_episode_is_whole_and_its_last_observation_is_kept(history):
    steps, _ = history
    start, t = steps.ts.obs[:, :, 0, 0], steps.ts.obs[:, :, 0, 1]
    np.testing.assert_array_equal(steps.first[0], True)
    np.testing.assert_array_equal(steps.first[1:], steps.done[:-1])
    np.testing.assert_array_equal(steps.first, t == 0)
    # the true next observation: the same episode one step on, at its end too
    np.testing.assert_array_equal(steps.final_obs[:, :, 0, 0], start)
    np.testing.assert_array_equal(steps.final_obs[:, :, 0, 1], t + 1)
    assert steps.final_state is None
    # what the policy sees next is another start exactly when the episode ended
    np.testing.assert_array_equal(start[1:] != start[:-1], steps.done[:-1])
    np.testing.assert_array_equal(steps.extras, np.repeat(t[:, :, None], 2, 2))  # the policy saw `ts`


def test_flags_tell_ends_from_cuts(history):
    steps, _ = history
    length = steps.episode_length
    np.testing.assert_array_equal(length > 0, steps.done)
    assert not (steps.terminated & steps.truncated).any()
    np.testing.assert_array_equal(steps.terminated, (length > 0) & (length % 2 == 0))
    np.testing.assert_array_equal(steps.truncated, length % 2 == 1)
    assert set(np.unique(length)) == {0, 2, 3, 4, 5, 6}


def test_masks_belong_to_their_observations(history):
    steps, _ = history
    t = steps.ts.obs[:, :, 0, 1]
    np.testing.assert_array_equal(steps.ts.agent_mask[..., 1], t < 2)
    np.testing.assert_array_equal(steps.final_mask[..., 1], t + 1 < 2)
    np.testing.assert_array_equal(steps.ts.action_mask[..., 1, 1], t < 2)
    assert np.take_along_axis(steps.ts.action_mask, steps.action[..., None], -1).all(), "only legal actions"
    assert len(np.unique(steps.action)) == 3


def test_episode_returns_are_the_sums_of_their_rewards(history):
    """Recounted step by step, over the border between two rollouts too."""
    steps, _ = history
    total, length = np.zeros((N, 2)), np.zeros(N, int)
    for t in range(2 * T):
        total += steps.reward[t]
        length += 1
        done = steps.done[t]
        np.testing.assert_allclose(steps.episode_return[t], np.where(done[:, None], total, 0.0))
        np.testing.assert_array_equal(steps.episode_length[t], np.where(done, length, 0))
        total[done], length[done] = 0.0, 0


def test_no_start_is_used_twice_while_the_pool_suffices(history):
    steps, reused = history
    starts = starts_of(steps)
    assert reused == [0, 0]
    assert len(np.unique(starts)) == len(starts) > 100


def test_a_small_pool_is_used_in_turn_and_counted():
    vec = envs.vectorise(Clock(), N, pool_size=5)
    steps, (reused,) = collect(vec)
    episodes = int(steps.done.sum())
    assert reused == episodes - 5
    fresh = starts_of(steps)[N:]  # ordered by time, then by environment, as they were drawn
    shown = fresh.size
    np.testing.assert_array_equal(fresh, np.resize(fresh[:5], shown))
    assert len(np.unique(fresh)) == 5


def test_only_what_differs_between_starts_is_pooled():
    """Through jit and other inner programs; what only an operation with the key could make differ counts as random."""

    class Parts(Clock):
        def reset(self, key):
            draw = jax.jit(lambda key, x: (jax.random.uniform(key), 2.0 * x))
            noise, same = draw(key, 3.0)
            branch = jax.lax.cond(noise > 0.5, lambda: (0.0, 1.0), lambda: (1.0, 1.0))
            start = {"noise": noise, "same": same, "branch": branch, "none": jnp.zeros(2), "key": key}
            return start, super().reset(key)[1]

    env = Parts()
    state, ts = vector.random_parts(env)
    assert state == {"noise": True, "same": False, "branch": (True, True), "none": False, "key": True}
    assert (ts.obs, ts.reward, ts.agent_mask, ts.action_mask) == (True, False, False, False)
    pool = vector.make_pool(envs.vectorise(env, 2), jax.random.split(jax.random.key(0), 5))
    assert pool.env["noise"].shape == (5,)
    assert pool.env["same"].shape == (1,)
    assert pool.env["none"].shape == (1, 2)
    assert pool.size == 5


def test_both_modes_draw_from_the_same_distribution():
    samples = {}
    for mode in ("pool", "exact"):
        steps, _ = collect(envs.vectorise(Clock(), 64, mode, 2000), steps=100, seed=3)
        samples[mode] = starts_of(steps), steps.episode_length[steps.done], steps.episode_return[steps.done][:, 1]
    for pool, exact in zip(samples["pool"], samples["exact"]):
        assert len(pool) > 1000
        assert stats.ks_2samp(pool, exact).pvalue > 1e-3
    assert stats.kstest(samples["pool"][0], "uniform").pvalue > 1e-3


def test_runs_repeat_and_jit_changes_nothing():
    vec = envs.vectorise(Clock(), 3)
    one, two, other = (collect(vec, steps=5, seed=s)[0] for s in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(one.ts.obs, other.ts.obs)
    vs = vector.init(vec, jax.random.key(5))
    with jax.disable_jit():
        eager = rollout.collect(
            vec, random_act(vec), jax.random.fold_in(jax.random.key(6), 0), vs, jnp.int32(0), 5
        ).steps
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, one)


def test_seeds_in_one_vmap_are_the_seeds_alone():
    vec = envs.vectorise(Clock(), 3)

    def run(key):
        return rollout.collect(vec, random_act(vec), key, vector.init(vec, key), jnp.int32(0), 12).steps

    keys = jax.random.split(jax.random.key(0), 2)
    both = jax.jit(jax.vmap(run))(keys)
    alone = jax.jit(run)(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6), both, alone)


@pytest.mark.parametrize("id", ["dispersion", "blind_particle_spread"])
def test_a_step_with_a_pool_costs_less_than_a_reset_in_every_step(id):
    def flops(mode):
        vec = envs.vectorise(envs.make(id), 64, mode)

        def shapes(key):
            vs = vector.init(vec, key)
            return vs, jax.vmap(partial(sample_action, vec.env.spec))(jax.random.split(key, 64), vs.ts)

        vs, action = jax.eval_shape(shapes, jax.random.key(0))
        pool = jax.eval_shape(
            lambda key: vector.make_pool(vec, vector.rollout_keys(vec, key, 128)[1]), jax.random.key(0)
        )
        step = jax.jit(partial(vector.step, vec))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 64))
        return step.lower(keys, vs, action, pool).compile().cost_analysis()["flops"]

    assert flops("pool") < 0.8 * flops("exact")


class Cut(Image):
    """Never ends by itself, but may be cut at any step."""

    @property
    def spec(self):
        return replace(super().spec, can_truncate=True)


def test_pools_hold_what_a_rollout_can_use():
    fixed, early = envs.make("blind_particle_spread", horizon=50), envs.make("dispersion", horizon=50)
    size = lambda env, n, steps: envs.vectorise(env, n).rollout_pool_size(steps)
    assert size(fixed, 4, 200) == 16
    assert size(early, 4, 200) == 32
    assert size(early, 4, 10) == 8
    assert size(early, 4, 1) == 4  # at most one end for each step
    assert size(Image(), 3, 250) == 9  # no horizon: 100 is assumed
    assert size(TimeLimit(Cut(), 50), 4, 200) == 32  # may be cut before the limit
    assert size(TimeLimit(Image(), 50), 4, 200) == 16
    assert envs.vectorise(early, 4, pool_size=7).rollout_pool_size(200) == 7
    assert collect(envs.vectorise(fixed, 4), steps=100, rollouts=1)[1] == [0]
    with pytest.raises(UserError, match="num_envs=0"):
        envs.vectorise(fixed, 0)
    with pytest.raises(UserError, match="auto_reset='never'"):
        envs.vectorise(fixed, 2, "never")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="pool_size=0"):
        envs.vectorise(fixed, 2, pool_size=0)


class Unbounded(Clock):
    """The clock without a horizon: it may be cut at any step."""

    @property
    def spec(self):
        return replace(super().spec, horizon=None, truncates_at_horizon=False)


class Liar(Clock):
    """A clock that is cut after three steps and promises to be cut after six."""

    @property
    def spec(self):
        return replace(super().spec, horizon=6, truncates_at_horizon=True)


# those that promise their horizon need few rows; the others a row per step, also behind a time limit
KEEPING = [
    (Clock((2, 4, 5)), 5),
    (Unbounded(), 1),
    (Clock(), 1),
    (TimeLimit(Clock((3,)), 50), 3),
    (TimeLimit(Unbounded((3,)), 50), 1),
    (TimeLimit(Unbounded((6,)), 4), 1),
]


@pytest.mark.parametrize("steps", [1, 5, T])
@pytest.mark.parametrize(("env", "window"), KEEPING)
def test_cuts_alone_are_the_last_observations_of_cut_episodes(env, window, steps):
    """From the middle of episodes."""
    vec = envs.vectorise(env, N)
    play = jax.jit(partial(rollout.collect, vec, random_act(vec), num_steps=steps), static_argnames="finals")
    start = rollout.collect(
        vec, random_act(vec), jax.random.key(3), vector.init(vec, jax.random.key(0)), jnp.int32(0), 5
    )
    args = dict(key=jax.random.key(1), vs=start.vec, carry=start.carry)
    whole, short = play(**args), play(**args, finals="cuts")
    assert whole.cuts is None
    assert short.steps.final_obs is None
    assert short.cuts.state is None
    jax.tree.map(np.testing.assert_array_equal, short.steps, whole.steps._replace(final_obs=None))
    assert short.cuts.step.shape == (-(-steps // window), N)
    assert int(short.lost_cuts) == 0
    row, column = np.nonzero(short.cuts.step < steps)
    step = np.asarray(short.cuts.step)[row, column]
    cut = np.zeros((steps, N), bool)
    cut[step, column] = True
    np.testing.assert_array_equal(cut, whole.steps.truncated)
    np.testing.assert_array_equal(short.cuts.obs[row, column], whole.steps.final_obs[step, column])


def test_cuts_without_a_row_are_counted_and_the_others_are_right():
    """A row keeps its last cut; the environment broke its promise, see the contract test."""
    vec = envs.vectorise(Liar((3,)), N)
    start = vector.init(vec, jax.random.key(0))
    play = jax.jit(partial(rollout.collect, vec, random_act(vec), num_steps=12), static_argnames="finals")
    args = dict(key=jax.random.key(1), vs=start, carry=jnp.int32(0))
    whole, short = play(**args), play(**args, finals="cuts")
    np.testing.assert_array_equal(short.cuts.step, np.repeat([[5], [11]], N, 1))
    np.testing.assert_array_equal(short.cuts.obs, whole.steps.final_obs[np.array([5, 11])])
    assert int(short.lost_cuts) == int(whole.steps.truncated.sum()) - 2 * N == 2 * N


def test_no_cuts_where_nothing_is_cut():
    vec = envs.vectorise(envs.make("matrix_game"), 2)
    act = lambda key, carry, vs: (carry, jnp.zeros((2, 4), jnp.int32), ())
    played = rollout.collect(vec, act, jax.random.key(0), vector.init(vec, jax.random.key(0)), (), 20, finals="cuts")
    assert played.cuts is None
    assert played.steps.terminated.sum() == 4
    with pytest.raises(UserError, match="finals='all'"):
        rollout.collect(vec, act, jax.random.key(0), vector.init(vec, jax.random.key(0)), (), 20, finals="all")  # pyright: ignore


def test_statistics_are_means_over_finished_episodes(history):
    steps, _ = history
    out = on_host(rollout.statistics(steps))
    done = steps.done
    assert out["rollout/episodes"] == done.sum()
    np.testing.assert_allclose(out["rollout/return"], steps.episode_return[done].mean(), rtol=1e-5)
    np.testing.assert_allclose(out["rollout/length"], steps.episode_length[done].mean(), rtol=1e-5)
    np.testing.assert_allclose(out["rollout/age"], steps.info["age"][done].mean(), rtol=1e-5)
    none = rollout.statistics(jax.tree.map(lambda x: x[:1], steps))
    assert all(np.isfinite(x) for x in jax.tree.leaves(none))  # on the device nothing is NaN
    none = on_host(none)
    assert none["rollout/episodes"] == 0
    assert np.isnan([none[f"rollout/{k}"] for k in ("return", "length", "age")]).all()


def test_evaluation_counts_the_first_episode_only():
    """Lengths L in 2..6 and rewards 1 + 2 + ... + L for agent 0, none for agent 1."""
    vec = envs.vectorise(Clock(), 32)
    idle = lambda key, carry, vs: (carry, jnp.zeros((32, 2), jnp.int32), ())
    run = jax.jit(lambda key, steps: rollout.evaluate(vec, idle, key, (), steps), static_argnums=1)
    key = jax.random.key(2)
    starts = vector.rollout_keys(vec, key, 1, starts=32)[1]  # the same however many steps follow
    lengths = np.asarray(vector.start(vec, starts).env.length)
    out = on_host(run(key, 3 * LONGEST))
    np.testing.assert_allclose(out["eval/length"], lengths.mean(), rtol=1e-5)
    np.testing.assert_allclose(out["eval/return"], (lengths * (lengths + 1) / 4).mean(), rtol=1e-5)
    np.testing.assert_allclose(out["eval/age"], lengths.mean(), rtol=1e-5)
    assert out["eval/finished"] == 1.0
    cut = on_host(run(key, 3))
    seen = np.minimum(lengths, 3)
    np.testing.assert_allclose(cut["eval/finished"], (lengths <= 3).mean(), rtol=1e-5)
    np.testing.assert_allclose(cut["eval/length"], seen.mean(), rtol=1e-5)
    np.testing.assert_allclose(cut["eval/return"], (seen * (seen + 1) / 4).mean(), rtol=1e-5)


def test_evaluation_tells_policies_when_an_episode_starts():
    """`first` is true once, and the carry is the policy's own."""
    vec = envs.vectorise(Clock(lengths=(5,)), 2)

    def act(key, carry, vs):
        starts = carry + vs.first
        return starts, jnp.broadcast_to(starts[:, None], (2, 2)), ()

    out = on_host(rollout.evaluate(vec, act, jax.random.key(0), jnp.zeros(2, jnp.int32), 5))
    np.testing.assert_allclose(out["eval/return"], (15 + 5) / 2)  # agent 1 earns its action: 1 a step


def test_recordings_end_with_the_episode():
    env = envs.make("dispersion", num_agents=2, horizon=7)
    hold = Policy(
        params=lambda s: s,
        init_carry=lambda p, b: jnp.zeros(b, jnp.int32),
        act=lambda p, c, obs, mask, first, key: (c + 1, jnp.full((1, 2), 4, jnp.int32)),
    )
    whole = rollout.record(env, hold, (), seed=0, max_steps=50)
    assert whole.frames.shape == (8, 320, 320, 3)
    assert (whole.frames[0] != whole.frames[-1]).any()
    lines = whole.captions()
    assert lines[0] == "step 0   return so far 0, mean of 2 agents"
    assert [line.split()[1] for line in lines] == list("01234567")
    assert lines[-1] == f"step 7   return so far {whole.returns[-1]:.4g}, mean of 2 agents   truncated"
    short = rollout.record(env, hold, (), seed=0, max_steps=3)
    assert len(short.frames) == 4
    assert short.captions() == lines[:4]
    with pytest.raises(UserError, match="cannot be drawn"):
        rollout.record(Clock(), hold, (), seed=0, max_steps=3)
