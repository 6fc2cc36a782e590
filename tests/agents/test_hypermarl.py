"""Identities of the generated networks and their gradients (Tessera et al., 2025)."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from training import make, network, run

from jaxstack import agents
from jaxstack.agents import team_ppo
from jaxstack.agents.hypermarl import Config, Form, HyperLayer, Layer, _row_orthogonal, hyper_team, input_sums
from jaxstack.core.learner import as_hypers
from jaxstack.core.metrics import on_host
from jaxstack.nn import team
from jaxstack.nn.distributions import Actions
from jaxstack.nn.init import orthogonal
from jaxstack.nn.team import Arch, TeamSpec

A, B, D, HIDDEN = 3, 20, 4, (8, 8)
SHAPE = TeamSpec(A, (D,), (D,), False, Actions("discrete", (5,)))
ARCH = Arch(HIDDEN, "tanh")
ONE_HOT = dict(kind="linear", embedding="one_hot")


def net(shape=SHAPE, arch=ARCH, **options):
    return hyper_team(Config(env="matrix_game", hidden=arch.hidden, gru=arch.gru, **options), shape, arch)


def config(**options):
    args = ("kind=match", f"count={A}")
    return Config(env="probe", env_args=args, num_envs=4, num_steps=5, num_minibatches=1, hidden=(8,), **options)


def noisy(params, seed=5, size=0.2):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [x + size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def batch(task, seed=0, weights=None):
    """Random transitions with plausible old values and log-probabilities."""
    k = jax.random.split(jax.random.key(seed), 7)
    lead, s = (1, B, A), task.shape
    obs = jax.random.normal(k[0], (*lead, *s.obs_shape))
    return team_ppo.Batch(
        obs=obs,
        critic_x=obs.reshape(1, B, -1) if s.central else obs,
        first=jnp.zeros((1, B), bool),
        action=jax.random.randint(k[1], lead, 0, s.actions.sizes[0]),
        action_mask=None,
        agent_mask=jnp.ones(lead) if weights is None else weights,
        logp=-jnp.log(2.0) + 0.1 * jax.random.normal(k[2], lead),
        value=jax.random.normal(k[3], lead),
        advantage=jax.random.normal(k[4], lead),
        target=jax.random.normal(k[5], lead),
        start=((), ()),
    )


def as_nops(params):
    """The weights of separate networks whose agent i has theta^i = H[i]: the heads' rows, with zero shared bias."""

    def head(p):
        layers = {}
        for i in range(len(p["params"])):
            kernel, bias = (p["params"][f"layer_{i}"][f"{k}_head"]["kernel"] for k in ("kernel", "bias"))
            layers[f"Dense_{i}"] = {"kernel": kernel.reshape(A, -1, bias.shape[-1]), "bias": bias}
        return {"params": layers}

    return {"actor_torso": {}, "actor_head": head(params["actor"]), "critic_torso": {}} | {
        "critic_head": head(params["critic"])
    }


def zero_shared_bias(params):
    """Noise everywhere but in the biases c of the linear hypernetwork."""
    noise = noisy(params)
    heads = ("kernel_head", "bias_head")
    keep = lambda path, n: 0.0 * n if any(str(getattr(p, "key", "")) in heads for p in path) and n.ndim == 1 else n
    return jax.tree_util.tree_map_with_path(keep, noise)


@pytest.mark.parametrize("algorithm", ["ippo", "mappo"])
def test_linear_one_hot_equals_separate_networks(algorithm):
    task = network("hypermarl", config(algorithm=algorithm, **ONE_HOT))
    # one group as in HyperMARL: its loss is the mean over all agents
    other = task._replace(team=team.separate(task.shape, task.cfg.arch)._replace(groups=task.groups))
    params = zero_shared_bias(task.team.init(jax.random.key(0)))
    twin = as_nops(params)
    mb, hypers = batch(task), as_hypers(task.cfg.hypers)
    grad = jax.jit(jax.value_and_grad(lambda t, p: team_ppo.loss(t, p, (), hypers, mb)[0], 1), static_argnums=0)
    (mine, g), (theirs, h) = grad(task, params), grad(other, twin)
    assert float(mine) == pytest.approx(float(theirs), abs=1e-6)
    h = {"actor": h["actor_head"]["params"], "critic": h["critic_head"]["params"]}
    for part in ("actor", "critic"):
        for i in range(len(h[part])):
            for kind in ("kernel", "bias"):
                got = g[part]["params"][f"layer_{i}"][f"{kind}_head"]["kernel"]
                np.testing.assert_allclose(got, h[part][f"Dense_{i}"][kind].reshape(A, -1), atol=1e-6)


def test_linear_one_hot_without_biases_trains_as_separate_networks():
    """50 updates from equal weights, nothing clipped. Adam's epsilon is small: HyperMARL's loss is a mean over agents,
    that of separate networks a sum, which Adam undoes up to its epsilon."""
    options = dict(num_envs=8, num_steps=8, hidden=(8,), lr=1e-3, max_grad_norm=1e9, adam_eps=1e-10, total_steps=3200)
    hyper = make("hypermarl", "match", A, hyper_bias=False, advantage_norm="agent", **ONE_HOT, **options)
    nops = make("ippo", "match", A, sharing="none", **options)

    @jax.jit
    def run(key):
        mine, theirs = hyper.init(key), nops.init(key)
        start = as_nops(mine.params)
        one = lambda c, _: ((hyper.step(c[0])[0], nops.step(c[1])[0]), None)
        (mine, theirs), _ = jax.lax.scan(one, (mine, theirs._replace(params=start)), None, length=50)
        return mine.params, theirs.params, start

    mine, theirs, start = run(jax.random.key(0))
    heads = [path[-2:] for path, _ in jax.tree_util.tree_leaves_with_path(mine)]
    assert {(h[0].key, h[1].key) for h in heads} == {("kernel_head", "kernel"), ("bias_head", "kernel")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), as_nops(mine), theirs)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), theirs, start)
    assert max(jax.tree.leaves(moved)) > 0.1


def test_linear_one_hot_starts_with_orthogonal_weights():
    w, _ = net(**ONE_HOT).materialise(net(**ONE_HOT).init(jax.random.key(0)), (), None)
    for kernel, bias in (w["actor"][0], w["actor"][1], w["critic"][0], w["critic"][1]):
        for i in range(A):  # rows <= columns: W W^T = gain^2 I
            np.testing.assert_allclose(kernel[i] @ kernel[i].T, 2 * np.eye(kernel.shape[1]), atol=1e-5)
        assert not np.any(bias)
        assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.1
    for last, square in ((w["actor"][-1][0], 1e-4), (w["critic"][-1][0], 1.0)):
        for i in range(A):
            np.testing.assert_allclose(last[i].T @ last[i], square * np.eye(last.shape[2]), atol=1e-5 * square + 1e-9)


def test_every_input_row_of_a_head_is_a_matrix_of_its_own():
    w = _row_orthogonal(Layer(4, 6, 3.0), 1.0)(jax.random.key(0), (5, 24)).reshape(5, 4, 6)
    for row in w:
        np.testing.assert_allclose(row @ row.T, 9 * np.eye(4), atol=1e-4)
    assert len({round(float(row[0, 0]), 4) for row in w}) == 5


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_normalised_init_has_the_nominal_gain(kind):
    shape, arch = SHAPE._replace(obs_shape=(16,), critic_shape=(16,)), Arch((32,), "tanh")
    hyper = net(shape, arch, kind=kind, init="normalised", embedding_dim=8, hyper_hidden=(32,))

    def ratios(key):
        w, _ = hyper.materialise(hyper.init(key), (), None)
        nominal = (np.sqrt(2 * 16), 0.01 * np.sqrt(5), np.sqrt(2 * 16), 1.0)
        layers = (w["actor"][0], w["actor"][-1], w["critic"][0], w["critic"][-1])
        return jnp.stack([jnp.linalg.norm(k, axis=(1, 2)) / n for (k, _), n in zip(layers, nominal)])

    got = jax.jit(jax.vmap(ratios))(jax.random.split(jax.random.key(0), 50))
    np.testing.assert_allclose(got.mean((0, 2)), 1.0, atol=0.06)


SUMS = [{}, {"embedding": "one_hot"}, {"kind": "linear"}, {"hyper_activation": "tanh", "hyper_hidden": (40, 24)}]


@pytest.mark.parametrize("init", ["orthogonal", "normalised", "default"])
def test_level_steps_change_no_function_at_first(init):
    embeddings = orthogonal(2**0.5)(jax.random.key(1), (A, 8))

    def weights(key, trunk_gain, hidden, sums):
        layer = HyperLayer(Layer(4, 6, 3.0), Form(hidden, "relu", init, trunk_gain, sums, True))
        return layer.apply(layer.init(key, embeddings), embeddings)

    for trunk_gain, hidden in ((None, (11, 7)), (2**0.5, (11,)), (None, ())):
        sums = tuple(3.0 * (i + 1) for i in range(len(hidden) + 1))
        one, two = (weights(jax.random.key(0), trunk_gain, hidden, s) for s in ((1.0,) * len(sums), sums))
        np.testing.assert_allclose(one[0], two[0], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(one[1], two[1], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("options", SUMS)
def test_sums_are_those_of_the_inputs_at_first(options):
    cfg = Config(hyper_bias=False, **options)
    widths = (*(cfg.hyper_hidden if cfg.kind == "mlp" else ()), 1)
    act = {"relu": jax.nn.relu, "tanh": jnp.tanh}[cfg.hyper_activation]

    def measured(key):
        keys = jax.random.split(key, len(widths))
        x = jnp.eye(A) if cfg.embedding == "one_hot" else orthogonal(2**0.5)(key, (A, cfg.embedding_dim))
        sums = []
        for k, width in zip(keys, widths):
            sums.append(jnp.abs(x).sum(-1).mean())
            x = act(x @ nn.initializers.lecun_normal()(k, (x.shape[-1], width)))
        return jnp.stack(sums)

    want = jax.vmap(measured)(jax.random.split(jax.random.key(0), 200)).mean(0)
    np.testing.assert_allclose(input_sums(replace(cfg, level_steps=True), 4, A, None), want, rtol=0.05)
    assert input_sums(cfg, 4, A, None) == (1.0,) * len(widths)


def test_a_step_of_adam_moves_generated_weights_by_the_learning_rate_whatever_the_width():
    shape, arch, lr = SHAPE._replace(obs_shape=(32,)), Arch((32,), "tanh"), 1e-4

    def moved(key, level, width):
        hyper = net(shape, arch, hyper_hidden=(width,), init="normalised", level_steps=level)
        params = hyper.init(key)
        kernel = lambda p: hyper.materialise(p, (), None)[0]["actor"][0][0]
        before, pull = jax.vjp(kernel, params)
        # the first step of Adam is the sign of the gradient
        after = kernel(
            jax.tree.map(lambda p, g: p - lr * jnp.sign(g), params, pull(jax.random.normal(key, before.shape))[0])
        )
        return jnp.abs(after - before).mean() / lr

    sizes = [(level, width) for level in (True, False) for width in (64, 256)]
    got = np.asarray(jax.jit(lambda key: jnp.stack([moved(key, *s) for s in sizes]))(jax.random.key(0)))
    assert got[0] == pytest.approx(got[1], rel=0.2)
    assert 0.5 < got[0] < 2.5
    assert got[3] == pytest.approx(4 * got[2], rel=0.3)
    assert got[2] > 5.0


@pytest.mark.parametrize(("activation", "cosine"), [("relu", 1 / np.pi), ("tanh", 0.0)])
def test_features_of_orthogonal_embeddings_are_correlated_by_rectifying(activation, cosine):
    layer = HyperLayer(Layer(1, 1, 1.0), Form((4000,), activation, "orthogonal", None, (1.0, 1.0), True))
    embeddings = jnp.eye(A, 8)
    params = layer.init(jax.random.key(0), embeddings)
    # what a generated weight is linear in
    features = jax.jacrev(lambda p: layer.apply(p, embeddings)[0][:, 0, 0])(params)["params"]["kernel_head"]["kernel"]
    features = features[..., 0] / jnp.linalg.norm(features[..., 0], axis=1, keepdims=True)
    np.testing.assert_allclose((features @ features.T)[np.triu_indices(A, 1)], cosine, atol=0.06)


def test_default_init_differs():
    w, _ = net(init="default").materialise(net(init="default").init(jax.random.key(0)), (), None)
    kernel = w["actor"][0][0][0]
    assert float(jnp.abs(kernel @ kernel.T - 2 * jnp.eye(D)).max()) > 0.1


@pytest.mark.parametrize(
    "options",
    [{}, {"share_embedding": False, "hyper_hidden": (6, 6), "level_steps": True}, {"kind": "linear"},
     {"hyper_activation": "tanh"}],
)  # fmt: skip
def test_gradient_is_the_sum_of_jacobians_times_agents_gradients(options):
    task = network("hypermarl", config(**options))
    params = noisy(task.team.init(jax.random.key(0)))
    mb, hypers = batch(task), as_hypers(task.cfg.hypers)
    generate = lambda p: task.team.materialise(p, (), None)[0]

    def loss_of_weights(w):
        fixed = task._replace(team=task.team._replace(materialise=lambda p, aux_state, obs: (w, aux_state)))
        return team_ppo.loss(fixed, params, (), hypers, mb)[0]

    z = jax.jit(jax.grad(loss_of_weights))(generate(params))  # Z_i: leaves [A, ...]
    _, pull = jax.vjp(generate, params)
    alone = lambda i: jax.tree.map(lambda x: jnp.zeros_like(x).at[i].set(x[i]), z)
    parts = [pull(alone(i))[0] for i in range(A)]
    want = jax.tree.map(lambda *x: sum(x), *parts)
    got = jax.jit(jax.grad(lambda p: team_ppo.loss(task, p, (), hypers, mb)[0]))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)


@pytest.mark.parametrize(("embedding", "coupled"), [("one_hot", False), ("learned", True)])
def test_agents_couple_only_through_the_hypernetwork(embedding, coupled):
    hyper = net(kind="linear", embedding=embedding)
    params = noisy(hyper.init(jax.random.key(0)))
    heads = dict.fromkeys(("h",), params["actor"]["params"]["layer_0"]["kernel_head"]["kernel"])

    def weights(h):
        p = jax.tree.map(lambda x: x, params)
        p["actor"]["params"]["layer_0"]["kernel_head"]["kernel"] = h
        return hyper.materialise(p, (), None)[0]["actor"][0][0].reshape(A, -1)

    jac = jax.jacrev(weights)(heads["h"]).reshape(A, D * HIDDEN[0], -1)
    cross = jnp.einsum("ip,jp->ij", jac[0], jac[1])
    assert (float(jnp.abs(cross).max()) > 1e-3) == coupled
    if not coupled:
        np.testing.assert_array_equal(cross, 0.0)


@pytest.mark.parametrize("options", [{}, {"algorithm": "mappo", "share_embedding": False}, {"condition": "id+obs"}])
def test_permuting_agents_with_embeddings_and_data_changes_nothing(options):
    task = network("hypermarl", config(**options))
    params = noisy(task.team.init(jax.random.key(0)))
    mb, hypers = batch(task), as_hypers(task.cfg.hypers)
    order = np.array([2, 0, 1])
    emb = {k: v[order] for k, v in params.items() if "embedding" in k}
    swap = lambda x: x[:, :, order] if x is not None and x.ndim > 2 and x.shape[2] == A else x
    moved = team_ppo.Batch(*map(swap, mb[:-1]), start=mb.start)
    if task.shape.central:  # the state itself stays
        moved = moved._replace(critic_x=mb.critic_x)
    loss = jax.jit(lambda p, mb: team_ppo.loss(task, p, (), hypers, mb)[0])
    assert float(loss(params | emb, moved)) == pytest.approx(float(loss(params, mb)), rel=1e-6)
    assert abs(float(loss(params | emb, mb)) - float(loss(params, mb))) > 1e-5


def products(jaxpr, inside=False):
    """(shape of each matrix product, is it inside a loop)."""
    out = []
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            out.append((tuple(e.outvars[0].aval.shape), inside))
        for sub in core.jaxprs_in_params(e.params):
            out += products(sub, inside or e.primitive.name in ("scan", "while"))
    return out


def test_weights_are_generated_once_a_rollout():
    task = network("hypermarl", config(hyper_hidden=(11,)))
    learner = agents.make("hypermarl", task.cfg)
    state = jax.eval_shape(learner.init, jax.random.key(0))
    found = products(jax.make_jaxpr(lambda s, k: team_ppo.gather_batch(task, s, k))(state, jax.random.key(0)).jaxpr)
    sizes = [(A, m * n) for m, n in ((2, 8), (8, 2), (2, 8), (8, 1))]
    for size in set(sizes):
        assert found.count((size, False)) >= sizes.count(size)
        assert (size, True) not in found
    assert any(inside for _, inside in found)  # the generated networks themselves run inside


def test_the_policy_stores_generated_weights_only():
    task = network("hypermarl", config())
    learner = agents.make("hypermarl", task.cfg)
    stored = learner.policy.params(learner.init(jax.random.key(0)))
    assert {x.shape for x in jax.tree.leaves(stored["weights"])} == {
        (A, 2, 8), (A, 8), (A, 8, 2), (A, 2), (A, 8, 1), (A, 1),
    }  # fmt: skip


def test_recurrent_networks_share_the_torso_and_generate_the_rest():
    arch = Arch((7,), "tanh", gru=6)
    hyper = net(SHAPE, arch)
    w, _ = hyper.materialise(hyper.init(jax.random.key(0)), (), None)
    assert [k.shape for k, _ in w["actor"]] == [(A, 6, 7), (A, 7, 5)]
    assert w["actor_torso"]["params"]["GRU_0"]["recurrent"].shape == (6, 18)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "ceiling"), [(2, 0.75), (4, 0.6836)])
def test_shared_policies_reach_the_homogeneous_optimum_of_the_matrix_game(count, ceiling):
    # independent uniform play is best for one policy: E 1/k = 1 - (1 - 1/N)^N
    assert 1 - (1 - 1 / count) ** count == pytest.approx(ceiling, abs=1e-4)
    options = dict(
        env="matrix_game", env_args=("kind=specialisation", f"num_agents={count}"), num_envs=32, num_steps=10,
        num_epochs=1, num_minibatches=1, hidden=(16,), lr=3e-3, gamma=0.0, lam=0.0, clip_value=False,
        total_steps=320 * 300, anneal_lr=False, eval_greedy=False, eval_episodes=512,
    )  # fmt: skip
    results = {}
    for name in ("ippo", "hypermarl"):
        one = agents.make(name, **options)
        train = jax.jit(lambda k, one=one: jax.lax.scan(lambda s, _: one.step(s), one.init(k), None, length=300)[0])
        results[name] = on_host(one.evaluate(train(jax.random.key(0)), jax.random.key(1)))["eval/return"] / 10
    assert results["ippo"] == pytest.approx(ceiling, abs=0.03)
    assert results["hypermarl"] > 0.95


def test_shared_embeddings_are_the_default_and_can_be_split():
    split = net(share_embedding=False).init(jax.random.key(0))
    assert split["critic_embedding"].shape == split["embedding"].shape == (A, 8)
    assert "critic_embedding" not in net().init(jax.random.key(0))
    gram = split["embedding"] @ split["embedding"].T
    np.testing.assert_allclose(gram, 2 * np.eye(A), atol=1e-5)


def test_lr_zero_keeps_every_weight():
    trained = run("hypermarl", "role", 3, updates=2, lr=0.0)
    start = trained.learner.init(jax.random.split(jax.random.key(0))[0])
    for a, b in zip(jax.tree.leaves(trained.state.params), jax.tree.leaves(start.params)):
        np.testing.assert_allclose(a, b, atol=1e-6)
