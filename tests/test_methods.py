"""The registry: rows are whole, and everything that lists methods says the same."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from jaxstack import agents, claims, envs, learners
from jaxstack.core.config import Config
from jaxstack.core.errors import UnknownName, UserError
from jaxstack.methods import AGENTS, CLAIMS, LEARNERS, METHODS

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_whole_and_import_nothing():
    slugs = [m.slug for m in METHODS]
    assert len(set(slugs)) == len(slugs)
    # learners may have the names that they are known by elsewhere, such as td3_bc
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", m.slug.replace("_", "-" * (not m.published))) for m in METHODS)
    assert sum(m.published for m in METHODS) >= 49
    for m in METHODS:
        assert m.title
        assert 1990 < m.year < 2100
        assert all(re.fullmatch(r"\d{4}\.\d{4,5}", i) for i in m.arxiv)
        assert set(m.extras) <= set(PYPROJECT["project"]["optional-dependencies"])
    code = "import sys, jaxstack.methods; assert not {'jax', 'numpy', 'yaml'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_tables_derive_from_the_rows():
    assert agents.AGENTS is AGENTS
    assert claims.CLAIMS is CLAIMS
    assert dict(CLAIMS) == {m.slug: m.claim for m in METHODS if m.claim}
    assert dict(LEARNERS) == {m.slug: m.factory for m in METHODS if m.factory}
    assert {*AGENTS, "sequence"} <= {*LEARNERS}


@pytest.mark.parametrize("m", [m for m in METHODS if not m.planned], ids=lambda m: m.slug)
def test_what_a_row_names_exists(m):
    assert m.tests
    assert (ROOT / m.tests).is_file()
    if m.factory:
        assert callable(LEARNERS.load(m.slug))
        assert issubclass(learners.config_class(m.slug), Config)
    if m.claim:
        assert (ROOT / m.page).is_file()
        claim = CLAIMS.load(m.slug)
        assert claim.method == m.slug
        record = json.loads((ROOT / f"docs/results/{m.slug}-small.json").read_text(encoding="utf-8"))
        assert [c["check"] for c in record["checks"]] == [c.describe() for c in claim.scales["small"].checks]
        assert (ROOT / f"docs/results/{m.slug}-small.png").is_file()


def test_methods_are_independent_of_each_other():
    (contract,) = [c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "independence"]
    assert contract["modules"] == list(dict.fromkeys(m.factory.partition(":")[0] for m in METHODS if m.factory))


def test_the_generated_lists_are_of_today():
    assert script("list_methods").stale() == [], "run python scripts/list_methods.py"


OWN = """
from dataclasses import dataclass
from jaxstack.agents import ippo
from jaxstack.envs.matrix_game import MatrixGame

@dataclass(frozen=True)
class Config(ippo.Config):
    extra: int = 3

def mine(config=Config()):
    return ippo.ippo(config)

class MyEnv(MatrixGame):
    pass
"""


def test_a_users_own_are_taken_by_module_and_attribute(tmp_path, monkeypatch):
    (tmp_path / "own_things.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    learner = agents.make("own_things:mine", env="own_things:MyEnv", env_args=("num_agents=2",), extra=5, num_envs=2)
    assert learner.name == "own_things:mine"
    assert learner.config.extra == 5
    assert learner.env.spec.num_agents == 2
    assert envs.make("own_things:MyEnv", horizon=3).spec.horizon == 3
    with pytest.raises(UserError, match="environment 'own_things:MyEnv': horizon='x'"):
        envs.make("own_things:MyEnv", horizon="x")
    with pytest.raises(UserError, match="agent 'no_such_thing:x': no module named 'no_such_thing'"):
        agents.make("no_such_thing:x")
    with pytest.raises(UnknownName, match="attribute of module own_things 'mien': did you mean 'mine'"):
        agents.make("own_things:mien")
    with pytest.raises(UserError, match="module math has no Config"):
        agents.make("math:sin")
    with pytest.raises(UnknownName, match="unknown agent 'own_things:'"):
        agents.make("own_things:")
    with pytest.raises(UnknownName, match="unknown agent 'sequence'"):
        agents.make("sequence")


def test_nothing_in_core_names_a_module_above_it():
    above = re.compile(r"[\"']jaxstack\.(?!core\b)[a-z_.]+")
    for file in (ROOT / "jaxstack" / "core").glob("*.py"):
        assert above.findall(file.read_text(encoding="utf-8")) == [], file
    assert import_module("jaxstack.core.registry").Registry
