"""follow_partner, match_now and repeat_last against slow references and closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.envs.cue_tasks import MatchNow, RepeatLast
from jaxstack.envs.follow_partner import FollowPartner


def play(env, episodes=200, seed=0):
    """Uniform actions [T, E, 2]: (states before, actions, TimeSteps of the steps, TimeSteps seen before), numpy."""

    @jax.jit
    def run(key):
        k_reset, k_act, k_step = jax.random.split(key, 3)
        start = jax.vmap(env.reset)(jax.random.split(k_reset, episodes))
        horizon = env.spec.horizon
        actions = jax.random.randint(k_act, (horizon, episodes, 2), 0, env.symbols)
        keys = jax.random.split(k_step, (horizon, episodes))

        def body(carry, x):
            new = jax.vmap(env.step)(x[1], carry[0], x[0])
            return new, (carry[0], x[0], new[1], carry[1])

        return jax.lax.scan(body, start, (actions, keys))[1]

    return jax.tree.map(np.asarray, run(jax.random.key(seed)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"partner": "grounded"},
        {"partner": "mixed", "mixture": 0.3, "types": 3},
        {"relabel": True},
        {"partner": "grounded", "see_action": False, "see_cue": False},
        {"own_cue": True, "symbols": 3},
    ],
    ids=str,
)
def test_follow_partner_is_its_definition(options):
    env = FollowPartner(**options)
    m = env.symbols
    state, action, ts, seen = play(env)
    for e in range(200):
        cues = state.cue[:, e]
        relabel, kind, script = state.relabel[0, e], int(state.type[0, e]), bool(state.grounded[0, e])
        assert sorted(relabel) == list(range(m))
        assert options.get("relabel") or list(relabel) == list(range(m))
        last = None
        for t in range(env.horizon):
            for i, (own, other) in enumerate([(cues[t, 0], cues[t, 1]), (cues[t, 1], cues[t, 0])]):
                expected = np.zeros(3 * m + 1)
                expected[own] = 1
                if env.see_cue:
                    expected[m + other] = 1
                theirs = m
                if last is not None and env.see_action:
                    theirs = last[1] if i == 0 else list(relabel).index(last[0])
                expected[2 * m + theirs] = 1
                np.testing.assert_array_equal(seen.obs[t, e, i], expected)
            first, second = int(action[t, e, 0]), int(relabel[action[t, e, 1]])
            if script:
                second = int(state.opening[0, e]) if t == 0 else int((cues[t - 1, 1] + kind) % m)
            paid = first == second and (not env.own_cue or first == cues[t, 0])
            np.testing.assert_array_equal(ts.reward[t, e], [float(paid)] * 2)
            np.testing.assert_array_equal(ts.agent_mask[t, e], [True, not script])
            assert ts.truncated[t, e] == (t == env.horizon - 1)
            last = (first, second)
    assert not ts.terminated.any()
    share = state.grounded[0].mean()
    assert abs(share - {"learned": 0, "grounded": 1, "mixed": 0.3}[env.partner]) < 0.1


def test_no_reactive_policy_beats_chance_with_the_grounded_partner():
    """All 2^8 tables from (own cue, partner's cue, its last action) to an action, M = K = 2: 1/M per step, as the
    partner's action at t depends on its cue of t - 1 alone, which no observation of t shows."""
    env = FollowPartner(partner="grounded", symbols=2, horizon=4)
    state, _, _, seen = play(env, episodes=4000)
    script = np.asarray(jax.vmap(jax.vmap(env.script))(jax.tree.map(jnp.asarray, state)))
    # states before a step [T, E]; the last action slot "none" occurs at t = 0 alone
    own, other = seen.obs[..., 0, :2].argmax(-1), seen.obs[..., 0, 2:4].argmax(-1)
    last = seen.obs[..., 0, 4:6].argmax(-1)
    cell = (own * 4 + other * 2 + last)[1:]
    best = max((np.asarray(table)[cell] == script[1:]).mean() for table in itertools.product(range(2), repeat=8))
    assert abs(best - 0.5) < 0.02


@pytest.mark.parametrize("env", [MatchNow(symbols=3), RepeatLast(symbols=3)], ids=["match_now", "repeat_last"])
def test_cue_tasks_are_their_definition(env):
    state, action, ts, seen = play(env)
    np.testing.assert_array_equal(seen.obs, np.eye(3)[state.cue])
    if env.id == "match_now":
        wanted = state.cue
    else:
        wanted = np.concatenate([np.full_like(state.cue[:1], -1), state.cue[:-1]])
    paid = (action == wanted).mean(-1)
    np.testing.assert_allclose(ts.reward, np.repeat(paid[..., None], 2, -1), atol=1e-7)
    assert ts.truncated[-1].all()
    assert not ts.truncated[:-1].any()
    assert not ts.terminated.any()


def test_bad_options_are_named():
    for make, field in (
        (lambda: FollowPartner(types=5), "types"),
        (lambda: FollowPartner(mixture=1.5), "mixture"),
        (lambda: FollowPartner(symbols=1), "symbols"),
        (lambda: RepeatLast(horizon=0), "horizon"),
    ):
        with pytest.raises(UserError, match=field):
            make()
