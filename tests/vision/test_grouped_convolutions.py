"""Every lowering of a grouped convolution against XLA's, packing, tiles, counts, the tuner and its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.nn import conv_choice
from jaxstack.nn import conv_forms as forms
from jaxstack.vision import grouped_convolutions as gc
from jaxstack.vision.grouped_convolutions import Case, Tiles, grouped_conv, gspc_tiles

KEY = jax.random.key(0)


def arrays(groups, channels=8, features=4, image=(7, 6), dtype=jnp.float32):
    x = jax.random.normal(KEY, (2, *image, channels), dtype)
    return x, jax.random.normal(jax.random.key(1), (3, 3, channels // groups, features), dtype)


@pytest.mark.parametrize(("groups", "features"), [(1, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 2)])
def test_all_lowerings_agree_with_their_gradients(groups, features, stride, dilation):
    x, w = arrays(groups, 8, features)

    @jax.jit
    def everything(x, w):
        found = {}
        for name in ("lax", *gc.IMPLEMENTATIONS, "auto"):
            if name == "depthwise" and groups != 8:
                continue
            form = lambda x, w, name=name: grouped_conv(x, w, groups, stride, 2, dilation, name)
            if name == "pallas":  # has no derivative
                found[name] = (form(x, w),)
            else:
                out, back = jax.vjp(form, x, w)
                found[name] = (out, *back(jnp.cos(out)))
        return found

    found = everything(x, w)
    for out in found.values():
        for a, b in zip(out, found["lax"]):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_double_precision_agrees_to_its_own_rounding():
    with jax.enable_x64(True):
        x, w = arrays(4, 8, 8, dtype=jnp.float64)
        found = [grouped_conv(x, w, 4, implementation=n) for n in ("lax", "pack", "im2col", "dense", "split", "auto")]
        for out in found[1:]:
            np.testing.assert_allclose(out, found[0], rtol=1e-12, atol=1e-12)


def test_groups_are_separate_and_a_hot_pixel_shows_the_kernel():
    x, w = arrays(4, 8, 8)
    out = grouped_conv(x, w, 4)
    order = np.array([2, 0, 3, 1])
    moved = grouped_conv(
        x.reshape(2, 7, 6, 4, 2)[:, :, :, order].reshape(x.shape),
        w.reshape(3, 3, 2, 4, 2)[:, :, :, order].reshape(w.shape),
        4,
    )
    np.testing.assert_allclose(
        moved, out.reshape(2, 7, 6, 4, 2)[:, :, :, order].reshape(out.shape), rtol=1e-5, atol=1e-5
    )
    dense = grouped_conv(x, forms.block_diagonal(w, 4), 1)
    np.testing.assert_allclose(dense, out, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(forms.of_blocks(forms.block_diagonal(w, 4), 4), w)
    hot = jnp.zeros((1, 7, 6, 8)).at[0, 3, 3, 1].set(1.0)
    np.testing.assert_allclose(grouped_conv(hot, w, 4)[0, 2:5, 2:5, :2], w[::-1, ::-1, 1, :2], rtol=1e-6, atol=1e-6)


def test_tiles_are_those_of_the_release():
    found = {g: gspc_tiles(64 // g, 64 // g, 32, 16) for g in (1, 2, 4, 8, 16, 32, 64)}
    assert found == {g: Tiles(16, 16, 16) for g in (1, 2, 4)} | {
        8: Tiles(8, 8, 16),
        16: Tiles(4, 4, 16),
        32: Tiles(2, 2, 16),
        64: Tiles(1, 1, 16),
    }
    assert gspc_tiles(8, 8, 32, 8) == Tiles(8, 8, 16)
    assert gspc_tiles(48, 48, 32, 16).oc_bn == 16
    assert gspc_tiles(20, 6, 32, 16) == Tiles(10, 6, 16)
    assert gspc_tiles(17, 17, 31, 16) == Tiles(1, 1, 31)


def test_packing_is_undone():
    w = jax.random.normal(KEY, (3, 3, 12, 40))
    packed = gc.pack_kernel(w, 2)
    assert packed.shape == (2, 2, 2, 3, 3, 6, 10)
    np.testing.assert_array_equal(gc.unpack_kernel(packed), w)
    np.testing.assert_array_equal(packed[1, 0, 1, 2, 0, 3], w[2, 0, 9, 20:30])


def test_work_is_what_xla_counts():
    case = Case(2, 16, 8, 1)
    x, w, _ = case.arrays()
    plain = jax.jit(lambda x, w: grouped_conv(x, w, 1, padding=0, implementation="lax")).lower(x, w).compile()
    window = gc.window_of(x.shape, w.shape, 1, padding=0)
    assert 2 * gc.multiply_adds(x.shape, w.shape, window) == pytest.approx(plain.cost_analysis()["flops"], rel=0.01)
    assert gc.multiply_adds(*Case(2, 16, 8, 4).shapes, Case(2, 16, 8, 4).window) * 4 == gc.multiply_adds(
        *case.shapes, case.window
    )


def test_the_layer_computes_what_its_function_does():
    x, _ = arrays(4)
    layer = gc.GroupedConv(8, 4, use_bias=True, implementation="pack")
    variables = layer.init(KEY, x)
    expected = grouped_conv(x, variables["params"]["kernel"], 4)
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-4, atol=1e-4)


def test_what_was_tuned_is_used_and_kept(tmp_path, monkeypatch):
    case = Case(1, 6, 4, 2, 8)
    monkeypatch.setattr(conv_choice, "TUNED", {})
    found = gc.tune(case, repeats=1)
    assert len(found) == len(conv_choice.TUNED) == 3
    assert [name.split()[0] for name in conv_choice.TUNED] == ["conv", "conv", "kernel"]
    for times, form in zip(found.values(), conv_choice.TUNED.values()):
        assert times[form].median == min(t.median for t in times.values())
    x, w, g = case.arrays()
    called = []

    def spy(kind, form):
        return lambda *args, window: called.append((kind, window)) or form(*args, window=window)

    monkeypatch.setitem(forms.CONV_FORMS, "lax", spy("conv", forms.conv_plain))
    monkeypatch.setitem(forms.KERNEL_FORMS, "lax", spy("kernel", forms.kernel_plain))
    conv_choice.TUNED.update(dict.fromkeys(conv_choice.TUNED, "lax"))
    jax.jit(jax.value_and_grad(lambda x, w: (grouped_conv(x, w, 2) * g).sum(), (0, 1))).lower(x, w)
    back = forms.backwards((6, 6), case.window)
    assert sorted(called) == sorted([("conv", case.window), ("conv", back), ("kernel", case.window)])
    path = conv_choice.save_choices(tmp_path / "conv.json")
    kept = dict(conv_choice.TUNED)
    conv_choice.TUNED.clear()
    assert conv_choice.load_choices(path) == 3
    assert kept == conv_choice.TUNED
    monkeypatch.setattr(conv_choice, "machine", lambda: {"cpu": "another"})
    assert conv_choice.load_choices(path) == 0
    path.write_text("{}")
    with pytest.raises(UserError, match="is no file of choices"):
        conv_choice.load_choices(path)


def test_times_are_of_every_repeat():
    found = gc.benchmark_grouped_conv(Case(1, 6, 4, 2), ("lax", "auto", "pack"), gradient=True, repeats=2)
    assert list(found) == ["lax", "auto", "pack"]
    assert all(len(t.seconds) == 2 and 0 < t.best <= t.median for t in found.values())


def test_the_command_tunes(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(conv_choice, "TUNED", {})
    monkeypatch.setattr(conv_choice, "choices_file", lambda: tmp_path / "conv.json")
    assert cli.main(["tune-conv", "--channels", "4", "--groups", "2", "4", "--side", "6", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "4 channels, 2 groups" in out
    assert (tmp_path / "conv.json").exists()
    assert len(conv_choice.TUNED) == 4  # equal shapes of the forward pass and the gradient by the image
    assert cli.main(["tune-conv", "--channels", "4", "--groups", "3"]) == 2
    assert "groups=3: expected a divisor of 4 and 4 channels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(groups=3), "groups=3: expected a divisor"),
        (dict(groups=4, implementation="fast"), "unknown implementation 'fast'"),
        (dict(groups=4, implementation="depthwise"), "expected 1 input channel per group, found 2"),
    ],
)
def test_bad_input_is_one_line(options, message):
    x, w = arrays(4)
    with pytest.raises(UserError, match=message):
        grouped_conv(x, w, **options)
