"""Synthetic sequence tasks, drawn on the device: recall, copying, memory and state tracking.

    mqar                 Arora et al. (2023), "Zoology": several keys asked for after all pairs were shown
    induction            Olsson et al. (2022), Gu and Dao (2023): what followed the special token?
    recall, noisy_recall, fuzzy_recall, selective_copy, compression, memorisation
                         the suite of Poli et al. (2024), "Mechanistic design and scaling of hybrid architectures"
    parity, modular_arithmetic, group, dyck, tracking
                         see state_tasks.py

A task is a frozen config with `sample(key, count, test=False) -> Batch`, to be used inside jit: fresh examples cost no
memory, and the same key gives the same examples. `make("mqar", length=64)` builds one by name.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core import config
from jaxstack.core.config import Config, require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key
from jaxstack.core.registry import Registry


class Batch(NamedTuple):
    """Examples of one length, arrays of jax or numpy; a single example lacks the axis B."""

    tokens: Any
    """[B, T] int32, or [B, T, num_inputs] float32 for a task with real inputs."""
    targets: Any
    """[B, T] int32, or [B, T] float32; what to say at each position, 0 where it is not scored."""
    mask: Any
    """[B, T] bool: scored positions."""


@dataclass(frozen=True)
class Task(Config):
    """Base of all tasks; `length` is T."""

    length: int = 64

    readout: ClassVar[Literal["each", "last"]] = "each"
    """"last": all targets are to be read from the state after the last token (an auto-encoder)."""
    num_inputs: ClassVar[int] = 0
    """Width of real inputs; 0 for tokens."""
    reads: ClassVar[bool] = False
    """Whether examples are drawn from `data`, which a program then gets as an argument."""

    @property
    def num_tokens(self) -> int:
        """Size of the input vocabulary; 0 for real inputs."""
        raise NotImplementedError

    @property
    def num_targets(self) -> int:
        """Number of classes; 0 for real targets (squared error)."""
        return self.num_tokens

    def example(self, key: Key, test: bool) -> Batch:
        """One example."""
        raise NotImplementedError

    def data(self, test: bool) -> Any:
        """Arrays on the host that examples are drawn from, of a task that `reads`."""
        return None

    def draw(self, key: Key, test: bool, data: Any) -> Batch:
        """One example, drawn from `data`."""
        return self.example(key, test)

    def sample(self, key: Key, count: int, test: bool = False, data: Any = None) -> Batch:
        """`count` independent examples; `test` (static) chooses what is scored where the two differ. `data` is that of
        `test`; without it, it becomes a constant of the program."""
        data = self.data(test) if data is None else data
        return jax.vmap(lambda k: self.draw(k, test, data))(jax.random.split(key, count))

    def validate(self) -> None:
        require_at_least(self, 2, "length")


def scored(tokens: Array, targets: Array, mask: Array) -> Batch:
    """A batch of whole numbers, targets 0 where the mask is False."""
    return Batch(tokens.astype(jnp.int32), jnp.where(mask, targets, 0).astype(jnp.int32), mask)


def _next_token(sequence: Array, asked: Array) -> Batch:
    """[T+1] -> inputs sequence[:-1], targets sequence[1:], scored where the predicted token is."""
    return scored(sequence[:-1], sequence[1:], asked[1:])


# ---------------------------------------------------------------- recall


@dataclass(frozen=True)
class MQAR(Task):
    """k1 v1 .. kN vN, then each key again at a distance drawn from a power law; its value is asked for at the key.

    Keys 1..V/2-1 and values V/2..V-1 without replacement. The queries take N different ones of the (T - 2N)/2 slots of
    two tokens, slot i with weight i^(power - 1); other positions are 0, or, with `filler`, any token (which may be a
    key by chance).
    """

    vocab: int = 8192
    pairs: int = 4
    power: float = 0.01
    filler: bool = False

    @property
    def num_tokens(self) -> int:
        return self.vocab

    def validate(self) -> None:
        require_at_least(self, 1, "pairs")
        require(self, "length", self.length % 2 == 0 and self.length >= 4 * self.pairs, "even and >= 4 pairs")
        require(self, "vocab", self.vocab > self.length, f"more than length={self.length}")
        require(self, "vocab", self.vocab % 2 == 0 and self.pairs < self.vocab // 2, "even, more than 2 pairs + 2")

    def example(self, key: Key, test: bool) -> Batch:
        k_keys, k_values, k_slots, k_fill = jax.random.split(key, 4)
        n, half = self.pairs, self.vocab // 2
        keys = 1 + jax.random.permutation(k_keys, half - 1)[:n]
        values = half + jax.random.permutation(k_values, half)[:n]
        slots = (self.length - 2 * n) // 2
        # the n greatest of log-weights plus Gumbel noise are draws one after another without replacement
        weight = (self.power - 1.0) * jnp.log(jnp.arange(1, slots + 1, dtype=jnp.float32))
        _, slot = jax.lax.top_k(weight + jax.random.gumbel(k_slots, (slots,)), n)
        at = 2 * n + 2 * slot
        context = jnp.stack([keys, values], 1).reshape(-1)
        empty = jnp.zeros(self.length, jnp.int32)
        tokens = empty.at[: 2 * n].set(context).at[at].set(keys)
        if self.filler:
            tokens = jnp.where(tokens == 0, jax.random.randint(k_fill, (self.length,), 0, self.vocab), tokens)
        return scored(tokens, empty.at[at].set(values), jnp.zeros(self.length, bool).at[at].set(True))


@dataclass(frozen=True)
class Induction(Task):
    """Random tokens 0..V-2; the special token V-1 stands once before the end and again at the end, where the token that
    followed it is asked for."""

    length: int = 256
    vocab: int = 16

    @property
    def num_tokens(self) -> int:
        return self.vocab

    def validate(self) -> None:
        require_at_least(self, 3, "length", "vocab")

    def example(self, key: Key, test: bool) -> Batch:
        k_tokens, k_place = jax.random.split(key)
        tokens = jax.random.randint(k_tokens, (self.length,), 0, self.vocab - 1)
        place = jax.random.randint(k_place, (), 0, self.length - 2)
        target = tokens[place + 1]
        tokens = tokens.at[place].set(self.vocab - 1).at[-1].set(self.vocab - 1)
        last = jnp.arange(self.length) == self.length - 1
        return scored(tokens, jnp.full(self.length, target), last)


@dataclass(frozen=True)
class Recall(Task):
    """Key-value pairs, T/2 of them: a new key gets a random value, a known key repeats its own; the last pair is known.

    Keys 0..K/2-1, values K/2..K-1, K = vocab - noise_vocab. A pair is noise (two tokens of K..V-1) with probability
    `noise`; one place is never noise. Training scores every next token, testing the values of known keys. The last
    token has no successor and is not scored.
    """

    length: int = 128
    vocab: int = 16
    noise_vocab: int = 0
    noise: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.vocab

    def validate(self) -> None:
        require(self, "length", self.length % 2 == 0 and self.length >= 4, "an even number >= 4")
        require_at_least(self, 0, "noise_vocab")
        require(self, "vocab", self.vocab - self.noise_vocab >= 4, f"at least noise_vocab + 4 = {self.noise_vocab + 4}")
        require(self, "noise", 0 <= self.noise < 1 and (self.noise == 0 or self.noise_vocab > 0), "0, or less than 1")

    def example(self, key: Key, test: bool) -> Batch:
        k_keys, k_map, k_noise, k_place, k_tokens, k_probe = jax.random.split(key, 6)
        kinds, pairs = (self.vocab - self.noise_vocab) // 2, self.length // 2
        keys = jax.random.randint(k_keys, (pairs,), 0, kinds)
        last = jnp.arange(pairs) == pairs - 1
        protected = jnp.arange(pairs) == jax.random.randint(k_place, (), 0, pairs - 1)
        noisy = (jax.random.uniform(k_noise, (pairs,)) < self.noise) & ~protected & ~last
        shown = jnp.zeros(kinds, bool).at[jnp.where(noisy | last, kinds, keys)].set(True, mode="drop")
        probe = jax.random.categorical(k_probe, jnp.where(shown, 0.0, -jnp.inf))
        keys = jnp.where(last, probe, keys)
        earlier = jnp.tril(keys[:, None] == keys[None], -1) & ~noisy[None]
        known = earlier.any(1) & ~noisy
        total = self.vocab - self.noise_vocab
        values = jax.random.randint(k_map, (kinds,), total // 2, total)[keys]
        pair = jnp.stack([keys, values], 1)
        if self.noise > 0:
            junk = jax.random.randint(k_tokens, (pairs, 2), total, self.vocab)
            pair = jnp.where(noisy[:, None], junk, pair)
        tokens = pair.reshape(-1)
        asked = jnp.stack([jnp.zeros_like(known), known], 1).reshape(-1)
        mask = jnp.roll(asked if test else jnp.ones_like(asked), -1).at[-1].set(False)
        return scored(tokens, jnp.roll(tokens, -1), mask)


@dataclass(frozen=True)
class NoisyRecall(Recall):
    """Recall with a fifth of the pairs replaced by noise."""

    vocab: int = 32
    noise_vocab: int = 16
    noise: float = 0.2


@dataclass(frozen=True)
class FuzzyRecall(Task):
    """Recall whose keys and values are ordered tuples of 1 to `key_motif` and `value_motif` different tokens.

    Training draws key sizes evenly and scores every next token; testing has keys of the greatest size and scores the
    values of known keys. A probe pair stands at a random place and again at the end. Padded on the left with V-1.
    """

    length: int = 128
    vocab: int = 16
    key_motif: int = 3
    value_motif: int = 3

    @property
    def num_tokens(self) -> int:
        return self.vocab

    def validate(self) -> None:
        require_at_least(self, 1, "key_motif", "value_motif")
        need = 2 * max(self.key_motif, self.value_motif) + 1
        require(self, "vocab", self.vocab >= need, f"at least {need} for such motifs")
        kinds = (self.vocab - 1) // 2
        require(self, "vocab", (kinds + 1) ** self.key_motif < 2**32, "fewer than 2^32 possible keys")
        longest = self.key_motif + self.value_motif
        require(self, "length", self.length >= 4 * longest, f"at least four pairs of {longest} tokens")

    def example(self, key: Key, test: bool) -> Batch:
        k_pairs, k_map, k_place = jax.random.split(key, 3)
        count, longest = self.length // 2, self.key_motif + self.value_motif
        motif = functools.partial(self._pair, k_map, test)
        pair, size, code = jax.vmap(motif)(jax.random.split(k_pairs, count + 1))
        # pairs begin as long as there is room for one of any size and the probe; the probe is the last one drawn
        limit = self.length - size[-1] - longest
        start = lambda s: jnp.cumsum(s) - s
        place = jax.random.randint(k_place, (), 0, limit - longest + 1)
        planted = (start(size[:-1]) < place).sum()
        index = jnp.arange(count + 1).at[planted].set(count)
        pair, size, code = pair[index], size[index], code[index]
        begin = start(size)
        kept = (begin < limit).at[-1].set(False)
        end = jnp.where(kept, size, 0).sum()
        begin, kept = begin.at[-1].set(end), kept.at[-1].set(True)
        known = (jnp.tril(code[:, None] == code[None], -1) & kept[None]).any(1)
        total = self.length + 1
        inside = jnp.arange(longest)
        at = begin[:, None] + inside + total - end - size[-1]
        at = jnp.where(kept[:, None] & (inside < size[:, None]), at, total)
        sequence = jnp.full(total, self.vocab - 1).at[at].set(pair, mode="drop")
        if not test:
            return _next_token(sequence, jnp.ones(total, bool))
        asked = known[:, None] & (inside >= self.key_motif)
        return _next_token(sequence, jnp.zeros(total, bool).at[at].set(asked, mode="drop"))

    def _pair(self, k_map: Key, test: bool, key: Key) -> tuple[Array, Array, Array]:
        """Tokens [longest] of a pair (key, then value, then filler), their number, and a number naming the key; the
        value is a function of `k_map` and the key."""
        k_size, k_tokens = jax.random.split(key)
        kinds = (self.vocab - 1) // 2
        n, m = self.key_motif, self.value_motif
        size = jnp.int32(n) if test else jax.random.randint(k_size, (), 1, n + 1)
        tokens = jnp.where(jnp.arange(n) < size, jax.random.permutation(k_tokens, kinds)[:n], kinds)
        code = jnp.zeros((), jnp.uint32)
        for i in range(n):
            code = code * jnp.uint32(kinds + 1) + tokens[i].astype(jnp.uint32)
        k_size, k_tokens = jax.random.split(jax.random.fold_in(k_map, code))
        value_size = jax.random.randint(k_size, (), 1, m + 1)
        value = kinds + jax.random.permutation(k_tokens, self.vocab - 1 - kinds)[:m]
        order = jnp.where(jnp.arange(n + m) < size, jnp.arange(n + m), jnp.arange(n + m) + n - size)
        pair = jnp.concatenate([tokens, value])[jnp.minimum(order, n + m - 1)]
        return pair, size + value_size, code


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """`copies` tokens among T - 2c - 1 blanks (V-2), the copy token (V-1), then c blanks: there the tokens are asked
    for in order. Each blank falls with equal chance before one of the c tokens."""

    length: int = 256
    vocab: int = 16
    copies: int = 16

    @property
    def num_tokens(self) -> int:
        return self.vocab

    def validate(self) -> None:
        require_at_least(self, 1, "copies")
        require_at_least(self, 3, "vocab")
        require(self, "length", self.length > 2 * self.copies, f"more than 2 copies = {2 * self.copies}")

    def example(self, key: Key, test: bool) -> Batch:
        k_tokens, k_blanks = jax.random.split(key)
        c = self.copies
        content = jax.random.randint(k_tokens, (c,), 0, self.vocab - 2)
        gap = jax.random.randint(k_blanks, (self.length - 2 * c - 1,), 0, c)
        at = jnp.arange(c) + jnp.cumsum(jnp.zeros(c, jnp.int32).at[gap].add(1))
        tokens = jnp.full(self.length, self.vocab - 2).at[at].set(content).at[self.length - c - 1].set(self.vocab - 1)
        place = jnp.arange(self.length) - (self.length - c)
        return scored(tokens, content[jnp.maximum(place, 0)], place >= 0)


@dataclass(frozen=True)
class Compression(Task):
    """T - 1 random tokens and the compression token V-1; all T are to be rebuilt from the state after the last."""

    length: int = 32
    vocab: int = 16
    readout: ClassVar[Literal["each", "last"]] = "last"

    @property
    def num_tokens(self) -> int:
        return self.vocab

    def validate(self) -> None:
        require_at_least(self, 2, "length", "vocab")

    def example(self, key: Key, test: bool) -> Batch:
        tokens = jax.random.randint(key, (self.length,), 0, self.vocab - 1).at[-1].set(self.vocab - 1)
        return scored(tokens, tokens, jnp.ones(self.length, bool))


@dataclass(frozen=True)
class Memorisation(Task):
    """key, INSERT, key, INSERT, ...: at each INSERT (V-1) the key's value under a map that never changes.

    Keys 0..n-1 map one to one to values n..2n-1, n = (V-1) // 2, by `map_seed`. Nothing in the sequence tells the
    value: it measures what the parameters hold. Training and test share the map.
    """

    length: int = 32
    vocab: int = 256
    map_seed: int = 12345

    @property
    def num_tokens(self) -> int:
        return self.vocab

    def validate(self) -> None:
        require(self, "length", self.length >= 2 and self.length % 2 == 0, "an even number >= 2")
        require_at_least(self, 3, "vocab")
        require_at_least(self, 0, "map_seed")

    def example(self, key: Key, test: bool) -> Batch:
        kinds = (self.vocab - 1) // 2
        values = kinds + jax.random.permutation(jax.random.key(self.map_seed), kinds)
        keys = jax.random.randint(key, (self.length // 2,), 0, kinds)
        tokens = jnp.stack([keys, jnp.full_like(keys, self.vocab - 1)], 1).reshape(-1)
        asked = jnp.arange(self.length) % 2 == 1
        return scored(tokens, jnp.repeat(values[keys], 2), asked)


# ---------------------------------------------------------------- by name


_HERE, _STATE = "jaxstack.sequence.tasks:", "jaxstack.sequence.state_tasks:"

TASKS = Registry(
    "sequence task",
    {
        "mqar": _HERE + "MQAR",
        "induction": _HERE + "Induction",
        "recall": _HERE + "Recall",
        "noisy_recall": _HERE + "NoisyRecall",
        "fuzzy_recall": _HERE + "FuzzyRecall",
        "selective_copy": _HERE + "SelectiveCopy",
        "compression": _HERE + "Compression",
        "memorisation": _HERE + "Memorisation",
        "parity": _STATE + "Parity",
        "modular_arithmetic": _STATE + "ModularArithmetic",
        "group": _STATE + "Group",
        "dyck": _STATE + "Dyck",
        "tracking": _STATE + "Tracking",
        "text": "jaxstack.sequence.text:Text",
    },
)
"""Name -> a subclass of `Task`; `TASKS.add(name, "module:class")` registers another."""


def make(name: str, **options: Any) -> Task:
    """The task with its options; raises `UnknownName` or, for a wrong option, `UserError`."""
    return config.from_dict(TASKS.load(name), options, f"task {name}")


def finite(task: Task, examples: int, seed: int = 0) -> Callable[..., Batch]:
    """A training set of fixed size without storing it: (key, count, data=None) -> `count` of its examples, drawn with
    replacement; example i is always the same, `data` is as for `Task.sample`. Raises `UserError` for no examples."""
    if examples < 1:
        raise UserError(f"examples={examples!r}: expected a whole number >= 1")

    def sample(key: Key, count: int, data: Any = None) -> Batch:
        data = task.data(False) if data is None else data
        index = jax.random.randint(key, (count,), 0, examples)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)
        return jax.vmap(lambda k: task.draw(k, False, data))(keys)

    return sample


def accuracy(logits: Array, batch: Batch) -> Array:
    """Share of scored positions whose greatest logit is the target; logits [B, T, num_targets]."""
    right = (logits.argmax(-1) == batch.targets) & batch.mask
    return right.sum() / jnp.maximum(batch.mask.sum(), 1)


def loss_terms(output: Array, batch: Batch) -> tuple[Array, Array]:
    """(sum over scored positions, their number): cross entropy of logits [B, T, C] in nats, or squared error of
    outputs [B, T]. Sums, so that batches in parts add up exactly. What stands at other positions, in the outputs and in
    the targets, is replaced before it is read, so that it cannot reach the gradient either."""
    output, targets = output.astype(jnp.float32), jnp.where(batch.mask, batch.targets, 0)
    if jnp.issubdtype(targets.dtype, jnp.floating):
        each = jnp.square(jnp.where(batch.mask, output, 0.0) - targets)
    else:
        log_p = jax.nn.log_softmax(jnp.where(batch.mask[..., None], output, 0.0), axis=-1)
        each = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return jnp.where(batch.mask, each, 0.0).sum(), batch.mask.sum().astype(jnp.float32)
