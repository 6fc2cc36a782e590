import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from playing import play
from scipy import stats

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.envs import render2d
from jaxstack.envs.base import sample_action
from jaxstack.envs.blind_particle_spread import VERSIONS, BlindParticleSpread
from jaxstack.envs.dispersion import Dispersion
from jaxstack.envs.matrix_game import MatrixGame
from jaxstack.envs.navigation import Navigation

NATIVE = (MatrixGame(), Dispersion(), Navigation(), BlindParticleSpread())


def same(ours, theirs, alive):
    np.testing.assert_allclose(ours[alive], np.asarray(theirs)[alive], rtol=0, atol=1e-5)


def wide(x):
    return x.astype(np.float64)


@pytest.mark.parametrize("kind", ["specialisation", "synchronisation"])
def test_matrix_game_is_its_definition(kind):
    env = MatrixGame(kind=kind, num_agents=5, num_actions=3, horizon=7)
    _, action, _, ts, alive = play(env)
    assert alive.all()
    for t in range(7):
        np.testing.assert_allclose(ts.reward[t], ref.matrix_reward(kind, action[t]), atol=1e-6)
        np.testing.assert_array_equal(ts.obs[t], np.repeat(np.eye(3)[action[t]].reshape(200, 1, 15), 5, axis=1))
    np.testing.assert_array_equal(ts.state, ts.obs[:, :, 0])
    np.testing.assert_array_equal(ts.terminated, np.repeat(np.arange(7)[:, None] == 6, 200, 1))
    _, start = env.reset(jax.random.key(0))
    assert not np.any(start.obs)
    assert np.all(MatrixGame(temporal=False).reset(jax.random.key(0))[1].obs == np.ones((4, 1)))


@pytest.mark.parametrize(("n", "a"), [(2, 2), (4, 4), (3, 5)])
def test_matrix_game_in_closed_form(n, a):
    """Uniform play over all joint actions: of A actions the share 1 - (1 - 1/A)^N is taken, each worth 1 in all."""
    joint = jnp.asarray(list(itertools.product(range(a), repeat=n)))

    def payoffs(kind):
        env = MatrixGame(kind=kind, num_agents=n, num_actions=a)
        state, _ = env.reset(jax.random.key(0))
        return jax.vmap(lambda action: env.step(jax.random.key(0), state, action)[1].reward.mean())(joint)

    spec, sync = payoffs("specialisation"), payoffs("synchronisation")
    np.testing.assert_allclose(spec.mean(), a / n * (1 - (1 - 1 / a) ** n), rtol=1e-5)
    np.testing.assert_allclose(sync.mean(), (1 + (n - 1) / a) / n, rtol=1e-5)
    assert float(spec.max()) == float(sync.max()) == 1.0
    together = jnp.all(joint == joint[:, :1], axis=1)
    np.testing.assert_allclose(spec[together], 1 / n, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(sync == 1.0), together)


@pytest.mark.parametrize(
    "options",
    [{}, {"share_reward": True, "num_food": 7}, {"continuous": True, "penalise_by_time": True, "num_agents": 3}],
)
def test_dispersion_follows_the_reference(options):
    env = Dispersion(**options)
    before, action, after, ts, alive = play(env)
    pos, vel, eaten = wide(before.pos[0]), wide(before.vel[0]), before.eaten[0]
    rewards = {k: v for k, v in options.items() if k in ("share_reward", "penalise_by_time")}
    for t in range(env.horizon):
        force = wide(action[t]) if env.continuous else ref.dispersion_force(action[t])
        pos, vel, eaten, reward, obs = ref.dispersion(pos, vel, wide(before.food[t]), eaten, force, **rewards)
        same(ts.reward[t], reward, alive[t])
        same(ts.obs[t], obs, alive[t])
        same(ts.info["eaten"][t], eaten.mean(-1), alive[t])
        np.testing.assert_array_equal(after.eaten[t][alive[t]], eaten[alive[t]])
        np.testing.assert_array_equal(ts.terminated[t][alive[t]], eaten.all(-1)[alive[t]])
    assert ts.truncated[-1][alive[-1]].any()
    assert after.eaten.any(), "the comparison must see meals"
    if not env.continuous:  # weaker forces do not get there
        assert np.abs(after.pos).max() == 1.0, "and the walls"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_agents": 6, "shared_reward": False, "observe_all_goals": True},
        {"num_agents": 4, "agents_with_same_goal": 2, "collisions": False},
        {"num_agents": 4, "agents_with_same_goal": 2, "split_goals": True, "collisions": False, "shared_reward": False},
    ],
)
def test_navigation_follows_the_reference(options):
    """From each state by itself: contacts are stiff, so trajectories in other precisions part."""
    env = Navigation(**options)
    before, action, after, ts, alive = play(env)
    contacts = 0
    for t in range(env.horizon):
        pos, vel, reward, done, obs, sure = ref.navigation(
            *map(wide, (before.pos[t], before.vel[t], before.goal[t], action[t])),
            env.shared_reward,
            env.collisions,
            env.observe_all_goals,
        )
        same(after.pos[t], pos, alive[t])
        same(after.vel[t], vel, alive[t])
        same(ts.reward[t], reward, alive[t])
        same(ts.obs[t] * sure, obs * sure, alive[t])
        np.testing.assert_array_equal(ts.terminated[t][alive[t]], done[alive[t]])
        contacts += (reward < -0.9).sum()
        assert sure.mean() > 0.98
    assert (contacts > 0) == env.collisions
    np.testing.assert_array_equal(ts.truncated[-1][alive[-1]], ~ts.terminated[-1][alive[-1]])


def test_navigation_shares_goals_as_asked():
    def goals(**options):
        state, _ = Navigation(num_agents=6, collisions=False, **options).reset(jax.random.key(0))
        return [int(np.flatnonzero((state.goal == g).all(-1))[0]) for g in state.goal]

    assert goals() == [0, 1, 2, 3, 4, 5]
    assert goals(agents_with_same_goal=3) == [0, 0, 0, 3, 4, 5]
    assert goals(agents_with_same_goal=2, split_goals=True) == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("options", [{"version": "v5"}, {"groups": (1, 3)}])
def test_blind_spread_follows_the_reference(options):
    env = BlindParticleSpread(**options)
    before, action, _, ts, alive = play(env, episodes=50)
    assert alive.all()
    group = np.repeat(np.arange(len(env.sizes)), env.sizes)
    pos, vel = wide(before.pos[0]), wide(before.vel[0])
    for t in range(env.horizon):
        pos, vel, reward, obs = ref.spread(pos, vel, wide(before.landmarks[t]), group, action[t])
        np.testing.assert_allclose(ts.reward[t], reward, rtol=1e-5, atol=1e-5)
        seen = np.stack([obs[:, i, env.orders[g]] for i, g in enumerate(group)], 1)
        np.testing.assert_allclose(ts.obs[t], seen, rtol=1e-5, atol=1e-5)
    assert ts.truncated[-1].all()
    assert not ts.truncated[:-1].any()


def test_blind_spread_versions():
    for version, groups in VERSIONS.items():
        env = BlindParticleSpread(version=version)
        assert env.spec.num_agents == sum(groups)
        orders = {tuple(o) for o in env.orders.tolist()}
        assert all(sorted(o) == list(range(env.spec.obs_dim)) for o in orders)
        assert len(orders) == (len(groups) if version in ("v5", "v6") else 1)


def uniform(x, low, high):
    counts = np.histogram(np.asarray(x).ravel(), bins=20, range=(low, high))[0]
    assert counts.sum() == np.asarray(x).size
    assert stats.chisquare(counts).pvalue > 1e-3


def test_starts_are_uniform_and_apart():
    keys = jax.random.split(jax.random.key(11), 10_000)
    nav, _ = jax.jit(jax.vmap(Navigation(num_agents=3).reset))(keys)
    points = np.concatenate([nav.pos, nav.goal], 1)
    gaps = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1) + np.eye(6)
    assert gaps.min() >= 0.25
    uniform(points[:, 0], -1, 1)  # those placed later avoid the earlier ones
    assert np.abs(points).max() <= 1
    food = jax.jit(jax.vmap(Dispersion().reset))(keys)[0].food
    uniform(food, -1, 1)
    blind = jax.jit(jax.vmap(BlindParticleSpread(groups=(1, 1)).reset))(keys)[0]
    uniform(blind.pos, -1, 1)
    uniform(blind.landmarks, -3, 3)
    assert not np.any(blind.vel)


@pytest.mark.parametrize("env", [Dispersion(), Navigation(), BlindParticleSpread(groups=(4,))], ids=lambda e: e.spec.id)
def test_agents_are_exchangeable(env):
    """Renamed agents get renamed observations and rewards (what belongs to an agent renamed too)."""
    order = np.array([2, 0, 3, 1])
    before, action, *_ = play(env, episodes=16, steps=30)
    states, actions = jax.tree.map(lambda x: x[-1], (before, action))
    names = {"pos", "vel", "goal"}
    renamed = type(states)(**{k: v[:, order] if k in names else v for k, v in states._asdict().items()})
    keys = jax.random.split(jax.random.key(0), 16)
    step = jax.jit(jax.vmap(env.step))
    one, two = step(keys, states, actions)[1], step(keys, renamed, actions[:, order])[1]
    np.testing.assert_allclose(two.obs, one.obs[:, order], atol=1e-5)
    np.testing.assert_allclose(two.reward, one.reward[:, order], atol=1e-5)
    np.testing.assert_array_equal(two.terminated, one.terminated)


def test_dispersion_starts_alike_and_shares_a_food():
    env = Dispersion(num_agents=3, num_food=2)
    state, ts = env.reset(jax.random.key(0))
    assert np.all(ts.obs == ts.obs[0])
    state = state._replace(
        food=jnp.array([[0.0, 0.0], [0.9, 0.9]]), pos=jnp.array([[0.0, 0.0], [0.02, 0.0], [0.5, 0.5]])
    )
    still = jnp.zeros(3, jnp.int32)
    state, ts = env.step(jax.random.key(0), state, still)
    np.testing.assert_allclose(ts.reward, [0.5, 0.5, 0.0])
    assert not ts.terminated
    state, ts = env.step(jax.random.key(0), state, still)
    assert not np.any(ts.reward), "an eaten food pays once"
    _, ts = env.step(jax.random.key(0), state._replace(pos=state.pos.at[2].set(0.9), t=jnp.int32(99)), still)
    np.testing.assert_allclose(ts.reward, [0.0, 0.0, 1.0])
    assert bool(ts.terminated)
    assert not bool(ts.truncated), "the goal, reached in the last step, terminates"


def test_navigation_pays_for_arrival_and_fines_contact():
    env = Navigation(num_agents=2)
    pos = jnp.array([[0.0, 0.0], [0.5, 0.0]])
    state, _ = env.reset(jax.random.key(0))
    arrived = state._replace(pos=pos, goal=pos + 0.01)
    still, step = jnp.zeros((2, 2)), jax.jit(env.step)
    _, ts = step(jax.random.key(0), arrived, still)
    np.testing.assert_allclose(ts.reward, 0.01, atol=1e-6)
    assert bool(ts.terminated)
    assert float(ts.info["at_goal"]) == 1.0
    touching = state._replace(pos=pos.at[1].set(jnp.array([0.202, 0.0])), goal=pos + 5.0)
    after, ts = step(jax.random.key(0), touching, still)
    np.testing.assert_allclose(ts.reward, -1.0, atol=1e-6)
    assert not np.any(after.vel), "a gap is no contact of bodies"


@pytest.mark.parametrize("env", [*NATIVE, Dispersion(share_reward=True), Navigation(collisions=False)], ids=repr)
def test_shared_rewards_are_declared(env):
    *_, ts, alive = play(env, episodes=32)
    equal = np.ptp(ts.reward[alive], axis=-1).max() < 1e-6
    assert equal == env.spec.shared_reward


@pytest.mark.parametrize("env", NATIVE, ids=lambda e: e.spec.id)
def test_pictures_show_what_moved(env):
    state, ts = env.reset(jax.random.key(0))
    first = env.frame(state)
    for t in range(3):
        state, ts = env.step(jax.random.key(t), state, sample_action(env.spec, jax.random.key(t), ts))
    second = env.frame(state)
    assert first.shape == second.shape == (320, 320, 3)
    assert first.dtype == np.uint8
    assert (first != 255).any()
    assert (first != second).any()


@pytest.mark.parametrize(
    ("id", "options", "named"),
    [
        ("matrix_game", {"kind": "chicken"}, "kind"),
        ("matrix_game", {"num_agents": 0}, "num_agents"),
        ("matrix_game", {"num_actions": -1}, "num_actions"),
        ("dispersion", {"horizon": 0}, "horizon"),
        ("dispersion", {"continuous": "yes"}, "continuous"),
        ("navigation", {"agents_with_same_goal": 2}, "collisions"),
        ("navigation", {"agents_with_same_goal": 9, "collisions": False}, "agents_with_same_goal"),
        ("navigation", {"num_agents": 30}, "num_agents"),
        ("blind_particle_spread", {"version": "v7"}, "version"),
        ("blind_particle_spread", {"groups": (3, 0)}, "groups"),
        ("blind_particle_spread", {"colour": 1}, "colour"),
    ],
)
def test_wrong_options_are_named(id, options, named):
    with pytest.raises(UserError, match=named):
        envs.make(id, **options)


@pytest.mark.parametrize("id", ["lbf", "rware", "boulder_push", "navigation", "taxi", "cliff_walking"])
def test_what_a_legend_names_is_in_the_picture(id):
    env = envs.make(id)
    state, _ = jax.jit(env.reset)(jax.random.key(0))
    picture = env.frame(state)
    kinds = envs.wrap(env, "time_limit=9").legend()
    assert kinds == env.legend() != ()
    drawn = {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in np.unique(picture.reshape(-1, 3), axis=0)}
    assert {render2d.COLOURS[k.colour] for k in kinds if k.colour is not None} <= drawn
    whole = render2d.captioned(np.stack([picture] * 2), ["step 0", "step 1"], kinds)
    assert whole.shape[0] == 2
    assert (whole[0] != whole[1]).any(axis=(1, 2)).nonzero()[0].max() < 18  # only the line above differs
    bare = render2d.captioned(np.stack([picture]), ["step 0"])
    np.testing.assert_array_equal(bare[0, 18:], picture)
    assert len(np.unique(whole[0, 18 + len(picture) :].reshape(-1, 3), axis=0)) > 2
