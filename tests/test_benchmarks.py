"""The benchmark scripts run: every case of bench_sequence.py at a tiny size, and what bench.py calls exists."""

import argparse
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxstack.core.errors import UserError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

STAND_IN = """
import json, sys
import numpy as np
weights = np.load(sys.argv[2] + "/weights.npz")
assert weights["delta"].shape == (128, 16) and np.load(sys.argv[2] + "/x.npy").shape == (1, 16, 64)
answers = {"load": {"torch": "none", "threads": 1}, "output": np.zeros((8, 64)).tolist()}
answers |= {"forward": 3.0, "gradient": 9.0}
for line in sys.stdin:
    print(json.dumps(answers[json.loads(line)["do"]]), flush=True)
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def run(script):
    bench = script("bench_sequence")

    def case(name, *options):
        args = bench.options().parse_args([*options, "--repeats", "1"])
        return {row["case"]: row for row in bench.CASES[name](args)}

    return case


def test_mixers_are_timed_and_compared(run):
    rows = run("mixers", "--mixers", "kla", "gla", "attention", "--lengths", "16", "--tokens", "32")
    assert {k for k, r in rows.items() if "ratio_quartiles" in r} == {
        "mixers, T = 16, kla / gla, forward",
        "mixers, T = 16, kla / gla, gradient",
    }
    for name in ("kla", "gla", "attention"):
        row = rows[f"mixers, T = 16, {name}, gradient"]
        assert row["batch"] == 2
        assert min(row["median_ms"], row["compile_s"]) > 0
        assert row["peak_mib"] >= rows[f"mixers, T = 16, {name}, forward"]["peak_mib"] > 0


def test_attention_is_left_out_of_long_sequences(run, script, monkeypatch, capsys):
    monkeypatch.setattr(script("bench_sequence"), "ATTENTION_UP_TO", 8)
    assert run("mixers", "--mixers", "attention", "--lengths", "16", "--tokens", "16") == {}
    assert "attention left out at T = 16" in capsys.readouterr().out


def test_layers_have_the_stated_sizes(script):
    bench = script("bench_sequence")
    sizes = {
        name: bench.state_bytes(bench.layer(name, 100)) / bench.state_bytes(bench.layer("kla", 100))
        for name in bench.LAYERS
    }
    own = {"mingru", "s5", "attention", "mamba of N = 16"}
    assert all(0.9 < size < 1.1 for name, size in sizes.items() if name not in own)
    from jaxstack.sequence.trainer import MIXERS

    assert {mixer for mixer, _ in bench.LAYERS.values()} == set(MIXERS)


def test_scan_compares_the_chosen_form_with_the_best(run):
    rows = run("scan", "--scan-up-to", "1024")
    assert len(rows) == 3
    for row in rows.values():
        assert {"sequential", "chunked"} <= set(row["compile_s"])


def test_decode_and_growth_give_exponents(run):
    rows = run("decode", "--contexts", "64", "128", "--steps", "2")
    for name in ("kla", "gla", "mamba", "attention", "attention, fixed context"):
        assert len(rows[f"decode, exponent, {name}"]["exponent_quartiles"]) == 3
        assert rows[f"decode, after 128 tokens, {name}"]["median_ms"] > 0
    rows = run("growth", "--growth", "16", "32")
    assert {"growth, exponent, forward", "growth, exponent, gradient"} < set(rows)


def test_exponent_of_a_power_law(script):
    sizes = [10, 100, 1000]
    row = script("bench_sequence").exponent_row("x", sizes, [[2 * n**1.5, 3 * n**1.5] for n in sizes], 1.0)
    assert row["exponent_quartiles"] == pytest.approx([1.5] * 3)
    assert not row["met"]


def test_targets_are_met_on_the_right_side(script):
    row = script("bench_sequence").ratio_row
    assert row("x", [3.0] * 5, [1.0] * 5, 2.0)["met"] is False
    assert row("x", [3.0] * 5, [1.0] * 5, 2.0, least=True)["met"] is True


def test_torch_case_talks_to_a_child(run, script, tmp_path, monkeypatch):
    """The child is replaced: torch is not among the packages that tests may need."""
    child = tmp_path / "bench_sequence_torch.py"
    child.write_text(STAND_IN)
    monkeypatch.setattr(script("bench_sequence"), "__file__", str(tmp_path / "bench_sequence.py"))
    options = ["--kla", str(tmp_path), "--torch-python", sys.executable, "--torch-size", "1", "16"]
    rows = run("torch", *options)
    assert rows["torch, B = 1, T = 16, difference of y"]["max_abs"] > 0
    assert sum("ratio_quartiles" in r for r in rows.values()) == 2


def test_a_child_that_dies_is_an_error(run, script, tmp_path, monkeypatch):
    from jaxstack.core.errors import UserError

    (tmp_path / "bench_sequence_torch.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(script("bench_sequence"), "__file__", str(tmp_path / "bench_sequence.py"))
    with pytest.raises(UserError, match="ended with 3"):
        run("torch", "--kla", str(tmp_path), "--torch-python", sys.executable, "--torch-size", "1", "16")


ECHO = """
import json, sys
import numpy as np
for line in sys.stdin:
    given = json.loads(line)
    file = sys.argv[1] + "/" + given["name"]
    if given["do"] == "output":
        np.save(file + "_out.npy", np.load(file + ".npz")["x"] * FACTOR)
    answer = {"torch": "none", "threads": 1} if given["do"] == "load" else 2.0
    print(json.dumps(answer), flush=True)
"""


def test_medical_networks_are_compared_and_timed(script, tmp_path, monkeypatch):
    """With a network that gives back its input, and a child that does so too."""
    import flax.linen as nn

    bench = script("bench_medical")

    class Same(nn.Module):
        def __call__(self, x):
            return x

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench_medical.py"))
    monkeypatch.setattr(bench, "NETWORKS", {"same": bench.Network(Same(), (8, 8), 1, 1.0, (4, 4))})
    args = argparse.Namespace(networks=["same"], tiny=True, repeats=2)
    for factor in (1, 2):
        (tmp_path / "bench_medical_torch.py").write_text(ECHO.replace("FACTOR", str(factor)))
        peer = bench.Peer(Path(sys.executable))
        try:
            if factor == 1:
                rows = {row["case"]: row for row in bench.forward(args, peer)}
                assert rows["forward, same, 4 x 4, difference"]["relative"] == 0
                assert rows["forward, same, 4 x 4, torch / jaxstack"]["met"] is True
                assert "met" not in rows["forward, same, 4 x 4, torch channels last / jaxstack"]
            else:
                with pytest.raises(AssertionError, match="forward, same, 4 x 4: outputs differ by"):
                    bench.forward(args, peer)
        finally:
            peer.close()


def test_choroids_are_measured_in_numpy_as_they_are_here(script):
    rows = script("bench_medical").metrics(argparse.Namespace(tiny=True, repeats=1), None)
    assert [row["case"].split(", ")[-1] for row in rows] == ["vmapped", "NumPy", "NumPy / vmapped"]


@pytest.mark.parametrize("quick", [False, True])
def test_bench_calls_scripts_that_exist(script, tmp_path, quick):
    bench = script("bench")
    names = "jaxmarl purejaxrl kla naswot torch_python peers_python probes_python corl jax_corl unifloral rejax ptgood"
    peers = {name: Path(name) for name in names.split()}
    for paths in (peers, dict.fromkeys(peers)):
        todo = bench.commands(argparse.Namespace(quick=quick, **paths), tmp_path)
        assert {"agents", "envs", "sequence"} <= set(todo)
        for name, command in todo.items():
            assert (SCRIPTS / command[0]).is_file()
            assert command[command.index("--out") + 1] == str(tmp_path / f"{name}.json")
    todo = bench.commands(argparse.Namespace(quick=quick, **peers), tmp_path)
    assert ("--kla" in todo["sequence"]) is not quick
    assert ("offline" in todo) is not quick
    if not quick:
        parsed = script("bench_offline").options().parse_args(todo["offline"][1:])
        assert [getattr(parsed, n) for n in ("jax_corl", "ptgood", "torch_python")] == [
            Path(n) for n in ("jax_corl", "ptgood", "torch_python")
        ]
        assert "--torch-python" in todo["medical"]


def test_quick_sequence_options_are_known(script, tmp_path):
    args = argparse.Namespace(quick=True, jaxmarl=None, purejaxrl=None)
    command = script("bench").commands(args, tmp_path)["sequence"]
    parsed = script("bench_sequence").options().parse_args(command[1:])
    assert (parsed.cases, parsed.mixers) == (["mixers"], ["kla", "gla"])


VISION_STAND_IN = """
import json, sys
import numpy as np
for line in sys.stdin:
    ask = json.loads(line)
    if ask["do"] == "make":
        answer = np.load(sys.argv[1] + "/n.npy").tolist()
    else:
        answer = {"about": {"torch": "9.9"}, "run": 6.0, "drop": None}[ask["do"]]
    print(json.dumps(answer), flush=True)
"""


def test_vision_is_timed_beside_a_child_that_computes_the_same(script, tmp_path, monkeypatch):
    """The child is replaced; what it is given is a separable convolution, which is checked here."""
    from bench_child import Child

    bench, child = script("bench_vision"), tmp_path / "child.py"
    child.write_text(VISION_STAND_IN)
    args = bench.options().parse_args(["--torch-python", sys.executable, "--tiny"])
    job = next(iter(bench.structured(args, tmp_path)))
    assert job.case == "structured, dense, forward"
    with np.load(tmp_path / "batch.npz") as given:
        x, depthwise, kernel = given["x"][0], given["p/depthwise"][:, :, 0], given["p/kernel"]
    corner = (x[:2, :2] * depthwise[1:, 1:]).sum((0, 1)) @ kernel
    np.testing.assert_allclose(job.number(), corner, rtol=1e-4, atol=1e-5)
    np.save(tmp_path / "n.npy", job.number())
    peer = Child("torch", [sys.executable, str(child), str(tmp_path)])
    try:
        row = bench.measured(job, peer, 2)
        assert row["met"]
        assert row["median_ms"]["default"] == 6000
        assert set(row["other_ratios_quartiles"]) == {"channels_last"}
        np.save(tmp_path / "n.npy", 1.1 * job.number())
        with pytest.raises(SystemExit, match=r"structured, dense, forward: found results .* apart"):
            bench.measured(job, peer, 2)
    finally:
        peer.close()


PEERS_STAND_IN = """
import json, sys
for line in sys.stdin:
    ask = json.loads(line)
    print(json.dumps({"lbforaging": "9.9"} if ask["do"] == "about" else [ask["steps"], 100.0]), flush=True)
"""


def test_random_play_is_compared_with_a_child(script, tmp_path, monkeypatch):
    bench = script("bench_marl")
    (tmp_path / "bench_marl_peers.py").write_text(PEERS_STAND_IN)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench_marl.py"))
    monkeypatch.setattr(bench, "WIDTH", 2)
    monkeypatch.setattr(bench, "LENGTH", 3)
    args = ["--peers-python", sys.executable, "--env", "lbf", "hidden_corner", "--rollouts", "1", "--repeats", "2"]
    rows = {row["case"]: row for row in bench.play(bench.options().parse_args(args))}
    assert set(rows) == {"play, lbf", "play, lbforaging", "play, lbf / lbforaging", "play, hidden_corner"}
    assert rows["play, lbforaging"]["steps_per_cpu_s_quartiles"] == pytest.approx([40.0] * 3)
    low, median, high = rows["play, lbf"]["steps_per_cpu_s_quartiles"]
    assert 0 < low <= median <= high
    assert rows["play, lbf / lbforaging"]["ratio_quartiles"][1] == pytest.approx(median / 40.0)


PROBES_STAND_IN = """
import json, sys
import numpy as np
for line in sys.stdin:
    ask = json.loads(line)
    if ask["do"] == "audit":
        assert np.load(ask["arrays"])["obs"].shape == (10, 50, 2, 18)
    answer = {"dec-pomdp-diagnostics": "9.9"} if ask["do"] == "about" else {"cpu_s": 60.0, "wall_s": 40.0}
    print(json.dumps(answer), flush=True)
"""


def test_probes_are_compared_with_a_child(script, tmp_path, monkeypatch):
    bench = script("bench_marl")
    (tmp_path / "bench_marl_peers.py").write_text(PROBES_STAND_IN)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench_marl.py"))
    # seconds by the number of null values; the estimates themselves are tested with the measures
    monkeypatch.setattr(bench, "audit", lambda team, reps, names=(): reps)
    monkeypatch.setattr(bench, "timed", lambda call: bench.Taken(wall=1.0 * call(), cpu=2.0 * call()))
    args = ["--probes-python", sys.executable, "--probe-rows", "500", "--repeats", "2"]
    rows = {row["case"]: row for row in bench.probes(bench.options().parse_args(args))}
    assert rows["probes, package"]["version"] == "9.9"
    assert rows["probes, real, 5 null values"]["wall_s_quartiles"] == [5.0] * 3
    assert rows["probes, real, 5 null values"]["met"]
    assert rows["probes, package / ours"]["ratio_quartiles"] == [6.0] * 3
    assert rows["probes, package / ours"]["met"]
    assert rows["probes, hidden, 200 / 5 null values"]["ratio_quartiles"] == [40.0] * 3
    assert not rows["probes, hidden, 200 / 5 null values"]["met"]
    for kind in ("real", "binary", "hidden", "moves"):
        drawn = bench.arrays(kind, 3, 4)
        assert drawn["action"].shape[:3] == drawn["obs"].shape[:3] == (3, 4, 2)
        assert ("hidden" in drawn) == (kind == "hidden")
        assert np.issubdtype(drawn["action"].dtype, np.integer) == (kind != "moves")


MATE_STAND_IN = """
import json, sys
assert sys.argv[1] == "clone"
for line in sys.stdin:
    ask = json.loads(line)
    answer = {"torch": "9.9"} if ask["do"] == "about" else [50 * ask["updates"], 3.0, 2.0]
    print(json.dumps(answer), flush=True)
"""


def test_training_of_mate_is_compared_with_a_child(script, tmp_path, monkeypatch):
    bench = script("bench_marl")
    (tmp_path / "bench_marl_mate.py").write_text(MATE_STAND_IN)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench_marl.py"))
    made = []
    side = script("bench_agents").Side(None, 0.0, 0, lambda repeat: lambda: repeat)
    monkeypatch.setattr(bench.bench_agents, "ours", lambda learner, updates: made.append((learner, updates)) or side)
    monkeypatch.setattr(bench, "timed", lambda call: bench.Taken(wall=0.5, cpu=0.5))
    parse = bench.options().parse_args
    rows = bench.mate(parse(["--mate", "clone", "--mate-python", sys.executable, "--mate-updates", "4"]))
    assert [(r["ratio_quartiles"], r["met"]) for r in rows] == [([6.0] * 3, True), ([4.0] * 3, False)]
    assert rows[0]["rates_quartiles"] == {"ours": [400.0] * 3, "official": pytest.approx([200 / 3] * 3)}
    ((learner, updates),) = made
    assert (updates, learner.num_steps, learner.samples_per_step) == (4, 4, 50)
    assert learner.config.gru == 128
    with pytest.raises(UserError, match="--mate-python: expected for the case mate"):
        bench.mate(parse(["--mate", "clone"]))


TORCH_STAND_IN = """
import json, sys
assert sys.argv[1:] == ["corl", "-"]
for line in sys.stdin:
    ask = json.loads(line)
    seconds = {1: 8.0, 2: 12.0}.get(ask.get("threads"), 9.0)
    print(json.dumps({"torch": "9.9"} if ask["do"] == "about" else seconds), flush=True)
"""


def test_learners_from_data_are_compared_with_a_child(script, tmp_path, monkeypatch):
    bench, peers = script("bench_offline"), script("bench_offline_peers")
    (tmp_path / "bench_offline_torch.py").write_text(TORCH_STAND_IN)
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "bench_offline_peers.py"))
    for name, value in dict(OBS=3, ACT=1, ROWS=64).items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr(bench, "ENV", "gymnax/Pendulum-v1")
    monkeypatch.setattr(bench, "ours", lambda learner, updates, seeds=1: lambda repeat: 2.0)
    args = bench.options().parse_args(["--corl", "corl", "--torch-python", sys.executable, "--repeats", "2"])
    rows = {row["case"]: row for row in bench.updates_of_td3_bc(args, 1e6, 8)}
    ratio = rows["td3_bc 2x8, CORL / jaxstack"]
    assert (ratio["ratio_quartiles"], ratio["target"], ratio["met"]) == ([4.0] * 3, 4.0, True)
    assert rows["td3_bc 2x8, CORL, 1 threads"]["torch"] == "9.9"
    assert "torch" not in rows["td3_bc 2x8, jaxstack"]
    # actor 3-8-8-1, two critics 4-8-8-1
    flops = 2 * 256 * (2.5 * (24 + 64 + 8) + 4.5 * 2 * (32 + 64 + 8))
    assert rows["td3_bc 2x8, jaxstack"]["share_of_matrix_rate"] == pytest.approx(flops / 2.0 / 1e6)
    missing = rows["td3_bc 2x8, JAX-CORL / jaxstack with normalised critics"]
    assert missing["not_measured"] == "--jax-corl PATH was not given"
    assert "ratio_quartiles" not in missing
    assert bench.ratio("x", [6.0] * 3, [1.0] * 3, 5.0, at_least=False)["met"] is False
    seconds = {"ptgood, 1 threads": [3.0, 3.0], "ptgood, 2 threads": [2.0, 9.0], "jaxstack": [1.0, 1.0]}
    assert peers.fastest(seconds, "ptgood") == [3.0, 3.0]


PEER_FILE = """
import os
import d4rl, gym, tqdm, wandb
import jax.numpy as jnp
from omegaconf import OmegaConf
from pydantic import BaseModel
from typing import NamedTuple
os.environ["XLA_FLAGS"] = "--theirs"
class TD3BCConfig(BaseModel):
    n_jitted_updates: int = 2
assert OmegaConf.from_cli() == {} and gym.Env
class Transition(NamedTuple):
    observations: object; actions: object; rewards: object; next_observations: object; dones: object
class Net(NamedTuple):
    params: object
class State(NamedTuple):
    actor: Net
def create_td3bc_train_state(key, obs, action, config):
    assert config.hidden_dims == (8, 8) and obs.shape == (17,) and action.shape == (6,)
    return State(Net(jnp.zeros(())))
class TD3BC:
    def update_n_times(self, state, data, key, config):
        return State(Net(state.actor.params + config.n_jitted_updates)), {}
"""


def test_a_peer_is_imported_without_what_training_does_not_need(script, tmp_path, monkeypatch):
    peers = script("bench_offline_peers")
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "td3bc.py").write_text(PEER_FILE)
    before = dict(os.environ)
    try:
        seconds = peers.jax_corl(argparse.Namespace(jax_corl=tmp_path), 8, 4)(0)
    finally:
        for name in ("d4rl", "gym", "tqdm", "wandb", "omegaconf", "pydantic"):
            if getattr(sys.modules.get(name), "__spec__", None) is None:
                sys.modules.pop(name, None)
    assert seconds > 0
    assert dict(os.environ) == before
    with pytest.raises(UserError, match=r"edac\.py: found no such file, expected that of a clone"):
        peers.unifloral(argparse.Namespace(unifloral=tmp_path), 1)
