"""The signature kernel against closed forms, truncated signatures and a library; what Sig-MMD and CSig-MMD keep."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import iv, jv

from jaxstack.core.errors import UserError
from jaxstack.measures import signature_mmd
from jaxstack.measures.signature_kernel import goursat

sig: Any = signature_mmd  # arrays of NumPy and wrong arguments are given on purpose
Grams, Kernel, TailWeights, make_paths = sig.Grams, sig.Kernel, sig.TailWeights, sig.make_paths

X: Any = np.stack([np.cumsum(np.sin(1.3 * k + np.arange(24).reshape(8, 3) ** 1.1) * 0.4, 0) for k in range(4)])
Y: Any = np.stack([np.cumsum(np.cos(0.7 * k + 1.7 * np.arange(15).reshape(5, 3)) * 0.5, 0) for k in range(3)])
PLAIN = Kernel("linear", order=0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64():
        yield


def paths(count, seed=0, scale=1.0, shift=0.0):
    return make_paths(shift + scale * np.random.default_rng(seed).normal(size=(count, 6, 1)).cumsum(1) / 3)


# pysiglib 4.0.0, sig_kernel_gram(X, Y), sig_mmd(X, Y) and sig_score(X, Y[0]) of the paths above; RBF with sigma 0.7
LIBRARY = {
    ("linear", 0): [
        [1.3537867857467898, 1.2139721290568593, 1.1119366150537926],
        [1.75921427653937, 1.5524949566949884, 1.2356779440234158],
        [1.4259610342868447, 1.4875304895426102, 1.4360546763726751],
        [0.9344852660538105, 1.1150765637369753, 1.4011936466643202],
    ],
    ("linear", 2): [
        [1.3532969738483231, 1.2137779336178045, 1.1080766866625207],
        [1.7625709733640365, 1.5483607109345696, 1.230210675642998],
        [1.4312582936258353, 1.4920630910126758, 1.4402501062056519],
        [0.9346746068519087, 1.117057018223037, 1.4016821880207575],
    ],
    ("rbf", 0): [
        [1.208885085863517, 0.8792150024721921, 0.6396932286143137],
        [2.235201204856275, 1.5897956749867341, 1.034779365361253],
        [1.5994285194877977, 1.8964205225796105, 1.7893141459685613],
        [0.5692394504606936, 0.8042141104533895, 1.4444743550813577],
    ],
    ("rbf", 2): [
        [1.2084247754531368, 0.8794851718672397, 0.639014822417059],
        [2.2560038652724295, 1.6143096722262091, 1.0313200350040084],
        [1.6046143418567924, 1.898167505058903, 1.8129581633601368],
        [0.5683675142729332, 0.8070479780686768, 1.4454744968428155],
    ],
}
LIBRARY_MMD = {"linear": 1.107283688669501, "rbf": 1.8933691787609805}
LIBRARY_SCORE = {"linear": -1.7093256443950942, "rbf": -1.7113059621235096}
LIBRARY_ORDERS = {0: 1.3537867857467898, 1: 1.3537264193368928, 3: 1.353145133617611, 5: 1.3530915567513158}


@pytest.mark.parametrize("static", ["linear", "rbf"])
def test_grams_mmd_and_score_are_those_of_another_library(static):
    for order in (0, 2):
        found = sig.signature_kernel_gram(jnp.asarray(X), jnp.asarray(Y), Kernel(static, 0.7, order))
        np.testing.assert_allclose(found, LIBRARY[static, order], rtol=1e-12)
    kernel = Kernel(static, 0.7, 1)
    assert float(sig.sig_mmd2(X, Y, kernel)) == pytest.approx(LIBRARY_MMD[static], rel=1e-12)
    own = sig.signature_kernel(jnp.asarray(Y[0]), jnp.asarray(Y[0]), kernel)  # a constant that the library leaves out
    assert float(sig.sig_score(X, jnp.asarray(Y[0]), kernel) - own) == pytest.approx(LIBRARY_SCORE[static], rel=1e-12)


def test_the_solver_converges_to_inner_products_of_truncated_signatures():
    x, y = jnp.asarray(X[0]), jnp.asarray(Y[0])
    levels = [sig.truncated_signature(p, 8) for p in (x, y)]
    ends = np.cumsum([3**k for k in range(1, 9)])
    inner = [1.0 + float(levels[0][:e] @ levels[1][:e]) for e in ends]
    assert abs(inner[7] - inner[5]) < 1e-5
    error = {o: abs(float(sig.signature_kernel(x, y, Kernel("linear", order=o))) - inner[7]) for o in range(6)}
    for order, value in LIBRARY_ORDERS.items():
        assert error[order] == pytest.approx(abs(value - inner[7]), abs=1e-8)
    assert error[5] < 1e-5
    assert error[3] / error[4] > 3.5
    assert error[4] / error[5] > 3.5
    naive = abs(float(sig.signature_kernel(x, y, Kernel("linear", order=5, scheme="naive"))) - inner[7])
    assert 100 * error[5] < naive < 0.05


def test_truncated_signatures_are_iterated_integrals():
    s = np.asarray(sig.truncated_signature(jnp.asarray(X[0]), 3))
    # pysiglib 4.0.0, sig(X[0], 3)
    known = {0: -1.7839436019919647e-01, 1: -3.681580499042989e-01, 4: 1.7576000202085246e-01}
    known |= {7: 6.777017485466813e-02, 12: -9.462199724411859e-04, 20: 7.568645653474461e-03}
    known |= {38: 2.860929110317002e-06}
    for place, value in known.items():
        assert s[place] == pytest.approx(value, rel=1e-10)
    dx = X[0][-1] - X[0][0]
    line = np.asarray(sig.truncated_signature(jnp.asarray(X[0][[0, -1]]), 3))
    np.testing.assert_allclose(line[3:12], np.outer(dx, dx).ravel() / 2, rtol=1e-12)
    np.testing.assert_allclose(s[:3], dx, rtol=1e-12)
    # shuffle product: S^i S^j = S^ij + S^ji
    second = s[3:12].reshape(3, 3)
    np.testing.assert_allclose(second + second.T, np.outer(dx, dx), atol=1e-12)


@pytest.mark.parametrize("scheme", ["second", "naive"])
def test_single_segments_have_bessel_functions(scheme):
    for size in (1.7, -1.7):
        x, y = jnp.asarray([[0.0, 0.0], [1.0, 2.0]]), jnp.asarray([[1.0, 1.0], [1.0 + size, 1.0]])
        found = float(sig.signature_kernel(x, y, Kernel("linear", order=7, scheme=scheme)))
        expected = iv(0, 2 * np.sqrt(size)) if size > 0 else jv(0, 2 * np.sqrt(-size))
        assert found == pytest.approx(expected, abs=3e-5 if scheme == "second" else 2e-2)


@pytest.mark.parametrize("scheme", ["second", "naive"])
def test_anti_diagonals_equal_a_loop_over_cells(scheme):
    for shape in ((3, 5), (6, 2)):
        kernel = Kernel("linear", order=1, scheme=scheme)
        z = np.random.default_rng(0).normal(size=shape)
        fine = np.repeat(np.repeat(z, 2, 0), 2, 1) / 4
        u = np.ones((fine.shape[0] + 1, fine.shape[1] + 1))
        for i, j in np.ndindex(*fine.shape):
            c = fine[i, j]
            a, b = (1 + c / 2 + c * c / 12, 1 - c * c / 12) if scheme == "second" else (1.0, 1 - c)
            u[i + 1, j + 1] = (u[i + 1, j] + u[i, j + 1]) * a - u[i, j] * b
        assert float(goursat(jnp.asarray(z), kernel)) == pytest.approx(u[-1, -1], rel=1e-12)


def test_invariances_of_the_kernel():
    x, y = jnp.asarray(X[0]), jnp.asarray(Y[0])
    k = lambda a, b, static="linear": float(sig.signature_kernel(a, b, Kernel(static, order=4)))
    fine = jnp.concatenate([jnp.stack([x[:-1], 0.7 * x[:-1] + 0.3 * x[1:]], 1).reshape(-1, 3), x[-1:]])
    assert k(fine, y) == pytest.approx(k(x, y), abs=2e-5)  # the same path at another speed
    for static in ("linear", "rbf"):
        assert k(x + 3.0, y, "linear") == pytest.approx(k(x, y, "linear"), rel=1e-12)
        assert k(x, y, static) == pytest.approx(k(y, x, static), rel=1e-12)
        repeated = jnp.concatenate([x[:3], x[2:], x[-1:], x[-1:]])  # adds no increment
        assert k(repeated, y, static) == pytest.approx(k(x, y, static), rel=1e-12)
        assert k(x[:1], y, static) == 1.0
    for kernel in (Kernel(), Kernel("linear")):
        gram = sig.signature_kernel_gram(paths(12), None, kernel)
        np.testing.assert_allclose(gram, sig.signature_kernel_gram(paths(12), paths(12), kernel, block=7), rtol=1e-12)
        assert (gram == gram.T).all()
        np.testing.assert_allclose(jnp.diag(gram), sig.self_kernels(paths(12), kernel), rtol=1e-12)
        assert np.linalg.eigvalsh(gram).min() > -1e-9 * np.trace(gram)


def test_gradients_are_central_differences():
    x, y = jnp.asarray(X[0]), jnp.asarray(Y[0])
    for kernel in (Kernel("rbf", order=1), Kernel("linear", order=1)):
        f = jax.jit(lambda x, k=kernel: sig.signature_kernel_gram(x[None], y[None], k)[0, 0])
        found = jax.grad(f)(x)
        for place in ((0, 0), (3, 1), (7, 2)):
            step = jnp.zeros_like(x).at[place].set(1e-5)
            assert float(found[place]) == pytest.approx(float(f(x + step) - f(x - step)) / 2e-5, abs=1e-6)


def test_paths_have_the_channels_that_are_asked_for():
    values = np.arange(6.0).reshape(1, 3, 2)
    plain = make_paths(values, basepoint=False, time=False)
    np.testing.assert_array_equal(plain, values)
    whole = make_paths(values, [10.0, 11.0, 14.0])
    np.testing.assert_array_equal(whole[0], [[0, 0, 0], [0, 0, 1], [0.25, 2, 3], [1, 4, 5]])
    late = make_paths(values, [10.0, 11.0, 14.0], span=(6.0, 14.0), basepoint=False)
    np.testing.assert_array_equal(late[0, :, 0], [0.5, 0.625, 1.0])
    both = make_paths(values, time=False, basepoint=False, lead_lag=True)
    np.testing.assert_array_equal(both[0, :, 0], [0, 2, 2, 4, 4])
    np.testing.assert_array_equal(both[0, :, 2], [0, 0, 2, 2, 4])
    # twice the area between lead and lag is the quadratic variation
    s = sig.truncated_signature(both[0], 2)[4:].reshape(4, 4)
    assert float(s[0, 2] - s[2, 0]) == pytest.approx((np.diff(values[0, :, 0]) ** 2).sum())
    assert make_paths(jnp.ones((1, 2, 1), int)).dtype == jnp.float64
    assert make_paths(jnp.ones((1, 2, 1), jnp.float32)).dtype == jnp.float32


def test_missing_stamps_are_dropped():
    rng = np.random.default_rng(1)
    values, times = rng.normal(size=(2, 6, 1)), np.arange(6.0)
    mask = np.array([[False, True, True, False, True, False], [True] * 6])
    made = make_paths(np.where(mask[..., None], values, np.nan), times, mask)
    short = make_paths(values[:1, [1, 2, 4]], times[[1, 2, 4]], span=(0.0, 5.0))
    gram = sig.signature_kernel_gram(made)
    assert float(gram[0, 0]) == pytest.approx(float(sig.signature_kernel(short[0], short[0])), rel=1e-12)
    assert float(gram[0, 1]) == pytest.approx(float(sig.signature_kernel(short[0], made[1])), rel=1e-12)
    # paths of different lengths, padded: stamps and values beyond the end are not read
    padded = make_paths(np.array([[[1.0], [np.nan]], [[1.0], [2.0]]]), [[0.0, np.nan], [0, 1]], [[1, 0], [1, 1]])
    np.testing.assert_array_equal(padded[0], [[0, 0], [0, 1], [0, 1]])


def test_mmd_of_a_sample_with_itself_and_of_splits():
    x = paths(20)
    own = sig.signature_kernel_gram(x)
    assert float(sig.mmd2(Grams(own, own, own), unbiased=False)) == pytest.approx(0.0, abs=1e-12)
    assert float(sig.sig_mmd2(x, x, unbiased=False)) == pytest.approx(0.0, abs=1e-12)

    @jax.vmap
    def split(key):
        a, b = jnp.split(jax.random.permutation(key, 20), 2)
        return sig.mmd2(Grams(own[a][:, a], own[a][:, b], own[b][:, b]))

    values = np.asarray(split(jax.random.split(jax.random.key(0), 200)))
    assert abs(values.mean()) < 2 * values.std() / np.sqrt(200)
    assert values.min() < 0
    other = paths(25, 1, scale=1.5)
    g = sig.grams(x, other)
    n = 20
    pairs = lambda k: [k[i, j] for i in range(len(k)) for j in range(len(k)) if i != j]
    expected = np.mean(pairs(np.asarray(own))) - 2 * g.xy.mean() + np.mean(pairs(np.asarray(g.yy)))
    assert float(sig.mmd2(g)) == pytest.approx(float(expected), rel=1e-12)
    # observation by observation: the mean of kernel scores is MMD^2 up to what does not depend on the forecast
    scores = sig.kernel_score(g)
    assert float(scores[3]) == pytest.approx(float(sig.sig_score(other, x[3])), rel=1e-10)
    constant = jnp.diag(own).mean() - (own.sum() - jnp.trace(own)) / n / (n - 1)
    assert float(scores.mean() - constant) == pytest.approx(float(sig.mmd2(g)), abs=1e-12)


def test_normalised_kernels_have_ones_on_the_diagonal():
    g = sig.grams(paths(20), paths(25, 1), normalize=True)
    plain = sig.grams(paths(20), paths(25, 1))
    np.testing.assert_allclose(jnp.diag(g.xx), 1.0, rtol=1e-12)
    expected = plain.xy[2, 1] / np.sqrt(plain.xx[2, 2] * plain.yy[1, 1])
    assert float(g.xy[2, 1]) == pytest.approx(float(expected), rel=1e-12)


def test_the_permutation_test():
    p = lambda a, b, seed=0: float(sig.permutation_p(jax.random.key(seed), sig.grams(a, b), 199))
    same = [p(paths(20, s), paths(25, 100 + s)) for s in range(20)]
    assert 0.3 < np.mean(same) < 0.7
    assert min(same) >= 1 / 200
    assert p(paths(20), paths(25, 1, shift=2.0)) == pytest.approx(1 / 200)
    g = sig.grams(paths(6), paths(5, 1))
    whole = np.block([[g.xx, g.xy], [g.xy.T, g.yy]])
    key, found = jax.random.key(3), []
    for k in jax.random.split(key, 30):
        first = np.asarray(jax.random.permutation(k, jnp.arange(11) < 6))
        a, b = np.flatnonzero(first), np.flatnonzero(~first)
        found.append(float(sig.mmd2(Grams(*(whole[np.ix_(i, j)] for i, j in ((a, a), (a, b), (b, b)))))))
    expected = (1 + (np.array(found) >= float(sig.mmd2(g))).sum()) / 31
    assert float(sig.permutation_p(key, g, 30)) == pytest.approx(expected)
    assert 2 / 31 < expected < 1
    # all equal: every exchange is a tie
    assert p(jnp.repeat(paths(1), 6, 0), jnp.repeat(paths(1), 5, 0)) == 1.0


def test_censoring_keeps_what_its_weights_keep():
    x, y, pivot = paths(20), paths(25, 1, scale=2.0), make_paths(jnp.zeros((1, 6, 1)))[0]
    ones, zeros = (lambda p: jnp.ones(len(p))), (lambda p: jnp.zeros(len(p)))
    for normalize in (False, True):
        plain = float(sig.sig_mmd2(x, y, normalize=normalize))
        assert float(sig.csig_mmd2(x, y, ones, pivot, normalize=normalize)) == pytest.approx(plain, abs=1e-12)
        assert float(sig.csig_mmd2(x, y, zeros, pivot, normalize=normalize)) == pytest.approx(0.0, abs=1e-12)
    level = lambda p: jax.nn.sigmoid(jnp.abs(p[:, -1, 1]) - 0.5)
    g = sig.censored_grams(x, y, level, pivot)
    whole = np.block([[g.xx, g.xy], [g.xy.T, g.yy]])
    assert np.linalg.eigvalsh(whole).min() > -1e-9 * np.trace(whole)
    # by explicit mixtures of features: a depth that is enough for these small paths
    features = lambda p: jnp.concatenate([jnp.ones(1), sig.truncated_signature(p, 9)])
    linear = Kernel("linear", order=4)
    phi = jax.vmap(features)(0.5 * x[:2])
    w = level(0.5 * x[:2])[:, None]
    mixed = w * phi + (1 - w) * features(pivot)
    found = sig.censored_grams(0.5 * x[:2], y[:2], level, pivot, linear).xx
    np.testing.assert_allclose(found, mixed @ mixed.T, rtol=2e-3)
    score = sig.csig_score(y, x[3], level, pivot)
    assert float(score) == pytest.approx(float(sig.kernel_score(g)[3]), rel=1e-10)


def test_tail_weights_look_at_the_tail_of_training_paths():
    rng = np.random.default_rng(0)

    def draw(bulk=1.0, tail=True):
        values = bulk * rng.normal(size=(100, 6, 1)).cumsum(1) / 6
        values[:8, 3:] += 2.0 * tail
        return make_paths(values)

    x, pivot = draw(), make_paths(np.zeros((1, 6, 1)))[0]
    fitted = TailWeights.fit(x, pivot)
    w = np.asarray(fitted(x))
    assert (w[:8] > 0.5).sum() >= 7
    assert (w > 0.5).sum() == 8  # 8% of 100
    assert np.median(w) < 1e-6
    assert fitted.beta * fitted.c2 == pytest.approx(25.6)
    near = jax.nn.sigmoid(fitted.beta * fitted.c2 * np.array([-0.08, 0.08]))
    np.testing.assert_allclose(near, [0.12, 0.88], atol=0.01)
    hard = TailWeights.fit(x, pivot, beta=float("inf"))(x)
    np.testing.assert_array_equal(hard, w > 0.5)
    smooth = TailWeights.fit(x, pivot, depth=3, kernel=Kernel("linear", order=0))
    assert smooth.location.shape == (2 + 4 + 8,)
    # a forecast without a tail is seen, one with another bulk is not
    observed, calm, narrow = draw(), draw(tail=False), draw(bulk=0.6)
    p = lambda g: float(sig.permutation_p(jax.random.key(0), g, 199))
    assert p(sig.censored_grams(observed, calm, fitted)) < 0.05
    assert p(sig.censored_grams(observed, narrow, fitted)) > 0.2
    assert p(sig.grams(observed, narrow)) < 0.05


def test_robust_moments_ignore_outliers_and_are_conditioned():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) @ np.diag([1.0, 2.0, 30.0])
    x[:45] += 1000.0
    location, precision = sig.robust_moments(x)
    assert np.abs(location / [1.0, 2.0, 30.0]).max() < 0.3
    far = np.einsum("ns,st,nt->n", x - location, precision, x - location)
    assert far[:45].min() > 100 * far[45:].max()
    thin = rng.normal(size=(20, 1)) @ rng.normal(size=(1, 30))  # more columns than points
    _, precision = sig.robust_moments(thin)
    scale = 1.4826 * np.median(np.abs(thin - np.median(thin, 0)), 0)
    values = np.linalg.eigvalsh(precision * np.outer(scale, scale))
    assert values[-1] / values[0] < 50.01


def test_the_median_heuristic():
    x = np.array([[[0.0], [1.0]], [[3.0], [3.0]]])
    assert sig.median_sigma(x) == 4.0  # 1, 9, 9, 4, 4, 0
    with pytest.raises(UserError, match="give sigma"):
        sig.median_sigma(np.ones((3, 2, 1)))


BAD = [
    (lambda: make_paths(np.ones((2, 3))), "values: found shape [2, 3], expected [N, L, d]"),
    (lambda: make_paths(np.ones((2, 3, 1)), np.ones(4)), "times: found shape [4], expected [3] or [2, 3]"),
    (lambda: make_paths(np.ones((2, 3, 1)), [0, 2, 1]), "times: found stamps that do not increase"),
    (lambda: make_paths(np.ones((2, 3, 1)), [0, 1, np.inf]), "times: found a stamp that is not finite"),
    (lambda: make_paths(np.full((2, 3, 1), np.nan)), "values: found a number that is not finite"),
    (lambda: make_paths(np.ones((2, 3, 1)), mask=np.ones((2, 2))), "mask: found shape [2, 2], expected [2, 3]"),
    (lambda: make_paths(np.ones((2, 2, 1)), mask=[[1, 0], [0, 0]]), "mask: trajectory 1 has no stamp"),
    (lambda: make_paths(np.ones((2, 2, 1)), span=(1.0, 1.0)), "span=(1.0, 1.0): expected two stamps"),
    (lambda: sig.signature_kernel_gram(X, Y[..., :2]), "paths: found (4, 8, 3) and (3, 5, 2)"),
    (lambda: sig.sig_mmd2(X, Y, Kernel("cubic")), "static='cubic': expected 'rbf' or 'linear'"),
    (lambda: sig.sig_mmd2(X, Y, Kernel(sigma=0.0)), "sigma=0.0: expected a number > 0"),
    (lambda: sig.sig_mmd2(X, Y, Kernel(order=-1)), "order=-1: expected 0 to 10"),
    (lambda: sig.sig_mmd2(X, Y, Kernel(scheme="third")), "scheme='third'"),
    (lambda: sig.sig_mmd2(X[:1], Y, PLAIN), "found 1, expected at least 2 of each sample"),
    (lambda: sig.truncated_signature(X[0], 0), "depth=0: expected at least 1"),
    (lambda: sig.permutation_p(jax.random.key(0), sig.grams(X[:1], Y, PLAIN)), "found 1 and 3"),
    (lambda: sig.csig_mmd2(X, Y, lambda p: p[:, 0, 0]), "pivot: expected a path"),
    (lambda: TailWeights.fit(X, X[0], alpha=1.0), "alpha=1.0: expected a number between 0 and 1"),
    (lambda: TailWeights.fit(X, X[0], beta=-1.0), "beta=-1.0: expected a number > 0"),
    (lambda: TailWeights.fit(X[:3], X[0]), "paths: found 3, expected at least 4"),
    (lambda: TailWeights.fit(X, X[0], depth=8), "depth=8: 3 channels have 9840 features, expected 4096 at most"),
    (lambda: TailWeights.fit(jnp.repeat(X[:1], 5, 0), X[0]), "the training paths do not differ"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_input_is_one_line(call, message):
    with pytest.raises(UserError) as e:
        call()
    assert message in str(e.value)
    assert "\n" not in str(e.value)
