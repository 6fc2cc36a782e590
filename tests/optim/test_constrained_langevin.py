"""Constrained Langevin dynamics: manifolds are kept, invariant laws are right, limits are the unconstrained ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import iv

import jaxstack
from jaxstack.core.errors import UserError
from jaxstack.nn.vision import zoo
from jaxstack.optim import constrained_langevin as cl

R = 0.7


@pytest.fixture
def x64():
    with jax.enable_x64():
        yield


def circle_point(count, seed=0, temperature=1.0):
    k_theta, k_p = jax.random.split(jax.random.key(seed))
    theta = jax.random.uniform(k_theta, (count,), jnp.float64, -R, R)
    return cl.start(k_p, theta, cl.Circle(R), temperature)


def test_the_circle_is_kept_over_many_steps(x64):
    steps = 5_000

    def body(at, key):
        k_grad, k_step = jax.random.split(key)
        g = jax.random.normal(k_grad, at.theta.shape, jnp.float64)
        return cl.ud_step(k_step, at, lambda _: g, 0.3, 1.0, 0.1, cl.Circle(R), "BAOA"), None

    run = jax.jit(lambda at: jax.lax.scan(body, at, jax.random.split(jax.random.key(1), steps))[0])
    at = run(circle_point(8))
    np.testing.assert_allclose(at.theta**2 + at.xi**2, R**2, rtol=1e-10)
    np.testing.assert_allclose(at.theta * at.p + at.xi * at.q, 0.0, atol=1e-12)


def test_drift_along_the_circle_is_reversible_and_keeps_the_energy(x64):
    at = circle_point(8)
    there = cl.circle_drift(at, 2.3, R)
    for a, b in zip(cl.circle_drift(there, -2.3, R), at):
        np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(there.p**2 + there.q**2, at.p**2 + at.q**2, rtol=1e-12)
    # the angle grows linearly
    angle = lambda point: jnp.arctan2(point.theta, point.xi)
    w = (at.xi * at.p - at.theta * at.q) / R**2
    np.testing.assert_allclose(jnp.exp(1j * angle(there)), jnp.exp(1j * (angle(at) + 2.3 * w)), atol=1e-12)
    kicked = cl.circle_kick(at, jnp.full(8, 0.5), 0.3, R)
    np.testing.assert_allclose(kicked.theta * kicked.p + kicked.xi * kicked.q, 0.0, atol=1e-14)


@pytest.mark.parametrize("overdamped", [False, True])
def test_the_law_on_a_circle_is_the_invariant_one(x64, overdamped):
    k, tau = 1.5, 0.3

    def samples(stiffness, h):
        gradient = lambda theta: stiffness * theta

        def body(at, key):
            if overdamped:
                return cl.od_step(key, at, gradient(at.theta), h, tau, cl.Circle(R)), None
            return cl.ud_step(key, at, gradient, h, 1.0, tau, cl.Circle(R), "BAOAB"), None

        keys = jax.random.split(jax.random.key(2), 300)
        return jax.jit(lambda at: jax.lax.scan(body, at, keys)[0])(circle_point(6_000, temperature=tau))

    h = 0.01 if overdamped else 0.15
    free = samples(0.0, h)
    np.testing.assert_allclose((free.theta**2).mean(), R**2 / 2, rtol=0.04)
    np.testing.assert_allclose((free.theta**4).mean(), 3 * R**4 / 8, rtol=0.06)
    if not overdamped:
        np.testing.assert_allclose((free.p**2 + free.q**2).mean(), tau, rtol=0.06)
    pulled = samples(k, h)
    x = k * R**2 / (4 * tau)
    # theta = r sin a, density exp(-k r^2 sin^2 a / (2 tau))
    np.testing.assert_allclose((1 - 2 * (pulled.theta / R) ** 2).mean(), iv(1, x) / iv(0, x), atol=0.03)


def test_a_large_circle_is_no_constraint(x64):
    theta, g = jnp.asarray([0.3, -0.2]), jnp.asarray([1.0, 2.0])
    wide, free = cl.Circle(1e4), None
    step = lambda kind, od: (
        cl.od_step(jax.random.key(1), cl.start(jax.random.key(0), theta, kind), g, 0.1, 0.0, kind)
        if od
        else cl.ud_step(jax.random.key(1), cl.start(jax.random.key(0), theta, kind), lambda _: g, 0.1, 1.0, 0.0, kind)
    )
    for od in (False, True):
        np.testing.assert_allclose(step(wide, od).theta, step(free, od).theta, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 6), (3, 3, 2, 5)])
def test_orthonormal_weights_stay_orthonormal(shape):
    kind = cl.Stiefel()
    theta = cl.stiefel_init(jax.random.key(0), shape)
    limits = {"w": kind}
    assert float(cl.violation({"w": theta}, limits)) < 1e-5

    def body(at, key):
        k_grad, k_step = jax.random.split(key)
        g = jax.random.normal(k_grad, shape)
        return cl.ud_step(k_step, at, lambda _: g, 0.05, 1.0, 0.01, kind), None

    keys = jax.random.split(jax.random.key(1), 1000)
    at = jax.jit(lambda at: jax.lax.scan(body, at, keys)[0])(cl.start(jax.random.key(2), theta, kind, 0.01))
    assert float(cl.violation({"w": at.theta}, limits)) < 1e-5
    assert np.abs(at.theta - theta).max() > 0.1
    q, p = cl._tall(at.theta), cl._tall(at.p)
    np.testing.assert_allclose(q.T @ p + p.T @ q, 0.0, atol=1e-4)
    # a step too large for the solver still ends on the manifold
    far = cl.stiefel_drift(at._replace(p=100 * at.p), 1.0)
    assert float(cl.violation({"w": far.theta}, limits)) < 1e-5


def test_the_tangent_projection_is_one():
    q = cl.stiefel_init(jax.random.key(0), (7, 3))
    p = cl.stiefel_project_tangent(q, jax.random.normal(jax.random.key(1), (7, 3)))
    np.testing.assert_allclose(cl.stiefel_project_tangent(q, p), p, atol=1e-6)
    np.testing.assert_allclose(q.T @ p, -(q.T @ p).T, atol=1e-6)
    free = q + 0.05 * p
    new = cl.stiefel_solve(free, q)
    inner = q.T @ (new - free)  # new = free + q Lambda
    np.testing.assert_allclose(inner, inner.T, atol=1e-5)
    np.testing.assert_allclose(q @ inner, new - free, atol=1e-5)


def test_a_linear_potential_ends_at_the_polar_factor(x64):
    a = jax.random.normal(jax.random.key(0), (4, 4), jnp.float64)
    # of the same determinant: no path leads from one to the other
    near = cl.polar(cl.polar(a) + 0.2 * jax.random.normal(jax.random.key(2), (4, 4)))
    assert jnp.linalg.det(near) * jnp.linalg.det(a) > 0
    assert jnp.abs(near - cl.polar(a)).max() > 0.1
    at = cl.start(jax.random.key(1), near, cl.Stiefel())
    body = lambda at, _: (cl.ud_step(jax.random.key(0), at, lambda q: -a, 0.1, 1.0, 0.0, cl.Stiefel()), None)
    at = jax.jit(lambda at: jax.lax.scan(body, at, None, length=2000)[0])(at)
    np.testing.assert_allclose(at.theta, cl.polar(a), atol=1e-6)


def test_the_overdamped_law_on_a_stiefel_circle_is_the_invariant_one():
    k, tau = 1.0, 0.5
    gradient = jnp.asarray([[-k], [0.0]])  # V = -k cos(angle)
    theta = jax.vmap(lambda key: cl.stiefel_init(key, (2, 1)))(jax.random.split(jax.random.key(0), 2000))
    step = jax.vmap(lambda key, x: cl.od_step(key, cl.Point(x, x), gradient, 0.02, tau, cl.Stiefel()).theta)
    body = lambda x, key: (step(jax.random.split(key, len(x)), x), None)
    keys = jax.random.split(jax.random.key(1), 300)
    x = jax.jit(lambda x: jax.lax.scan(body, x, keys)[0])(theta)
    np.testing.assert_allclose(x[:, 0, 0].mean(), iv(1, k / tau) / iv(0, k / tau), atol=0.04)


def test_without_noise_and_constraints_it_is_momentum():
    lr, momentum = 0.05, 0.9
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    loss = lambda p: jnp.sum(jnp.square(p["w"] - 0.2)) + jnp.sum(jnp.square(p["b"] + 1.0))
    free = lambda p: jax.tree.map(lambda x: None, p)
    ours, theirs = (
        cl.constrained_langevin(constraints=free, order="OBA", **cl.from_momentum(lr, momentum)),
        optax.sgd(lr, momentum),
    )

    def run(tx):
        def body(c, _):
            updates, state = tx.update(jax.grad(loss)(c[0]), c[1], c[0])
            return (optax.apply_updates(c[0], updates), state), None

        return jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), None, length=20)[0][0])()

    for a, b in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs))):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_first_layer_is_known_whatever_its_name():
    assert cl.entrance("digits", "mlp", (4,)) == "Dense_0/kernel"
    for model, path in (("wrn-10-1", "stem/kernel"), ("vgg-small", "conv0/kernel")):
        config = cl.Config(model=model, constraint="stiefel")
        model_of = zoo.model_of(config.data, config.model)
        params = jax.eval_shape(model_of.init, jax.random.key(0))["params"]
        limits = config.constraints(params)
        layer, _, name = path.partition("/")
        assert limits[layer][name] is None
        assert limits["Dense_0"]["kernel"] == cl.Stiefel()
    with pytest.raises(UserError, match="entrance='stem': expected one of w"):
        cl.by_shape({"w": jnp.ones((2, 2))}, circle=1.0, entrance="stem")


def test_constraints_by_shape_and_starting_points():
    params = {
        "Dense_0": {"bias": jnp.zeros(3), "kernel": jnp.full((4, 3), 9.0)},
        "Dense_1": {"kernel": jnp.ones((3, 2))},
    }
    limits = cl.by_shape(params, circle=0.5, first=0.2)
    assert limits == {"Dense_0": {"bias": None, "kernel": cl.Circle(0.2)}, "Dense_1": {"kernel": cl.Circle(0.5)}}
    inside = cl.on_manifold(jax.random.key(0), params, limits)
    assert float(cl.violation(inside, limits)) == 0.0
    assert float(cl.violation(params, limits)) == pytest.approx(44.0)
    assert len(np.unique(inside["Dense_0"]["kernel"])) == 12
    limits = cl.by_shape(params, stiefel=True)
    assert limits["Dense_0"]["kernel"] is None
    assert float(cl.violation(cl.on_manifold(jax.random.key(0), params, limits), limits)) < 1e-5


@pytest.mark.parametrize("options", [{}, dict(constraint="stiefel")])
def test_the_learner_learns_on_its_manifold(options):
    learner = jaxstack.make_learner(
        "weight-constrained-sgld", num_updates=80, hidden=(16,), temperature=1e-6, lr=0.1, **options
    )
    result = jaxstack.train(learner, seeds=2, progress=False)
    last = result.metrics[result.metrics.step == 80]
    assert (last["eval/accuracy"] > 0.6).all()
    worst = jax.vmap(lambda p: cl.violation(p, learner.config.constraints(p)))(result.state.params)
    assert (worst < 1e-4).all()
    # each seed has noise of its own
    keys = jax.random.key_data(result.state.opt_state.key)
    assert (keys[0] != keys[1]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(order="ABO"), "order='ABO': expected letters A, B and O, all B before the first A"),
        (dict(order="BAX"), "order='BAX'"),
        (dict(radius=0.0), "radius=0.0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(model="mlpp"), "model='mlpp': expected one of mlp"),
        (dict(constraint="sphere"), "constraint='sphere': expected one of 'circle'"),
    ],
)
def test_wrong_options_of_the_dynamics_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        jaxstack.make_learner("weight-constrained-sgld", **changes)


def test_two_kinds_of_constraint_at_once_are_refused():
    with pytest.raises(UserError, match="found circle and stiefel"):
        cl.by_shape({"w": jnp.ones((2, 2))}, circle=1.0, stiefel=True)
    tx = cl.constrained_langevin(0.1, lambda p: cl.by_shape(p, circle=1.0))
    params = {"w": jnp.zeros((2, 2))}
    with pytest.raises(UserError, match="expected params"):
        tx.update(params, tx.init(params))
