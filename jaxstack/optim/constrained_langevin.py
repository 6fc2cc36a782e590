"""Constrained Langevin dynamics (Leimkuhler, Vlaar, Pouchon and Storkey, "Better Training using Weight-Constrained
Stochastic Dynamics", ICML 2021).

Parameters move in the potential V, the loss of a minibatch, at temperature tau and friction gamma, on a manifold g = 0:

    (1) overdamped:  d theta = -grad V dt + sqrt(2 tau) dW - grad g d lambda
    (2) underdamped: d theta = p dt;  dp = (-grad V - gamma p) dt + sqrt(2 gamma tau) dW - grad g d mu

(2) is split into A (drift along geodesics), B (kick by the force's tangent part) and O (exact Ornstein-Uhlenbeck step,
then projection). Circle: each weight has a slack xi with theta^2 + xi^2 = r^2, so |theta| <= r. Stiefel: Q^T Q = I of a
matrix [rows, cols] with rows >= cols, Q Q^T = I of a wide one.

The paper's body could not be read: (2)'s splitting is that of the released code with its defects mended, (1) follows
the theory of constrained Langevin dynamics (Lelievre, Rousset and Stoltz, 2010).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require_at_least, require_positive
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.data import images
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.nn import optimisers
from jaxstack.nn.supervised import Model, accuracy, supervised
from jaxstack.nn.vision import zoo

# --- circle -----------------------------------------------------------------------------------------------------------


class Circle(NamedTuple):
    """|theta| <= radius for every entry of an array."""

    radius: float


class Point(NamedTuple):
    """A point of an array's phase space."""

    theta: Array
    p: Array
    """Momentum; unused by overdamped dynamics."""
    xi: Any = ()
    """Slack of a circle."""
    q: Any = ()
    """Momentum of the slack."""


def slack(theta: Array, radius: float) -> Array:
    """xi >= 0 with theta^2 + xi^2 = radius^2."""
    return jnp.sqrt(jnp.maximum(radius**2 - theta**2, 0.0))


def circle_drift(at: Point, s: Any, radius: float) -> Point:
    """A: rotate by the angle w s with w = (xi p - theta q) / r^2. Positions stay on the circle, momenta on its tangent,
    whatever the angle."""
    w = (at.xi * at.p - at.theta * at.q) / radius**2
    cos, sin = jnp.cos(w * s), jnp.sin(w * s)
    theta, xi = at.theta * cos + at.xi * sin, at.xi * cos - at.theta * sin
    return Point(theta, w * xi, xi, -w * theta)


def circle_kick(at: Point, gradient: Array, s: Any, radius: float) -> Point:
    """B: momenta change by the tangent part of the force (-gradient, 0)."""
    unit = at.theta / radius
    p = at.p - s * gradient * (1.0 - unit**2)
    return at._replace(p=p, q=at.q + s * gradient * unit * at.xi / radius)


def circle_tangent(at: Point, radius: float) -> Point:
    """Momenta without their radial part: theta p + xi q = 0."""
    radial = (at.theta * at.p + at.xi * at.q) / radius**2
    return at._replace(p=at.p - radial * at.theta, q=at.q - radial * at.xi)


def circle_overdamped(at: Point, gradient: Array, h: Any, radius: float, noise: tuple[Array, Array]) -> Point:
    """(1): an Euler-Maruyama step of (theta, xi), back to the circle along its radius; `noise` has the scale
    sqrt(2 tau h)."""
    theta, xi = at.theta - h * gradient + noise[0], at.xi + noise[1]
    scale = radius / jnp.sqrt(theta**2 + xi**2)
    return at._replace(theta=theta * scale, xi=xi * scale)


# --- Stiefel ----------------------------------------------------------------------------------------------------------


class Stiefel(NamedTuple):
    """Orthonormal columns (tall) or rows (wide) of an array as the matrix [product of the first axes, last axis]."""

    iterations: int = 10
    """Of the solver for the constraint."""


def _tall(x: Array) -> Array:
    """The array as a matrix [rows, cols] with rows >= cols."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _like(matrix: Array, x: Array) -> Array:
    """`_tall` backwards."""
    wide = x.size // x.shape[-1] < x.shape[-1]
    return (matrix.T if wide else matrix).reshape(x.shape)


def stiefel_project_tangent(q: Array, p: Array) -> Array:
    """Pi_Q(P) = P - Q (P^T Q + Q^T P) / 2, for Q [rows, cols] with Q^T Q = I."""
    across = q.T @ p
    return p - q @ (across + across.T) / 2


def stiefel_solve(free: Array, old: Array, iterations: int = 10) -> Array:
    """Find Q' = free + old Lambda, Lambda symmetric, with Q'^T Q' = I, by quasi-Newton iterations
    Q <- Q - old (Q^T Q - I) / 2. They converge where `free` is near `old`; else the polar factor of `free` is taken."""
    eye = jnp.eye(old.shape[1], dtype=old.dtype)
    found = jax.lax.fori_loop(0, iterations, lambda _, q: q - old @ (q.T @ q - eye) / 2, free)
    residual = jnp.abs(found.T @ found - eye).max()
    far = ~(residual < 1e-4)  # also where it is not finite
    return jax.lax.cond(far, lambda: polar(free), lambda: found)


def polar(matrix: Array) -> Array:
    """The nearest matrix with orthonormal columns, U V^T of the singular value decomposition."""
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def stiefel_init(key: Key, shape: tuple[int, ...]) -> Array:
    """A uniformly random array of orthonormal columns or rows."""
    x = jnp.zeros(shape, jnp.float32)
    q, r = jnp.linalg.qr(jax.random.normal(key, _tall(x).shape))
    return _like(q * jnp.sign(jnp.diagonal(r)), x)


def stiefel_drift(at: Point, s: Any, iterations: int = 10) -> Point:
    """A: a free step, back to the manifold along the normals of the old point; momenta follow."""
    q, p = _tall(at.theta), _tall(at.p)
    free = q + s * p
    new = stiefel_solve(free, q, iterations)
    p = stiefel_project_tangent(new, p + (new - free) / s)
    return at._replace(theta=_like(new, at.theta), p=_like(p, at.p))


def stiefel_tangent(at: Point) -> Point:
    """Momenta on the tangent space."""
    return at._replace(p=_like(stiefel_project_tangent(_tall(at.theta), _tall(at.p)), at.p))


def stiefel_overdamped(at: Point, gradient: Array, h: Any, noise: Array, iterations: int = 10) -> Point:
    """(1): a free Euler-Maruyama step, back to the manifold along the normals of the old point."""
    free = _tall(at.theta - h * gradient + noise)
    return at._replace(theta=_like(stiefel_solve(free, _tall(at.theta), iterations), at.theta))


# --- one step of an array ---------------------------------------------------------------------------------------------

Constraint = Circle | Stiefel | None


def start(key: Key, theta: Array, constraint: Constraint, temperature: Any = 0.0) -> Point:
    """Momenta of the temperature at a point that obeys the constraint, see `on_manifold`."""
    k_p, k_q = jax.random.split(key)
    scale = jnp.sqrt(jnp.asarray(temperature, theta.dtype))
    at = Point(theta, scale * jax.random.normal(k_p, theta.shape, theta.dtype))
    if isinstance(constraint, Circle):
        at = at._replace(xi=slack(theta, constraint.radius), q=scale * jax.random.normal(k_q, theta.shape, theta.dtype))
    return tangent(at, constraint)


def tangent(at: Point, constraint: Constraint) -> Point:
    """Momenta on the tangent space of the constraint."""
    if isinstance(constraint, Circle):
        return circle_tangent(at, constraint.radius)
    return at if constraint is None else stiefel_tangent(at)


def drift(at: Point, s: Any, constraint: Constraint) -> Point:
    """A."""
    if isinstance(constraint, Circle):
        return circle_drift(at, s, constraint.radius)
    return at._replace(theta=at.theta + s * at.p) if constraint is None else stiefel_drift(at, s, constraint.iterations)


def kick(at: Point, gradient: Array, s: Any, constraint: Constraint) -> Point:
    """B."""
    if isinstance(constraint, Circle):
        return circle_kick(at, gradient, s, constraint.radius)
    return tangent(at._replace(p=at.p - s * gradient), constraint)


def ou_step(key: Key, at: Point, s: Any, friction: Any, temperature: Any, constraint: Constraint) -> Point:
    """O: p <- c p + sqrt(tau (1 - c^2)) R with c = exp(-gamma s), then the tangent part."""
    c = jnp.exp(-friction * s)
    scale = jnp.sqrt(temperature * (1.0 - c**2))
    k_p, k_q = jax.random.split(key)
    noisy = lambda key, p: c * p + scale * jax.random.normal(key, p.shape, p.dtype)
    at = at._replace(p=noisy(k_p, at.p))
    at = at._replace(q=noisy(k_q, at.q)) if isinstance(constraint, Circle) else at
    return tangent(at, constraint)


def od_step(key: Key, at: Point, gradient: Array, h: Any, temperature: Any, constraint: Constraint) -> Point:
    """A step of (1)."""
    k_theta, k_xi = jax.random.split(key)
    scale = jnp.sqrt(2.0 * temperature * h)
    noise = scale * jax.random.normal(k_theta, at.theta.shape, at.theta.dtype)
    if isinstance(constraint, Circle):
        other = scale * jax.random.normal(k_xi, at.theta.shape, at.theta.dtype)
        return circle_overdamped(at, gradient, h, constraint.radius, (noise, other))
    if constraint is None:
        return at._replace(theta=at.theta - h * gradient + noise)
    return stiefel_overdamped(at, gradient, h, noise, constraint.iterations)


def ud_step(
    key: Key,
    at: Point,
    gradient: Callable[[Array], Array],
    h: Any,
    friction: Any,
    temperature: Any,
    constraint: Constraint,
    order: str = "OBA",
) -> Point:
    """A step of (2).

    Args:
        key: of the noise.
        at: a point on the manifold with tangent momenta.
        gradient: theta -> grad V; asked for at every B.
        h: step size.
        friction: gamma.
        temperature: tau.
        constraint: of the array.
        order: letters A, B and O; one that stands n times is a step of h / n each time.

    Returns:
        The next point.
    """
    part = {letter: h / order.count(letter) for letter in set(order)}
    for i, letter in enumerate(order):
        if letter == "A":
            at = drift(at, part[letter], constraint)
        elif letter == "B":
            at = kick(at, gradient(at.theta), part[letter], constraint)
        else:
            at = ou_step(jax.random.fold_in(key, i), at, part[letter], friction, temperature, constraint)
    return at


def on_manifold(key: Key, params: Any, constraints: Any) -> Any:
    """Parameters that obey their constraints: entries beyond a circle's radius are drawn anew inside it, constrained
    matrices become random orthonormal ones.

    Args:
        key: of the draws.
        params: a tree of arrays.
        constraints: a tree of the same structure, see `by_shape`.

    Returns:
        The tree.
    """
    leaves, structure = jax.tree.flatten(params)
    kinds = structure.flatten_up_to(constraints)

    def one(key: Key, x: Array, kind: Constraint) -> Array:
        if isinstance(kind, Circle):
            inside = jax.random.uniform(key, x.shape, x.dtype, -kind.radius, kind.radius)
            return jnp.where(jnp.abs(x) < kind.radius, x, inside)
        return x if kind is None else stiefel_init(key, x.shape).astype(x.dtype)

    keys = jax.random.split(key, max(len(leaves), 1))
    return structure.unflatten([one(k, x, kind) for k, x, kind in zip(keys, leaves, kinds)])


def violation(params: Any, constraints: Any) -> Array:
    """How far parameters are from their constraints: the largest max(|theta| / r - 1, 0) and |Q^T Q - I|."""
    leaves, structure = jax.tree.flatten(params)
    found = [jnp.float32(0)]
    for x, kind in zip(leaves, structure.flatten_up_to(constraints)):
        if isinstance(kind, Circle):
            found.append(jnp.maximum(jnp.abs(x).max() / kind.radius - 1.0, 0.0))
        elif kind is not None:
            q = _tall(x)
            found.append(jnp.abs(q.T @ q - jnp.eye(q.shape[1])).max())
    return jnp.stack(found).max()


# --- optax ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Of the optimiser."""

    key: Key
    step: Array
    points: tuple[Point, ...]
    """Of each array; theta is left empty, as the parameters have it."""


def constrained_langevin(
    step_size: Any,
    constraints: Callable[[Any], Any],
    *,
    friction: Any = 1.0,
    temperature: Any = 0.0,
    order: str = "BAOA",
    overdamped: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Constrained Langevin dynamics as an optax transformation.

    Args:
        step_size: h, or step -> h.
        constraints: parameters -> a tree of `Circle`, `Stiefel` or None (unconstrained), one per array.
        friction: gamma of (2).
        temperature: tau.
        order: of (2). There is one gradient per step, at its beginning, so all B stand before the first A.
        overdamped: (1) instead of (2).
        seed: of the noise. Its stream also depends on the initial parameters, so that vmapped seeds differ.

    Returns:
        The transformation; `updates` are differences of parameters. Initial parameters must obey the constraints, see
        `on_manifold`.

    Raises:
        UserError: for an order with other letters, or a B behind an A.

    Example:
        limits = lambda params: by_shape(params, circle=0.1)
        tx = constrained_langevin(0.1, limits, friction=1.0, temperature=1e-5)
    """
    if set(order) != set("ABO") or "B" in order[order.index("A") :]:
        raise UserError(f"order={order!r}: expected letters A, B and O, all B before the first A")
    rate = step_size if callable(step_size) else lambda step: step_size

    def init(params: Any) -> State:
        leaves, structure = jax.tree.flatten(params)
        kinds = structure.flatten_up_to(constraints(params))
        mark = sum(jax.lax.bitcast_convert_type(x.astype(jnp.float32).sum(), jnp.uint32) for x in leaves)
        key, k_start = jax.random.split(jax.random.fold_in(jax.random.key(seed), mark))
        keys = jax.random.split(k_start, max(len(leaves), 1))
        points = [start(k, x, kind, temperature)._replace(theta=()) for k, x, kind in zip(keys, leaves, kinds)]
        return State(key, jnp.int32(0), tuple(points))

    def update(grads: Any, state: State, params: Any = None) -> tuple[Any, State]:
        if params is None:
            raise UserError("constrained_langevin: expected params in update")
        leaves, structure = jax.tree.flatten(params)
        kinds = structure.flatten_up_to(constraints(params))
        key, k_step = jax.random.split(state.key)
        h = rate(state.step)
        new = []
        for i, (x, g, kind, point) in enumerate(zip(leaves, structure.flatten_up_to(grads), kinds, state.points)):
            k, at = jax.random.fold_in(k_step, i), point._replace(theta=x)
            if overdamped:
                new.append(od_step(k, at, g, h, temperature, kind))
            else:
                new.append(ud_step(k, at, lambda _, g=g: g, h, friction, temperature, kind, order))
        updates = structure.unflatten([point.theta - x for point, x in zip(new, leaves)])
        return updates, State(key, state.step + 1, tuple(point._replace(theta=()) for point in new))

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def by_shape(
    params: Any,
    *,
    circle: float | None = None,
    first: float | None = None,
    stiefel: bool = False,
    entrance: str = "",
) -> Any:
    """Constraints of the usual kind: biases and normalisation are free.

    Args:
        params: a tree of arrays, those of two or more axes being weights.
        circle: radius of weights.
        first: radius of the first layer's weights; default: `circle`.
        stiefel: orthonormal weights, those of the first layer free.
        entrance: path of the first layer's weights, as "stem/kernel"; default: the first weights in the tree's order,
            which is that of the layers where their names sort so.

    Returns:
        A tree of the same structure for `constrained_langevin`.

    Raises:
        UserError: for both kinds at once, and an `entrance` that is no path of weights.
    """
    if stiefel and circle is not None:
        raise UserError("by_shape: found circle and stiefel, expected one of them")
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in _paths(params)}
    weights = [name for name, x in named.items() if x.ndim >= 2]
    entrance = entrance or next(iter(weights), "")
    if weights and entrance not in weights:
        raise UserError(f"entrance={entrance!r}: expected one of {', '.join(weights)}")

    def one(name: str) -> Constraint:
        if name not in weights:
            return None
        if stiefel:
            return None if name == entrance else Stiefel()
        radius = first if name == entrance and first is not None else circle
        return None if radius is None else Circle(radius)

    return jax.tree.structure(params).unflatten([one(name) for name in named])


_paths = jax.tree_util.tree_leaves_with_path


def from_momentum(lr: float, momentum: float) -> dict[str, float]:
    """Step size and friction of (2) that equal SGD's P <- momentum P - grad, theta <- theta + lr P: h = sqrt(lr) and
    gamma = -log(momentum) / h."""
    h = lr**0.5
    return {"step_size": h, "friction": float(-jnp.log(momentum)) / h}


# --- the learner ------------------------------------------------------------------------------------------------------


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 0.1
    """Step size h."""
    friction: float = 1.0
    """gamma."""
    temperature: float = 0.0
    """tau."""


@dataclass(frozen=True)
class Config(configs.Config):
    """A classifier of images trained by constrained Langevin dynamics."""

    data: str = "digits"
    """digits, mnist-5k or fashion-mnist; NAME=PATH for files of one's own."""
    train_images: int = 0
    """Use so many training images; 0: all."""
    model: str = "mlp"
    """mlp, or a convolutional network as `jaxstack train classifier --model` names them."""
    hidden: tuple[int, ...] = (128,)
    """Of mlp."""
    constraint: Literal["circle", "stiefel", "none"] = "circle"
    """circle: |weight| <= radius; stiefel: orthonormal weights of all layers but the first. Biases are free."""
    radius: float = 0.5
    first_radius: float = 0.25
    """Of the first layer's weights."""
    dynamics: Literal["underdamped", "overdamped"] = "underdamped"
    order: str = "BAOA"
    """Of the underdamped steps."""
    schedule: optimisers.Schedule = "constant"
    batch_size: int = 64
    num_updates: int = 1000
    split_seed: int = 0
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "batch_size", "num_updates")
        require_at_least(self, 0, "train_images", "split_seed", "hypers.lr", "hypers.temperature", "hypers.friction")
        require_positive(self, "radius", "first_radius")
        images.class_facts(self.data)
        zoo.check_model(self)
        constrained_langevin(0.1, lambda params: params, order=self.order)

    def constraints(self, params: Any) -> Any:
        """Of each array of the network."""
        if self.constraint == "none":
            return by_shape(params)
        of = entrance(self.data, self.model, self.hidden)
        if self.constraint == "stiefel":
            return by_shape(params, stiefel=True, entrance=of)
        return by_shape(params, circle=self.radius, first=self.first_radius, entrance=of)


class Dynamics(NamedTuple):
    """The optimiser as the supervised learner takes it."""

    config: Config

    def rate(self, hypers: Hypers, step: Any, num_steps: Any) -> Array:
        """Step size of a step, from 0."""
        return optimisers.learning_rate(self.config.schedule, step, num_steps, hypers.lr)

    def make(self, hypers: Hypers, num_steps: Any) -> optax.GradientTransformation:
        """The transformation."""
        c = self.config
        return constrained_langevin(
            lambda step: self.rate(hypers, step, num_steps),
            c.constraints,
            friction=hypers.friction,
            temperature=hypers.temperature,
            order=c.order,
            overdamped=c.dynamics == "overdamped",
        )


def model_of(config: Config) -> Model:
    """The network of a config, whose initial weights obey the constraints."""
    model = zoo.model_of(config.data, config.model, config.hidden)

    def init(key: Key) -> Any:
        variables = dict(model.init(key))
        kinds = config.constraints(variables["params"])
        return variables | {"params": on_manifold(jax.random.fold_in(key, 1), variables["params"], kinds)}

    return model._replace(init=init)


@functools.lru_cache(64)
def entrance(data: str, name: str, hidden: tuple[int, ...]) -> str:
    """The path of the first layer's weights: flax makes parameters in the order of its layers; trees sort them."""
    found = []

    def first(tree: Any, path: str = "") -> str:
        inner = ((f"{path}/{k}".lstrip("/"), v) for k, v in tree.items())
        return next(filter(None, (first(v, k) if isinstance(v, dict) else k * (v.ndim > 1) for k, v in inner)), "")

    model = zoo.model_of(data, name, hidden)
    jax.eval_shape(lambda key: found.append(first(model.init(key)["params"])), jax.random.key(0))
    return found[0]


def source(config: Config) -> ArrayData:
    """Training batches, in shuffled epochs of each seed's own."""
    arrays = images.part(config.data, "train", config.split_seed, config.train_images)
    return ArrayData(arrays, config.batch_size, per_seed=True)


def eval_source(config: Config) -> SplitData:
    """The validation part, once."""
    return SplitData(images.part(config.data, "valid", config.split_seed), 256)


def loss(logits: Array, labels: Array, hypers: Any) -> Array:
    """Cross entropy in nats [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def weight_constrained_sgld(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    return supervised(
        model_of(config),
        loss,
        {"accuracy": accuracy},
        Dynamics(config),  # pyright: ignore[reportArgumentType]
        num_steps=config.num_updates,
        hypers=config.hypers,
        config=config,
        name="weight-constrained-sgld",
        batch_size=config.batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/accuracy", "max"),
    )
