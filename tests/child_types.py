"""Run by test_types.py in a process of its own: main functions of core, nn, measures and envs with beartype checking
their annotations, shapes too."""

from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, install_import_hook

PACKAGES = ["jaxstack.core", "jaxstack.nn", "jaxstack.measures", "jaxstack.envs"]
check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float


def refuses(function, *args):
    try:
        function(*args)
    except TypeCheckError:
        return True
    return False


def main():
    import jax
    import jax.numpy as jnp

    from jaxstack import agents
    from jaxstack.core import groups, losses, returns, runner, running
    from jaxstack.measures import diversity, forecast_scores, gradients, signature_mmd

    x, flag = jnp.ones((4, 2, 3)), jnp.zeros((4, 2, 3), bool)
    returns.gae(x, x, x, flag, flag, 0.9, jnp.float32(0.9))
    returns.lambda_returns(x, x, flag, flag, 0.9, 0.9)
    returns.n_step_returns(x, x, flag, flag, 0.9, 2)
    returns.discounted_returns(x, flag, 1)
    returns.vtrace(x, x, x, flag, flag, x, 0.9)
    losses.huber(x)
    for team in ((), (0, 1, 1)):
        losses.explained_variance(x, x, flag, team)
        losses.standardise(x, ~flag, groups=team)
        running.apply(running.of_agents(running.init_groups((), team), team), x)
    groups.clip_by_norms(1.0).update({"w": x}, ())
    diversity.snd(diversity.jensen_shannon(x) + diversity.total_variation(x) + diversity.wasserstein(x, x))
    gradients.interference(x[0]), gradients.relative_variance(x[0]), gradients.entry_variance(x[0, 0])

    paths = signature_mmd.make_paths(jax.random.normal(jax.random.key(0), (5, 3, 1)))
    weights = signature_mmd.TailWeights.fit(paths, 0 * paths[0])
    signature_mmd.csig_mmd2(paths, paths[:3, :-1], weights, normalize=True)
    signature_mmd.permutation_p(jax.random.key(0), signature_mmd.grams(paths, paths), 2)
    signature_mmd.csig_score(paths, paths[0], weights)
    forecast_scores.crps(paths, paths[0]), forecast_scores.variogram_score(paths, paths[0])

    tiny = dict(num_envs=2, num_steps=4, num_minibatches=2, num_epochs=1, hidden=(4,), total_steps=16, eval_episodes=2)
    quiet: Any = dict(progress=False, chunk=1)
    for name, options in (
        ("ippo", dict(env="matrix_game", sharing="none", normalise_value=True, normalise_reward=True)),
        ("ppo", dict(env="gymnax/CartPole-v1", gru=4, normalise_obs=True, pool_size=2)),
    ):
        learner = agents.make(name, **tiny, **options)
        result = runner.train(learner, seeds=2, **quiet)
        assert result.alive.all()
    jax.block_until_ready(result.state)

    # the check is on, for shapes too
    assert refuses(returns.gae, x, x, x, x, flag, 0.9, 0.9)
    assert refuses(diversity.snd, x[0])
    assert refuses(gradients.entry_variance, x)
    assert refuses(losses.ppo_clip, x, x[0], x, 0.2)
    assert refuses(signature_mmd.signature_kernel, paths, paths[0])
    print("all checked")


if __name__ == "__main__":
    with install_import_hook(PACKAGES, "child_types.check"):
        main()
