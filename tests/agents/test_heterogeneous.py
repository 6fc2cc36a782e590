"""What their papers define: HAPPO (Kuba et al., 2022), DiCo (Bettini et al., 2024), Kaleidoscope (Li et al., 2024)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import network

from jaxstack import agents
from jaxstack.agents import happo, team_ppo
from jaxstack.agents.dico import Config as DicoConfig
from jaxstack.agents.dico import dico_team, mean_distance
from jaxstack.agents.kaleidoscope import Config as KaleidoscopeConfig
from jaxstack.agents.kaleidoscope import kaleidoscope_mask, mask_diversity, masked_team
from jaxstack.core.learner import as_hypers
from jaxstack.nn.distributions import Actions
from jaxstack.nn.team import Arch, TeamSpec

A, B, D = 3, 7, 4
SHAPE = TeamSpec(A, (D,), (D,), False, Actions("discrete", (5,)))
ARCH = Arch((8,), "tanh")
OBS = jax.random.normal(jax.random.key(9), (1, B, A, D))
FIRST = jnp.zeros((1, B), bool)


def config(agent, count, **options):
    sizes = dict(num_envs=4, num_steps=5, num_minibatches=1, hidden=(8,), anneal_lr=False, total_steps=2000)
    one = agents.make(agent, env="probe", env_args=("kind=match", f"count={count}"), **(sizes | options))
    return one.config


def happo_parts(count, **options):
    """(task, state, batch) of one rollout."""
    task = network("happo", config("happo", count, **options))
    learner = team_ppo.make_learner("happo", task, happo.sequential_update, happo.init_optimisers)

    @jax.jit
    def start():
        return team_ppo.gather_batch(task, learner.init(jax.random.key(0)), jax.random.key(1))

    state, batch, _ = start()
    return task, state, batch


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("options", [{}, {"normalise_advantage": False, "clip_value": False}])
def test_happo_with_one_agent_is_ppo(options):
    task, state, batch = happo_parts(1, num_epochs=3, lr=1e-2, **options)
    key = jax.random.key(2)
    got, metrics = jax.jit(lambda s: happo.sequential_update(task, s, batch, key))(state)
    plain = state._replace(opt_state=team_ppo.optimiser(task.cfg, state.hypers).init(state.params))
    want, expected = jax.jit(lambda s: team_ppo.ppo_epochs(task, s, batch, key))(plain)
    close(got.params, want.params)
    for name in ("loss/total", "loss/actor", "loss/critic", "train/entropy"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-6)


def by_hand(task, state, batch, order):
    """One epoch, agent after agent: (parameters, M), with a loss of its own on the team's joint network."""
    hypers, weight = state.hypers, batch.agent_mask
    tx = optax.chain(optax.clip_by_global_norm(hypers.max_grad_norm), optax.adam(hypers.lr, eps=1e-5))
    joint = batch.advantage.mean(-1)

    def logps(params):
        raw = task.team.actor(params, (), batch.obs, batch.first)[1]
        logits = jax.nn.log_softmax(raw, -1)
        return jnp.take_along_axis(logits, batch.action[..., None], -1)[..., 0], -(jnp.exp(logits) * logits).sum(-1)

    def loss(params, i, factor):
        logp, entropy = logps(params)
        w = weight[..., i] / weight[..., i].sum()
        adv = (joint - (w * joint).sum()) / (jnp.sqrt((w * jnp.square(joint - (w * joint).sum())).sum()) + 1e-8)
        ratio = jnp.exp(logp[..., i] - batch.logp[..., i])
        surrogate = jnp.minimum(ratio * factor * adv, jnp.clip(ratio, 1 - hypers.clip, 1 + hypers.clip) * factor * adv)
        value = task.team.critic(params, (), batch.critic_x, batch.first)[1][..., i]
        old, target = batch.value[..., i], batch.target[..., i]
        near = old + jnp.clip(value - old, -hypers.clip, hypers.clip)
        error = 0.5 * jnp.maximum((value - target) ** 2, (near - target) ** 2)
        return (w * (-surrogate + hypers.vf_coef * error - hypers.ent_coef * entropy[..., i])).sum()

    @jax.jit
    def one(params, factor, i):
        row = lambda tree: jax.tree.map(lambda x: x[i], tree)
        updates, _ = tx.update(row(jax.grad(loss)(params, i, factor)), tx.init(row(params)), row(params))
        params = jax.tree.map(lambda p, u: p.at[i].add(u), params, updates)
        ratio = jnp.exp(logps(params)[0] - batch.logp)[..., i]
        return params, factor * jnp.where(weight[..., i] > 0, ratio, 1.0)

    params, factor = state.params, jnp.ones(batch.first.shape)
    for i in order:
        params, factor = one(params, factor, jnp.int32(i))
    return params, factor


def test_happo_multiplies_by_the_ratios_of_the_agents_before():
    task, state, batch = happo_parts(A, num_epochs=1, lr=3e-2)
    absent = jax.random.bernoulli(jax.random.key(3), 0.3, batch.agent_mask.shape)
    noise = jax.random.normal(jax.random.key(4), batch.advantage.shape)
    batch = batch._replace(agent_mask=~absent, advantage=noise)
    update = jax.jit(lambda key: happo.sequential_update(task, state, batch, key))
    seen = set()
    for seed in range(3):
        key = jax.random.key(seed)
        order = tuple(int(i) for i in jax.random.permutation(jax.random.split(key)[0], A))
        got, metrics = update(key)
        want, factor = by_hand(task, state, batch, order)
        close(got.params, want, rtol=1e-3, atol=2e-5)
        assert float(metrics["train/factor"]) == pytest.approx(float(factor.mean()), abs=1e-4)
        assert float(jnp.abs(factor - 1).max()) > 1e-2
        seen.add(order)
    assert len(seen) > 1


def test_happo_factor_stays_one_when_nobody_learns():
    task, state, batch = happo_parts(A, lr=0.0)
    got, metrics = jax.jit(lambda s: happo.sequential_update(task, s, batch, jax.random.key(0)))(state)
    assert float(metrics["train/factor"]) == pytest.approx(1.0, abs=1e-6)
    close(got.params, state.params, 0, 0)


def spread(team, weights, obs):
    """Mean distance between agents' outputs on the same observations, by a plain loop."""
    flat = obs.reshape(1, -1, 1, D)
    same = jnp.broadcast_to(flat, (1, flat.shape[1], A, D))
    act = jax.jit(lambda w: team.actor(w, (), same, jnp.zeros(same.shape[:2], bool))[1][0])
    out = np.asarray(act(weights), np.float64)
    return np.mean(
        [np.linalg.norm(out[:, i] - out[:, k], axis=-1).mean() for i, k in itertools.combinations(range(A), 2)]
    )


def dico(**options):
    team = dico_team(DicoConfig(env="matrix_game", **options), SHAPE, ARCH)

    @jax.jit
    def grown():
        params = team.init(jax.random.key(0))
        return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)

    return team._replace(materialise=jax.jit(team.materialise)), grown()


@pytest.mark.parametrize("wanted", [0.5, 2.0])
def test_dico_reaches_the_wanted_diversity(wanted):
    team, params = dico(diversity=wanted, tau=1.0)
    weights, aux_state = team.materialise(params, team.init_aux_state(), OBS)
    assert spread(team, weights, OBS) == pytest.approx(wanted, rel=1e-5)
    # acting uses the stored measurement
    stored, same = team.materialise(params, aux_state, None)
    assert float(stored["scale"]) == pytest.approx(float(weights["scale"]), rel=1e-6)
    assert float(same) == float(aux_state)


def test_dico_at_zero_is_homogeneous_and_at_minus_one_unconstrained():
    none, params = dico(diversity=0.0)
    free, _ = dico(diversity=-1.0)
    for obs in (None, OBS):
        assert spread(none, none.materialise(params, none.init_aux_state(), obs)[0], OBS) == 0.0
        weights, _ = free.materialise(params, free.init_aux_state(), obs)
        assert float(weights["scale"]) == 1.0
        assert spread(free, weights, OBS) > 0.1


def test_dico_measures_a_running_mean_whose_last_term_has_a_gradient():
    team, params = dico(diversity=1.0, tau=0.25)
    measure = lambda params, aux_state, obs: team.materialise(params, aux_state, obs)[1]
    first = measure(params, team.init_aux_state(), OBS)
    fresh = measure(params, team.init_aux_state(), 2.0 * OBS)
    assert float(first) == pytest.approx(spread(team, params | {"scale": 1.0}, OBS), rel=1e-5)
    assert float(measure(params, first, 2.0 * OBS)) == pytest.approx(
        0.75 * float(first) + 0.25 * float(fresh), rel=1e-5
    )
    scale = lambda p, obs: team.materialise(p, first, obs)[0]["scale"]
    norm = lambda g: float(optax.global_norm(g))
    grad = jax.jit(jax.grad(lambda p: scale(p, OBS)))(params)
    direct = jax.jit(jax.grad(lambda p: -0.25 * measure_without_stop(team, p) / first**2))(params)
    close(grad["own"], direct["own"], rtol=1e-3, atol=1e-5)
    assert norm(grad["own"]) > 1e-3
    assert norm(grad["common"]) == norm(jax.grad(lambda p: measure(p, first, OBS))(params)) == 0.0
    assert norm(jax.grad(lambda p: scale(p, None))(params)) == 0.0


def measure_without_stop(team, params):
    """The diversity of the deviations on OBS, differentiable: the outputs differ by the deviations alone."""
    flat = jnp.broadcast_to(OBS.reshape(1, -1, 1, D), (1, B * A, A, D))
    return mean_distance(team.actor(params | {"scale": 1.0}, (), flat, jnp.zeros((1, B * A), bool))[1])


def test_mean_distance_has_a_finite_gradient_where_agents_agree():
    x = jnp.ones((2, A, 4)).at[0, 0].set(3.0)
    grad = jax.grad(mean_distance)(x)
    assert bool(jnp.isfinite(grad).all())
    np.testing.assert_array_equal(grad[1], 0.0)
    assert float(mean_distance(x)) == pytest.approx(0.5 * 2 / 3 * 4.0)  # one sample, two of three pairs, at |2,2,2,2|


def test_kaleidoscope_mask_and_its_gradients():
    weight = jnp.array([-0.9, -0.2, 0.3, 0.8])
    threshold = jnp.log(jnp.array([[0.25] * 4, [0.6] * 4]) / (1 - jnp.array([[0.25] * 4, [0.6] * 4])))
    got = kaleidoscope_mask(weight, threshold)
    np.testing.assert_allclose(got, [[-0.65, 0.0, 0.05, 0.55], [-0.3, 0.0, 0.0, 0.2]], atol=1e-6)
    total = lambda w, s: kaleidoscope_mask(w, s).sum()
    on_weight, on_threshold = jax.grad(total, (0, 1))(weight, threshold)
    np.testing.assert_array_equal(on_weight, [2, 0, 1, 2])  # how many agents keep the weight
    slope = np.array([[0.25 * 0.75], [0.6 * 0.4]]) * np.array([[1, 0, -1, -1], [1, 0, 0, -1]])
    np.testing.assert_allclose(on_threshold, slope, atol=1e-6)


def masked(**options):
    cfg = KaleidoscopeConfig(env="matrix_game", **options)
    team = masked_team(cfg, SHAPE, ARCH)
    return team, jax.jit(team.init)(jax.random.key(0))


def test_kaleidoscope_masks_kernels_of_the_actor_only():
    team, params = masked(start_threshold=-6.0)
    weights, _ = team.materialise(params, (), None)
    silent = []
    for layer, shared in params["actor_head"]["params"].items():
        own = weights["own_head"]["params"][layer]
        s = params["thresholds"]["params"][layer]["kernel"]
        np.testing.assert_allclose(own["kernel"], kaleidoscope_mask(shared["kernel"], s))
        assert own["bias"].shape == (A, *shared["bias"].shape)
        silent.append(float((own["kernel"] == 0).mean()))
    assert max(silent) > 0.0  # the last layer starts small, so thresholds silence some of it
    assert max(silent) < 1.0
    close(weights["critic_head"], params["critic_head"], 0, 0)


def test_kaleidoscope_bonus_is_the_mean_distance_and_drives_agents_apart():
    team, params = masked(start_threshold=-1.0, diversity_coef=0.5)
    own = team.materialise(params, (), None)[0]["own_head"]
    flat = np.concatenate([np.asarray(x).reshape(A, -1) for x in jax.tree.leaves(own)], -1)
    want = np.mean([np.abs(flat[i] - flat[k]).mean() for i, k in itertools.combinations(range(A), 2)])
    assert float(mask_diversity(own)) == pytest.approx(want, rel=1e-5)
    assert float(team.penalty(params, ())) == pytest.approx(-0.5 * want, rel=1e-5)
    down = jax.jit(jax.grad(lambda p: team.penalty(p, ())))(params)
    moved = jax.tree.map(lambda p, g: p - 10.0 * g, params, down)
    assert float(mask_diversity(team.materialise(moved, (), None)[0]["own_head"])) > 1.01 * want


def test_gradient_steps_of_one_agents_samples_leave_the_other_thresholds_alone():
    task = network("kaleidoscope", config("kaleidoscope", A, diversity_coef=0.0, start_threshold=-6.0))
    learner = team_ppo.make_learner("kaleidoscope", task)
    state, batch, _ = jax.jit(lambda: team_ppo.gather_batch(task, learner.init(jax.random.key(0)), jax.random.key(1)))()
    only = jnp.zeros_like(batch.agent_mask).at[..., 1].set(True)
    noise = jax.random.normal(jax.random.key(4), batch.advantage.shape)
    hypers = as_hypers(task.cfg.hypers)
    batch = team_ppo.samples(task, batch._replace(agent_mask=only, advantage=noise)).take(jnp.arange(20))
    grads = jax.jit(jax.grad(lambda p: team_ppo.loss(task, p, (), hypers, batch)[0]))(state.params)
    for s in jax.tree.leaves(grads["thresholds"]):
        if s.size:
            np.testing.assert_array_equal(s[np.array([0, 2])], 0.0)
            assert np.any(s[1])
