"""The command line: every command on a small real run, exit codes, and one clear line for every wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from jaxstack import cli, envs, load_policy
from jaxstack.report import plots

SMALL = (
    "--env dispersion --num-envs 4 --num-steps 8 --num-minibatches 2 --num-epochs 1 --hidden 8 "
    "--eval-episodes 4 --total-steps 1.28e2 --checkpoint-every 2"
).split()
COMMANDS = ("list", "info", "resume", "evaluate", "reproduce", "plot", "render", "export")


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", "ippo", *SMALL, "--seeds", "0", "3", "--run-dir", str(path)]) == 0
    return path


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def fails(capsys, *argv: str, code: int = 2) -> str:
    """Exit code 2 and its message, from our own errors and from the parsers alike."""
    try:
        returned = cli.main(list(argv))
    except SystemExit as e:
        returned = e.code
    out = capsys.readouterr()
    assert returned == code
    assert "Traceback" not in out.err + out.out
    return " ".join((out.err + out.out).replace("│", " ").split())


def test_help_needs_no_jax():
    code = (
        "import sys; from jaxstack import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'jax', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert all(f"jaxstack {c}" in out.stdout for c in (*COMMANDS[:-1], "train"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([command, "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: jaxstack {command}")
    assert len(text.splitlines()) > 5


def test_help_of_an_agent_lists_its_options(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["train", "hypermarl", "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--embedding-dim", "--lr", "--checkpoint-every", "--seeds", "--run-dir"))
    assert cli.main(["train"]) == 0
    text = capsys.readouterr().out
    assert "hypermarl" in text
    assert "sequence" in text
    with pytest.raises(SystemExit):
        cli.main(["train", "sequence", "--help"])
    assert "--mixers" in capsys.readouterr().out


def test_list_and_info(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("hypermarl", "dispersion", "jaxmarl/MPE_simple_spread_v3", "brax/ant"))
    assert cli.main(["list", "envs", "--family", "native"]) == 0
    native = ["matrix_game", "dispersion", "navigation", "blind_particle_spread"]
    native += ["follow_partner", "match_now", "repeat_last", "hidden_corner", "cliff_walking", "taxi"]
    native += ["lbf", "boulder_push", "zone_spread", "rware"]
    assert sorted(capsys.readouterr().out.split()) == sorted(native)
    assert cli.main(["list", "learners"]) == 0
    assert {"hypermarl", "sequence"} <= set(capsys.readouterr().out.split())
    assert cli.main(["list", "methods"]) == 0
    assert "diamond" in capsys.readouterr().out
    assert cli.main(["info", "diamond"]) == 0
    assert "https://arxiv.org/abs/2405.12399" in capsys.readouterr().out
    assert cli.main(["info", "mappo"]) == 0
    assert "lr = " in capsys.readouterr().out
    assert cli.main(["info", "navigation"]) == 0
    assert "horizon = " in capsys.readouterr().out


def test_a_run_has_config_record_metrics_and_policy(trained):
    metrics = pd.read_json(trained / "metrics.jsonl", lines=True)
    assert sorted(set(metrics.seed)) == [0, 3]
    assert metrics.step.max() == 4
    assert metrics["eval/return"].notna().sum() == 2
    assert json.loads((trained / "run.json").read_text())["status"] == "finished"
    policy = load_policy(trained / "policy")
    _, action = policy.act(np.zeros((2, 4, *envs.make("dispersion").spec.obs_shape), np.float32))
    assert action.shape == (2, 4)


def test_evaluate_reports_every_seed(run, capsys):
    assert cli.main(["evaluate", str(run), "--episodes", "3"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("eval/")]
    assert [x.split(":")[0] for x in lines] == ["eval/return", "eval/length", "eval/finished", "eval/eaten"]
    assert all(len(json.loads(x.split("by seed: ")[1])) == 2 for x in lines)


SEQUENCE = (
    "--task parity --task-args length=6 --mixer kla --features 8 --depth 1 --batch-size 8 --num-updates 4".split()
)
SEQUENCE += "--mixer-args d_state=2 expand=1 --eval-examples 16".split()


def test_a_sequence_model_trains_resumes_sweeps_and_is_drawn(tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["sequence", *SEQUENCE, "--seeds", "0", "3"]
    assert cli.main(["train", *argv, "--checkpoint-every", "2", "--run-dir", str(run)]) == 0
    whole = pd.read_json(run / "metrics.jsonl", lines=True, precise_float=True)
    text = capsys.readouterr().out
    assert f"run: {run}" in text
    assert f"eval/accuracy: {whole['eval/accuracy'].mean():.3f} (mean of 2 seeds)" in text
    shutil.rmtree(run / "checkpoints" / "4")
    assert cli.main(["resume", str(run)]) == 0
    pd.testing.assert_frame_equal(whole, pd.read_json(run / "metrics.jsonl", lines=True, precise_float=True))
    capsys.readouterr()
    assert cli.main(["evaluate", str(run)]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("eval/")]
    assert {x.split(":")[0] for x in lines} == {"eval/loss", "eval/accuracy", "eval/perplexity"}
    assert all(len(json.loads(x.split("by seed: ")[1])) == 2 for x in lines)
    assert cli.main(["plot", str(run), "--out", str(tmp_path / "c.png")]) == 0
    for argv, message in (
        (["export", str(run), str(tmp_path / "p")], "sequence has no policy: export needs one"),
        (["render", str(run)], "sequence has no policy: render needs one"),
        (["crossplay", str(run)], "sequence has no policy: crossplay needs one"),
        (["evaluate", str(run), "--episodes", "3"], "sequence has no policy: --episodes needs one"),
        (["evaluate", str(run), "--env", "dispersion"], "sequence has no policy: --env needs one"),
    ):
        assert message in fails(capsys, *argv)
    argv = ["sequence", *SEQUENCE, "--sweep", "lr=1e-3,1e-2", "--seed", "3", "--out", str(tmp_path / "s")]
    assert cli.main(["sweep", *argv]) == 0
    text = capsys.readouterr().out
    assert "IQM of eval/accuracy" in text
    assert "best: lr=" in text


def test_a_users_own_agent_and_environment_train_and_come_back(tmp_path, monkeypatch, capsys):
    (tmp_path / "our_things.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    argv = [*SMALL, "--env", "our_things:MyEnv", "--extra", "4", "--run-dir", "run"]
    assert cli.main(["train", "our_things:mine", *argv]) == 0
    assert "eval/return" in capsys.readouterr().out
    assert cli.main(["evaluate", "run", "--env", "our_things:MyEnv:horizon=3", "--episodes", "2"]) == 0
    assert "run  our_things:MyEnv:horizon=3  eval/length: 3.000" in capsys.readouterr().out
    assert load_policy("run/policy").learner.config.extra == 4
    assert cli.main(["info", "our_things:mine"]) == 0
    assert "extra = 3" in capsys.readouterr().out


def test_plot_draws_runs(run, tmp_path, capsys):
    out = tmp_path / "curves.png"
    assert cli.main(["plot", str(run), "--metric", "eval/return", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "no_such_metric" in fails(capsys, "plot", str(run), "--metric", "no_such_metric", "--out", str(out))
    assert "a.jpg: found .jpg, expected a file that ends in .png" in fails(capsys, "plot", str(run), "--out", "a.jpg")
    assert "--smooth 0: expected at least 1" in fails(capsys, "plot", str(run), "--smooth", "0")
    capsys.readouterr()
    assert cli.main(["info", str(run)]) == 0
    text = capsys.readouterr().out
    assert f"{run}: ippo on dispersion" in text
    assert "status finished" in text
    assert "run: eval/return " in text
    assert "no run found" in fails(capsys, "info", str(tmp_path))


def test_runs_of_one_name_are_told_apart(run, tmp_path, monkeypatch):
    for folder in ("x", "y"):
        shutil.copytree(run, tmp_path / folder / "a")
    shutil.copytree(run, tmp_path / "y" / "b")
    drawn = []
    monkeypatch.setattr(plots, "learning_curves", lambda runs, *_, **__: drawn.append(list(runs)))
    monkeypatch.chdir(tmp_path)
    for argv in (["x/a", "y/a"], ["x/a", "y/b", "y/a/"], ["y/b", "./y/b"], ["y/b"]):
        assert cli.main(["plot", *argv]) == 0
    assert drawn == [["x/a", "y/a"], ["x/a", "b", "y/a"], ["b"], ["b"]]


def test_render_draws_an_episode_of_the_chosen_seed(run, tmp_path, capsys):
    out = tmp_path / "e.gif"
    assert cli.main(["render", str(run), "--out", str(out), "--max-steps", "3", "--train-seed", "3"]) == 0
    assert out.read_bytes().startswith(b"GIF")
    assert "--train-seed 7" in fails(capsys, "render", str(run), "--train-seed", "7")
    assert ".bmp" in fails(capsys, "render", str(run), "--out", str(tmp_path / "e.bmp"), "--max-steps", "2")


def test_export_writes_the_policy_that_training_wrote(run, tmp_path):
    assert cli.main(["export", str(run), str(tmp_path / "p")]) == 0
    one, two = load_policy(tmp_path / "p"), load_policy(run / "policy")
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_export_writes_stablehlo_and_says_what_onnx_needs(run, tmp_path, capsys):
    assert cli.main(["export", str(run), str(tmp_path / "p.stablehlo"), "--format", "stablehlo"]) == 0
    assert json.loads((tmp_path / "p.stablehlo.json").read_text())["platforms"] == ["cpu", "cuda", "tpu"]
    assert "jax2onnx" in fails(capsys, "export", str(run), str(tmp_path / "p.onnx"), "--format", "onnx")


def test_resume_of_an_unfinished_run_ends_where_a_whole_one_does(run, capsys):
    whole = pd.read_json(run / "metrics.jsonl", lines=True, precise_float=True)
    shutil.rmtree(run / "checkpoints" / "4")
    assert cli.main(["resume", str(run)]) == 0
    again = pd.read_json(run / "metrics.jsonl", lines=True, precise_float=True)
    pd.testing.assert_frame_equal(whole, again)
    for schedule, lr in ((["--schedule", "keep"], 0.0), ([], 5e-4 / 6)):
        shutil.rmtree(copy := run.with_name("longer"), ignore_errors=True)
        shutil.copytree(run, copy)
        assert cli.main(["resume", str(copy), "--steps", "6", *schedule]) == 0
        longer = pd.read_json(copy / "metrics.jsonl", lines=True, precise_float=True)
        np.testing.assert_allclose(longer[longer.step == 6]["train/lr"], lr, rtol=1e-5)
    assert "num_steps=5: expected at least 6, which" in fails(capsys, "resume", str(copy), "--steps", "5")


def test_a_changed_config_is_refused_and_changes_nothing(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    text = (run / "run.yaml").read_text().partition("\n")[2]  # without its checksum
    (run / "run.yaml").write_text("[" + text)
    assert "not valid YAML" in fails(capsys, "resume", str(run))
    for old, new, message in (
        ("num_epochs: 1", "num_epochs: x", "config.num_epochs: 1 -> 'x'"),
        ("hidden:\n  - 8", "hidden:\n  - 16", "config.hidden: [8] -> [16]"),
        ("    gamma: 0.99", "    gamma: 0.5", "config.hypers.gamma: 0.99 -> 0.5"),
        ("agent: ippo", "agent: mappo", "agent: 'ippo' -> 'mappo'"),
    ):
        (run / "run.yaml").write_text(text.replace(old, new))
        assert new in (run / "run.yaml").read_text()
        for command in (["resume"], ["evaluate"], ["export"]):
            argv = [*command, str(run), *(["out"] if command == ["export"] else [])]
            assert f"changed since the run began: {message}. Only num_steps or options" in fails(capsys, *argv)
    (run / "checksums" / "run.yaml").unlink()  # then the checkpoint tells
    (run / "run.yaml").write_text(text.replace("    gamma: 0.99", "    gamma: 0.5"))
    assert "gamma=0.5: expected [0.99" in fails(capsys, "resume", str(run))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_more_steps_in_the_runs_file_are_trained(run):
    text = (run / "run.yaml").read_text().partition("\n")[2]
    (run / "run.yaml").write_text(text.replace("num_steps: 4", "num_steps: 5"))
    assert cli.main(["resume", str(run)]) == 0
    assert pd.read_json(run / "metrics.jsonl", lines=True).step.max() == 5


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, capsys):
    for file in (run / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert cli.main(["resume", str(run)]) == 0
    assert "using the one of step 2" in capsys.readouterr().out
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert "checkpoint" in fails(capsys, "evaluate", str(run))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "hypermrl"], "did you mean 'hypermarl'"),
        (["train", "ippo", "--env", "dispersoin"], "did you mean 'dispersion'"),
        (["train", "ippo", "--env", "jaxmarl/MPE_simple_spred_v3"], "did you mean 'jaxmarl/MPE_simple_spread_v3'"),
        (["train", "ippo", "--env", "dispersion", "--env-args", "agents=3"], "agents"),
        (["train", "ippo", "--lr", "-1"], "lr=-1.0"),
        (["train", "ippo", "--gamma", "nan"], "gamma=nan"),
        (["train", "ippo", "--num-minibatches", "7"], "num_minibatches=7"),
        (["train", "ippo", "--num-envs", "0"], "num_envs=0"),
        (["train", "ippo", "--num-envs", "1.5"], "'1.5': expected a whole number"),
        (["train", "ippo", "--env", "dispersion", "--env-args", "horizon=x"], "horizon='x': expected a whole number"),
        (["evaluate", "x", "--episodes", "few"], "--episodes: 'few': expected a whole number"),
        (["train", "ippo", "--sharing", "all"], "--sharing"),
        (["train", "ippo", "--no-such-option", "1"], "no-such-option"),
        (["train", "ippo", "--chunk", "-3"], "chunk=-3"),
        (["train", "ippo", *SMALL, "--seeds", "1", "1"], "seeds="),
        (["train", "ppo", "--env", "dispersion"], "agent"),
        (["train", "hypermarl", "--env", "gymnax/CartPole-v1", "--sharing", "none"], "sharing"),
        (["train", "ippo", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate", "nowhere"], "no run found"),
        (["resume", "nowhere"], "no run found"),
        (["resume", "nowhere", "--schedule", "keep"], "--schedule keep: expected together with --steps"),
        (["resume", "nowhere", "--steps", "9", "--schedule", "stretch"], "'stretch'"),
        (["plot", "nowhere"], "no metrics found"),
        (["info", "hypermrl"], "hypermarl"),
        (["reproduce", "hypermrl"], "did you mean 'hypermarl'"),
        (["reproduce", "hypermarl", "--seeds", "1"], "seeds=1"),
        (["list", "envs", "--family", "jaxmrl"], "jaxmarl"),
        (["lst"], "lst"),
        (["evaluate"], "RUN"),
        (["evaluate", "x", "--episode-count", "2"], "--episode-count"),
    ],
)
def test_wrong_input_is_one_clear_message(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "jaxstack train" in capsys.readouterr().out


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no run found"):
        cli.main(["evaluate", "nowhere", "--debug"])


def test_a_directory_of_others_is_left_alone(run, tmp_path, capsys):
    assert "holds a run already" in fails(capsys, "train", "ippo", *SMALL, "--run-dir", str(run))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "not empty" in fails(capsys, "train", "ippo", *SMALL, "--run-dir", str(tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in fails(capsys, "train", "ippo", *SMALL, "--run-dir", str(tmp_path / "file" / "run"))


def test_a_config_file_is_the_default_that_flags_override(run, tmp_path, capsys):
    import yaml

    config = yaml.safe_load((run / "run.yaml").read_text())["config"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = ["train", "ippo", "--config", str(file), "--num-epochs", "2", "--run-dir", str(tmp_path / "new")]
    assert cli.main(argv) == 0
    new = yaml.safe_load((tmp_path / "new" / "run.yaml").read_text())["config"]
    assert new == config | {"num_epochs": 2}
    file.write_text(yaml.safe_dump(config | {"num_epoch": 2}))
    assert "num_epoch" in fails(capsys, "train", "ippo", "--config", str(file))


def test_sigterm_saves_and_exits_with_143(tmp_path):
    path = tmp_path / "run"
    argv = [sys.executable, "-m", "jaxstack.cli", "train", "ippo", *SMALL, "--total-steps", "100000000"]
    env = os.environ | {"JAXSTACK_CACHE": os.environ.get("JAX_COMPILATION_CACHE_DIR", "off")}
    job = subprocess.Popen(
        [*argv, "--chunk", "4", "--checkpoint-every", "0", "--run-dir", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        deadline = time.monotonic() + 240
        while not (path / "metrics.jsonl").exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 143, err
    assert f"`jaxstack resume {path}` continues" in err
    assert json.loads((path / "run.json").read_text())["status"] == "interrupted"
    assert cli.main(["evaluate", str(path), "--episodes", "2"]) == 0


def test_devices_need_no_flags_on_a_cpu(tmp_path):
    """The command makes the CPU show as many, in training and resuming; a number that was set stays."""
    path = tmp_path / "run"
    env = os.environ | {"JAXSTACK_CACHE": os.environ.get("JAX_COMPILATION_CACHE_DIR", "off"), "JAX_PLATFORMS": "cpu"}
    train = ["train", "ippo", *SMALL, "--seeds", "0", "1", "--devices", "2", "--run-dir", str(path)]
    for argv in (train, ["resume", str(path)]):
        out = subprocess.run([sys.executable, "-m", "jaxstack.cli", *argv], env=env, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
    assert json.loads((path / "run.json").read_text())["device"] == "cpu cpu x2"
    forced = env | {"XLA_FLAGS": f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1".strip()}
    argv = [sys.executable, "-m", "jaxstack.cli", *train[:-1], str(tmp_path / "other")]
    out = subprocess.run(argv, env=forced, capture_output=True, text=True)
    assert out.returncode == 2
    assert "devices=2: expected at most 1" in out.stderr
