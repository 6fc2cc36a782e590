"""MATE (Schäfer et al., 2022): the embeddings' loss, what a team remembers, MAA2C's returns, frozen adaptation, bad
input. Numbers by hand are those of the method's definition."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import make, train

from jaxstack import agents, cli
from jaxstack.agents import mate, mate_team
from jaxstack.agents.task_embedding import Batch, Coefs, Embedder, kl_to_standard_normal, mate_loss, mixture
from jaxstack.claims import mate as claims
from jaxstack.claims.harness import problems
from jaxstack.core import returns, runner
from jaxstack.core.errors import UserError
from jaxstack.core.learner import as_hypers
from jaxstack.envs import rollout
from jaxstack.envs.hidden_corner import HiddenCorner, optimum
from jaxstack.measures import crossplay

TINY = dict(
    env="hidden_corner", num_envs=4, hidden=(8,), gru=0, emb_dim=2, encoder_hidden=8, decoder_hidden=(8,),
    mixer_hidden=(8,), eval_episodes=4, total_steps=60,
)  # fmt: skip
A, O, K, T, N = 2, 3, 2, 4, 5
KEY = jax.random.key(0)


def tiny(**options):
    return agents.make("mate", **(TINY | options))


def embedder(mode, **options):
    return Embedder(mode, A, O, K, **(dict(dim=3, hidden=8, decoder=(8,), mixer=(8,)) | options))


@functools.cache
def begun(mode, **options):
    """Parameters of `embedder`."""
    return jax.jit(embedder(mode, **options).init)(KEY)


def batch_of(e, mask=None):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(T, N, *shape)), jnp.float32)
    mask = np.ones((T, N), bool) if mask is None else mask
    z = draw(e.encoders, e.width)
    return Batch(z, draw(A * O), draw(A * K), draw(A * O), draw(A), jnp.asarray(mask))


def zero(tree):
    return all(bool((np.asarray(x) == 0).all()) for x in jax.tree.leaves(tree))


def test_kl_of_known_gaussians():
    assert float(kl_to_standard_normal(jnp.zeros(3), jnp.zeros(3))) == 0.0
    assert float(kl_to_standard_normal(jnp.ones(3), jnp.zeros(3))) == 1.5
    # var 4: (4 - 1 - ln 4) / 2 per dimension
    wide = kl_to_standard_normal(jnp.zeros(2), jnp.full(2, np.log(4.0)))
    assert float(wide) == pytest.approx(3 - np.log(4), rel=1e-6)


def test_returns_of_the_card_and_of_the_released_code():
    column = lambda *x: jnp.asarray(x, jnp.float32).reshape(-1, 1, 1)
    reward, over = column(1, 0, 2), column(0, 1, 0) > 0
    following = column(0, 0, 10)
    right = returns.lambda_returns(reward, following, over, over, 0.5, 1.0)
    np.testing.assert_allclose(right.ravel(), [1, 0, 7])
    late = mate.late_mask_returns(reward, column(1, 1, 0) > 0, jnp.full((1, 1), 10.0), 0.5)
    np.testing.assert_allclose(late.ravel(), [1.5, 1.0, 2.0])


def by_hand(e, params, batch, coefs, key):
    """The loss in NumPy, one transition and encoder after another, for deterministic encoders."""
    total = []
    for t, n in np.ndindex(T, N):
        each = []
        for i in range(e.encoders):
            x = np.concatenate([batch.embedding[t, n, i], batch.obs[t, n], batch.action[t, n]])
            w = params["decoder"]["params"]
            h = np.maximum(x @ w["Dense_0"]["kernel"] + w["Dense_0"]["bias"], 0)
            out = h @ w["Dense_1"]["kernel"] + w["Dense_1"]["bias"]
            errors = np.square(out - np.concatenate([batch.next_obs[t, n], batch.reward[t, n]]))
            each.append(coefs.obs * errors[: A * O].mean() + coefs.reward * errors[A * O :].mean())
        if e.mode == "mix":
            w = params["mixer"]["params"]
            h = np.maximum(batch.obs[t, n] @ w["Dense_0"]["kernel"] + w["Dense_0"]["bias"], 0)
            g = np.exp(h @ w["Dense_1"]["kernel"] + w["Dense_1"]["bias"])
            each = np.asarray(each) * (g / g.sum()) * e.encoders
        total.append(np.mean(each) * bool(batch.mask[t, n]))
    return np.sum(total) / batch.mask.sum()


@pytest.mark.parametrize("mode", ["ind", "cen", "mix"])
def test_the_loss_is_the_one_of_its_definition(mode):
    e, params = embedder(mode, deterministic=True), begun(mode, deterministic=True)
    batch = batch_of(e, np.random.default_rng(5).random((T, N)) < 0.7)
    coefs = Coefs(0.7, 1.3, 0.1)
    got, metrics = jax.jit(lambda: mate_loss(e, params, batch, coefs, KEY))()
    assert float(got) == pytest.approx(by_hand(e, params, jax.tree.map(np.asarray, batch), coefs, KEY), rel=1e-5)
    assert float(metrics["loss/kl"]) == 0.0
    assert e.encoders == (1 if mode == "cen" else A)


def test_the_mixture_is_exact_and_trains_its_gate():
    each = jnp.array([[3.0, 5.0], [1.0, 2.0]])
    np.testing.assert_allclose(mixture(jnp.array([[1.0, 0.0], [0.25, 0.75]]), each), [3.0, 1.75])
    e, params = embedder("mix", deterministic=True), begun("mix", deterministic=True)
    batch = batch_of(e)
    # a gate that is sure of agent 0
    sure = jax.tree.map(jnp.zeros_like, params["mixer"])
    sure["params"]["Dense_1"]["bias"] = jnp.array([200.0, -200.0])
    agent_0_alone = batch._replace(embedding=jnp.stack([batch.embedding[:, :, 0]] * 2, 2))

    @jax.jit
    def values():
        def of(mode, mixer, batch, released=False):
            one = embedder(mode, deterministic=True)
            return mate_loss(one, params | {"mixer": mixer}, batch, Coefs(), KEY, released)[0]

        gate = [jax.grad(lambda m, r=r: of("mix", m, batch, r))(params["mixer"]) for r in (False, True)]
        slope = jax.grad(lambda z: of("mix", sure, batch._replace(embedding=z)))(batch.embedding)
        return of("mix", sure, batch), of("ind", sure, agent_0_alone), *gate, slope

    mixed, alone, right, released, slope = values()
    assert float(mixed) == pytest.approx(float(alone), rel=1e-6)
    assert not zero(right)
    assert zero(released)
    assert zero(slope[:, :, 1])
    assert not zero(slope[:, :, 0])


def test_transitions_that_end_an_episode_count_nothing():
    e, params, mask = embedder("ind"), begun("ind"), np.ones((T, N), bool)
    mask[2, 1] = False
    batch = batch_of(e, mask)
    other = batch._replace(next_obs=batch.next_obs.at[2, 1].set(99.0), reward=batch.reward.at[2, 1].set(-99.0))
    of = lambda p, b: mate_loss(e, p, b, Coefs(), KEY)[0]
    grads = jax.jit(jax.grad(of, argnums=(0, 1), allow_int=True))
    (a, by_data), (b, _) = grads(params, batch), grads(params, other)
    jax.tree.map(np.testing.assert_array_equal, a["decoder"], b["decoder"])
    assert zero(by_data.embedding[2, 1])
    assert not zero(by_data.embedding[2, 0])


def test_the_released_kl_grows_with_the_batch():
    e, params, coefs = embedder("ind"), begun("ind"), Coefs(0.0, 0.0, 1.0)
    batch = batch_of(e)
    both = jax.jit(lambda: [mate_loss(e, params, batch, coefs, KEY, released)[0] for released in (False, True)])()
    assert float(both[1]) == pytest.approx(float(both[0]) * T * N * e.encoders, rel=1e-5)


def test_padding_is_no_target_and_probabilistic_decoders_are_bounded():
    e = embedder("ind", deterministic=True, obs_sizes=(O, 1))
    batch, params = batch_of(e), begun("ind", deterministic=True)
    padded = batch.next_obs.at[..., O + 1 :].set(7.0)
    value = jax.jit(lambda b: mate_loss(e, params, b, Coefs(), KEY)[0])
    assert float(value(batch)) == float(value(batch._replace(next_obs=padded)))
    e, params = embedder("cen", probabilistic=True), begun("cen", probabilistic=True)
    batch = batch_of(e)

    @jax.jit
    def probabilistic():
        loss, _ = mate_loss(e, params, batch, Coefs(1.0, 0.0, 0.0), KEY)
        return loss, *e.decode(params, e.moments(batch.embedding)[0], batch.obs, batch.action)

    loss, mean, _, log_std = probabilistic()
    assert mean.shape == (T, N, 1, A * O)
    assert log_std.shape == (T, N, 1, A * (O + 1))
    assert float(log_std.min()) >= -4.0
    assert np.isfinite(float(loss))


@pytest.mark.parametrize("mode", ["ind", "cen"])
def test_encoders_read_an_episode_whole_or_in_parts(mode):
    e = embedder(mode)
    params, x = begun(mode), jnp.asarray(np.random.default_rng(2).normal(size=(12, N, A, O + K + 1)), jnp.float32)
    first = np.zeros((12, N), bool)

    @jax.jit
    def read(first):
        whole = e.encode(params, e.start(N), x, first)
        h, parts = e.start(N), []
        for i in range(0, 12, 4):
            h, part = e.encode(params, h, x[i : i + 4], first[i : i + 4])
            parts.append(part)
        return whole, (h, jnp.concatenate(parts))

    (h, whole), (h_parts, parts) = read(first)
    np.testing.assert_allclose(whole, parts, atol=1e-6)
    np.testing.assert_allclose(h, h_parts, atol=1e-6)
    assert whole.shape == (12, N, e.encoders, 6)
    first[[4, 8]] = True
    (_, cleared), _ = read(first)
    np.testing.assert_allclose(cleared[:4], whole[:4], atol=1e-6)
    assert float(jnp.abs(cleared[4:] - whole[4:]).max()) > 1e-3
    assert e.for_agents(whole).shape == (12, N, A, 6)


def task_of(**options):
    return mate_team.make_task(mate.Config(**(TINY | options)))


@functools.cache
def two_rollouts(**options):
    """A task, the state after a rollout, and the next rollout and its batch."""
    task = task_of(**options)

    @jax.jit
    def go():
        learner = mate.make_learner(task)
        s = learner.init(KEY, as_hypers(learner.hypers))
        act, draw = mate.actor(task, s.params, training=True)

        def play(c, key):
            played = rollout.collect(task.vec, act, key, *c, 5, draw, finals="cuts")
            return (played.vec, played.carry), (*c, played)

        _, both = jax.lax.scan(play, (s.vec, s.carry), jnp.stack([jax.random.key(0), jax.random.key(1)]))
        vec, carry, played = jax.tree.map(lambda x: x[1], both)
        s = s._replace(vec=vec, carry=carry)
        return s, played, mate.prepare(task, s, played)

    return task, *go()


SHORT = dict(env_args=("horizon=4",))  # episodes end within a rollout of five steps


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "mix"},
        {"mode": "cen", "gru": 4},
        {"mode": "ind", "lose_memory": True, "leak": True},
    ],
    ids=str,
)
def test_the_update_reads_the_embeddings_that_the_team_acted_on(options):
    """Those of the last step of a rollout, which the carry keeps, from states of the rollout before."""
    task, s, played, batch = two_rollouts(**SHORT, **options)

    @jax.jit
    def read():
        last = lambda x: mate.embeddings(task, s.params, batch._replace(x=x))[1][-1, 0].sum()
        return *mate.embeddings(task, s.params, batch), jax.grad(last)(batch.x)

    before, after, slope = read()
    share = task.embedder.for_agents
    np.testing.assert_allclose(share(before[-1]), played.carry.embedding, atol=1e-5)
    assert zero(before[np.asarray(batch.first)])
    assert not zero(before[~np.asarray(batch.first)])
    # behind each transition stands the embedding of the next step, where the episode continues
    goes_on = ~np.asarray(batch.first[1:])
    np.testing.assert_allclose(after[:-1][goes_on], before[1:][goes_on], atol=1e-6)
    seen = [t for t in range(6) if not zero(slope[t])]
    starts = np.flatnonzero(np.asarray(batch.first)[:, 0])
    assert seen == ([5] if task.cfg.forgets else list(range(int(starts[-1]) + 1, 6)))
    assert task_of(reference_compat=True).cfg.forgets


def test_returns_end_at_the_true_observation_of_a_time_limit():
    task, s, _, batch = two_rollouts(**SHORT, mode="mix")
    hypers = s.hypers._replace(gamma=jnp.float32(0.5))
    act, draw = mate.actor(task, s.params, training=True)
    every = jax.jit(lambda: rollout.collect(task.vec, act, jax.random.key(1), s.vec, s.carry, 5, draw))()
    score = lambda state, emb: (state.sum(-1)[..., None] + emb.sum(-1)).astype(jnp.float32)
    after = jax.jit(lambda: mate.embeddings(task, s.params, batch)[1])()
    bootstrapped = lambda *args: np.asarray(jax.jit(lambda: mate.bootstrapped(*args, after, score))())
    got = bootstrapped(task, hypers, batch)
    steps = jax.tree.map(np.asarray, every.steps)
    np.testing.assert_array_equal(steps.reward, batch.reward)  # the same steps
    behind = np.asarray(score(jnp.asarray(steps.final_obs).reshape(5, 4, -1), after))
    assert steps.truncated.any()
    want = np.zeros((6, 4, 2))
    want[5] = np.where(steps.truncated[-1][:, None], 0.0, behind[-1])
    for t in reversed(range(5)):
        following = np.where(steps.truncated[t][:, None], behind[t], want[t + 1])
        want[t] = steps.reward[t] + 0.5 * following
    np.testing.assert_allclose(got, want[:-1], rtol=1e-5, atol=1e-5)
    # the released code takes the time limit for the end of the task, one step late
    cfg = task._replace(cfg=mate.Config(**(TINY | SHORT), reference_compat=True))
    late = bootstrapped(cfg, hypers, batch)
    assert not np.allclose(late, got)
    # standardised rewards: mean 0 and deviation 1 per agent in an update
    cfg = task._replace(cfg=mate.Config(**(TINY | SHORT), standardise_reward=True))
    paid = batch._replace(reward=jax.random.normal(KEY, batch.reward.shape) * 9 + 4)
    zero_gamma = hypers._replace(gamma=jnp.float32(0.0))
    scaled = bootstrapped(cfg, zero_gamma, paid)
    np.testing.assert_allclose([scaled.mean((0, 1)), scaled.std((0, 1))], [[0, 0], [1, 1]], atol=1e-4)


@pytest.mark.parametrize("options", [{"mode": "mix"}, {"mode": "cen", "gru": 4}], ids=str)
def test_the_policys_loss_reaches_encoders_only_if_asked(options):
    task, s, _, batch = two_rollouts(**SHORT, **options)
    apart = s.hypers._replace(obs_coef=jnp.float32(0), reward_coef=jnp.float32(0), kl_coef=jnp.float32(0))

    def grads(detach):
        cfg = mate.Config(**(TINY | SHORT | options), detach=detach)
        return jax.grad(lambda p: mate.loss(task._replace(cfg=cfg), p, s.target, apart, batch, KEY)[0])(s.params)

    detached, joined = jax.jit(lambda: (grads(True), grads(False)))()
    assert zero(detached["mate"])
    assert not zero(detached["team"])
    assert not zero(joined["mate"]["encoder"])
    assert zero(joined["mate"]["decoder"])


def test_the_leak_lets_an_embedding_read_the_reward_it_predicts():
    task, s, _, batch = two_rollouts(**SHORT, mode="mix")

    def slope(leak):
        cfg = mate.Config(**(TINY | SHORT), mode="mix", leak=leak)
        one = lambda x: mate.loss(task._replace(cfg=cfg), s.params, s.target, s.hypers, batch._replace(x=x), KEY)[0]
        return jax.grad(one)(batch.x)[-1, ..., -1]  # by the reward of the rollout's last transition

    without, leaky = jax.jit(lambda: (slope(False), slope(True)))()
    assert zero(without)
    assert not zero(leaky)


def test_the_target_follows_the_critics_slowly():
    learner = tiny(mode="none", tau=0.25)

    @jax.jit
    def go():
        s = learner.init(KEY, as_hypers(learner.hypers))
        return s, learner.step(s)[0]

    s, new = go()
    for name in ("critic_head",):
        want = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, s.target[name], new.params["team"][name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), want, new.target[name])


def test_maa2c_learns_what_is_in_view_and_a_recurrent_one_what_was():
    for kind, options, updates in (("match", {}, 100), ("memory", {"gru": 8}, 200)):
        sizes = dict(num_envs=64, num_steps=4, hidden=(16, 16), mode="none", total_steps=256)
        learner = make("mate", kind, 2, **(sizes | {"gru": 0} | options), tau=0.2)
        score = jax.jit(lambda key, learner=learner, updates=updates: train(learner, updates, key)[2])(KEY)
        assert float(score.total / score.count) > 0.9, kind


def test_adapting_leaves_what_makes_embeddings_bitwise_as_it_was(tmp_path, capsys):
    argv = ["--num-envs", "4", "--hidden", "8", "--gru", "0", "--encoder-hidden", "8", "--total-steps", "60"]
    argv += ["--eval-every", "-1", "--checkpoint-every", "2", "--chunk", "1", "--mode", "ind", "--decoder-hidden", "8"]
    run, new = str(tmp_path / "a"), str(tmp_path / "b")
    assert cli.main(["train", "mate", *argv, "--seeds", "0", "1", "--run-dir", run]) == 0
    more = ["train", "mate", *argv, "--env-args", "task_set=test", "--start-from", run]
    assert cli.main([*more, "--seeds", "1", "0", "--run-dir", new, "--adapt-optimiser", "keep"]) == 0
    capsys.readouterr()
    load = lambda path: runner.load_state(tiny(mode="ind", emb_dim=3, mixer_hidden=(64,)), path)
    old, adapted = load(run), load(new)
    flipped = jax.tree.map(lambda x: np.asarray(x)[::-1], old.params)
    jax.tree.map(np.testing.assert_array_equal, adapted.params["mate"], flipped["mate"])
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), adapted.params["team"], flipped["team"])
    assert all(jax.tree.leaves(changed))
    count = lambda s: int(jax.tree.leaves(s.opt_state["team"])[0][0])
    assert count(adapted) == 6  # three updates of the first run, three of the second
    # stopped after two of its three updates, it resumes to the same numbers
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "3")
    assert cli.main(["resume", new]) == 0
    again = load(new)
    jax.tree.map(np.testing.assert_array_equal, again.params, adapted.params)
    # what does not fit is named
    wrong = {
        ("--hidden", "16"): r"params\['team'\].*: found shape \(2, 8\), expected shape \(2, 16\)",
        ("--mode", "none"): r"params\['mate'\].*: found shape .*, expected none",
        ("--seeds", "0", "5"): r"found seeds \[0, 1\], expected one seed or \[5\] among them",
    }
    for options, message in wrong.items():
        capsys.readouterr()
        assert cli.main([*more, *options, "--run-dir", str(tmp_path / "c")]) == 2
        assert re.search(message, " ".join(capsys.readouterr().err.split())), options
    assert cli.main(["train", "ippo", "--env", "dispersion", "--start-from", run]) == 2
    assert "found a run of mate, expected one of ippo" in capsys.readouterr().err


def test_recorded_play_has_embeddings_that_begin_with_zero():
    learner = tiny(mode="ind", emb_dim=1)
    states = jax.jit(jax.vmap(lambda k: learner.init(k, as_hypers(learner.hypers))))(jax.random.split(KEY, 2))
    got = mate.record(learner, states, jax.random.key(1), episodes=6)
    assert got.embedding.shape == (2, 6, 20, 2, 2)
    assert zero(got.embedding[:, :, 0])
    assert not zero(got.embedding[:, :, 1])
    assert got.task.shape == (2, 6)
    assert set(np.unique(got.task)) <= set(range(6))
    assert bool(got.alive.all())
    with pytest.raises(UserError, match="mode='none', expected ind, cen or mix"):
        mate.record(tiny(mode="none"), None, KEY)


def test_who_plays_a_policy_tells_it_rewards():
    task, s, played, _ = two_rollouts(**SHORT, mode="mix")
    learner = mate.make_learner(task)
    alone = crossplay.act_with(learner.policy, learner.policy.params(s), greedy=True)
    training, draw = mate.actor(task, s.params, greedy=True)
    vs = played.vec._replace(first=jnp.zeros(4, bool))

    @jax.jit
    def step(reward):
        at = vs._replace(ts=vs.ts._replace(reward=jnp.full((4, 2), reward)))
        numbers = jax.tree.map(lambda x: x[0], draw(KEY, 1))
        return [a(n, played.carry, at)[:2] for a, n in ((alone, KEY), (training, numbers))]

    (carry, action), (carry_too, action_too) = step(1.0)
    jax.tree.map(np.testing.assert_array_equal, (carry, action), (carry_too, action_too))
    assert not np.allclose(carry.embedding, step(0.0)[0][0].embedding)


def shape_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    "options",
    [
        dict(mode="mix", emb_dim=10, deterministic=True),
        dict(mode="cen", emb_dim=1, probabilistic=True, detach=False),
        dict(mode="oracle", gru=4),
        dict(mode="ind", env="probe", env_args=("kind=target", "count=3"), standardise_reward=True, anneal_lr=True),
    ],
    ids=str,
)
def test_shapes_of_every_kind_of_task(options):
    one = tiny(**options)
    state = jax.eval_shape(one.init, KEY, as_hypers(one.hypers))
    new, metrics = jax.eval_shape(one.step, state)
    assert shape_of(new) == shape_of(state)
    assert ("loss/embedding" in metrics) == (options["mode"] != "oracle")
    if options["mode"] == "oracle":
        assert one.env.spec.obs_shape == (4 + 8,)


def test_one_program_holds_all_tasks_of_the_oracle():
    one = tiny(mode="oracle", env_args=("task_set=all",))
    _, ts = jax.jit(jax.vmap(one.env.reset))(jax.random.split(KEY, 64))
    shown = np.asarray(ts.obs[:, 0, 4:])
    assert (shown.sum(1) == 1).all()
    assert (shown.sum(0) > 0).all()
    np.testing.assert_array_equal(ts.obs[:, 0, 4:], ts.obs[:, 1, 4:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="centralised"), "mode='centralised'"),
        (dict(emb_dim=0), "emb_dim=0"),
        (dict(tau=1.5), "hypers.tau=1.5"),
        (dict(kl_coef=-1.0), "hypers.kl_coef=-1"),
        (dict(decoder_hidden=(0,)), "decoder_hidden"),
        (dict(total_steps=3), "total_steps=3: expected at least one update"),
        (dict(mode="oracle", env="dispersion"), "dispersion.*no sets of tasks"),
        (dict(adapt_optimiser="maybe"), "adapt_optimiser='maybe'"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_the_claim_is_whole():
    assert problems(claims.claim, "small") == []
    assert problems(claims.claim, "full") == []
    assert pytest.approx(optimum(HiddenCorner().catalogue()["nw"]), abs=1e-4) == claims.BEST


@pytest.mark.slow
def test_the_claim_runs_from_tuning_to_adapting():
    """At the smallest size: every arm has the numbers that its checks read."""
    small = dict(num_envs=8, hidden=(4,), gru=0, encoder_hidden=4, decoder_hidden=(4,))
    arms = tuple(claims.MODES)
    one = claims.transfer(claims.E, "hidden_corner", "train", "test", 1600, 800, arms, 800, True, **small)
    tuning = one.tune("Ind-MATE")
    assert len(tuning.settings) == 4
    assert set(tuning.chosen) == {"lr", "kl_coef"}
    rows = {arm: list(one.run(arm, (0, 3), tuned={})) for arm in ("Ind-MATE", "Scratch")}
    assert [r["seed"] for r in rows["Ind-MATE"]] == [0, 3]
    for check in claims.CHECKS:
        for arm in set(check.arms) & set(rows):
            assert all(np.isfinite(r[check.metric]) for r in rows[arm]), check
    assert sum(name.startswith("return@") for name in rows["Ind-MATE"][0]) == 10
