"""Parameter sharing: how many parameters each scheme has, and which agents SePS puts together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import davies_bouldin_score

from jaxstack import agents, envs
from jaxstack.agents import seps
from jaxstack.agents.ippo import Config as IPPO
from jaxstack.agents.mappo import Config as MAPPO
from jaxstack.agents.sharing import team_network
from jaxstack.agents.team_ppo import make_env, team_shape
from jaxstack.core.errors import UserError

A, OBS, ACTIONS, HIDDEN = 3, 2, 2, 8


def mlp(inputs: int, outputs: int) -> int:
    return (inputs + 1) * HIDDEN + (HIDDEN + 1) * outputs


@pytest.mark.parametrize(("cls", "critic"), [(IPPO, OBS), (MAPPO, A * OBS)])
@pytest.mark.parametrize(
    ("sharing", "copies", "ids", "sees"),
    [
        ("full", 1, 0, True),
        ("full+id", 1, A, True),
        ("id", 1, A, False),
        ("none", A, 0, True),
        ("partial", 2, 0, True),
    ],
)
def test_parameter_counts(cls, critic, sharing, copies, ids, sees):
    groups = (0, 1, 0) if sharing == "partial" else ()
    config = cls(env="probe", env_args=("kind=match", f"count={A}"), hidden=(HIDDEN,), sharing=sharing, groups=groups)
    env = make_env(config)
    net = team_network(config, team_shape(env, config, central=cls is MAPPO), env)
    params = jax.eval_shape(net.init, jax.random.key(0))
    actor, value = (mlp(sees * size + ids, out) for size, out in ((OBS, ACTIONS), (critic, 1)))
    assert sum(x.size for x in jax.tree.leaves(params)) == copies * (actor + value)


@pytest.mark.parametrize("sharing", ["full", "full+id", "id"])
def test_a_common_torso_gives_actor_and_critic_the_same_features(sharing):
    config = IPPO(env="probe", env_args=("kind=memory", f"count={A}"), gru=HIDDEN, sharing=sharing, common_torso=True)
    env = make_env(config)
    net = team_network(config, team_shape(env, config, central=False), env)
    params = net.init(jax.random.key(0))
    assert sorted(params) == ["actor_head", "actor_torso", "critic_head"]
    obs = jax.random.normal(jax.random.key(1), (5, 4, A, OBS))
    first = jax.random.bernoulli(jax.random.key(2), 0.3, (5, 4))
    start = jax.tree.map(lambda h: h + 0.5, net.carry(4))
    assert net.actor_critic is not None
    raw, value = net.actor_critic(params, start[0], obs, first)
    carry, want = net.actor(params, start[0], obs, first)
    np.testing.assert_allclose(raw, want, atol=1e-6)
    after, want = net.critic(params, start[1], obs, first)
    np.testing.assert_allclose(value, want, atol=1e-6)
    np.testing.assert_allclose(after, carry, atol=1e-6)


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        ("ippo", {}, "off without gru or a network"),
        ("ippo", {"gru": 8, "sharing": "none"}, "off unless sharing is full"),
        ("mappo", {"gru": 8}, "off with a central critic"),
    ],
)
def test_a_common_torso_needs_a_torso_and_one_input(agent, options, message):
    with pytest.raises(UserError, match=f"common_torso.*{message}"):
        agents.make(agent, env="probe", env_args=("kind=memory",), common_torso=True, **options)


def test_seps_finds_the_agents_with_equal_tasks():
    # the reward of an action depends on i % 2 alone
    env = envs.make("probe", kind="role", count=6)
    options = seps.Options(transitions=1000, lr=3e-3, epochs=20, max_groups=4)
    assert seps.find_groups(env, jax.random.key(0), options) == (0, 1, 0, 1, 0, 1)


def test_transitions_are_those_of_the_environment():
    env = envs.make("probe", kind="role", count=3)
    obs, action, nxt, reward = seps.transitions(env, jax.random.key(0), 25)
    assert obs.shape == nxt.shape == (30 * 3, 2)
    assert action.shape == (90, 2)
    want = jnp.where(action.argmax(-1) == jnp.arange(90) % 3 % 2, 1.0, -1.0)
    np.testing.assert_array_equal(reward, want)


def test_clusters_are_numbered_in_order_and_their_number_is_found():
    centres = np.array([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    order = [2, 0, 2, 1, 0, 1, 2]
    points = centres[order] + 0.1 * np.random.default_rng(0).normal(size=(7, 2))
    assert seps.cluster(points, 6) == (0, 1, 0, 2, 1, 2, 0)


def test_davies_bouldin_index():
    rng = np.random.default_rng(1)
    points, labels = rng.normal(size=(20, 3)), rng.integers(0, 4, 20)
    assert seps.davies_bouldin(points, labels) == pytest.approx(davies_bouldin_score(points, labels))
    assert seps.davies_bouldin(points, np.zeros(20, int)) == np.inf


def test_equal_codes_are_one_group():
    assert seps.cluster(np.ones((4, 2)), 3) == (0, 0, 0, 0)
    assert seps.cluster(np.repeat(np.eye(2), 2, axis=0), 3) == (0, 0, 1, 1)


def test_one_agent_has_no_groups():
    with pytest.raises(UserError, match="at least two agents"):
        seps.find_groups(envs.make("probe", kind="role", count=1), jax.random.key(0))
