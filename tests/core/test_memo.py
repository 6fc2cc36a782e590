"""What was compiled once in a process is not compiled again."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_learners import Hypers, ToyConfig, assert_same, classifier, regression

from jaxstack import agents
from jaxstack.core import memo
from jaxstack.core.config import watched
from jaxstack.core.errors import UserError
from jaxstack.core.runner import load_state, resume, train
from jaxstack.data.sources import ArrayData, HostData, RandomData
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


BEGUN = []


def test_a_stored_run_is_read_without_tracing_its_beginning_again(tmp_path):
    def make(size=3):
        def init(key, hypers=Hypers()):
            BEGUN.append(size)
            return regression(ToyConfig(width=size)).init(key, hypers)

        return regression(ToyConfig(width=size))._replace(init=init)

    whole = train(make(), 4, 2, run_dir=tmp_path / "run", **QUIET)
    assert BEGUN
    BEGUN.clear()
    assert_same(load_state(make(), tmp_path / "run"), whole.state)
    assert_same(resume(make(), tmp_path / "run", **QUIET).state, whole.state)
    assert BEGUN == []
    with pytest.raises(UserError, match="no usable checkpoint"):  # another one's shapes are not these
        load_state(make(4), tmp_path / "run")
    assert BEGUN


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
    def print_of(**more):
        learner = agents.make(name, **options, **more)
        return memo.fingerprint(learner._replace(hypers=None, init=memo.Given(learner.init, 2)))

    assert print_of() == print_of()
    assert hash(print_of()) == hash(print_of())
    assert print_of() == print_of(lr=0.1, gamma=0.5)  # these are traced
    assert print_of() != print_of(num_envs=32)


def test_a_number_that_is_read_while_tracing_is_part_of_what_is_compiled():
    """A learner may read its config's numbers against the rule: it then has programs for each of them."""

    @dataclasses.dataclass(frozen=True)
    class Config(ToyConfig):
        hypers: Hypers = Hypers()

    def make(lr):
        config, one = Config(hypers=Hypers(lr=lr)), regression()
        step = lambda s: (one.step(s)[0], {"loss/total": jnp.float32(config.hypers.lr)})
        return one._replace(step=step, config=config, hypers=config.hypers)

    for lr in (0.1, 0.2, 0.1, 0.3):
        run = train(make(lr), 1, **QUIET)
        assert run.metrics["loss/total"].item() == np.float32(lr)
    assert len(fresh(run)) == 3  # the first time with this number
    assert fresh(train(make(0.1), 1, **QUIET)) == []
    config = Config(hypers=Hypers(lr=0.5))
    played = [memo.jit(lambda x, c=Config(hypers=Hypers(lr=lr)): x + c.hypers.lr)(1.0) for lr in (0.5, 0.25, 0.5)]
    assert [float(x) for x in played] == [1.5, 1.25, 1.5]
    assert memo.fingerprint(config) == memo.fingerprint(Config())
    assert memo.fingerprint(config, numbers=True) != memo.fingerprint(Config(), numbers=True)
    with watched() as read:  # a fingerprint that is made while something is traced reads no number
        memo.fingerprint(lambda: config, numbers=True)
    assert read == []


def test_defaults_of_what_is_always_given_do_not_matter():
    def make(count, number, step=0.0):
        def init(key, hypers=number, other=step):
            return key, hypers, other

        return memo.fingerprint(memo.Given(init, count))

    assert make(2, 1.0) == make(2, 2.0)
    assert make(1, 1.0) != make(1, 2.0)
    assert make(2, 1.0, 3.0) != make(2, 1.0, 4.0)


def test_sources_with_other_arrays_share_programs():
    """Arrays are arguments; what a subclass adds is not known to be one."""
    rows = lambda seed: (np.random.default_rng(seed).normal(size=(8, 64)), np.arange(8) % 10)
    run = lambda data: train(classifier(), 2, data=data, **QUIET)
    for kind in (ArrayData, RandomData):
        run(kind(rows(0), 4))
        assert fresh(run(kind(rows(1), 4))) == []
        assert "chunk" in fresh(run(kind(rows(1), 8)))
    run(HostData(lambda step: jax.tree.map(lambda x: x[:4], rows(step))))
    assert fresh(run(HostData(lambda step: jax.tree.map(lambda x: x[4:], rows(step))))) == []

    # where the rows come from is no part of the program, what a batch is made of them is
    def from_object(seed, augment=None):
        held = object()
        make = lambda config: (held, RandomData(rows(seed), 4, augment=augment))[1]
        return classifier()._replace(source=make, takes_batch=False)

    train(from_object(0), 2, **QUIET)
    assert fresh(train(from_object(1), 2, **QUIET)) == []
    assert "chunk" in fresh(train(from_object(1, lambda key, batch: (batch[0] + 1.0, batch[1])), 2, **QUIET))

    class Own(RandomData):
        def _rows(self, constants, item, key):
            return super()._rows(jax.tree.map(lambda x: x * self.seed, constants), item, key)

    assert memo.fingerprint(Own(rows(0), 4)) != memo.fingerprint(Own(rows(0), 4))


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
        with memo.programs(ToyConfig(width=width + 1)):
            pass
    assert len(memo._known) == memo.LEARNERS
    with memo.programs(1) as store:
        pass
    for i in range(memo.PROGRAMS + 2):
        memo.keep(store, i, i)
    assert list(store) == list(range(2, memo.PROGRAMS + 2))


def test_a_second_evaluation_compiles_nothing():
    """Of members across environments, in mixed teams, and with given partners; nor one of a learner whose numbers
    differ."""
    options = dict(env="matrix_game", num_envs=2, num_steps=4, num_minibatches=1, hidden=(4,), total_steps=8)

    def scores(states=None, **numbers):
        learner = agents.make("ippo", **options, **numbers)
        if states is None:
            states = jax.jit(jax.vmap(learner.init))(jax.random.split(jax.random.key(0), 2))
        env = learner.env
        return states, (
            crossplay.evaluate_many(learner, states, episodes=3)[env.spec.id].returns,
            crossplay.cross_play(learner, states, episodes=3).returns,
            conventions.with_partner(learner, states, env, partners.constant(1), jax.random.key(1), 3),
        )

    states, first = scores()
    for numbers in ({}, {"lr": 0.1}):
        (_, second), count = compiled(lambda n=numbers: scores(states, **n))
        assert count == 0
        assert_same(first, second)
