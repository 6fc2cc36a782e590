"""Random configs and command lines: each is a valid plan of a run or one clear error, never a traceback.

1,000 configs and 150 command lines here; the profile `HYPOTHESIS_PROFILE=soak` draws twenty times as many.
"""

import contextlib
import io
import os

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxstack import agents, cli, envs
from jaxstack.core import config
from jaxstack.core.errors import UserError
from jaxstack.core.stages import Staged

TIMES = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else 1
QUIET = dict(deadline=None, derandomize=TIMES == 1, suppress_health_check=list(HealthCheck), database=None)

numbers = st.one_of(
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from([0, 1, -1, 2**31, 10**400, 1e-5, float("nan"), float("inf"), 1e308]),
)
words = st.one_of(
    st.sampled_from(["full", "none", "full+id", "id", "partial", "tanh", "relu", "pool", "exact", "mlp", "true", ""]),
    st.sampled_from([*envs.NATIVE, "gymnax/CartPole-v1", "jaxmarl/", "brax/antt", "agents=3", "num_agents=0", "a=b=c"]),
    st.text(max_size=6),
)
values = st.one_of(numbers, words, st.booleans(), st.none(), st.lists(st.one_of(numbers, words), max_size=3))


def names(agent: str) -> list[str]:
    cls = agents.config_class(agent)
    return [*cls.__dataclass_fields__, *cls().hypers._fields, "lerning_rate", "hypers"]


NAMES = {agent: names(agent) for agent in agents.AGENTS}  # imports the agents, which a strategy must not do


@st.composite
def configs(draw):
    agent = draw(st.sampled_from([*agents.AGENTS]))
    chosen = draw(st.lists(st.sampled_from(NAMES[agent]), max_size=4, unique=True))
    return agent, {name: draw(values) for name in chosen}


@st.composite
def command_lines(draw):
    agent = draw(st.one_of(st.sampled_from([*agents.AGENTS]), st.just("ipo")))
    known = NAMES.get(agent, NAMES["ippo"])
    extra = ["seeds", "chunk", "split-seeds", "eval-every", "run-dir", "max-compiles", "best-metric", "no-guard"]
    argv = []
    for name in draw(st.lists(st.sampled_from([*known, *extra]), max_size=4)):
        argv.append("--" + name.replace("_", "-"))
        argv += draw(st.lists(st.one_of(numbers.map(str), words), max_size=2))
    return agent, argv


def attempt(make):
    """(value, "") or (None, what a user is told); any other exception, or an exit that is not 2, is a failure."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
            return make(), ""
    except UserError as e:
        return None, str(e)
    except SystemExit as e:
        if e.code != 2:
            raise
        return None, out.getvalue()


def one_line(text: str) -> bool:
    return bool(text.strip()) and "Traceback" not in text and len(text) < 2000


def can_run(learner) -> bool:
    """It has a length; the learners of stages are made from the states of those before."""
    if isinstance(learner, Staged):
        return len(learner.stages) >= 1
    return learner.samples_per_step >= 1 and learner.config.num_updates >= 1


def trainable(learner):
    """Whether it is a learner, or a method in stages."""
    return len(learner.stages) >= 1 if hasattr(learner, "stages") else learner.samples_per_step >= 1


@settings(max_examples=1000 * TIMES, **QUIET)
@given(configs())
def test_a_config_is_valid_or_named_in_one_error(case):
    agent, fields = case
    cls = agents.config_class(agent)
    cfg, error = attempt(lambda: config.from_dict(cls, {"env": "matrix_game"} | fields))
    if cfg is None:
        assert one_line(error)
        return
    assert config.from_yaml(cls, config.to_yaml(cfg)) == cfg
    assert yaml.safe_load(config.to_yaml(cfg))["env"] == cfg.env
    learner, error = attempt(lambda: agents.make(agent, cfg))
    if learner is None:
        assert one_line(error)
        return
    assert can_run(learner)


@settings(max_examples=150 * TIMES, **QUIET)
@given(command_lines())
def test_a_command_line_is_a_plan_or_one_clear_error(case):
    agent, argv = case
    planned, error = attempt(lambda: cli.plan(agent, argv))
    if planned is None:
        assert one_line(error)
        return
    learner, job = planned
    assert can_run(learner)
    assert len(job.seeds) >= 1
