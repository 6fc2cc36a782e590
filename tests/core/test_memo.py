"""What was compiled once in a process is not compiled again."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_learners import Hypers, ToyConfig, assert_same, regression

from jaxstack import agents
from jaxstack.core import memo
from jaxstack.core.errors import UserError
from jaxstack.core.runner import train
from jaxstack.measures import conventions, crossplay, partners

QUIET = dict(progress=False)


def compiled(function):
    """(result, how many programs XLA was asked for by our own calls and by JAX's)."""
    events = []
    listen = lambda name, *_, **__: events.append(name) if name.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return function(), len(events)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def fresh(run):
    return [p.name for p in run.ledger.programs if not p.reused]


def test_the_second_identical_run_compiles_nothing_and_is_the_same():
    first, count = compiled(lambda: train(regression(), 4, 2, **QUIET))
    assert count >= 3
    second, count = compiled(lambda: train(regression(), 4, 2, max_compiles=1, **QUIET))
    assert count == 0
    assert fresh(first) == [p.name for p in second.ledger.programs]
    assert fresh(second) == []
    assert second.ledger.seconds == 0.0
    assert_same(first.state, second.state)
    assert first.metrics.equals(second.metrics)


def test_only_what_has_other_shapes_is_compiled():
    train(regression(), 4, 2, **QUIET)
    assert fresh(train(regression(), 4, [7, 9], hypers=Hypers(lr=0.5), **QUIET)) == []  # other values
    assert fresh(train(regression(), 4, 2, hypers=Hypers(lr=jnp.array([0.1, 0.2])), **QUIET)) == ["init"]
    assert len(fresh(train(regression(), 4, 3, **QUIET))) == 3
    assert fresh(train(regression(), 4, 2, chunk=2, **QUIET)) == ["chunk"]
    assert len(fresh(train(regression(ToyConfig(width=5)), 4, 2, **QUIET))) == 3
    with pytest.raises(UserError, match="max_compiles=1"):
        train(regression(), 4, 5, max_compiles=1, **QUIET)


def test_a_learner_with_another_function_is_another():
    one = regression()
    scaled = lambda by: one._replace(step=lambda s: (one.step(s)[0], {"loss/total": jnp.float32(by)}))
    runs = [train(scaled(by), 1, **QUIET).metrics["loss/total"].item() for by in (1.0, 2.0, 1.0)]
    assert runs == [1.0, 2.0, 1.0]


def test_a_reused_program_still_says_why_a_seed_was_frozen(capsys):
    for _ in range(2):
        train(regression(), 4, 2, hypers=Hypers(poison=jnp.array([-1.0, 2.0])), **QUIET)
    assert capsys.readouterr().out.count("seed 1: loss/total is not finite at step 2") == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ppo", {"env": "gymnax/CartPole-v1"}),
        ("ippo", {"env": "jaxmarl/MPE_simple_spread_v3"}),
        ("mappo", {"env": "navigation", "gru": 4}),
        ("hypermarl", {"env": "dispersion"}),
        ("happo", {"env": "navigation"}),
    ],
)
def test_agents_from_equal_configs_are_one_and_others_are_not(name, options):
    print_of = lambda **more: memo.fingerprint(agents.make(name, **options, **more))
    assert print_of() == print_of()
    assert hash(print_of()) == hash(print_of())
    assert print_of() != print_of(num_envs=32)


def test_fingerprints_tell_values_apart():
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        x: float

    @dataclasses.dataclass
    class Loose:
        x: float

    def make(x):
        return lambda y, z=x: y + z + x

    same = memo.fingerprint
    assert same(make(1)) == same(make(1))
    assert same(make(1)) != same(make(1.0))
    assert same(make(0.0)) != same(make(-0.0))
    assert same(partial(make, 1)) == same(partial(make, 1))
    assert same(Frozen(1.0)) == same(Frozen(1.0))
    assert same(Frozen(1.0)) != same(Frozen(2.0))
    assert same(Loose(1.0)) != same(Loose(1.0))  # may change
    assert same(np.arange(3)) == same(np.arange(3))
    assert same(np.arange(3)) != same(np.arange(4))
    assert same(True) != same(1)


def test_few_learners_are_kept():
    for width in range(memo.LEARNERS + 3):
        memo.programs(ToyConfig(width=width + 1))
    assert len(memo._known) == memo.LEARNERS
    store = memo.programs(1)
    for i in range(memo.PROGRAMS + 2):
        memo.keep(store, i, i)
    assert list(store) == list(range(2, memo.PROGRAMS + 2))


def test_a_second_evaluation_compiles_nothing():
    """Of members across environments, in mixed teams, and with given partners."""
    options = dict(env="matrix_game", num_envs=2, num_steps=4, num_minibatches=1, hidden=(4,), total_steps=8)

    def scores(states=None):
        learner = agents.make("ippo", **options)
        if states is None:
            states = jax.jit(jax.vmap(learner.init))(jax.random.split(jax.random.key(0), 2))
        env = learner.env
        return states, (
            crossplay.evaluate_many(learner, states, episodes=3)[env.spec.id].returns,
            crossplay.cross_play(learner, states, episodes=3).returns,
            conventions.with_partner(learner, states, env, partners.constant(1), jax.random.key(1), 3),
        )

    states, first = scores()
    (_, second), count = compiled(lambda: scores(states))
    assert count == 0
    assert_same(first, second)
