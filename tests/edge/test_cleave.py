"""Cleave: times and areas have closed forms, rectangles tile products, failures cost their rectangle alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.cli import main
from jaxstack.core.errors import UserError
from jaxstack.edge import cleave, cleave_baselines, cleave_devices
from jaxstack.edge.cleave import Chains, Devices, Gemm, Link
from jaxstack.edge.cleave_events import simulate
from jaxstack.edge.cleave_execution import Workers, sharded_matmul, tiled

WORK = Gemm(3000, 1000, 2000)


def alike(count, **changes):
    values = dict(memory=4e9, speed=2e12, down=25e6, up=5e6, latency=0.02) | changes
    return Devices(**{k: np.full(count, v) * 1.0 for k, v in values.items()})


@pytest.mark.parametrize("overlap", [False, True])
def test_areas_invert_times_and_more_devices_are_never_slower(overlap):
    devices = cleave_devices.drawn(7, seed=1)
    for area in (10.0, 1e5, 3.9e6, 5e6):  # squares, and strips beyond 2000 x 2000
        seconds = cleave.least_time(devices, area, WORK, overlap)
        for i in range(7):
            found = cleave.largest_area(devices.take([i]), seconds[i], WORK, overlap)
            np.testing.assert_allclose(found, area, rtol=1e-9)
    makespans = [float(cleave.relaxed(cleave_devices.drawn(7).take(range(k)), WORK, overlap)[0]) for k in range(1, 8)]
    assert (np.diff(makespans) <= 0).all()
    # scenarios side by side
    both = Devices(*(np.stack([a, b]) for a, b in zip(devices, cleave_devices.drawn(7))))
    np.testing.assert_allclose(cleave.relaxed(both, WORK, overlap)[0][1], makespans[-1])


def test_closed_forms_of_the_makespan():
    # one device
    t, areas = cleave.relaxed(alike(1), WORK)
    np.testing.assert_allclose(t, cleave.task_time(alike(1), 3000, 2000, WORK)[0])
    np.testing.assert_allclose(areas, [6e6])
    # p = k^2 devices that are alike: squares
    square = Gemm(6000, 500, 6000)
    side = 2000.0
    want = 0.02 + 2 * side * 1000 / 25e6 + 2 * side**2 * 500 / 2e12 + side**2 * 2 / 5e6
    plan = cleave.plan_gemm(alike(9), square)
    np.testing.assert_allclose(cleave.relaxed(alike(9), square)[0], want)
    np.testing.assert_allclose(plan.makespan, want, rtol=1e-2)
    np.testing.assert_allclose(np.diff(plan.rows, axis=1), 2000, atol=20)
    # links without limit: areas in proportion to speed; speed without limit: to the uplink
    devices = cleave_devices.drawn(6, seed=2)
    fast = devices._replace(down=np.full(6, 1e30), up=np.full(6, 1e30), latency=np.zeros(6))
    t, areas = cleave.relaxed(fast, WORK)
    np.testing.assert_allclose(areas / areas.sum(), devices.speed / devices.speed.sum(), rtol=1e-6)
    np.testing.assert_allclose(t, WORK.operations / devices.speed.sum(), rtol=1e-6)
    up = devices._replace(down=np.full(6, 1e30), speed=np.full(6, 1e30), latency=np.zeros(6))
    np.testing.assert_allclose(cleave.relaxed(up, WORK)[1] / 6e6, devices.up / devices.up.sum(), rtol=1e-6)


def coverage(plan, shape):
    seen = np.zeros(shape, int)
    for (a, b), (c, d) in zip(plan.rows, plan.columns):
        seen[a:b, c:d] += 1
    return seen


@pytest.mark.parametrize("split", ["best", "both", "rows", "columns"])
def test_rectangles_tile_the_product_within_memory(split):
    devices = cleave_devices.drawn(24, seed=3)._replace(memory=np.full(24, 1.5e6))
    devices.latency[5] = 1e6  # nobody waits for it
    plan = cleave.plan_gemm(devices, WORK, split=split, overlap=True)
    assert (coverage(plan, (3000, 2000)) == 1).all()
    assert 5 not in plan.device
    assert len({*plan.device}) == len(plan.device)
    r, c = (np.diff(x, axis=1)[:, 0] for x in (plan.rows, plan.columns))
    assert (cleave.resident(r, c, WORK) <= devices.memory[plan.device]).all()
    assert plan.makespan >= plan.relaxed * (1 - 1e-9)
    np.testing.assert_allclose(plan.down, (r + c) * 2000)
    if split != "columns":
        assert plan.seconds.min() > 0.5 * plan.makespan
    # the link of the server: all bytes go through it
    slow = cleave.plan_gemm(devices, WORK, split=split, link=Link(1e3, 1e30))
    np.testing.assert_allclose(slow.makespan, slow.down.sum() / 1e3)
    assert plan.relaxed < slow.relaxed <= slow.makespan
    tiles = cleave.plan_gemm(devices, WORK, split=split, tile=8)
    assert (coverage(tiles, (3000, 2000)) == 1).all()
    assert (tiles.rows % 8 == 0).all()


def test_an_equal_split_and_chains():
    devices = cleave_devices.drawn(16, seed=4)
    plan = cleave.equal_split(devices, WORK)
    assert (coverage(plan, (3000, 2000)) == 1).all()
    areas = np.diff(plan.rows, axis=1) * np.diff(plan.columns, axis=1)
    np.testing.assert_allclose(areas, 6e6 / 16, rtol=0.02)
    assert plan.makespan > cleave.plan_gemm(devices, WORK).makespan
    chains = Chains(1000, 1e5, 5e4, 1e9, 1e6)
    found = cleave.plan_chains(devices, chains)
    assert np.diff(found.rows, axis=1).sum() == 1000
    one = devices.latency + 1e5 / devices.down + 1e9 / devices.speed + 5e4 / devices.up
    assert found.relaxed <= found.makespan <= found.relaxed + one.max()
    with pytest.raises(UserError, match="memory: found no device"):
        cleave.plan_chains(devices, chains._replace(memory=1e12))
    with pytest.raises(UserError, match="memory: found devices that hold less than"):
        cleave.relaxed(devices._replace(memory=np.full(16, 1e3)), WORK)


def test_a_step_of_a_model_counts_its_operations_and_bytes():
    model = cleave.Model(2, 64, 256, 4, 100)
    devices = cleave_devices.drawn(5)
    step = cleave.plan_step(devices, model, 4, 32)
    total = sum(times * work.operations for _, times, work in cleave.works(model, 4, 32))
    tokens, attention = 128, 4 * 4 * 4.0 * 32**2 * 16
    assert total == 6 * tokens * model.parameters + 2 * 4 * attention
    np.testing.assert_allclose(step.down.sum(), sum(times * plan.down.sum() for _, times, plan in step.plans))
    assert step.seconds >= step.relaxed
    # rivals: one device has nobody to talk to
    one = alike(1, latency=0.0)
    np.testing.assert_allclose(cleave_baselines.pipeline(one, model, 4, 32).seconds, total / 2e12, rtol=1e-6)
    np.testing.assert_allclose(cleave_baselines.ring(one, model, 4, 32).seconds, total / 2e12)
    assert cleave_baselines.data_parallel(one, model, 4, 32).seconds > total / 2e12
    assert not cleave_baselines.data_parallel(alike(2, memory=1e3), model, 4, 32).fits
    # two stages of two layers beat one device where links cost little
    near = alike(2, down=1e12, up=1e12, latency=0.0)
    assert cleave_baselines.pipeline(near, model, 4, 32).seconds < 0.9 * total / 2e12


def test_failures_cost_their_rectangle_alone():
    devices, products = cleave_devices.drawn(12, seed=5), [WORK, Gemm(500, 2000, 1000)]
    never = np.full(12, np.inf)
    whole = simulate(devices, products, never)
    plans = [cleave.plan_gemm(devices, p) for p in products]
    np.testing.assert_allclose(whole.seconds, sum(p.seconds.max() for p in plans))
    np.testing.assert_allclose(
        (whole.down, whole.up), (sum(p.down.sum() for p in plans), sum(p.up.sum() for p in plans))
    )
    # two devices fail, one of them while it does the other's work
    fails = never.copy()
    fails[int(plans[0].device[0])] = 0.1
    fails[int(plans[0].device[1])] = plans[0].makespan * 1.05
    got = simulate(devices, products, fails, timeout=0.5)
    assert got.lost == 2
    assert got.alive.sum() == 10
    assert got.seconds > whole.seconds
    np.testing.assert_allclose(got.up, whole.up)  # every number came up once
    again = cleave.recovery(devices, plans[0], WORK, int(plans[0].device[0]))
    assert again.makespan < plans[0].makespan
    assert int(plans[0].device[0]) not in again.device
    with pytest.raises(UserError, match="devices: found none alive"):
        simulate(devices, products, np.full(12, 0.01))


def test_workers_that_die_give_the_same_numbers():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((70, 40), (40, 50)))
    one = tiled(a, b, 16)
    np.testing.assert_allclose(one, a @ b, rtol=1e-5, atol=1e-5)
    with Workers(cleave_devices.drawn(4), tile=16) as workers:
        np.testing.assert_array_equal(workers.product(a, b), one)
        workers.kill(0)
        workers.kill(2)
        np.testing.assert_array_equal(workers.product(a, b), one)
        assert workers.lost >= 2  # a part of the one's work may have gone to the other
        assert list(workers.alive) == [False, True, False, True]
        workers.join(0)
        np.testing.assert_array_equal(workers.product(a, b), one)
        # gradients, inside a program
        loss = lambda matmul: jax.jit(jax.grad(lambda a, b: jnp.sin(matmul(a, b)).sum(), (0, 1)))(a, b)
        ours = loss(sharded_matmul(workers.product))
        for x, y in zip(ours, loss(jnp.matmul)):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
        for x, y in zip(ours, loss(sharded_matmul(functools.partial(tiled, tile=16)))):
            np.testing.assert_array_equal(x, y)
        for device in range(4):
            workers.kill(device)
        with pytest.raises(UserError, match="workers: found none alive"):
            workers.product(a, b)


def test_the_command_plans_a_step_and_names_bad_input(tmp_path, capsys):
    table = tmp_path / "devices.csv"
    table.write_text("memory,speed,down,up,latency\n4,2,25,5,20\n8,6,100,20,10\n2,1,10,1,50\n")
    out = tmp_path / "shares.csv"
    shape = ["--model", "2,64,256,4,100", "--sequences", "4", "--length", "32"]
    assert main(["plan-edge", "--devices", str(table), *shape, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "3 devices" in text
    assert "pipeline" in text
    assert len(out.read_text().splitlines()) == 4
    for wrong, message in (
        (["--model", "2,64"], "--model 2,64: expected"),
        (["--model", "opt-2b"], "--model opt-2b: expected"),
        (["--devices", str(tmp_path / "none.csv")], "none.csv: cannot be read"),
        (["--count", "0"], "--count 0: expected at least 1"),
        (["--spread", "0.5"], "--spread 0.5: expected 1 or more"),
        (["--spread", "inf"], "--spread inf: expected 1 or more, and finite"),
        (["--model", "2,64,²,4,9"], "--model 2,64,²,4,9: expected"),
        (["--server", "0"], "--server 0: expected a number above 0"),
        (["--cloud", "nan"], "--cloud nan: expected a number above 0"),
        (["--model", shape[1], "--count", "2", "--out", str(table / "x.csv")], "x.csv: cannot be written"),
    ):
        assert main(["plan-edge", *shape[2:], *wrong]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan-edge", "--seed", "-1"])
    assert "--seed: '-1': expected 0 to 2^32-1" in capsys.readouterr().err
    table.write_text("memory,speed,down,up,latency\n4,2,25,0,20\n")
    with pytest.raises(UserError, match="row 2: found up=0, expected a number above 0"):
        cleave_devices.read(table)
    table.write_text("memory,speed,down,up,latency\n4,2,25,5,0\n4,2,25,5,-1\n")
    with pytest.raises(UserError, match="row 3: found latency=-1, expected a number 0 or more"):
        cleave_devices.read(table)
