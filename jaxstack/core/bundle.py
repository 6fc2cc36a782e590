"""Policy bundles: what it takes to act, apart from the full checkpoint.

A bundle is a directory with `policy.safetensors` (weights, normaliser statistics) and `policy.json` (agent, config,
shapes, versions). `load_policy` gives something to call; nothing is unpickled.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core import config as configs
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner

FORMAT = 1


class LoadedPolicy(NamedTuple):
    """A trained policy. `act(obs)` with obs [B, A, *obs_shape] gives actions [B, A, ...]."""

    learner: Learner
    params: Any
    spec: dict[str, Any]

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
        """
        obs = jnp.asarray(obs)
        batch = obs.shape[0]
        carry = self.init_carry(batch) if carry is None else carry
        first = jnp.zeros(batch, bool) if first is None else first
        return _policy(self.learner).act(self.params, carry, obs, action_mask, first, key)

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


def _policy(learner: Learner) -> Any:
    if learner.policy is None:
        raise UserError(f"{learner.name} has no policy to act with")
    return learner.policy


def _table(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree) if np.size(x)
    }
