"""Networks of one's own, bfloat16 products, returns of teams, and environments whose parameters a callback changes."""

import sys
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import SMALL, make, run

import jaxstack
from jaxstack import envs
from jaxstack.agents.hypermarl import apply_generated
from jaxstack.core.errors import UserError
from jaxstack.core.metrics import Mean
from jaxstack.envs import rollout
from jaxstack.envs.base import Discrete, Environment, Spec, first_step
from jaxstack.fast.products import half_product
from jaxstack.nn import networks


class Twice(nn.Module):
    width: int = 8
    statistics: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        return nn.BatchNorm(use_running_average=True)(x) if self.statistics else nn.relu(x)


class Whole(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.sum()


class State(NamedTuple):
    level: Any


@dataclass(frozen=True)
class Levels(Environment):
    """One step that pays the level, which is a parameter of all copies."""

    @property
    def spec(self):
        names = ("hunter_0", "hunter_1", "prey_0")
        return Spec("levels", names, (1,), Discrete(2), horizon=1, can_truncate=False)

    @property
    def parameters(self):
        return {"level": jnp.float32(1.0)}

    def reset(self, key, parameters=None):
        level = (self.parameters if parameters is None else parameters)["level"]
        return State(level), first_step(self.spec, jnp.full((3, 1), level))

    def step(self, key, state, action):
        ts = first_step(self.spec, jnp.zeros((3, 1)))
        reward = state.level * jnp.asarray([1.0, 3.0, -4.0])
        return state, ts._replace(reward=reward, terminated=jnp.bool_(True))


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
    module = types.ModuleType("own_parts")
    vars(module).update(Twice=Twice, Whole=Whole, Levels=Levels, five=lambda: 5)
    monkeypatch.setitem(sys.modules, "own_parts", module)


def test_a_network_of_ones_own_reads_for_actor_and_critic_and_learns():
    trained = run("ppo", "match", updates=30, network="own_parts:Twice={width: 6}", hidden=(16,))
    assert trained.returns == 1.0
    assert trained.state.params["actor_torso"]["params"]["Twice_0"]["Dense_0"]["kernel"].shape == (2, 6)
    assert trained.state.params["critic_head"]["params"]["Dense_0"]["kernel"].shape == (6, 16)


def test_sizes_of_the_convolutions():
    net = networks.make("cnn={channels: [4, 6], sizes: [3], strides: [2, 1]}", "relu")
    out, variables = net.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    assert out.shape == (2, 4, 4, 6)
    shapes = [v["kernel"].shape for v in variables["params"].values()]
    assert shapes == [(3, 3, 3, 4), (3, 3, 4, 6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "cnnn"}, "unknown network 'cnnn': did you mean 'cnn'"),
        ({"network": "own_parts:Nothing"}, "unknown attribute of module own_parts 'Nothing'"),
        ({"network": "own_parts:Twice={widht: 3}"}, "unknown option of network 'own_parts:Twice' 'widht'"),
        ({"network": "own_parts:five"}, "made a int, expected a flax.linen.Module"),
        ({"network": "own_parts:Whole"}, r"returns .* expected real features \[batch, ...\]"),
        ({"network": "own_parts:Twice={statistics: true}"}, "found the collections .*batch_stats.*, expected params"),
        ({"network": "cnn"}, "network='cnn': expected mlp, as observations of probe_match"),
        ({"network": "own_parts:Twice", "cnn": True}, "expected mlp or cnn beside cnn=True"),
        ({"precision": "fp8"}, "precision='fp8': expected one of 'float32'"),
    ],
)
def test_networks_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make("ppo", "match", 1, **options)


def test_a_network_beside_ids_or_generated_weights_is_refused():
    for agent, options in (("ippo", {"sharing": "full+id"}), ("hypermarl", {})):
        with pytest.raises(UserError, match="network='own_parts:Twice': expected mlp"):
            make(agent, "match", 3, network="own_parts:Twice", **options)


def test_bf16_products_add_in_float32():
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(7, 300), (300, 5)]))
    low = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(half_product(x, w), low(x) @ low(w), rtol=1e-4, atol=1e-4)
    g = jax.random.normal(jax.random.key(2), (7, 5))
    dx, dw = jax.vjp(half_product, x, w)[1](g)
    np.testing.assert_allclose(dx, low(g) @ low(w).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, low(x).T @ low(g), rtol=1e-4, atol=1e-4)
    # sums in bfloat16 would stop at 256
    assert half_product(jnp.ones((1, 4096)), jnp.ones((4096, 1)))[0, 0] == 4096
    assert (dx.dtype, dw.dtype) == (jnp.float32, jnp.float32)


def test_a_bf16_agent_learns_what_a_float32_one_does():
    full, half = (run("ppo", "match", updates=30, precision=p) for p in ("float32", "bf16"))
    assert full.returns == half.returns == 1.0
    leaves = list(zip(jax.tree.leaves(full.state.params), jax.tree.leaves(half.state.params)))
    assert all(y.dtype == jnp.float32 for _, y in leaves)
    assert any(bool((x != y).any()) for x, y in leaves)


def test_generated_layers_multiply_in_bf16():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [(jax.random.normal(keys[0], (2, 5, 4)), jax.random.normal(keys[1], (2, 4)))]
    x = jax.random.normal(keys[2], (3, 6, 2, 5))
    out = apply_generated(weights, x, "tanh", "bf16")
    low = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)
    expected = jnp.einsum("tbam,amn->tban", low(x), low(weights[0][0])) + weights[0][1]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert np.abs(out - apply_generated(weights, x, "tanh")).max() > 1e-4


def test_teams_and_agents_have_returns_of_their_own():
    spec = Levels().spec
    assert rollout.teams(spec) == {"hunter": [0, 1], "prey": [2]}
    learner = jaxstack.make_agent("ippo", **(SMALL | dict(env="own_parts:Levels", agent_returns=True)))
    state = learner.init(jax.random.key(0))
    metrics = jax.jit(lambda s: (learner.step(s)[1], learner.evaluate(s, jax.random.key(1))))(state)
    value = lambda m: float(m.total / m.count) if isinstance(m, Mean) else float(m)
    got = {k: value(v) for m in metrics for k, v in m.items() if "return" in k}
    expected = {"": 0.0, "_hunter": 2.0, "_prey": -4.0, "_hunter_0": 1.0, "_hunter_1": 3.0, "_prey_0": -4.0}
    assert got == {f"{g}/return{k}": v for g in ("rollout", "eval") for k, v in expected.items()}
    alone = rollout.statistics(rollout_of("dispersion"), envs.make("dispersion").spec)
    assert [k for k in alone if "return" in k] == ["rollout/return"]


def rollout_of(name):
    vec = envs.vectorise(envs.make(name), 2)
    act, draw = rollout.random_policy(vec)
    key = jax.random.key(0)
    return jax.jit(lambda: rollout.collect(vec, act, key, envs.vector.init(vec, key), (), 4, draw))().steps


@pytest.mark.parametrize("auto_reset", ["pool", "exact"])
def test_a_callback_changes_parameters_without_a_new_program(auto_reset, tmp_path):
    def level(now):
        assert now.rows[-1]["step"] == now.step
        return envs.with_parameters(now.state, {"level": jnp.float32(1 + now.step)})

    options = SMALL | dict(env="own_parts:Levels", auto_reset=auto_reset)
    learner = jaxstack.make_agent("ippo", **options)
    given = dict(chunk=1, progress=False, eval_every=-1, callbacks=[level])
    whole = jaxstack.train(learner, 4, seeds=2, **given)
    hunters = whole.metrics[whole.metrics.seed == 0]["rollout/return_hunter"].tolist()
    # an episode that began before the change keeps its level: the first step of a rollout pays the old one
    new, old = np.asarray([1, 2, 3, 4]), np.asarray([1, 1, 2, 3])
    np.testing.assert_allclose(hunters, 2 * (15 * new + old) / 16)
    np.testing.assert_array_equal(envs.parameters_of(whole.state)["level"], [5.0, 5.0])
    before = len(whole.ledger.programs)
    jaxstack.train(learner, 2, seeds=2, run_dir=tmp_path / "run", profile=str(tmp_path / "trace"), **given)
    assert len(list((tmp_path / "trace").rglob("perfetto_trace.json.gz"))) == 1
    resumed = jaxstack.core.runner.resume(learner, tmp_path / "run", 4, schedule="keep", chunk=1, callbacks=[level])
    assert resumed.metrics[resumed.metrics.seed == 0]["rollout/return_hunter"].tolist() == hunters
    assert before == len(jaxstack.train(learner, 4, seeds=2, chunk=1, progress=False, eval_every=-1).ledger.programs)


@pytest.mark.parametrize(
    ("make_new", "message"),
    [
        (lambda s: s.params, "callback <lambda>: returned another structure"),
        (lambda s: envs.with_parameters(s, {"level": jnp.zeros(3)}), r"found an array \(3,\), expected \(1,\) or \(\)"),
        (lambda s: envs.with_parameters(s, jnp.zeros(())), "parameters: found PyTreeDef"),
    ],
)
def test_states_that_do_not_fit_are_refused(make_new, message):
    learner = jaxstack.make_agent("ippo", **(SMALL | dict(env="own_parts:Levels")))
    with pytest.raises(UserError, match=message):
        jaxstack.train(learner, 1, progress=False, eval_every=-1, callbacks=[lambda now: make_new(now.state)])


def test_weights_of_tasks_are_parameters():
    env = envs.wrap(envs.make("hidden_corner"), "task_weights=all")
    envs.check_env(env)
    count = len(env.parameters)
    keys = jax.random.split(jax.random.key(0), 64)
    tasks = jax.vmap(lambda key: env.task_of(env.reset(key, jax.nn.one_hot(2, count))[0]))(keys)
    assert set(tasks.tolist()) == {2}
    drawn = jax.vmap(lambda key: env.task_of(env.reset(key)[0]))(keys)
    assert len(set(drawn.tolist())) == count
    with pytest.raises(UserError, match="no sets of tasks"):
        envs.wrap(envs.make("dispersion"), "task_weights=all")
