"""Structured pruning: saliencies in closed form, removals, compressed against masked networks, sizes, the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import cli
from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.nn.classifier import classifier
from jaxstack.nn.vision import wrn
from jaxstack.nn.vision.wrn import WRN
from jaxstack.report import stats
from jaxstack.vision import structured_pruning as sp

KEY = jax.random.key(0)
NET = WRN(10, 0.25, 3, (4, 5, 6))


@pytest.fixture(scope="module")
def trained():
    """Variables with statistics and shifts that are not those of the start, in which channel 2 of block1 is dead."""
    x = jax.random.normal(KEY, (16, 8, 8, 2))
    start = jax.jit(NET.init)(KEY, x)
    noise = lambda path, v: v + 0.2 * jnp.abs(jax.random.normal(jax.random.fold_in(KEY, len(str(path))), v.shape))
    params = jax.tree_util.tree_map_with_path(noise, start["params"])
    changed = jax.tree_util.tree_map_with_path(noise, start["batch_stats"])
    bn = params["block1"]["bn2"]
    params["block1"]["bn2"] = {"scale": bn["scale"].at[2].set(0.0), "bias": bn["bias"].at[2].set(-0.1)}
    return {"params": params, "batch_stats": changed}, x, jnp.arange(16) % 3


def test_the_fisher_saliency_of_a_linear_head_has_its_closed_form():
    h, u = jax.random.normal(KEY, (2, 6, 4))
    mask = jnp.array([1.0, 0.0, 1.0, 1.0])
    loss = lambda u, rows: ((u[0] * h * rows[0]).sum(1).mean(), ())
    (value, _), grads, (delta,) = sp.fisher_step(loss, u, (mask,), 6)
    np.testing.assert_allclose(value, (h @ (mask * u[0])).mean(), rtol=1e-5)
    np.testing.assert_allclose(grads[0], mask * h.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(delta, mask * 0.5 * ((u[0] * h / 6) ** 2).mean(0), rtol=1e-4)


def test_the_fisher_saliency_of_a_network_is_that_of_its_activations(trained):
    """g_nc = sum over pixels of h dL/dh, with h the perturbed activations themselves."""
    variables, x, y = trained
    masks = tuple(m.at[1].set(0.0) for m in sp.full_masks(NET.middle()))

    def loss(params, rows):
        logits, new = NET.apply({**variables, "params": params}, x, True, masks=rows, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[jnp.arange(16), y].mean(), new

    @jax.jit
    def run(params):
        rows = tuple(jnp.broadcast_to(v, (16, len(v))) for v in masks)
        return sp.fisher_step(loss, params, masks, 16), jax.grad(lambda r: loss(params, r)[0])(rows)

    ((_, new), grads, delta), by_mask = run(variables["params"])
    for i, (d, m) in enumerate(zip(delta, masks)):
        assert (d >= 0).all()
        assert (d > 0).sum() == len(m) - 1 - (i == 1)  # the masked one has none, nor has the dead one
        # conv2's gradient knows its input: sum over channels out of w dL/dw is the sum over images of g
        kernel = variables["params"][f"block{i}"]["conv2"]["kernel"]
        total = (kernel * grads[f"block{i}"]["conv2"]["kernel"]).sum((0, 1, 3))
        by_rows = by_mask[i] * m
        np.testing.assert_allclose(by_rows.sum(0), total, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(d, 0.5 * (by_rows**2).mean(0), rtol=1e-4, atol=1e-9)
    assert delta[1][2] == 0
    assert set(new) == {"batch_stats"}
    _, first = sp.prune_argmin(delta, sp.full_masks(NET.middle())[:1] + masks[1:])
    assert first in (1, 4 + 2)  # zero: the channel that its mask has just returned, or the dead one
    _, first = sp.prune_argmin(delta, masks)
    assert first == 4 + 2


def test_at_an_optimum_fisher_ranks_channels_as_their_removal_does():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        h = jnp.asarray(rng.gamma(2.0, size=(1000, 12)) * np.geomspace(0.05, 2.0, 12)[rng.permutation(12)])
        true = jnp.asarray(rng.normal(size=(12, 3)))
        y = jax.random.categorical(KEY, h @ true)

        def loss(w, rows):
            return -jax.nn.log_softmax(h * rows[0] @ w)[jnp.arange(len(y)), y].mean(), ()

        ones = (jnp.ones(12),)
        flat = lambda w: loss(w.reshape(12, 3), ones)[0]
        w = true.reshape(-1)
        # Newton, with a little on the diagonal as logits have a free direction
        newton = lambda w, _: (w - jnp.linalg.solve(jax.hessian(flat)(w) + 1e-9 * jnp.eye(36), jax.grad(flat)(w)), ())
        w, _ = jax.jit(lambda w: jax.lax.scan(newton, w, length=8))(w)
        w = w.reshape(12, 3)
        (best, _), grads, (delta,) = sp.fisher_step(loss, w, ones, len(y))
        assert abs(grads).max() < 1e-6
        without = jnp.stack([loss(w, (ones[0].at[c].set(0.0),))[0] for c in range(12)]) - best
        assert (without > 0).all()
        assert stats.spearman(np.asarray(delta), np.asarray(without)).value > 0.7
        # to second order the loss of a mask 1 - t is L - t g + t^2 / 2 H
        t = 1e-3
        by_mask = jax.jit(lambda m: loss(1.5 * w, (m,))[0])
        g, hessian = jax.jit(lambda m: (jax.grad(by_mask)(m), jax.hessian(by_mask)(m)))(ones[0])
        for c in range(12):
            change = by_mask(ones[0].at[c].add(-t)) - by_mask(ones[0])
            np.testing.assert_allclose(change + t * g[c], 0.5 * t**2 * hessian[c, c], rtol=1e-2)


def test_l1_does_not_see_signs_and_the_release_does(trained):
    variables, _, _ = trained
    masks = sp.full_masks(NET.middle())
    params = variables["params"]
    turned = jax.tree.map(lambda v: v, params)
    kernel = params["block0"]["conv1"]["kernel"]
    turned["block0"]["conv1"]["kernel"] = kernel * jnp.where(jax.random.bernoulli(KEY, 0.5, kernel.shape), 1.0, -1.0)
    for one, two in zip(sp.l1_saliency(params, masks), sp.l1_saliency(turned, masks)):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    signed = [sp.l1_saliency(p, masks, signed=True)[0] for p in (params, turned)]
    np.testing.assert_allclose(signed[0], kernel.sum((0, 1, 2)), rtol=1e-5, atol=1e-6)
    assert not np.allclose(*signed)
    mean = sp.l1_saliency(params, masks, normalised=True)[0]
    np.testing.assert_allclose(mean, np.abs(kernel).mean((0, 1, 2)), rtol=1e-5)


def test_the_least_channel_of_all_blocks_goes():
    masks = (jnp.ones(2), jnp.zeros(0), jnp.array([1.0, 0.0, 1.0]))
    saliency = (jnp.array([3.0, 2.0]), jnp.zeros(0), jnp.array([2.5, -9.0, 4.0]))
    order = []
    for _ in range(4):
        masks, index = sp.prune_argmin(saliency, masks)
        order.append(int(index))
    assert order == [1, 2, 0, 4]
    assert sp.widths(masks) == (0, 0, 0)
    none, _ = sp.prune_argmin(saliency, masks)
    assert sp.widths(none) == (0, 0, 0)


def test_rounds_remove_a_channel_each_and_compressed_networks_are_the_masked_ones(trained):
    variables, x, y = trained
    rows = sp.shuffled_rows(16, 13, 2, 8, seed=0)
    assert sorted(rows[0].reshape(-1)) == list(range(16))  # an epoch
    change = lambda key, x: x + 0.01 * jax.random.normal(key, x.shape)

    @jax.jit  # one program for all criteria
    def run(criterion, key):
        state = sp.begin(variables, NET.middle(), key)
        return sp.prune_and_tune(NET, (x, y), state, jnp.asarray(rows), criterion, change=change)

    orders = []
    for i, name in enumerate(("fisher", "l1", "random", "random")):
        state, order = run(jnp.int32(sp.criterion_number(name)), jax.random.key(i))
        assert len({*np.asarray(order)}) == 13
        mask = np.concatenate(state.masks)
        assert {*np.flatnonzero(mask)} == set(range(15)) - {*np.asarray(order)}
        orders.append(order)
    assert orders[0][0] == 4 + 2  # dead, so nothing is lost with it
    assert (orders[2] != orders[3]).any()
    whole = {"params": state.params, **state.stats}
    mid, small = sp.compress(whole, state.masks)
    assert sum(mid) == 2
    assert 0 in mid  # so a block is its shortcut alone
    network = WRN(10, 0.25, 3, mid)
    assert sum(v.size for v in jax.tree.leaves(small["params"])) == sp.param_count(10, 0.25, mid, 3, 2)
    masked = NET.apply(whole, x, masks=state.masks)
    np.testing.assert_allclose(network.apply(small, x), masked, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(NET.apply(sp.folded(whole, state.masks), x), masked, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="batch_size=17: expected 1 to 16, the number of images"):
        sp.shuffled_rows(16, 1, 1, 17, 0)
    with pytest.raises(UserError, match="unknown criterion 'l2'"):
        sp.criterion_number("l2")


def test_identity_blocks_can_lose_everything():
    x = jax.random.normal(KEY, (2, 8, 8, 1))
    network = WRN(16, 0.25, 3, (3, 2, 1, 4, 2, 2))
    variables = jax.jit(network.init)(KEY, x)
    masks = tuple(jnp.zeros(n) if i in (1, 2) else jnp.ones(n) for i, n in enumerate(network.middle()))
    mid, small = sp.compress(variables, masks)
    assert mid == (3, 0, 0, 4, 2, 2)
    assert "block1" not in small["params"]  # its shortcut has no weights
    smaller = WRN(16, 0.25, 3, mid)
    found, wanted = jax.jit(lambda a, b: (smaller.apply(a, x), network.apply(b, x, masks=masks)))(small, variables)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert sum(v.size for v in jax.tree.leaves(small["params"])) == sp.param_count(16, 0.25, mid, 3, 1)
    again = tuple(jnp.ones(n).at[:1].set(0.0) for n in mid)
    twice, _ = sp.compress(small, again)  # a network with empty blocks can be compressed too
    assert twice == (2, 0, 0, 3, 1, 1)


def test_rivals_have_the_largest_size_that_is_allowed():
    whole = sp.param_count(40, 2)
    for share in (0.3, 0.6, 0.9):
        target = int(share * whole)
        depth, width = sp.shallower(target, 2), sp.narrower(target, 40)
        assert sp.param_count(depth, 2) <= target < sp.param_count(depth + 6, 2)
        assert sp.param_count(40, width) <= target < sp.param_count(40, width + 1 / 64)
        same = sp.bottleneck(target, 40, 2)
        profile = np.linspace(0.2, 1.0, 18)
        cat = sp.copycat(profile, target, 40, 2)
        outs = np.array(wrn.block_features(40, 2)[0])
        for mid, shape in ((same, np.ones(18)), (cat, profile)):
            assert 0.97 * target < sp.param_count(40, 2, mid) <= target
            # one scale, rounded to whole channels
            assert ((np.array(mid) - 0.5) / (shape * outs)).max() <= ((np.array(mid) + 0.5) / (shape * outs)).min()
    for call in (lambda: sp.copycat([1.0] * 3, 100, 10, 1), lambda: sp.narrower(100, 10), lambda: sp.shallower(9, 1)):
        with pytest.raises(UserError, match=r"expected at least \d+, the parameters of the smallest candidate"):
            call()
    with pytest.raises(UserError, match="profile: found 2 shares, expected 3, one for each block"):
        sp.copycat([1.0, 1.0], 10**6, 10, 1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    learner = classifier(model="wrn-10-0.25", num_updates=1, batch_size=16, ema=True, size=4)
    return stored(learner, tmp_path_factory.mktemp("runs") / "base")


def stored(learner, path):
    """A run that has not been trained."""
    state = jax.jit(learner.init)(KEY, learner.hypers)
    return runner.save(learner, jax.tree.map(lambda v: v[None], state), [0], path)


def test_the_command_stores_a_smaller_run(run_dir, tmp_path, capsys):
    out = tmp_path / "small"
    options = ["--method", "random", "--keep", "0.25", "--updates", "1", "--out", str(out)]
    assert cli.main(["compress", str(run_dir), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    base, small = (line.split() for line in lines[-3:-1])
    assert base[0] == str(run_dir)
    assert base[1] == f"{sp.param_count(10, 0.25, None, 10, 1):,}"
    assert cli.main(["evaluate", str(out)]) == 0
    error = 1.0 - float(capsys.readouterr().out.split("eval/accuracy: ")[1].split()[0])
    assert float(small[2].rstrip("%")) == pytest.approx(100 * error, abs=0.11)
    learner, _ = cli.runs.load(str(out))
    assert sum(learner.config.mid_features) == 7
    facts = json.loads((out / "compress.json").read_text())
    assert (facts["run"], facts["method"], facts["keep"], facts["updates"]) == (str(run_dir), "random", 0.25, 1)
    assert facts["networks"][str(out)]["valid_error"] == pytest.approx(error, abs=1e-3)
    assert small[1] == f"{sp.param_count(10, 0.25, learner.config.mid_features, 10, 1):,}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0"], "--keep 0: expected a share in (0, 1]"),
        (["--keep", "1.5"], "--keep 1.5: expected a share in (0, 1]"),
        (["--method", "l2"], "--method l2: expected one of fisher, l1"),
        (["--updates", "0"], "--updates 0, --lr 0.0008: expected at least 1 update"),
        (["--batch-size", "5000"], "batch_size=5000: expected 1 to 1258"),
        (["--train-seed", "7"], "--train-seed 7: expected one of the run's seeds [0]"),
    ],
)
def test_the_command_refuses_in_one_line(options, message, run_dir, tmp_path, capsys):
    assert cli.main(["compress", str(run_dir), "--out", str(tmp_path / "o"), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_only_networks_with_middle_channels_are_compressed(tmp_path, capsys):
    stored(classifier(features=(4,), num_updates=1, batch_size=8), tmp_path / "mlp")
    assert cli.main(["compress", str(tmp_path / "mlp"), "--out", str(tmp_path / "o")]) == 2
    assert "found mlp, expected a classifier with --model wrn-D-W" in capsys.readouterr().err
