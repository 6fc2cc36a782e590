"""Networks that teach others: the teacher of a stored run, and the loss of a classifier that learns from one.

Distillation (Hinton et al., 2015) and attention transfer (Zagoruyko and Komodakis, 2017), alone or together.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.core.rundir import read_plan
from jaxstack.nn.attention_transfer import attention_maps, map_distance
from jaxstack.nn.supervised import Loss, cross_entropy, distillation, variables

Distil = Literal["kd", "at", "kd+at"]


def stored_teacher(run_dir: str, method: str, config: type, factory: Callable[[Any], Learner]) -> tuple[Any, Any]:
    """Config and variables of a supervised method's run, of its first seed that lives.

    Args:
        run_dir: the run.
        method: its name.
        config: class of the method's config.
        factory: config -> learner.

    Raises:
        UserError: for a run of another method, of several settings, or without a checkpoint.
    """
    plan, where = read_plan(run_dir), f"teacher={run_dir}"
    if plan["agent"] != method:
        raise UserError(f"{where}: found a run of {plan['agent']}, expected one of {method}")
    if len({*plan.get("settings", [0])}) > 1:
        raise UserError(f"{where}: found a sweep of several settings, expected a run of one")
    known = configs.from_dict(config, plan["config"], f"{run_dir}/run.yaml: config")
    states, alive = runner.stored(factory(known), run_dir)
    if not alive.any():
        raise UserError(f"{where}: found no seed whose numbers are finite, expected one")
    row = int(np.flatnonzero(alive)[0])
    return known, jax.tree.map(lambda x: np.asarray(x)[row], variables(states))


def with_one_teacher(learner: Learner, taught_by: Any) -> Learner:
    """A learner with `given` variables of a teacher whose every seed has the same one.

    Args:
        learner: of `supervised` with `teacher`.
        taught_by: the teacher's variables, without an axis of seeds.
    """

    def init(key: Key, hypers: Any) -> Any:
        return learner.init(key, hypers, jax.tree.map(jax.numpy.asarray, taught_by))

    return learner._replace(init=init, given=None)


def taught(outputs: Any, kind: Distil) -> Any:
    """What a student learns from a teacher's outputs (logits, taps): logits [B, C], and maps of its stages [B, H W]."""
    logits, taps = outputs
    return logits, attention_maps(taps) if "at" in kind else ()


def distil_loss(kind: Distil, scale: float = 1.0) -> Loss:
    """The loss of a student whose outputs are (logits, taps), its targets (labels, `taught` of a teacher).

    kd: (1 - a) CE + a T^2 KL(teacher || student) at temperature T, a = `distil_weight`; at: CE + 3 beta / L times the
    distance of L stages' attention maps; kd+at: both, with one CE.

    Args:
        kind: of these.
        scale: multiplies beta, see `attention_transfer.attention_weight`.
    """

    def loss(outputs: Any, targets: Any, hypers: Any) -> Array:
        (logits, taps), (labels, (logits_t, maps_t)) = outputs, targets
        known = "kd" in kind
        value = distillation(logits, (labels, logits_t), hypers) if known else cross_entropy(logits, labels, hypers)
        if "at" in kind:
            distance = map_distance(maps_t, attention_maps(taps))
            value = value + 3 * scale * hypers.beta / max(len(taps), 1) * distance
        return value

    return loss
