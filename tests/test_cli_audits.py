"""`jaxstack audit` and `jaxstack conventions`: scenarios, the page, and a clear line for bad input."""

import numpy as np
import pytest

from jaxstack import cli, envs
from jaxstack.agents import probe_audit, probe_page
from jaxstack.core.errors import UserError
from jaxstack.measures.probes import Probe


def test_the_papers_scenarios_are_known_environments():
    lists = probe_audit.read_scenarios()
    assert len(lists["paper"]) == 37
    assert len(lists["reduced"]) == 5
    assert {s.env for s in (*lists["paper"], *lists["reduced"])} <= set(envs.ids())


def test_a_page_tells_what_runs_say(tmp_path):
    null = np.full(200, 0.05)
    one = Probe("HAR", 0.5, 0.5, null, 1 / 201, True, np.full(2, 0.5), 100, ("a note",))
    probes = {n: one._replace(name=n) for n in ("OAR", "HAR", "PIF", "AA", "DAI")}
    runs = [probe_audit.Run(f"IPPO-{k}", s, 1.0 + (k == "RNN"), probes) for k in ("FF", "RNN") for s in range(5)]
    audited = probe_audit.Audited(probe_audit.Scenario("repeat_last"), runs, probe_audit._gaps(runs))
    text = probe_page.write([audited], tmp_path / "out").read_text()
    assert "IPPO: memory pays (recurrent less feed-forward +1.000, 5 of 5 seeds better, p = 0.0312)." in text
    assert "Policies depend on history, and it raises their return." in text
    assert "100% (1/1)" in text
    assert text.count("data:image/png;base64,") == 1
    assert "http" not in text
    assert len((tmp_path / "out" / "probes.csv").read_text().splitlines()) == 1 + 10 * 5


def test_the_reading_says_where_null_values_are_too_few():
    few = Probe("PIF", 1.0, 1.0, np.full(20, 0.04), 1 / 21, True, np.full(2, 1.0), 100)
    other = few._replace(norm=0.03, p=1.0, flag=False)
    runs = [probe_audit.Run("IPPO-FF", s, 1.0, {"PIF": p}) for s, p in enumerate((few, other, other))]
    audited = probe_audit.Audited(probe_audit.Scenario("repeat_last"), runs, {})
    lines = probe_page.reading(audited, probe_audit.discoveries([audited]))
    assert "No private information of an agent shows in a teammate's action." in lines
    assert lines[-1].startswith("PIF: 1 of 3 runs lie above all their null values, but 20 null values are too few")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["audit"], "expected environment ids or --scenarios NAME"),
        (["audit", "match_now", "--scenarios", "paper"], "one of the two"),
        (["audit", "--scenarios", "papr"], "did you mean 'paper'"),
        (["audit", "match_now", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["audit", "match_now", "--null-reps", "0"], "--null-reps 0: expected at least 1"),
        (["audit", "match_now", "--slow-null-reps", "0"], "--slow-null-reps 0: expected at least 1"),
        (["audit", "match_now", "--algorithms", "SAC"], "expected some of IPPO-FF"),
        (["audit", "nope"], "unknown environment 'nope'"),
        (["conventions", "nowhere"], "no run found"),
    ],
)
def test_bad_input_is_one_line(argv, text, capsys):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def test_a_scenario_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        probe_audit.read_scenarios(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("mine:\n  own: {total_stps: 3, scenarios: [match_now]}\n")
    with pytest.raises(UserError, match="total_stps"):
        probe_audit.read_scenarios(tmp_path / "bad.yaml")
