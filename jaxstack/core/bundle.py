"""Policy bundles: what it takes to act, apart from the full checkpoint.

A bundle is a directory with `policy.safetensors` (weights, normaliser statistics) and `policy.json` (agent, config,
shapes, versions). `load_policy` gives something to call; nothing is unpickled.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxstack.core import config as configs
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner, rows_of
from jaxstack.core.rundir import refuse_scripts

FORMAT = 1


class LoadedPolicy(NamedTuple):
    """A trained policy. `act(obs)` with obs [B, A, *obs_shape] gives actions [B, A, ...]."""

    learner: Learner
    params: Any
    spec: dict[str, Any]

    def __repr__(self) -> str:
        count = sum(np.size(x) for x in jax.tree.leaves(self.params))
        env = self.learner.env
        where = "" if env is None else f" in {env.spec.id}, {env.spec.num_agents} agents"
        return f"LoadedPolicy({self.learner.name}{where}; {count:,} numbers; act(obs [B, A, ...]) -> (carry, actions))"

    def init_carry(self, batch: int) -> Any:
        """Recurrent state before the first step."""
        return _policy(self.learner).init_carry(self.params, batch)

    def act(
        self, obs: Any, carry: Any = None, *, action_mask: Any = None, first: Any = None, key: Any = None
    ) -> tuple[Any, Any]:
        """Act in B environments.

        Args:
            obs: Observations [B, A, *obs_shape].
            carry: Recurrent state from the last call; default: that of a first step.
            action_mask: Legal actions [B, A, n], if the environment has a mask.
            first: [B] bool, which environments begin an episode; default: none.
            key: Samples actions; default: the most likely ones.

        Returns:
            (carry, actions [B, A, ...]).

        Raises:
            UserError: For inputs of other shapes, observations that are not finite, and a missing mask.
        """
        obs = jnp.asarray(obs)
        _check_inputs(self, obs, carry, action_mask, first)
        batch = obs.shape[0]
        carry = self.init_carry(batch) if carry is None else carry
        first = jnp.zeros(batch, bool) if first is None else first
        return _compiled(_policy(self.learner).act)(self.params, carry, obs, action_mask, first, key)

    def rewarded(self, carry: Any, reward: Any) -> Any:
        """Tell a policy that reads rewards what the last actions earned, before the next `act`.

        Args:
            carry: Recurrent state from the last `act`.
            reward: [B, A].

        Returns:
            The carry for the next `act`; as it was for policies that read none.
        """
        return _policy(self.learner).rewarded(carry, jnp.asarray(reward, jnp.float32))


def save_policy(path: str | Path, learner: Learner, state: Any) -> Path:
    """Store the policy of ONE seed (`state` without seed axis). Raises `UserError` if there is no policy to save."""
    from safetensors.numpy import save_file

    path = Path(path)
    params = _policy(learner).params(state)
    refuse_scripts({"agent": learner.name, "config": configs.to_dict(learner.config)}, f"policy bundle {path}")
    tensors = {name: np.asarray(x, order="C") for name, x in _table(params).items()}
    spec = {
        "format": FORMAT,
        "agent": learner.name,
        "config": configs.to_dict(learner.config),
        "arrays": {k: {"shape": list(v.shape), "dtype": str(v.dtype)} for k, v in tensors.items()},
        "jax": jax.__version__,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(path / "policy.safetensors"))
        (path / "policy.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")
    except OSError as e:
        raise UserError(f"policy bundle {path}: cannot be written ({e.strerror})") from e
    return path


def save_first(run_dir: str | Path, learner: Learner, state: Any, alive: Any) -> int | None:
    """Store the policy of a run's first living row in RUN/policy.

    Args:
        run_dir: Of the run.
        learner: What was trained.
        state: The last states [S, ...].
        alive: [S] bool.

    Returns:
        The row; None where there is no policy, or no row alive.
    """
    if learner.policy is None or not np.any(alive):
        return None
    first = int(np.flatnonzero(alive)[0])
    save_policy(Path(run_dir) / "policy", learner, rows_of(state, first))
    return first


def load_policy(path: str | Path, make: Callable[[str, Any, str], Learner]) -> LoadedPolicy:
    """Rebuild the policy from a bundle; `make(name, fields, source)` makes the learner from what the file says.

    Raises `UserError` naming the file that is missing, corrupt or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    spec_file, array_file = path / "policy.json", path / "policy.safetensors"
    for file in (spec_file, array_file):
        if not file.exists():
            raise UserError(f"policy bundle {path}: {file.name} is missing")
    try:
        spec = json.loads(spec_file.read_text(encoding="utf-8"))
        agent, fields = spec["agent"], spec["config"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{spec_file}: not a policy description ({e})") from e
    if spec.get("format") != FORMAT:
        raise UserError(f"{spec_file}: format {spec.get('format')!r}, expected {FORMAT}")
    try:
        tensors = load_file(str(array_file))
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{array_file}: cannot be read ({e})") from e
    learner = make(agent, fields, str(spec_file))
    template = jax.eval_shape(lambda k: _policy(learner).params(learner.init(k, learner.hypers)), jax.random.key(0))

    def leaf(where: Any, like: Any) -> Any:
        name = jax.tree_util.keystr(where)
        if not like.size:
            return jnp.zeros(like.shape, like.dtype)
        if name not in tensors:
            raise UserError(f"{array_file}: {name} is missing")
        if tensors[name].shape != like.shape:
            raise UserError(f"{array_file}: {name} has shape {tensors[name].shape}, expected {like.shape}")
        return jnp.asarray(tensors[name], like.dtype)

    return LoadedPolicy(learner, jax.tree_util.tree_map_with_path(leaf, template), spec)


def _check_inputs(policy: LoadedPolicy, obs: Any, carry: Any, action_mask: Any, first: Any) -> None:
    """Raise `UserError` for what would give actions of no meaning. Values are checked where they are known."""
    env = policy.learner.env
    if env is None:
        return
    spec, n = env.spec, getattr(env.spec.action_space, "n", None)
    if obs.ndim == 0 or not obs.shape[0] or obs.shape[1:] != (spec.num_agents, *spec.obs_shape):
        want = ", ".join(map(str, ("B", spec.num_agents, *spec.obs_shape)))
        raise UserError(f"obs: found an array {list(obs.shape)}, expected [{want}] of {spec.id}")
    batch = obs.shape[0]
    known = not isinstance(obs, Tracer)
    if known and jnp.issubdtype(obs.dtype, jnp.inexact) and not np.isfinite(np.asarray(obs)).all():
        raise UserError("obs: found numbers that are not finite, expected finite ones")
    if action_mask is None and spec.has_action_mask:
        raise UserError(f"action_mask: found None, expected [{batch}, {spec.num_agents}, {n}], as {spec.id} has one")
    shapes = {"action_mask": (action_mask, (batch, spec.num_agents, n)), "first": (first, (batch,))}
    for name, (value, want) in shapes.items():
        if value is not None and jnp.shape(value) != want:
            raise UserError(f"{name}: found an array {list(jnp.shape(value))}, expected {list(want)}")
    seen = None if action_mask is None or isinstance(action_mask, Tracer) else np.asarray(action_mask)
    if seen is not None and not seen.any(-1).all():
        raise UserError("action_mask: found an agent without a legal action, expected one at least")
    if carry is not None:
        given, want = (_shapes(x) for x in (carry, jax.eval_shape(lambda: policy.init_carry(batch))))
        if given != want:
            raise UserError(f"carry: found {given!r:.200}, expected that of {batch} environments: {want!r:.200}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@functools.lru_cache(maxsize=16)
def _compiled(act: Callable[..., Any]) -> Callable[..., Any]:
    """`act` as one program per batch size; operation by operation a recurrent policy takes a hundred times longer."""
    return jax.jit(act)


def _policy(learner: Learner) -> Any:
    if learner.policy is None:
        raise UserError(f"{learner.name} has no policy to act with")
    return learner.policy


def _table(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree) if np.size(x)
    }
