"""Ensembles of dynamics models (Chua et al., 2018; Janner et al., 2019): each member gives a normal distribution of
the change of the state and the reward.

The unit of learning is a fit call: a random part of the data, members trained on bootstrapped rows of it, stopped when
no member gets better on what was held out. Fit calls follow each other until the error on all data stays. Units of
observations are the caller's; inputs are standardised here. float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxstack.nn.ensembles import Net, forward

LOW, HIGH = -10.0, 0.5
"""Where the trained bounds of the log-variance begin."""
BOUNDS_WEIGHT = 0.01
"""Of sum(high) - sum(low) in the loss."""
DECAY = 1e-5
"""L2 of all parameters, added to their gradients before Adam."""
GAIN = 0.01
"""Share by which an error must fall to count as better."""
MINIBATCH = 512
BLOCK = 4096
"""Rows whose errors are computed at once."""


class Rows(NamedTuple):
    """Transitions; the first so many are valid, see `fit`."""

    obs: Array
    """[N, S]"""
    action: Array
    """[N, A]"""
    reward: Array
    """[N]"""
    next_obs: Array
    """[N, S]"""

    @property
    def inputs(self) -> Array:
        """[N, S + A]"""
        return jnp.concatenate([self.obs, self.action], -1)

    @property
    def outputs(self) -> Array:
        """[N, S + 1], changes of the state and rewards"""
        return jnp.concatenate([self.next_obs - self.obs, self.reward[..., None]], -1)


class Model(NamedTuple):
    """What is learned."""

    params: Any
    """{"net" with a leading axis of members, "low", "high" [S + 1]}"""
    opt_state: Any
    elites: Array
    """[E] int32, the members of lowest held-out error, best first"""
    mean: Array
    """[S + A] by which inputs are standardised"""
    std: Array


class Progress(NamedTuple):
    """Of a fit, which ends when it does not improve."""

    best: Array
    """Lowest mean squared error over all data, of members and outputs"""
    since: Array
    """int32, fit calls since then"""
    calls: Array
    """int32, all fit calls"""


def begin() -> Progress:
    """Before the first fit call."""
    return Progress(jnp.float32(jnp.finfo(jnp.float32).max), jnp.int32(0), jnp.int32(0))


def soft_clamp(x: Array, low: Array | float, high: Array | float) -> Array:
    """Bring x above low and below high smoothly, with slopes that never vanish (Chua et al., 2018, appendix A.1).

    The result lies in (low, low + softplus(high - low)): above `high` by at most log(1 + exp(low - high)), which is
    3e-5 where the trained bounds begin and matters only where training brings them together.
    """
    x = high - jax.nn.softplus(high - x)
    return low + jax.nn.softplus(x - low)


def nll(mean: Array, logvar: Array, target: Array, low: Array, high: Array) -> Float[Array, ""]:
    """Return sum_k mean_{b,d}[(mu - y)^2 exp(-l) + l] + 0.01 (sum high - sum low).

    Args:
        mean: [K, B, D].
        logvar: [K, B, D], clamped.
        target: [K, B, D] or [B, D].
        low: [D], trained bounds of the log-variance.
        high: [D].
    """
    each = jnp.square(mean - target) * jnp.exp(-logvar) + logvar
    return each.mean((1, 2)).sum() + BOUNDS_WEIGHT * (high.sum() - low.sum())


def disagreement(mean: Float[Array, "K B D"]) -> Float[Array, " B"]:
    """Return the mean over members of |mu_k - mean mu|, the distance of each prediction from their mean."""
    square = jnp.square(mean - mean.mean(0)).sum(-1)
    # the slope of a square root at 0 is infinite, and a single member never disagrees
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0).mean(0)


class Dynamics(NamedTuple):
    """Static: an ensemble of networks [s, a] -> means and log-variances of [s' - s, r]."""

    obs_size: int
    action_size: int
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    members: int = 7
    num_elites: int = 5
    lr: float = 1e-3

    @property
    def net(self) -> Net:
        """One member."""
        return Net(self.hidden, 2 * (self.obs_size + 1), activation="elu")

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """Adam with L2 in the gradient."""
        return optax.chain(optax.add_decayed_weights(DECAY), optax.adam(self.lr))

    def init(self, key: Array) -> Model:
        """Fresh members; the first are the elites."""
        inputs, out = self.obs_size + self.action_size, self.obs_size + 1
        one = lambda k: self.net.init(k, jnp.zeros((1, inputs), jnp.float32))["params"]
        params = {
            "net": jax.vmap(one)(jax.random.split(key, self.members)),
            "low": jnp.full(out, LOW, jnp.float32),
            "high": jnp.full(out, HIGH, jnp.float32),
        }
        elites = jnp.arange(self.num_elites, dtype=jnp.int32)
        zero, unit = jnp.zeros(inputs, jnp.float32), jnp.ones(inputs, jnp.float32)
        return Model(params, self.optimiser.init(params), elites, zero, unit)

    def outputs(self, params: Any, x: Array) -> tuple[Array, Array]:
        """Means and log-variances [K, B, S + 1] for standardised inputs [B, D], or [K, B, D] of each member."""
        run = lambda p, x: forward(self.net, p, x)
        raw = jax.vmap(run, (0, 0 if x.ndim == 3 else None))(params["net"], x)
        mean, logvar = jnp.split(raw, 2, axis=-1)
        return mean, soft_clamp(logvar, params["low"], params["high"])

    def predict(self, model: Model, obs: Array, action: Array) -> tuple[Array, Array]:
        """Means and log-variances [K, B, S + 1] of [s' - s, r] from all members, for obs [B, S] and action [B, A]."""
        x = (jnp.concatenate([obs, action], -1) - model.mean) / model.std
        return self.outputs(model.params, x)

    def elite(self, model: Model, index: Array) -> Any:
        """Parameters of one elite, number `index` [] of `num_elites`, for `advance`."""
        return jax.tree.map(lambda x: x[model.elites[index]], model.params["net"])

    def advance(self, model: Model, member: Any, obs: Array, action: Array) -> Array:
        """The mean next state [B, S] of one member."""
        x = (jnp.concatenate([obs, action], -1) - model.mean) / model.std
        return obs + forward(self.net, member, x)[:, : self.obs_size]


def scaler(rows: Rows, count: Array) -> tuple[Array, Array]:
    """Mean and deviation [S + A] of the inputs of the first `count` rows; a deviation below 1e-12 counts as 1."""
    valid = (jnp.arange(len(rows.reward)) < count)[:, None]
    x = jnp.where(valid, rows.inputs, 0.0)
    mean = x.sum(0) / count
    var = jnp.where(valid, jnp.square(x - mean), 0.0).sum(0) / count
    std = jnp.sqrt(var)
    return mean, jnp.where(std < 1e-12, 1.0, std)


def split(key: Array, total: int, count: Array | int, batch: int) -> tuple[Array, Array]:
    """Draw 10 `batch` distinct rows among the first `count` of `total`.

    Where there are fewer, rows come again, but no row is both held out and learned from, unless there is only one.

    Returns:
        Numbers of the rows that are held out [0.2 batch], at most a fifth of all, and of those to learn from.
    """
    valid = jnp.arange(total) < count
    order = jnp.argsort(jnp.where(valid, jax.random.uniform(key, (total,), jnp.float32), 2.0))
    most = max(1, batch // 5)
    few = jnp.clip(count // 5, 1, most)
    held = order[jnp.arange(most) % few]
    learned = order[(few + jnp.arange(10 * batch - most) % jnp.maximum(count - few, 1)) % count]
    return held, learned


def fit_call(
    dyn: Dynamics, model: Model, rows: Rows, count: Array, key: Array, *, batch: int = 256, patience: int = 10
) -> tuple[Model, Array]:
    """Train on 10 `batch` random rows, of which 0.2 `batch` are held out, until no member's held-out error fell by more
    than 1 % for `patience` epochs. See `split`.

    Args:
        dyn: the ensemble.
        model: what was learned so far; its scaler stays.
        rows: transitions [N, ...].
        count: [] how many of them are valid.
        key: of what is drawn.
        batch: as above.
        patience: epochs.

    Returns:
        The model, its elites chosen by the held-out errors, and the number of epochs.
    """
    k_rows, k_boot, k_epochs = jax.random.split(key, 3)
    held, learned = split(k_rows, len(rows.reward), count, batch)
    train = len(learned)
    size = min(MINIBATCH, train)
    # bootstrapped rows of each member
    own = learned[jax.random.randint(k_boot, (dyn.members, train), 0, train)]
    inputs, targets = (rows.inputs - model.mean) / model.std, rows.outputs
    test_x, test_y = inputs[held], targets[held]

    def loss(params: Any, x: Array, y: Array) -> Array:
        mean, logvar = dyn.outputs(params, x)
        return nll(mean, logvar, y, params["low"], params["high"])

    def minibatch(c: tuple, at: Array) -> tuple[tuple, None]:
        params, opt_state = c
        grads = jax.grad(loss)(params, inputs[at], targets[at])
        updates, opt_state = dyn.optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(c: tuple) -> tuple:
        params, opt_state, best, since, number = c
        order = jax.random.permutation(jax.random.fold_in(k_epochs, number), own, axis=1, independent=True)
        # what does not fill a minibatch waits for another order
        steps = order[:, : train // size * size].reshape(dyn.members, -1, size).swapaxes(0, 1)
        (params, opt_state), _ = jax.lax.scan(minibatch, (params, opt_state), steps)
        error = jnp.square(dyn.outputs(params, test_x)[0] - test_y).mean((1, 2))
        better = error < best * (1.0 - GAIN)
        since = jnp.where(better.any(), 0, since + 1)
        return params, opt_state, jnp.where(better, error, best), since, number + 1

    worst = jnp.full(dyn.members, jnp.finfo(jnp.float32).max, jnp.float32)
    start = (model.params, model.opt_state, worst, jnp.int32(0), jnp.int32(0))
    params, opt_state, _, _, epochs = jax.lax.while_loop(lambda c: c[3] < patience, epoch, start)
    error = jnp.square(dyn.outputs(params, test_x)[0] - test_y).mean((1, 2))
    elites = jnp.argsort(error)[: dyn.num_elites].astype(jnp.int32)
    return model._replace(params=params, opt_state=opt_state, elites=elites), epochs


def error_of(dyn: Dynamics, model: Model, rows: Rows, count: Array) -> Float[Array, ""]:
    """Mean squared error of the first `count` rows, over members and outputs."""
    total = len(rows.reward)
    pad = -total % min(BLOCK, total)
    blocks = lambda x: jnp.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1))).reshape(-1, min(BLOCK, total), *x.shape[1:])
    valid = jnp.arange(total) < count
    x, y = (rows.inputs - model.mean) / model.std, rows.outputs

    def block(c: tuple) -> Array:
        x, y, valid = c
        error = jnp.square(dyn.outputs(model.params, x)[0] - y).mean((0, 2))
        return jnp.where(valid, error, 0.0).sum()

    return jax.lax.map(block, (blocks(x), blocks(y), blocks(valid))).sum() / count


def fit(
    dyn: Dynamics,
    model: Model,
    rows: Rows,
    count: Array,
    key: Array,
    progress: Progress,
    *,
    patience: int,
    max_calls: Array | int,
    batch: int = 256,
) -> tuple[Model, Progress]:
    """Standardise by the data and repeat fit calls until the error on all of it has not fallen for `patience` of them.

    A fit may be made in parts: with the same data and key, and the progress of the last part, it continues where that
    ended.

    Args:
        dyn: the ensemble.
        model: what was learned so far.
        rows: transitions [N, ...].
        count: [] how many of them, from the first, are valid.
        key: of what is drawn.
        progress: `begin()`, or what the last part returned.
        patience: fit calls.
        max_calls: the most of them, with those of earlier parts.
        batch: of `fit_call`.
    """
    mean, std = scaler(rows, count)

    def more(c: tuple[Model, Progress]) -> Array:
        return (c[1].since < patience) & (c[1].calls < max_calls)

    def call(c: tuple[Model, Progress]) -> tuple[Model, Progress]:
        model, p = c
        model, _ = fit_call(dyn, model, rows, count, jax.random.fold_in(key, p.calls), batch=batch)
        error = error_of(dyn, model, rows, count)
        since = jnp.where(error < p.best, 0, p.since + 1)
        return model, Progress(jnp.minimum(p.best, error), since, p.calls + 1)

    return jax.lax.while_loop(more, call, (model._replace(mean=mean, std=std), progress))


class Imagined(NamedTuple):
    """Transitions of a model [h, N, ...]."""

    rows: Rows
    terminated: Bool[Array, "h N"]
    valid: Bool[Array, "h N"]
    """False behind a predicted end."""


def imagine(
    dyn: Dynamics,
    model: Model,
    act: Callable[[Array, Array], Array],
    ends: Callable[[Array], Array],
    starts: Float[Array, "N S"],
    horizon: int,
    key: Array,
    penalty: Array | float = 0.0,
) -> Imagined:
    """Roll a policy out in the model: a random elite for each transition, next states and rewards sampled.

    Args:
        dyn: the ensemble.
        model: what it learned.
        act: (observations [N, S], key) -> actions [N, A].
        ends: next observations [N, S] -> [N] bool, whether the task ends there.
        starts: [N, S].
        horizon: steps.
        key: of what is drawn.
        penalty: weight of the disagreement of all members, taken from the rewards.
    """
    count = len(starts)

    def step(c: tuple, key: Array) -> tuple[tuple, Imagined]:
        obs, alive = c
        k_act, k_elite, k_noise = jax.random.split(key, 3)
        action = act(obs, k_act)
        mean, logvar = dyn.predict(model, obs, action)
        member = model.elites[jax.random.randint(k_elite, (count,), 0, dyn.num_elites)]
        pick = lambda x: jnp.take_along_axis(x, member[None, :, None], 0)[0]
        z = jax.random.normal(k_noise, (count, dyn.obs_size + 1), jnp.float32)
        change = pick(mean) + jnp.exp(0.5 * pick(logvar)) * z
        after = obs + change[:, : dyn.obs_size]
        reward = change[:, dyn.obs_size] - penalty * disagreement(mean)
        end = ends(after)
        return (after, alive & ~end), Imagined(Rows(obs, action, reward, after), end, alive)

    return jax.lax.scan(step, (starts, jnp.ones(count, bool)), jax.random.split(key, horizon))[1]
