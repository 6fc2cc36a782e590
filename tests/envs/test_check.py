"""Faults of a user's own environment are named; environments become text and back."""

import re
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import jaxstack
from jaxstack import agents, envs
from jaxstack.core.errors import UserError
from jaxstack.envs.base import Box, Discrete, Environment, Spec, first_step
from jaxstack.envs.wrappers import FrameStack, RewardClip, TimeLimit, Wrapper


class State(NamedTuple):
    left: jax.Array


@dataclass(frozen=True)
class Countdown(Environment):
    """Three steps; `fault` is what is wrong with it."""

    fault: str = ""
    count: int = 2

    @property
    def spec(self):
        names = tuple(f"agent_{i}" for i in range(self.count))
        spec = Spec("countdown", names, (1,), Discrete(2), horizon=3, can_truncate=False)
        match self.fault:
            case "missing mask":
                return replace(spec, has_action_mask=True)
            case "missing state":
                return replace(spec, state_shape=(4,))
            case "agents":
                return replace(spec, agents=("a", "a"))
            case "list":
                return replace(spec, obs_shape=[1])
            case "obs type":
                return replace(spec, obs_space=Discrete(4), obs_shape=())
        return spec

    def _ts(self, left, **fields):
        ts = first_step(self.spec, jnp.full((self.count, 1), left, jnp.float32), **fields)
        match self.fault:
            case "scalar reward":
                return ts._replace(reward=jnp.float32(1))
            case "int reward":
                return ts._replace(reward=jnp.zeros(self.count, jnp.int32))
            case "done an agent":
                return ts._replace(terminated=jnp.zeros(self.count, bool))
            case "dict obs":
                return ts._replace(obs={"agent_0": ts.obs[0]})
            case "no agent axis":
                return ts._replace(obs=ts.obs[0])
            case "wide obs":
                return ts._replace(obs=jnp.zeros((self.count, 2)))
            case "flat mask":
                return ts._replace(action_mask=jnp.ones(2, bool))
            case "vector info":
                return ts._replace(info={"x": jnp.zeros(3)})
        return ts

    def reset(self, key):
        if self.fault == "dict step":
            return {"left": 3}
        return State(jnp.int32(3)), self._ts(3)

    def step(self, key, state, action):
        if self.fault == "python if" and state.left > 1:
            return state, self._ts(state.left)
        if self.fault == "error":
            raise KeyError("lava")
        left = state.left - (1.0 if self.fault == "state type" else 1)
        ts = self._ts(left, reward=(action == 1).astype(jnp.float32))._replace(terminated=left == 0)
        if self.fault == "changing info":
            ts = ts._replace(info={"won": left})
        return State(left), (tuple(ts) if self.fault == "tuple" else ts)


FAULTS = {
    "scalar reward": r"reset: reward: found one number of float32, expected an array \[2\] of float32",
    "int reward": r"reset: reward: found an array \[2\] of int32, expected an array \[2\] of float32",
    "done an agent": r"reset: terminated: found an array \[2\] of bool, expected one number of bool",
    "dict obs": r"reset: obs: found dict, expected an array \[2, 1\]",
    "no agent axis": r"reset: obs: found an array \[1\] of float32, expected an array \[2, 1\]",
    "wide obs": r"reset: obs: found an array \[2, 2\] of float32, expected an array \[2, 1\]",
    "flat mask": r"reset: action_mask: found an array \[2\] of bool, expected None, as spec.has_action_mask=False",
    "missing mask": r"reset: action_mask: found None, expected an array, as spec.has_action_mask=True",
    "missing state": r"reset: state: found None, expected an array, as spec.state_shape=\(4,\)",
    "vector info": r"reset: info\['x'\]: found an array \[3\] of float32, expected one number",
    "changing info": r"TimeStep.info\['won'\]: found in step and not in reset",
    "state type": r"state.left: found one number of int32 in reset and one number of float32 in step",
    "python if": r"step: found `if`, `while` or a conversion that depends on an array",
    "error": r"step cannot be traced: KeyError: 'lava'",
    "tuple": r"step: found a second value of tuple, expected \(state, TimeStep\)",
    "dict step": r"reset: found dict, expected \(state, TimeStep\)",
    "obs type": r"reset: obs: found an array \[2, 1\] of float32, expected an array \[2\] of int32",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_in_one_line(fault):
    with pytest.raises(UserError) as e:
        envs.check_env(Countdown(fault))
    assert re.search(f"environment 'countdown': {FAULTS[fault]}", str(e.value))
    assert "\n" not in str(e.value)


def test_faults_of_the_object_itself():
    for env, message in {
        Countdown("agents"): "Countdown.spec.agents: found .*expected a tuple of different names",
        Countdown("list"): r"Countdown.spec.obs_shape: found \[1\], expected a tuple",
        Countdown: r"expected an Environment; make one with MyEnv\(\)",
        3: "env: found 3, expected an Environment",
    }.items():
        with pytest.raises(UserError, match=message):
            envs.check_env(env)


@pytest.mark.parametrize("id", [*envs.ids("native"), "gymnax/CartPole-v1", "jaxmarl/MPE_simple_spread_v3"])
def test_every_environment_of_the_package_passes_and_is_described(id):
    env = envs.make(id)
    envs.check_env(env)
    assert envs.described(env) == (id, (), ())


@dataclass(frozen=True)
class Bonus(Wrapper):
    """Adds `amount` to rewards."""

    amount: float = 0.0

    def step(self, key, state, action):
        state, ts = self.env.step(key, state, action)
        return state, ts._replace(reward=ts.reward + self.amount)


def test_wrappers_by_name_and_objects_as_text():
    base = envs.make("dispersion", num_agents=3)
    env = envs.wrap(base, "time_limit=5", "frame_stack", "reward_clip=[-2, 2]", f"{__name__}:Bonus={{amount: 0.5}}")
    assert env == Bonus(RewardClip(FrameStack(TimeLimit(base, 5)), -2.0, 2.0), 0.5)
    id, args, around = envs.described(env)
    assert (id, args) == ("dispersion", ("num_agents=3",))
    assert envs.wrap(envs.make(id, **envs.parse_options(args)), *around) == env
    assert envs.described(envs.make("gymnax/Pendulum-v1", max_steps_in_episode=50)) == (
        "gymnax/Pendulum-v1",
        ("max_steps_in_episode=50",),
        (),
    )
    for entry, message in {
        "frame_stak": "unknown wrapper 'frame_stak': did you mean 'frame_stack'",
        "time_limit=0": "wrap 'time_limit=0': steps=0: expected",
        "time_limit=x": "wrapper 'time_limit': steps='x': expected a whole number",
        "time_limit=[1, 2]": "found 2 values, expected at most 1",
        "reward_clip={lo: 1}": "unknown option of wrapper 'reward_clip' 'lo'",
        f"{__name__}:State": "made a State, expected an Environment",
    }.items():
        with pytest.raises(UserError, match=message):
            envs.wrap(base, entry)


def test_an_agent_takes_an_object_and_stores_what_rebuilds_it():
    own = f"{__name__}:Countdown"
    small = dict(total_steps=64, num_envs=2, num_steps=16, num_minibatches=1)
    learner = agents.make("ippo", env=TimeLimit(Countdown(count=3), 2), env_args={"fault": ""}, **small)
    assert (learner.config.env, learner.config.env_args, learner.config.wrap) == (
        own,
        ("count=3", "fault=''"),
        ("time_limit={steps: 2}",),
    )
    assert learner.env == TimeLimit(Countdown(count=3), 2)
    assert agents.make("ippo", env=Countdown, **small).env == Countdown()
    given = dict(env=Countdown(), total_steps=256, num_envs=2, num_minibatches=1, hidden=(4,))
    done = jaxstack.train("ippo", seeds=[5], progress=False, eval_every=-1, **given)
    assert done.metrics.seed.tolist() == [5]
    with pytest.raises(UserError, match="terminated: found an array"):
        agents.make("ippo", env=Countdown("done an agent"), **small)

    @dataclass(frozen=True)
    class Local(Countdown):
        pass

    with pytest.raises(UserError, match="Local is no class at the top of a module"):
        agents.make("ippo", env=Local(), **small)
    with pytest.raises(UserError, match="is no plain value"):
        agents.make("ippo", env=Countdown(count=jnp.int32(3)), **small)


def test_bounds_of_actions_are_kept():
    """A `Box` action has its own shape."""

    @dataclass(frozen=True)
    class Steered(Countdown):
        @property
        def spec(self):
            return replace(super().spec, action_space=Box((2,), -1.0, 1.0))

        def step(self, key, state, action):
            assert action.shape == (2, 2)
            return super().step(key, state, action[:, 0])

    envs.check_env(Steered())


@pytest.mark.parametrize("id", ["brax/hopper", "gymnax/Acrobot-v1", "jaxmarl/MPE_simple_tag_v3"])
def test_a_missing_library_is_named_and_the_others_still_work(id, monkeypatch):
    library = id.partition("/")[0]
    monkeypatch.setitem(sys.modules, library, None)
    options = {"gymnax": {"max_steps_in_episode": 77}, "jaxmarl": {"max_steps": 77}}.get(library, {})
    with pytest.raises(UserError, match=f"{id}: the library {library} is missing; pip install {library}"):
        envs.make(id, **options)
    assert envs.make("dispersion").spec.num_agents == 4
