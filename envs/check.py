"""What every environment must hold to, checked by its shapes alone before anything is trained in it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxstack.core.errors import UserError
from jaxstack.envs.base import Box, Discrete, Environment, MultiDiscrete, Spec, TimeStep, cached


def check_env(env: Environment) -> None:
    """Check an environment against its spec: `reset` and `step` are traced, nothing is run.

    Args:
        env: The environment.

    Raises:
        UserError: Naming the environment, what is wrong, what was found and what is expected.

    Example:
        jaxstack.check_env(MyEnv(size=5))
    """
    _name_errors(env)
    try:
        hash(env)
    except TypeError:
        raise UserError(f"{type(env).__name__}: found no hash, expected a frozen dataclass of plain fields") from None
    _check(env)


@cached(64)
def _check(env: Environment) -> None:
    spec = env.spec
    key = jax.eval_shape(lambda: jax.random.key(0))
    state, first = _traced(env, "reset", lambda: jax.eval_shape(env.reset, key))
    _check_timestep(env.spec, "reset", first)
    space = spec.action_space
    action = jax.ShapeDtypeStruct((spec.num_agents, *space.shape), space.dtype)
    after, ts = _traced(env, "step", lambda: jax.eval_shape(env.step, key, state, action))
    _check_timestep(spec, "step", ts)
    _same(spec, "state", state, after)
    _same(spec, "TimeStep", first, ts)
    if jax.tree.leaves(env.parameters):
        given = jax.tree.map(jnp.asarray, env.parameters)
        again = _traced(env, "reset with its parameters", lambda: jax.eval_shape(env.reset, key, given))  # pyright: ignore
        _same(spec, "state", state, again[0])
        _same(spec, "TimeStep", first, again[1])


def _name_errors(env: Any) -> None:
    """What can be wrong with the object itself."""
    if not isinstance(env, Environment):
        hint = "; make one with MyEnv()" if isinstance(env, type) else ""
        raise UserError(f"env: found {env!r:.80}, expected an Environment{hint}")
    spec = env.spec
    name = type(env).__name__
    if not isinstance(spec, Spec):
        raise UserError(f"{name}.spec: found {type(spec).__name__}, expected a Spec")
    if not isinstance(spec.agents, tuple) or not spec.agents or len({*spec.agents}) < len(spec.agents):
        raise UserError(f"{name}.spec.agents: found {spec.agents!r}, expected a tuple of different names")
    if not isinstance(spec.obs_shape, tuple):
        raise UserError(f"{name}.spec.obs_shape: found {spec.obs_shape!r}, expected a tuple")
    if not isinstance(spec.action_space, (Discrete, MultiDiscrete, Box)):
        raise UserError(
            f"{name}.spec.action_space: found {spec.action_space!r}, expected Discrete, MultiDiscrete or Box"
        )
    for field in ("obs_sizes", "action_sizes"):
        sizes = getattr(spec, field)
        if sizes and len(sizes) != spec.num_agents:
            raise UserError(
                f"{name}.spec.{field}: found {len(sizes)} numbers, expected one for each of {spec.num_agents}"
            )


def _traced(env: Environment, method: str, trace: Callable[[], Any]) -> tuple[Any, TimeStep]:
    """(state, TimeStep) of a method; what goes wrong inside is told in a line, with the traceback as its cause."""
    where = f"environment {env.spec.id!r}: {method}"
    try:
        out = trace()
    except UserError:
        raise
    except jax.errors.ConcretizationTypeError as e:
        raise UserError(
            f"{where}: found `if`, `while` or a conversion that depends on an array, expected jnp.where or jax.lax"
        ) from e
    except Exception as e:
        what = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"{where} cannot be traced: {what}") from e
    if not isinstance(out, tuple) or len(out) != 2 or not isinstance(out[1], TimeStep):
        found = f"{len(out)} values" if isinstance(out, tuple) and not hasattr(out, "_fields") else type(out).__name__
        if isinstance(out, tuple) and len(out) == 2:
            found = f"a second value of {type(out[1]).__name__}"
        raise UserError(f"{where}: found {found}, expected (state, TimeStep)")
    return out


def _check_timestep(spec: Spec, method: str, ts: TimeStep) -> None:
    agents = spec.num_agents
    real = ("float32",)
    _field(spec, method, "obs", ts.obs, (agents, *spec.obs_shape), _numbers(spec))
    _field(spec, method, "reward", ts.reward, (agents,), real)
    _field(spec, method, "terminated", ts.terminated, (), ("bool",))
    _field(spec, method, "truncated", ts.truncated, (), ("bool",))
    _field(spec, method, "agent_mask", ts.agent_mask, (agents,), ("bool",))
    n = getattr(spec.action_space, "n", None)
    optional = (
        ("action_mask", ts.action_mask, (agents, n), ("bool",), spec.has_action_mask, "has_action_mask"),
        ("state", ts.state, spec.state_shape, None, spec.state_shape is not None, "state_shape"),
    )
    for name, value, shape, kinds, wanted, why in optional:
        where = f"environment {spec.id!r}: {method}: {name}"
        if wanted and value is None:
            raise UserError(f"{where}: found None, expected an array, as spec.{why}={getattr(spec, why)}")
        if not wanted and value is not None:
            raise UserError(f"{where}: found {_said(value)}, expected None, as spec.{why}={getattr(spec, why)}")
        if wanted:
            _field(spec, method, name, value, shape, kinds)
    if not isinstance(ts.info, dict):
        raise UserError(f"environment {spec.id!r}: {method}: info: found {type(ts.info).__name__}, expected a dict")
    for name, value in ts.info.items():
        _field(spec, method, f"info[{name!r}]", value, (), None)


def _numbers(spec: Spec) -> tuple[str, ...] | None:
    """Types that observations may have: that of the space where one is given, else any number."""
    return None if spec.obs_space is None else (jnp.dtype(spec.obs_space.dtype).name,)


def _field(spec: Spec, method: str, name: str, value: Any, shape: Any, kinds: tuple[str, ...] | None) -> None:
    where = f"environment {spec.id!r}: {method}: {name}"
    kind = "" if kinds is None else f" of {kinds[0]}"
    want = f"an array {list(shape)}{kind}" if shape else f"one number{kind}"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise UserError(f"{where}: found {_said(value)}, expected {want}")
    dtype = jnp.dtype(value.dtype).name
    wide = {"float64": "float32", "int64": "int32"} if jax.config.read("jax_enable_x64") else {}
    if tuple(value.shape) != tuple(shape) or (kinds is not None and wide.get(dtype, dtype) not in kinds):
        raise UserError(f"{where}: found {_said(value)}, expected {want}")


def _same(spec: Spec, what: str, first: Any, after: Any) -> None:
    """Raise where what `step` returns has other leaves than what `reset` returns, which a scan refuses."""
    where = f"environment {spec.id!r}: {what}"
    old, new = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (first, after))
    for path in [*old, *(p for p in new if p not in old)]:
        leaf = jax.tree_util.keystr(path)
        if path not in new or path not in old:
            found, missing = ("reset", "step") if path in old else ("step", "reset")
            raise UserError(f"{where}{leaf}: found in {found} and not in {missing}, expected in both")
        if old[path].shape != new[path].shape or old[path].dtype != new[path].dtype:
            raise UserError(
                f"{where}{leaf}: found {_said(old[path])} in reset and {_said(new[path])} in step, expected the same"
            )
    if jax.tree.structure(first) != jax.tree.structure(after):
        raise UserError(f"{where}: found other containers in step than in reset, expected the same")


def _said(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        shape = f"an array {list(value.shape)}" if value.shape else "one number"
        return f"{shape} of {jnp.dtype(value.dtype).name}"
    return type(value).__name__
