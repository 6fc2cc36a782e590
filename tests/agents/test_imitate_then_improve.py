"""First imitate, then improve: the card's checks, stages, what the released code does differently, bad input."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import offline_data
import pytest

from jaxstack import agents
from jaxstack.agents import imitate_then_improve as method
from jaxstack.agents import offline, soft, td3
from jaxstack.core import config as configs
from jaxstack.core import stages
from jaxstack.core.errors import UserError
from jaxstack.core.learner import as_hypers
from jaxstack.core.runner import train
from jaxstack.data.files import save_dataset
from jaxstack.data.offline import dataset, returns_to_go, soft_returns_to_go
from jaxstack.measures import fitted_q

SIZES = dict(batch_size=8, actor_hidden=(6,), critic_hidden=(6,), eval_episodes=1)
SMALL = SIZES | dict(env=offline_data.ENV, env_args=("max_steps_in_episode=3",), num_updates=6)
QUIET = dict(progress=False, eval_every=-1, chunk=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return offline_data.write(tmp_path_factory.mktemp("data") / "tiny.npz")


def make(file, **options):
    return agents.make(
        "imitate-then-improve", **(SMALL | dict(dataset=file, num_critics=2, pretrain_steps=4) | options)
    )


def config(file, **options):
    return make(file, **options).config


def leaves(tree):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(data(x)) for x in jax.tree.leaves(tree)]


def equal(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def drawn(cfg, number=0):
    task = offline.make_task(cfg)
    source = offline.source(task)(cfg)
    return task, source.batch(source.constants(), np.int32(number), jax.random.key(3))[0]


def advanced(learner, steps=3):
    """The state after some steps on batches of the learner's own source."""
    source = learner.source(learner.config)
    constants = source.constants()
    step = jax.jit(
        lambda s, i: learner.step(s, source.batch(constants, i, jax.random.fold_in(jax.random.key(4), i)))[0]
    )
    state = jax.jit(learner.init)(jax.random.key(7), as_hypers(learner.hypers))
    for i in range(steps):
        state = step(state, np.int32(i))
    return state


@pytest.mark.parametrize("base", ["td3_bc", "rebrac", "edac"])
def test_without_pretraining_it_is_the_base_algorithm_bitwise(base, file):
    (stage,) = make(file, base=base, pretrain_steps=0).stages
    assert stage.steps == 6
    more = dict(num_critics=2) if base == "edac" else {}
    plain = agents.make(base, **SMALL, dataset=file, layer_norm=True, **more)
    own = {k: v for k, v in method.Hypers()._asdict().items() if k in plain.hypers._fields}
    mine, theirs = advanced(stage.make({})), advanced(agents.make(base, plain.config, **own))
    for part in ("params", "target", "opt_state", "key"):
        equal(getattr(mine, part), getattr(theirs, part))


def test_a_stage_begins_with_all_that_the_last_one_learned(file, tmp_path):
    method_ = make(file, base="edac")
    names = ["imitate", "value", "improve"]
    assert [s.name for s in method_.stages] == names
    whole = stages.train(method_, 2, run_dir=tmp_path / "run", checkpoint_every=1, **QUIET)
    before = whole.states["value"]
    learner = method_.stages[-1].make(whole.states)
    keys = jnp.stack([jax.random.key(i) for i in range(2)])
    begun = jax.jit(jax.vmap(lambda k, g: learner.init(k, learner.hypers, g)))(keys, learner.given)
    for part in ("params", "target", "opt_state", "mean", "std"):
        equal(getattr(begun, part), getattr(before, part))
    count = lambda state: int(state.opt_state["critic"][0].count[0])
    assert (count(before), count(whole.state)) == (2, 4)  # Adam's count continues
    table = method.counted(whole.metrics)
    assert sorted(set(table.updates)) == [1, 2, 3, 4, 5, 6]  # pretraining counts among num_updates
    assert list(dict.fromkeys(table.stage)) == names
    # stopped between two stages and continued: bitwise identical
    shutil.rmtree(tmp_path / "run" / "3_improve")
    again = stages.resume(make(file, base="edac"), tmp_path / "run", **QUIET)
    equal(again.state, whole.state)
    assert [s.name for s in make(file).stages] == ["imitate", "improve"]


def test_what_a_variant_trains_in_the_first_stage(file):
    for variant, changed in (("ac", {"actor", "critic"}), ("bc", {"actor"}), ("critic", {"critic"})):
        for compat in (False, True):
            cfg = config(file, variant=variant, reference_compat=compat)
            task, batch = drawn(cfg)
            nets = method.td3_nets(cfg, task)
            s = td3.init(nets, jax.random.key(0), as_hypers(cfg.hypers))
            new, metrics = jax.jit(lambda s, b, c=cfg, n=nets: method.pretrain_td3(c, n, s, b, jax.random.key(1)))(
                s, batch
            )
            moved = lambda a, b: {k for k in a if any((x != y).any() for x, y in zip(leaves(a[k]), leaves(b[k])))}
            assert moved(new.params, s.params) == changed
            # the release forgets the averaged actor where the actor alone is pretrained
            assert moved(new.target, s.target) == (set() if compat and variant == "bc" else changed)
            assert set(metrics) == {f"loss/{part}" for part in changed}
    assert [s.name for s in make(file, variant="none").stages] == ["improve"]


def test_the_mixture_has_value_one_and_the_directions_of_its_parts(file):
    cfg = config(file)
    task, batch = drawn(cfg)
    nets = method.td3_nets(cfg, task)
    s = td3.init(nets, jax.random.key(0), as_hypers(cfg.hypers))
    goal = jax.random.normal(jax.random.key(2), (8,))

    @jax.jit
    def slopes(critic):
        slope = lambda **options: jax.value_and_grad(
            lambda c: method.critic_loss(configs.replace(cfg, **options), nets.critics, batch, 0.0, goal, c)
        )(critic)
        part = lambda to: jax.grad(lambda c: td3.regression(nets, c, batch, to))(critic)
        return [slope(td_component=x) for x in (0.0, 0.25, 1.0)], part(batch.returns), part(goal)

    (mc, half, td), own, temporal = slopes(s.params["critic"])
    flat = lambda tree: np.concatenate([x.ravel() for x in leaves(tree)])
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine(flat(mc[1]), flat(own)) == pytest.approx(1.0, abs=1e-5)
    assert cosine(flat(td[1]), flat(temporal)) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(flat(half[1]), 0.75 * flat(mc[1]) + 0.25 * flat(td[1]), rtol=1e-3, atol=1e-5)
    for value, _ in (mc, half, td):
        assert float(value) == pytest.approx(1.0, abs=1e-5)
    # a negative loss is lowered too; the released form raises it
    assert float(jax.grad(method.relative)(-2.0)) == pytest.approx(0.5)
    assert float(jax.grad(lambda x: method.relative(x, True))(-2.0)) == pytest.approx(-0.5)


def test_pretraining_finds_the_values_of_a_deterministic_behaviour(tmp_path):
    """A walk over 5 states to a terminal reward: Q = gamma^k, and temporal differences then change it by less than the
    tolerance. The critic alone: Pendulum's numbers stand for the states."""
    length, copies = 5, 4
    states = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    done = np.tile(np.arange(length) == length - 1, copies)
    obs = np.tile(states, (copies, 1))
    rows = dict(obs=obs, action=np.zeros((len(obs), 1)), reward=done.astype(np.float32), terminated=done)
    rows["next_obs"] = np.where(done[:, None], obs, np.roll(obs, -1, 0))
    path = save_dataset(tmp_path / "walk.npz", dataset("walk", **rows))
    cfg = config(str(path), batch_size=32, critic_hidden=(32,), layer_norm=False, lr=3e-3, num_updates=5000)
    task = offline.make_task(cfg)
    source = offline.source(task)(cfg)
    nets = method.td3_nets(cfg, task)
    constants = source.constants()
    draw = lambda key: source.batch(constants, np.int32(0), key)[0]

    @jax.jit
    def run(key):
        s = td3.init(nets, key, as_hypers(cfg.hypers))
        one = lambda s, k: (method.pretrain_td3(cfg, nets, s, draw(k), k)[0], None)
        s, _ = jax.lax.scan(one, s, jax.random.split(key, 3000))
        batch = jax.tree.map(lambda x: jnp.asarray(x)[:length], constants[0])
        new, _ = td3.update(nets, s, draw(key), jnp.int32(0), td3.draw(nets, key, 32))
        q = lambda s: nets.critics(s.params["critic"], batch.obs, batch.action)
        return q(s), q(new), batch.returns, nets.actor(s.params["actor"], batch.obs)

    before, after, returns, action = run(jax.random.key(0))
    np.testing.assert_allclose(returns, 0.99 ** np.arange(4, -1, -1), rtol=1e-5)
    np.testing.assert_allclose(before, np.broadcast_to(returns, before.shape), atol=1e-2)
    assert float(jnp.abs(after - before).max()) < 1e-2
    np.testing.assert_allclose(action, 0, atol=1e-2)


def test_rewards_twice_as_large_double_the_returns_and_leave_the_actor(file):
    data = offline.read(file)
    cfg = config(file)
    task, batch = drawn(cfg)
    twice = data._replace(reward=2 * data.reward)
    a, b = (offline.rows_of(task, d, "tiny", 0.99).batch.returns for d in (data, twice))
    np.testing.assert_allclose(b, 2 * a, rtol=1e-6)
    nets = method.td3_nets(cfg, task)
    s = td3.init(nets, jax.random.key(0), as_hypers(cfg.hypers))
    critic, last = s.params["critic"], "Dense_1"
    double = critic | {last: jax.tree.map(lambda x: 2 * x, critic[last])}
    slope = jax.jit(lambda c: jax.grad(lambda a: td3.actor_loss(nets, a, c, batch, s.hypers))(s.params["actor"]))
    for x, y in zip(leaves(slope(critic)), leaves(slope(double)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_soft_returns_come_from_the_cloned_actor_once_and_from_the_data_alone(file, monkeypatch):
    data = offline.read(file)
    open_flag = lambda flag: np.append(flag[:-1], False)
    open_end = data._replace(truncated=open_flag(data.truncated), terminated=open_flag(data.terminated))
    for compat in (False, True):
        cfg = config(file, base="edac", reference_compat=compat)
        task = offline.make_task(cfg)
        nets = method.soft_nets(cfg, task)
        s = soft.init(nets, jax.random.key(0), as_hypers(cfg.hypers))
        s = s._replace(params=s.params | {"log_alpha": jnp.log(0.3)})
        rows = offline.rows_of(task, open_end, "tiny", 0.99)
        monkeypatch.setattr(method, "BLOCK", 7)
        found = np.asarray(method.soft_returns(cfg, nets, rows, s))
        key = jax.random.fold_in(s.key, 2**31 - 1)
        noise = jax.random.normal(key, (data.size + 1, 1))
        obs = np.concatenate([rows.all_obs, np.zeros((1, 3), np.float32)])
        entropy = -np.asarray(nets.actor(s.params["actor"], obs).sample_from(noise)[1])
        out, gamma, behind = np.zeros(data.size), 0.99, 0.0  # `behind`: the return of the next row with its entropy
        for t in reversed(range(data.size)):
            r, h = float(open_end.reward[t]), 0.3 * float(entropy[t])
            open_row = t == data.size - 1
            if rows.ends[0][t]:
                out[t], behind = r, r + h
            elif compat and open_row:  # zeros behind the data
                out[t] = r + gamma * 0.3 * float(entropy[-1]) / (1 - gamma)
                behind = out[t] + h
            elif rows.ends[1][t] or open_row:
                behind = (r + h) / (1 - gamma)
                out[t] = r / (1 - gamma) if compat else behind - h
            else:
                out[t] = r + gamma * behind
                behind = out[t] + h
        np.testing.assert_allclose(found, out, rtol=2e-4, atol=1e-3)
    # without entropies soft and hard returns are equal
    flags = data.terminated, data.truncated
    np.testing.assert_array_equal(
        soft_returns_to_go(data.reward, 0 * data.reward, *flags, 0.9, 1.0), returns_to_go(data.reward, *flags, 0.9)
    )


def test_what_the_release_does_differently(file):
    mine, theirs = config(file), config(file, reference_compat=True)
    # time limits end values in both stages
    task, batch = drawn(configs.replace(theirs, bootstrap_on_timeout=False))
    data = offline.read(file)
    make_ = lambda cfg: method.imitate_then_improve(cfg).stages[0].make({})
    last = lambda cfg: np.asarray(make_(cfg).source(make_(cfg).config).constants()[0].last)
    np.testing.assert_array_equal(last(mine), data.terminated)
    np.testing.assert_array_equal(last(theirs), data.terminated | data.truncated)
    # next observations that are not stored are rolled after they were standardised, and standardised again
    rolled = offline.rows_of(task, data, "tiny", 0.99, rolled=True)
    plain = offline.rows_of(task, data, "tiny", 0.99)
    twice = (np.roll(np.asarray(plain.batch.obs), -1, 0) - plain.shared.mean) / plain.shared.std
    np.testing.assert_allclose(rolled.batch.next_obs, twice, rtol=1e-5)
    # EDAC: an epoch more, beside what counts; errors averaged over critics; log(1 - tanh^2 + 1e-6)
    edac = dict(base="edac", pretrain_steps=4)
    assert [s.steps for s in make(file, **edac).stages] == [2, 2, 2]
    assert [s.steps for s in make(file, **edac, reference_compat=True).stages] == [502, 502, 2]
    far = jnp.full((1, 1), 20.0)
    exact, released = (
        type_(far, jnp.zeros((1, 1))).sample_from(jnp.zeros((1, 1)))[1][0]
        for type_ in (method.TanhNormal, method.ReleasedActor)
    )
    assert float(exact) > 30
    assert float(released) < 15
    cfg = config(file, **edac, eta=0.0, num_critics=3)
    nets = method.soft_nets(cfg, task)
    s = soft.init(nets, jax.random.key(0), as_hypers(cfg.hypers))
    noise = soft.draw(nets, jax.random.key(1), 8)
    loss = lambda c: float(
        jax.jit(lambda s: method.evaluate_soft(c, nets, s, batch, batch.returns, noise)[1])(s)["loss/critic"]
    )
    assert loss(cfg) == pytest.approx(3 * loss(configs.replace(cfg, reference_compat=True)), rel=1e-5)
    # the hard returns of its edac know no time limit
    correct = offline.rows_of(task, data, "tiny", 0.99, correct=False).batch.returns
    np.testing.assert_allclose(
        correct, returns_to_go(data.reward, data.terminated, data.truncated, 0.99, False), rtol=1e-5
    )


def test_hybrids_keep_their_terms_in_the_second_stage(file):
    for options in (dict(keep_conservative=True, conservative=1.0), dict(base="edac", cloning=1.0)):
        part = "actor" if "cloning" in options else "critic"
        base = {k: v for k, v in options.items() if k == "base"}
        one, plain = (make(file, pretrain_steps=0, **o).stages[0].make({}) for o in (options, base))
        a, b = advanced(one, 1).params[part], advanced(plain, 1).params[part]
        assert any((x != y).any() for x, y in zip(leaves(a), leaves(b)))


def test_iterations_on_a_chain_are_those_of_the_bound():
    eps = 1e-3
    for length, gamma, horizon in ((5, 0.9, 7), (20, 0.95, 33), (30, 0.99, 200)):
        chain = fitted_q.ring(length, gamma)
        q = fitted_q.values(chain)
        np.testing.assert_allclose(q, chain.reward + gamma * q[chain.following], rtol=1e-12)
        zero, error_0 = fitted_q.iterations(chain, 0 * q, eps)
        start = fitted_q.monte_carlo(chain, horizon)
        known, error_mc = fitted_q.iterations(chain, start, eps)
        assert abs(zero - fitted_q.predicted(eps, error_0, gamma)) < 1
        assert abs(known - fitted_q.predicted(eps, error_mc, gamma)) < 1
        saved = np.log(error_mc / error_0) / np.log(gamma)
        assert abs(zero - known - saved) <= 1
        assert known < zero or error_mc >= error_0
        # the estimate is the sum of an episode's rewards
        np.testing.assert_allclose(
            fitted_q.monte_carlo(chain, horizon, False), q - gamma**horizon * q[(np.arange(length) + horizon) % length]
        )
    assert fitted_q.iterations(chain, q, eps) == (0, 0.0)
    assert fitted_q.predicted(eps, 0.0, 0.9) == 0.0
    for options in ((0, 0.9), (3, 1.0)):
        with pytest.raises(UserError, match="expected"):
            fitted_q.ring(*options)


def test_bad_input_is_named(file):
    for options, message in (
        (dict(pretrain_steps=6), "pretrain_steps=6: expected less than num_updates=6"),
        (dict(td_component=1.5), r"td_component=1.5: expected a number in \[0, 1\]"),
        (dict(base="edac", conservative=1.0), "conservative=1.0: expected 0 with base edac"),
        (dict(cloning=1.0), "cloning=1.0: expected 0 with base td3_bc"),
        (dict(base="rebrac", keep_conservative=True), "keep_conservative=True: expected false"),
        (dict(returns="soft"), "returns='soft': expected soft only with base edac and variant ac"),
        (dict(base="cql"), "base='cql'"),
    ):
        with pytest.raises(UserError, match=message):
            make(file, **options)
    # returns-to-go have the config's discount: another one in a sweep is refused, not ignored
    learner = make(file).stages[0].make({})
    with pytest.raises(UserError, match="gamma, which is that of the returns-to-go"):
        train(learner, seeds=1, hypers=learner.hypers._replace(gamma=0.5), progress=False)
