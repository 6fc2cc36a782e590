"""Estimators, losses and measures refuse arrays of other shapes and types, and name the argument."""

import inspect

import jax.numpy as jnp
import pytest

from jaxstack.core import losses, returns
from jaxstack.measures import diversity, gradients
from jaxstack.report import stats

X, FLAG = jnp.ones((4, 3)), jnp.zeros((4, 3), bool)
TD = dict(r_t=X, v_t=X, v_tp1=X, terminated_t=FLAG, done_t=FLAG, log_rho_t=X, gamma=0.9, lam=0.9, n=2)
PPO = dict(logp=X, old_logp=X, advantage=X, clip=0.2)
VALUE = dict(value=X, old_value=X, target=X, clip=0.2)
WEIGHTED = dict(x=X, weight=FLAG)
LOGITS, PAIRS = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 3))


def td(function):
    return {name: TD[name] for name in inspect.signature(function).parameters if name in TD}


CASES = [
    *((f, td(f), "done_t", FLAG[:, :1]) for f in (returns.gae, returns.lambda_returns, returns.vtrace)),
    *((f, td(f), "v_tp1", X[:3]) for f in (returns.gae, returns.lambda_returns, returns.n_step_returns)),
    (returns.gae, td(returns.gae), "v_t", X[..., None]),
    (returns.gae, td(returns.gae), "terminated_t", X),
    (returns.vtrace, td(returns.vtrace), "log_rho_t", FLAG),
    (returns.n_step_returns, td(returns.n_step_returns), "terminated_t", FLAG[0]),
    (returns.discounted_returns, td(returns.discounted_returns), "done_t", X),
    (returns.discounted_returns, td(returns.discounted_returns), "r_t", jnp.float32(1.0)),
    (losses.ppo_clip, PPO, "old_logp", X[:, 0]),
    (losses.ppo_clip, PPO, "advantage", X[:, :1]),
    (losses.ppo_clip, PPO, "clip", X),
    (losses.clipped_value, VALUE, "old_value", X.T),
    (losses.clipped_value, VALUE, "target", X[0]),
    (losses.huber, dict(error=X), "error", FLAG),
    (losses.masked_mean, WEIGHTED, "weight", FLAG.T),
    (losses.masked_mean, WEIGHTED, "x", FLAG),
    (losses.masked_means, dict(terms={"a": X, "b": X}, weight=FLAG), "b", X.T),
    (losses.standardise, WEIGHTED, "weight", FLAG[:3]),
    (losses.standardise, WEIGHTED | dict(groups=(0, 1, 1)), "x", X[:, :1]),
    (losses.moments, WEIGHTED, "x", X.astype(int)),
    (losses.explained_variance, dict(value=X, target=X, weight=FLAG), "target", X[:, :1]),
    (diversity.jensen_shannon, dict(logits=LOGITS), "logits", LOGITS[0]),
    (diversity.total_variation, dict(logits=LOGITS), "logits", LOGITS[None]),
    (diversity.wasserstein, dict(mean=LOGITS, std=LOGITS), "std", LOGITS[..., :1]),
    (diversity.snd, dict(distances=PAIRS), "distances", LOGITS),
    (gradients.cosine_matrix, dict(gradients=X), "gradients", LOGITS),
    (gradients.interference, dict(gradients=X), "gradients", X[0]),
    (gradients.relative_variance, dict(gradients=X), "gradients", X.astype(int)),
    (stats.median, dict(x=X), "x", X[0]),
    (stats.improvement, dict(x=X, y=X), "y", X[:, :2]),
    (stats.profile, dict(x=X, taus=X[0]), "taus", X),
    (stats.by_task, dict(x=X), "x", X[0]),
    (stats.iqm_by_task, dict(x=X), "x", LOGITS),
    (gradients.entry_variance, dict(gradient=X[0]), "gradient", X),
]


@pytest.mark.parametrize(("function", "good", "argument", "bad"), CASES)
def test_a_wrong_array_is_refused_and_named(function, good, argument, bad):
    function(**good)
    wrong = good | {"terms": good["terms"] | {argument: bad}} if "terms" in good else good | {argument: bad}
    with pytest.raises(AssertionError, match=rf"argument {argument}\b"):
        function(**wrong)


def test_every_public_function_is_checked():
    modules = (returns, losses, diversity, gradients)
    own = [f for m in modules for f in vars(m).values() if inspect.isfunction(f) and f.__module__ == m.__name__]
    named = {function for function, *_ in CASES if function.__module__ != stats.__name__}
    assert {f for f in own if f.__name__[0] != "_"} == named
