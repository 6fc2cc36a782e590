import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.nn import team
from jaxstack.nn.distributions import Actions
from jaxstack.nn.team import Arch, TeamSpec

T, B, A, D, N = 4, 5, 3, 6, 2
MODES = {
    "full": lambda s, a: team.shared(s, a, with_id=False),
    "full+id": lambda s, a: team.shared(s, a, with_id=True),
    "id": lambda s, a: team.shared(s, a, with_id=True, with_obs=False),
    "none": team.separate,
    "partial": lambda s, a: team.separate(s, a, (0, 1, 0)),
}


def shape(central=False, kind="discrete", obs=(D,)):
    critic = (A * int(np.prod(obs)),) if central else obs
    return TeamSpec(A, obs, critic, central, Actions(kind, (N,)))


def data(s, seed=0):
    k1, k2 = jax.random.split(jax.random.key(seed))
    obs = jax.random.normal(k1, (T, B, A, *s.obs_shape))
    x = obs.reshape(T, B, -1) if s.central else obs
    return obs, x, jax.random.bernoulli(k2, 0.3, (T, B))


def outputs(net, params, obs, x, first, carry=None):
    weights, _ = net.materialise(params, net.init_aux_state(), None)
    ca, cc = net.carry(B) if carry is None else carry
    ca, raw = net.actor(weights, ca, obs, first)
    cc, value = net.critic(weights, cc, x, first)
    return (ca, cc), raw, value


def noisy(params, seed=9):
    """Away from initialisation, where the small last actor layer and zero biases hide differences."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


@pytest.mark.parametrize(("central", "gru"), [(False, 8), (True, 8), (True, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_shapes_and_step_by_step(mode, central, gru):
    s = shape(central, "continuous")
    net = MODES[mode](s, Arch((7,), "tanh", gru))
    params = noisy(net.init(jax.random.key(0)))
    obs, x, first = data(s)
    carry, raw, value = jax.jit(lambda p: outputs(net, p, obs, x, first))(params)
    assert (raw.shape, value.shape) == ((T, B, A, N), (T, B, A))
    weights, _ = net.materialise(params, (), None)
    assert net.log_std(weights).shape in ((N,), (A, N))
    step = jax.jit(lambda p, c, o, x, f: outputs(net, p, o, x, f, c))
    c = net.carry(B)
    assert jax.tree.map(jnp.shape, c) == jax.tree.map(jnp.shape, carry)
    for t in range(T):
        c, r, v = step(params, c, obs[t : t + 1], x[t : t + 1], first[t : t + 1])
        np.testing.assert_allclose(r[0], raw[t], atol=1e-5)
        np.testing.assert_allclose(v[0], value[t], atol=1e-5)


@pytest.mark.parametrize("gru", [0, 8])
@pytest.mark.parametrize("groups", [None, (0, 1, 0)])
def test_separate_networks_equal_a_loop_over_agents(groups, gru):
    s, arch = shape(), Arch((7,), "relu", gru)
    net = team.separate(s, arch, groups)
    params = noisy(net.init(jax.random.key(0)))
    obs, x, first = data(s)
    _, raw, value = outputs(net, params, obs, x, first)
    m = team.modules(s, arch)
    for i in range(A):
        own = jax.tree.map(lambda p, i=i: p[i if groups is None else groups[i]], params)
        carry = net.carry(B)[0]
        carry = carry[:, i] if gru else ()
        _, f = m.actor_torso.apply(own["actor_torso"], carry, obs[:, :, i], first)
        np.testing.assert_allclose(raw[:, :, i], m.actor_head.apply(own["actor_head"], f), atol=1e-5)
        _, f = m.critic_torso.apply(own["critic_torso"], carry, x[:, :, i], first)
        np.testing.assert_allclose(value[:, :, i], m.critic_head.apply(own["critic_head"], f)[..., 0], atol=1e-5)


def test_separate_networks_start_apart_and_get_their_own_gradients():
    s = shape()
    net = team.separate(s, Arch((7,)))
    params = net.init(jax.random.key(0))
    obs, x, first = data(s)
    for leaf in jax.tree.leaves(params):
        assert leaf.shape[0] == A
    kernel = params["actor_head"]["params"]["Dense_0"]["kernel"]
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.1
    grads = jax.grad(lambda p: outputs(net, p, obs, x, first)[1][:, :, 1].sum())(params)
    rows = np.stack([np.abs(g).sum(tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads["actor_head"])])
    assert rows[:, 1].min() > 0
    assert not rows[:, [0, 2]].any()


def test_groups_share_weights_and_sum_their_gradients():
    s = shape()
    net, single = team.separate(s, Arch((7,)), (0, 1, 0)), team.separate(s, Arch((7,)))
    params = noisy(net.init(jax.random.key(0)))
    obs, x, first = data(s)
    copies, _ = net.materialise(params, (), None)
    f = lambda n: lambda p: jnp.square(outputs(n, p, obs, x, first)[1]).sum()
    together, apart = jax.grad(f(net))(params), jax.grad(f(single))(copies)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart)):
        np.testing.assert_allclose(a[0], b[0] + b[2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a[1], b[1], rtol=1e-4, atol=1e-5)


def test_a_shared_network_treats_agents_alike():
    s = shape()
    net = team.shared(s, Arch((7,)), with_id=False)
    params = noisy(net.init(jax.random.key(0)))
    obs, x, first = data(s)
    _, raw, value = outputs(net, params, obs, x, first)
    order = np.array([2, 0, 1])
    _, raw2, value2 = outputs(net, params, obs[:, :, order], x[:, :, order], first)
    np.testing.assert_allclose(raw2, raw[:, :, order], atol=1e-6)
    np.testing.assert_allclose(value2, value[:, :, order], atol=1e-6)


def test_ids_tell_agents_apart_and_id_alone_is_blind():
    s = shape()
    obs, _, first = data(s)
    same = jnp.broadcast_to(obs[:, :, :1], obs.shape)
    for mode in ("full+id", "id"):
        net = MODES[mode](s, Arch((7,)))
        params = noisy(net.init(jax.random.key(0)))
        _, raw, value = outputs(net, params, same, same, first)
        assert float(jnp.abs(raw[:, :, 0] - raw[:, :, 1]).max()) > 0.01
        assert float(jnp.abs(value[:, :, 0] - value[:, :, 1]).max()) > 0.01
        moved = outputs(net, params, same + 1, same + 1, first)[1]
        assert bool(jnp.allclose(moved, raw)) == (mode == "id")


def test_a_central_critic_without_ids_is_evaluated_once_for_all():
    s = shape(central=True)
    net = team.shared(s, Arch((7,)), with_id=False)
    params = noisy(net.init(jax.random.key(0)))
    obs, x, first = data(s)
    _, _, value = outputs(net, params, obs, x, first)
    np.testing.assert_array_equal(value, jnp.broadcast_to(value[..., :1], value.shape))
    assert net.carry(B)[1] == ()
    recurrent = team.shared(s, Arch((7,), gru=8), with_id=False)
    assert recurrent.carry(B)[1].shape == (B, 1, 8)
    # the batched products inside have one row for each of the T * B states, not A of them
    jaxpr = jax.make_jaxpr(lambda p: net.critic(p, (), x, first))(params)
    sizes = [e.outvars[0].aval.size for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert all(size <= T * B * 7 for size in sizes)


@pytest.mark.parametrize("mode", ["full", "none"])
def test_convolutions_read_images(mode):
    s = shape(obs=(5, 4, 2))
    net = MODES[mode](s, Arch((7,), network="cnn"))
    params = net.init(jax.random.key(0))
    obs, x, first = data(s)
    _, raw, value = jax.jit(lambda p: outputs(net, p, obs, x, first))(params)
    assert (raw.shape, value.shape) == ((T, B, A, N), (T, B, A))
    kernels = [p.shape for p in jax.tree.leaves(params["actor_torso"]) if p.ndim >= 4]
    assert len(kernels) == 3


def test_convolutions_of_the_actor_go_with_a_flat_central_state():
    s = shape(central=True, obs=(5, 4, 2))
    net = team.shared(s, Arch((7,), network="cnn"), with_id=False)
    params = net.init(jax.random.key(0))
    obs, x, first = data(s)
    assert outputs(net, params, obs, x, first)[2].shape == (T, B, A)
    assert not jax.tree.leaves(params["critic_torso"])
