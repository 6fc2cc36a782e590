"""Tasks of state tracking: what matters is a state that every token changes.

    parity, modular_arithmetic
                  Deletang et al. (2023), "Neural networks and the Chomsky hierarchy"
    group         word problems of finite groups, Merrill et al. (2024), "The illusion of state"
    dyck          brackets of bounded depth, Hewitt et al. (2020)
    tracking      a noisy random walk whose optimal filter is known in closed form

See tasks.py for what a task offers.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import require, require_at_least, require_unit
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key
from jaxstack.sequence.tasks import Batch, Task, scored


@dataclass(frozen=True)
class Parity(Task):
    """Bits; the parity of all bits so far, at every position or, without `dense`, at a last END token (2) alone."""

    length: int = 40
    dense: bool = True

    @property
    def num_tokens(self) -> int:
        return 2 if self.dense else 3

    @property
    def num_targets(self) -> int:
        return 2

    def example(self, key: Key, test: bool) -> Batch:
        bits = jax.random.bernoulli(key, 0.5, (self.length,)).astype(jnp.int32)
        if self.dense:
            return scored(bits, jnp.cumsum(bits) % 2, jnp.ones(self.length, bool))
        last = jnp.arange(self.length) == self.length - 1
        return scored(jnp.where(last, 2, bits), jnp.full(self.length, bits[:-1].sum() % 2), last)


@dataclass(frozen=True)
class ModularArithmetic(Task):
    """digit op digit op ... digit =; the value modulo m at "=", * before + and -.

    Tokens: digits 0..m-1, then +, -, *, =. T/2 digits.
    """

    length: int = 40
    modulus: int = 5

    @property
    def num_tokens(self) -> int:
        return self.modulus + 4

    @property
    def num_targets(self) -> int:
        return self.modulus

    def validate(self) -> None:
        require_at_least(self, 2, "modulus")
        require(self, "length", self.length >= 2 and self.length % 2 == 0, "an even number >= 2")

    def example(self, key: Key, test: bool) -> Batch:
        k_digits, k_ops = jax.random.split(key)
        m, n = self.modulus, self.length // 2
        digits = jax.random.randint(k_digits, (n,), 0, m)
        ops = jax.random.randint(k_ops, (n,), 0, 3).at[-1].set(3)

        def step(carry: tuple[Array, Array], x: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            total, term = carry
            op, digit = x
            done = (total + term) % m
            signed = jnp.where(op == 0, digit, -digit) % m
            times = op == 2
            return (jnp.where(times, total, done), jnp.where(times, term * digit % m, signed)), None

        (total, term), _ = jax.lax.scan(step, (jnp.zeros((), digits.dtype), digits[0]), (ops[:-1], digits[1:]))
        tokens = jnp.stack([digits, m + ops], 1).reshape(-1)
        last = jnp.arange(self.length) == self.length - 1
        return scored(tokens, jnp.full(self.length, (total + term) % m), last)


@functools.lru_cache(maxsize=16)
def group_table(name: str) -> np.ndarray:
    """[n, n] int32, entry [a, b] = a o b, the identity is 0.

    S<n>, A<n> (n <= 6): permutations in lexicographic order, (a o b)(i) = a(b(i)); Z<n>: addition modulo n; products
    as "A4xZ5". Raises `UserError` for other names.
    """
    if "x" in name:
        left, right = (group_table(part) for part in name.split("x", 1))
        n, m = len(left), len(right)
        out = (left[:, None, :, None] * m + right[None, :, None, :]).reshape(n * m, n * m)
    else:
        kind, size = name[:1], int(name[1:]) if name[1:].isdigit() else 0
        if kind == "Z" and 1 <= size <= 4096:
            out = np.add.outer(np.arange(size), np.arange(size)) % size
        elif kind in ("S", "A") and kind and 2 <= size <= 6:
            members = [p for p in itertools.permutations(range(size)) if kind == "S" or _even(p)]
            index = {p: i for i, p in enumerate(members)}
            out = np.array([[index[tuple(a[i] for i in b)] for b in members] for a in members])
        else:
            raise UserError(f"group={name!r}: expected S2..S6, A2..A6, Z<n> or a product such as A4xZ5")
    out = out.astype(np.int32)
    out.flags.writeable = False
    return out


def _even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


@dataclass(frozen=True)
class Group(Task):
    """Word problem: tokens are elements of a finite group, the target is the product so far, y_t = y_{t-1} o x_t.

    A5 and S5 are not solvable: composing them is complete for NC1 (Barrington, 1989), which constant-depth linear
    recurrences and attention do not reach; Z<n>, S3 and A4 are solvable.
    """

    length: int = 16
    group: str = "A5"
    """See `group_table`."""

    @property
    def num_tokens(self) -> int:
        return len(group_table(self.group))

    def validate(self) -> None:
        require_at_least(self, 1, "length")
        group_table(self.group)

    def example(self, key: Key, test: bool) -> Batch:
        table = jnp.asarray(group_table(self.group))
        tokens = jax.random.randint(key, (self.length,), 0, len(table))

        def step(y: Array, x: Array) -> tuple[Array, Array]:
            y = table[y, x]
            return y, y

        _, products = jax.lax.scan(step, jnp.zeros((), jnp.int32), tokens)
        return scored(tokens, products, jnp.ones(self.length, bool))


@dataclass(frozen=True)
class Dyck(Task):
    """Well-formed brackets of `kinds` types nested at most `depth` deep; the target is the type that may close next
    (`kinds` where nothing is open).

    Opening i is token i, closing i is kinds + i. At each step open or close with equal chance where both are possible;
    the string ends with everything closed.
    """

    kinds: int = 2
    depth: int = 8

    @property
    def num_tokens(self) -> int:
        return 2 * self.kinds

    @property
    def num_targets(self) -> int:
        return self.kinds + 1

    def validate(self) -> None:
        require_at_least(self, 1, "kinds", "depth")
        require(self, "length", self.length >= 2 and self.length % 2 == 0, "an even number >= 2")

    def example(self, key: Key, test: bool) -> Batch:
        k_type, k_coin = jax.random.split(key)
        types = jax.random.randint(k_type, (self.length,), 0, self.kinds)
        coins = jax.random.bernoulli(k_coin, 0.5, (self.length,))
        left = self.length - jnp.arange(self.length)

        def step(carry: tuple[Array, Array], x: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            stack, open_ = carry
            kind, coin, remaining = x
            opens = (open_ == 0) | (coin & (open_ < self.depth) & (open_ < remaining))
            token = jnp.where(opens, kind, self.kinds + stack[open_ - 1])
            stack = stack.at[jnp.where(opens, open_, self.depth)].set(kind, mode="drop")
            open_ = jnp.where(opens, open_ + 1, open_ - 1)
            return (stack, open_), (token, jnp.where(open_ == 0, self.kinds, stack[open_ - 1]))

        start = (jnp.zeros(self.depth, types.dtype), jnp.zeros((), jnp.int32))
        _, (tokens, tops) = jax.lax.scan(step, start, (types, coins, left))
        return scored(tokens, tops, jnp.ones(self.length, bool))


# ---------------------------------------------------------------- real inputs


@dataclass(frozen=True)
class Tracking(Task):
    """x_t = decay x_{t-1} + N(0, drift^2), seen as y_t = x_t + N(0, r_t^2); the target is x_t.

    r_t is `fine` or `coarse` with equal chance and the inputs are (y_t, [r_t coarse], [r_t fine]); x_0 is one
    transition from N(0, 1). The optimum is the Kalman filter, `optimal`.
    """

    decay: float = 0.98
    drift: float = 0.2
    fine: float = 0.1
    coarse: float = 2.0
    num_inputs: ClassVar[int] = 3

    @property
    def num_tokens(self) -> int:
        return 0

    @property
    def num_targets(self) -> int:
        return 0

    def validate(self) -> None:
        super().validate()
        require_unit(self, "decay")
        require_at_least(self, 0, "drift")
        require(self, "fine", self.fine > 0, "a number > 0")
        require(self, "coarse", self.fine <= self.coarse, f"at least fine={self.fine}")

    def example(self, key: Key, test: bool) -> Batch:
        k_first, k_drift, k_kind, k_noise = jax.random.split(key, 4)
        steps = self.drift * jax.random.normal(k_drift, (self.length,))
        advance = lambda x, e: (self.decay * x + e,) * 2
        _, x = jax.lax.scan(advance, jax.random.normal(k_first), steps)
        coarse = jax.random.bernoulli(k_kind, 0.5, (self.length,))
        y = x + jnp.where(coarse, self.coarse, self.fine) * jax.random.normal(k_noise, (self.length,))
        inputs = jnp.stack([y, coarse.astype(y.dtype), 1.0 - coarse], -1)
        return Batch(inputs, x, jnp.ones(self.length, bool))

    def optimal(self, inputs: Array) -> tuple[Array, Array]:
        """inputs [..., T, 3] -> mean and variance [..., T] of x_t given all up to t (Kalman, 1960)."""
        noise = jnp.where(inputs[..., 1] > 0.5, self.coarse, self.fine) ** 2

        def step(carry: tuple[Array, Array], x: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            mean, var = self.decay * carry[0], self.decay**2 * carry[1] + self.drift**2
            gain = var / (var + x[1])
            new = mean + gain * (x[0] - mean), (1.0 - gain) * var
            return new, new

        first = lambda a: jnp.moveaxis(a, -1, 0)
        start = (jnp.zeros(inputs.shape[:-2]), jnp.ones(inputs.shape[:-2]))
        _, out = jax.lax.scan(step, start, (first(inputs[..., 0]), first(noise)))
        return jnp.moveaxis(out[0], 0, -1), jnp.moveaxis(out[1], 0, -1)
