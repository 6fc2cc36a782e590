import math
import struct
import sys

import pytest
from toy_learners import regression

from jaxstack.core import sinks
from jaxstack.core.errors import UserError
from jaxstack.core.runner import train


def test_only_finite_metrics_are_sent():
    row = {"step": 1, "samples": 8, "seed": 0, "loss/a": 1.0, "loss/b": math.nan, "loss/c": math.inf}
    assert sinks.metrics_of(row) == {"loss/a": 1.0}


def records(path):
    """Scalars of an event file: (step, tag, value)."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    at, out = 0, []
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + length])
        out += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        at += 16 + length
    return out


def test_tensorboard_holds_every_row(tmp_path):
    got = train(regression(), 3, [0, 4], progress=False, sinks=[sinks.TensorBoard(tmp_path)], eval_every=-1)
    for seed in (0, 4):
        (file,) = (tmp_path / f"seed_{seed}").iterdir()
        mine = got.metrics.query(f"seed == {seed}")
        losses = [(step, value) for step, tag, value in records(file) if tag == "loss/total"]
        assert losses == list(zip(mine.samples, mine["loss/total"]))


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], 0

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


def test_wandb_has_one_run_a_seed_in_one_group(monkeypatch):
    made = {}

    class Fake:
        @staticmethod
        def init(name, **options):
            made[name] = (FakeRun(), options)
            return made[name][0]

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    sink = sinks.Wandb("project", "group", {"width": 4})
    got = train(regression(), 2, 2, progress=False, sinks=[sink], eval_every=-1)
    assert sorted(made) == ["seed_0", "seed_1"]
    run, options = made["seed_1"]
    assert (options["project"], options["group"], options["config"]) == ("project", "group", {"width": 4})
    assert [m["loss/total"] for _, m in run.logged] == got.metrics.query("seed == 1")["loss/total"].tolist()
    assert [step for step, _ in run.logged] == [8, 16]
    assert run.finished == 1


def test_wandb_has_one_run_a_setting_and_seed_of_a_sweep(monkeypatch):
    made = {}

    class Fake:
        @staticmethod
        def init(name, **options):
            made[name] = options
            return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    sink = sinks.Wandb("project", "group", {"lr": 1.0}, settings={0: {"lr": 0.1}, 1: {"lr": 0.2}}, id="ab")
    rows = [{"step": 1, "samples": 8, "seed": s, "setting": i, "loss/total": 1.0} for i in (0, 1) for s in (0, 4)]
    sink.write(rows * 2)
    assert list(made) == ["setting_0/seed_0", "setting_0/seed_4", "setting_1/seed_0", "setting_1/seed_4"]
    assert made["setting_1/seed_4"]["config"] == {"lr": 0.2}
    assert made["setting_1/seed_4"]["id"] == "ab-setting-1-seed-4"


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("tensorboardX", lambda path: sinks.TensorBoard(path), r"jaxstack\[tensorboard\]"),
        ("wandb", lambda path: sinks.Wandb("p", "g", {}), r"jaxstack\[wandb\]"),
    ],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, module, make, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=extra):
        make(tmp_path)
