import jax.numpy as jnp
import numpy as np
import pytest
from training import run, seeds_with_return, values

GAMMA = 0.9


@pytest.mark.parametrize(
    ("kind", "obs", "expected"),
    [
        ("one", [[0.0, 0.0]], [1.0]),
        ("obs", [[-1.0, 0.0], [1.0, 0.0]], [-1.0, 1.0]),
        ("delayed", [[0.0, 0.0], [0.0, 1.0]], [GAMMA, 1.0]),
    ],
)
def test_the_critic_finds_values_in_closed_form(kind, obs, expected):
    got = values("ppo", run("ppo", kind, gamma=GAMMA), jnp.asarray(obs)[:, None])
    np.testing.assert_allclose(got[:, 0], expected, atol=0.03)


@pytest.mark.parametrize("agent", ["ppo", "mappo"])
def test_values_bootstrap_at_truncation(agent):
    # reward 1 for ever, cut after 5 steps: 1 / (1 - gamma), not the return of five steps (4.1)
    trained = run(agent, "endless", updates=80, gamma=GAMMA, lr=2e-2, clip_value=False)
    np.testing.assert_allclose(values(agent, trained, [[[0.0, 0.0]]]), 1 / (1 - GAMMA), atol=0.2)


def test_a_recurrent_critic_bootstraps_at_truncation():
    trained = run("ppo", "endless", updates=80, gamma=GAMMA, lr=2e-2, clip_value=False, gru=8)
    # rollouts end between truncations too: the mean target is the value of every step
    assert float(trained.metrics["loss/critic"][-1]) < 0.02
    assert trained.returns == 5.0


def test_normalised_values_have_the_same_fixed_point():
    trained = run("ppo", "endless", updates=80, gamma=GAMMA, lr=2e-2, clip_value=False, normalise_value=True)
    stats = trained.state.norms.value
    got = values("ppo", trained, [[[0.0, 0.0]]]) * jnp.sqrt(stats.var) + stats.mean
    np.testing.assert_allclose(got, 1 / (1 - GAMMA), atol=1.0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("action", {}),
        ("match", {}),
        ("match", {"normalise_obs": True, "normalise_reward": True, "normalise_value": True}),
        ("match", {"auto_reset": "exact", "normalise_advantage": False}),
        ("memory", {"gru": 16}),
    ],
)
def test_ppo_learns_the_policy(kind, options):
    assert run("ppo", kind, **options).returns == 1.0


def test_without_memory_the_cue_is_lost():
    assert abs(run("ppo", "memory", updates=20).returns) < 0.8


def test_continuous_actions_reach_the_target():
    trained = run("ppo", "target")
    assert trained.returns > -0.005
    assert float(trained.state.params["log_std"][0]) < -0.5


@pytest.mark.parametrize("agent", ["ippo", "mappo"])
@pytest.mark.parametrize("sharing", ["full+id", "id", "none", "partial"])
def test_identity_lets_a_team_take_roles(agent, sharing):
    groups = (0, 1, 0) if sharing == "partial" else ()
    assert run(agent, "role", 3, sharing=sharing, groups=groups).returns == pytest.approx(1.0)


@pytest.mark.parametrize("agent", ["ippo", "mappo"])
def test_one_shared_policy_cannot_take_roles(agent):
    # all act alike: two of three agents right at best, (2 - 1) / 3
    assert run(agent, "role", 3).returns == pytest.approx(1 / 3)


@pytest.mark.parametrize("agent", ["ippo", "mappo"])
@pytest.mark.parametrize("sharing", ["full", "none"])
def test_teams_read_their_own_cue(agent, sharing):
    assert run(agent, "match", 3, sharing=sharing).returns == pytest.approx(1.0)


def test_id_alone_is_blind_to_the_cue():
    assert abs(run("ippo", "match", 3, updates=20, sharing="id").returns) < 0.5


@pytest.mark.parametrize("sharing", ["full", "full+id", "none"])
def test_recurrent_teams_remember(sharing):
    assert run("mappo", "memory", 3, updates=80, sharing=sharing, gru=16).returns == pytest.approx(1.0)


def test_a_common_torso_remembers():
    trained = run("ippo", "memory", 3, updates=80, sharing="full", gru=16, common_torso=True)
    assert trained.returns == pytest.approx(1.0)


@pytest.mark.parametrize("algorithm", ["ippo", "mappo"])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("embedding", ["learned", "one_hot"])
def test_hypermarl_takes_roles(algorithm, kind, embedding):
    # a seed can settle on one action for all (1/3) before the agents part: the method must do it nearly always
    options = dict(algorithm=algorithm, kind=kind, embedding=embedding, lr=1e-3)
    assert seeds_with_return(1.0, "hypermarl", "role", 3, **options) >= 6


@pytest.mark.parametrize("algorithm", ["ippo", "mappo"])
def test_recurrent_hypermarl_remembers(algorithm):
    trained = run("hypermarl", "memory", 3, updates=80, algorithm=algorithm, gru=16)
    assert trained.returns == pytest.approx(1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"condition": "id+obs"},
        {"init": "normalised", "share_embedding": False},
        {"init": "default", "hyper_hidden": (16, 16)},
    ],
)
def test_hypermarl_ablations_learn_too(options):
    assert seeds_with_return(1.0, "hypermarl", "match", 3, seeds=4, lr=3e-3, **options) >= 3


@pytest.mark.parametrize(("agent", "options"), [("happo", {}), ("dico", {"diversity": 2.0}), ("kaleidoscope", {})])
def test_heterogeneous_agents_take_roles(agent, options):
    assert run(agent, "role", 3, updates=60, **options).returns == pytest.approx(1.0)


@pytest.mark.parametrize(("agent", "options"), [("happo", {}), ("dico", {"diversity": -1.0}), ("kaleidoscope", {})])
def test_heterogeneous_agents_reach_continuous_targets(agent, options):
    assert run(agent, "target", 3, updates=60, **options).returns > -0.02


def test_dico_pays_for_diversity_what_geometry_asks():
    # three means with mean distance 1 about one target: (-0.75, 0, 0.75) is best, at a mean square of 0.375
    trained = run("dico", "target", 3, updates=60, diversity=1.0, tau=1.0)
    assert trained.returns == pytest.approx(-0.375, abs=0.08)


def test_a_homogeneous_dico_team_cannot_take_roles():
    assert run("dico", "role", 3, diversity=0.0).returns == pytest.approx(1 / 3)


def test_central_critics_value_each_agent_on_its_own():
    trained = run("mappo", "role", 3, sharing="full")
    # agents 0 and 2 disagree with agent 1, whose reward has the other sign; a central critic without ids sees no agent
    obs = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 3, 2))
    got = values("mappo", trained, obs)
    np.testing.assert_allclose(got, 1 / 3, atol=0.1)
    apart = values("mappo", run("mappo", "role", 3, sharing="none"), obs)
    np.testing.assert_allclose(apart, 1.0, atol=0.1)
