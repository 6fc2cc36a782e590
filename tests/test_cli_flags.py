"""What users type, from other habits: lists, files of options, a run's own file, names of other libraries."""

import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import yaml

import jaxstack
from jaxstack import cli
from jaxstack.cli import flags
from jaxstack.core import rundir
from jaxstack.core.errors import UserError
from jaxstack.core.runner import Result

SMALL = "--env matrix_game --total-steps 32 --num-envs 2 --num-steps 8 --num-minibatches 1 --hidden 4".split()


def planned(*argv):
    return cli.plan("ippo", [*SMALL, *argv])[1]


def refused(*argv, name="ippo"):
    with pytest.raises(UserError) as e:
        cli.plan(name, argv)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "words", ["--seeds 0,1,2", "--seeds [0, 1, 2]", "--seed 0 1 2", "--seeds=0,1,2", "--seeds 0 1,2"]
)
def test_lists_are_read_as_people_write_them(words):
    flag, *rest = words.split(" ", 1) if "[" in words else words.split()
    assert planned(flag, *rest).seeds == (0, 1, 2)


def test_lists_of_layers_and_of_options_of_environments():
    assert planned("--hidden", "[64,64]").config.hidden == (64, 64)
    assert planned("--hidden=(8,4)").config.hidden == (8, 4)
    assert planned("--wrap", "time_limit=3", "reward_clip=[-1, 1]").config.wrap == (
        "time_limit=3",
        "reward_clip=[-1, 1]",
    )
    assert planned("--total-steps", "1e5").config.total_steps == 100_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning-rate", "3"], "unknown option --learning-rate: use --lr"),
        (["--total_timesteps", "3"], "unknown option --total-timesteps: use --total-steps"),
        (["--num-env", "3"], "unknown option num-env: did you mean num-envs"),
        (
            ["CartPole-v1"],
            "'CartPole-v1': expected options, each --name value; `jaxstack train ippo --help` lists them",
        ),
        (["--total-steps", "abc"], "--total-steps: 'abc': expected a whole number"),
        (["--total-steps"], "--total-steps: expected a value"),
        (["--sharing", "all"], "--sharing: 'all': expected one of 'full', 'full+id'"),
        (["--total-steps", "1"], "total_steps=1: expected at least one update"),
        (["--config"], "--config: expected one file, found none"),
        (["--wandb-mode", "offline", "--wandb-group", "a", "--nope"], "unknown option nope"),
    ],
)
def test_wrong_options_are_one_line(argv, message):
    assert message in refused(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("collect a --quality good --out b.npz", "jaxstack collect: --quality: found 'good', expected one of random, "),
        ("collect a --quality random --out b.npz --episodes x", "jaxstack collect: --episodes: "),
        ("collect a", "jaxstack collect: the following arguments are required: --quality, --out"),
        (
            "list envs --famly native",
            "jaxstack list: unrecognised arguments: --famly native; see `jaxstack list --help`",
        ),
        ("colect a", "jaxstack: COMMAND: found 'colect', expected one of list, info, "),
    ],
)
def test_what_no_command_knows_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv.split())
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_messages_are_read_without_utf8_too():
    box = "Value error\n -------\n  Error parsing config: elites=9: expected 1 to 7\n ---\n For help, see - --help\n"
    assert flags._one_line(box, (), "") == "elites=9: expected 1 to 7"


def test_a_file_holds_any_options_and_flags_go_before_it(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("lr: 1e-3\nenv: matrix_game\ntotal_steps: 1e4\nseeds: 2\neval_every: 3\nhypers: {gamma: 0.5}\n")
    job = cli.plan("ippo", ["--config", str(file), "--total-steps", "2e4"])[1]
    assert (job.config.hypers.lr, job.config.hypers.gamma, job.config.hypers.lam) == (1e-3, 0.5, 0.95)
    assert (job.config.total_steps, job.seeds, job.run.eval_every) == (20_000, (2,), 3)
    for text, message in {
        "lr: 1e-3\nhypers: {lr: 1}": "lr is given twice, by itself and among hypers",
        "learning_rate: 1": "unknown field in .* 'learning_rate': known: lr",
        "tensorboard: 3": "tensorboard=3: expected true or false",
        "- 1": "expected a mapping of options, found list",
        "lr: [": "not valid YAML",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            cli.plan("ippo", [f"--config={file}"])
    file.write_text("lr: 1")
    with pytest.raises(UserError, match="found options without a learner"):
        cli.plan(None, ["--config", str(file)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    argv = ["--seeds", "0,3", "--lr", "0.02", "--eval-every", "1", "--tensorboard", "--run-dir", str(path)]
    assert cli.main(["train", "ippo", *SMALL, *argv]) == 0
    return path


def test_a_run_is_repeated_by_its_own_file(run, tmp_path, capsys):
    assert cli.main(["train", "--config", str(run), "--run-dir", str(tmp_path / "again")]) == 0
    whole, again = (rundir.read_metrics(path) for path in (run, tmp_path / "again"))
    pd.testing.assert_frame_equal(whole, again)
    job = cli.plan("ippo", ["--config", str(run / "run.yaml"), "--lr", "0.01"])[1]
    assert (job.config.hypers.lr, job.seeds, job.run.eval_every, job.config.num_envs) == (0.01, (0, 3), 1, 2)
    assert "found a run of ippo, expected one of mappo" in refused("--config", str(run), name="mappo")


def test_a_finished_run_goes_on_with_its_sinks(run, tmp_path, capsys):
    assert cli.main(["resume", str(run)]) == 0
    assert "all 2 steps are done, nothing is left to do" in capsys.readouterr().out
    events = run.with_name("run-tensorboard") / "seed_3"
    assert len(list(events.iterdir())) == 1
    assert cli.main(["resume", str(run), "--total-steps", "64"]) == 0
    assert rundir.read_metrics(run).step.max() == 4
    assert len(list(events.iterdir())) == 2
    assert cli.main(["resume", str(run), "--total-steps", "64", "--steps", "4"]) == 2
    assert "expected one of the two" in capsys.readouterr().err


def test_a_run_from_before_an_option_existed_goes_on(run, tmp_path, capsys):
    plan = yaml.safe_load((run / "run.yaml").read_text())
    del plan["config"]["wrap"]
    (run / "run.yaml").write_text(yaml.safe_dump(plan))
    (run / "checksums" / "run.yaml").unlink()
    assert cli.main(["resume", str(run), "--steps", "5"]) == 0


def test_the_sinks_of_a_run_are_stored(tmp_path, monkeypatch):
    made = []

    class Fake:
        @staticmethod
        def init(**options):
            made.append(options)
            return Fake()

        def log(self, metrics, step):
            pass

        def finish(self):
            pass

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    run = str(tmp_path / "run")
    flags = "--wandb ours --wandb-entity us --wandb-tags a,b --wandb-mode offline".split()
    assert cli.main(["train", "ippo", *SMALL, *flags, "--run-dir", run]) == 0
    assert cli.main(["resume", run, "--steps", "3"]) == 0
    first, again = made
    assert first["id"] == again["id"]
    assert (again["resume"], again["project"], again["entity"]) == ("allow", "ours", "us")
    assert (again["tags"], again["mode"], again["group"]) == (["a", "b"], "offline", "run")
    with pytest.raises(UserError, match="--wandb-entity: expected together with --wandb PROJECT"):
        cli.main(["--debug", "train", "ippo", *SMALL, "--wandb-entity", "us"])


def test_a_class_of_the_script_itself_is_refused_where_it_would_be_lost(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys, jaxstack\n"
        "from jaxstack.envs.matrix_game import MatrixGame\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Mine(MatrixGame): pass\n"
        "small = dict(total_steps=32, num_envs=2, num_steps=8, num_minibatches=1, hidden=(4,), env=Mine())\n"
        "learner = jaxstack.make_agent('ippo', **small)\n"
        "print(jaxstack.train(learner, progress=False))\n"
        "jaxstack.train(learner, progress=False, run_dir='lost')\n"
    )
    out = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert out.stdout.startswith("Result(2 steps, 1 of 1 seeds alive, run_dir=None; metrics: ")
    assert "env='__main__:Mine' is defined in the script itself, which other processes cannot import" in out.stderr
    assert "move it into a module of its own, or train without a run directory" in out.stderr
    assert not (tmp_path / "lost").exists()


def test_version_imports_and_closed_pipes(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxstack {jaxstack.__version__}\n"
    assert cli.main(["--import", "no_such_module", "list"]) == 2
    assert "--import no_such_module: no module named 'no_such_module' is found" in capsys.readouterr().err
    (tmp_path / "adds.py").write_text(
        "from jaxstack import envs\nenvs.NATIVE.add('ours', 'jaxstack.envs.matrix_game:MatrixGame', overwrite=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--import", "adds", "list", "envs", "--family", "native"]) == 0
    assert "ours" in capsys.readouterr().out.split()
    code = "import sys; from jaxstack.cli import main; sys.exit(main(['list']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_device_that_is_not_there_is_one_line():
    code = "import sys; from jaxstack.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "train", "ippo", *SMALL]
    out = subprocess.run(argv, env=os.environ | {"JAX_PLATFORMS": "tpu"}, capture_output=True, text=True, timeout=60)
    assert out.returncode == 2
    assert out.stderr.splitlines()[-1].startswith("jaxstack: JAX_PLATFORMS=tpu: no such device is found")
    assert "Traceback" not in out.stderr


def test_a_result_prints_in_a_line():
    text = repr(
        Result(None, pd.DataFrame({"step": [1, 2], "loss/a": [0.0, 1.0]}), pd.Series([True]).to_numpy(), None, None)
    )
    assert text == "Result(2 steps, 1 of 1 seeds alive, run_dir=None; metrics: loss/a)"
