import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence import model as models
from jaxstack.sequence import tasks
from jaxstack.sequence.kla import KalmanLinearAttention
from jaxstack.sequence.mixer import ShortConv
from jaxstack.sequence.model import SequenceModel, generate, sample_token


def kla(width=8, **options):
    return KalmanLinearAttention(width, d_state=2, **options)


MODEL = SequenceModel((kla(), kla(block="mamba", expand=1.0)), 11, 11)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 12))


@pytest.fixture(scope="module")
def params():
    params = jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]
    return models.reinitialise(params, jax.random.key(1), 0.3)  # so that every part matters


def run(params, tokens, **options):
    return jax.jit(lambda p, x: MODEL.apply({"params": p}, x, **options))(params, tokens)


def close(x, y, **tolerance):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 2e-4, "atol": 2e-5} | tolerance)


def test_pieces_and_steps_give_what_the_whole_gives(params):
    whole, end = run(params, TOKENS)
    first, state = run(params, TOKENS[:, :5])
    second, last = run(params, TOKENS[:, 5:], state=state)
    close(jnp.concatenate([first, second], 1), whole)
    close(last, end)

    def decode(params, state, tokens):
        step = lambda s, x: MODEL.apply({"params": params}, x, s, method="step")[::-1]
        return jax.lax.scan(step, state, tokens.T)

    last, stepped = jax.jit(decode)(params, MODEL.init_state(3), TOKENS)
    close(jnp.swapaxes(stepped, 0, 1), whole)
    close(last, end)


def test_outputs_depend_on_the_past_alone(params):
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    a, b = run(params, TOKENS)[0], run(params, changed)[0]
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert (np.abs(a - b)[:, 7:].max(-1) > 1e-6).all()


def test_padding_changes_nothing(params):
    whole, end = run(params, TOKENS)
    mask = np.ones((3, 15), bool)
    padded = np.zeros((3, 15), int)
    for row, places in enumerate(([0, 1, 2], [12, 13, 14], [0, 5, 9])):
        mask[row, places] = False
        padded[row, mask[row]] = TOKENS[row]
    out, state = run(params, padded, mask=jnp.asarray(mask))
    close(out[mask].reshape(3, 12, 11), whole)
    close(state, end)


def test_what_stands_at_padding_reaches_no_output_and_no_gradient(params):
    mask = jnp.asarray(np.arange(12) >= np.array([[0], [2], [5]]))

    def graded(model, tokens, targets):
        def total(params):
            bound = {"params": params}
            out, _ = model.apply(bound, tokens, mask=mask)
            mean, variance = model.apply(bound, tokens, mask=mask, method="belief")
            if not model.num_targets:
                chosen = (mean.sum(-1),)
            else:
                log_p = models.predictive(model, params, tokens, jax.random.key(0), 2, mask=mask)
                chosen = (log_p.max(-1), mean.sum(-1))
            score = sum(jnp.where(mask, x, 0.0).sum() for x in (*chosen, variance.sum(-1)))
            return tasks.loss_terms(out, tasks.Batch(tokens, targets, mask))[0] + score

        return jax.jit(jax.value_and_grad(total))

    words, real = SequenceModel((kla(),), 11, 11, mlp_ratio=0.0), SequenceModel((kla(),), 0, 0, mlp_ratio=0.0)
    weights = {k: v for k, v in params.items() if k in ("embed", "mixers_0", "mixer_norms_0", "final_norm", "head")}
    inputs = np.random.default_rng(1).normal(size=(3, 12, 2)).astype(np.float32)
    real_params = jax.jit(real.init)(jax.random.key(0), inputs)["params"]
    cases = (
        (words, weights, TOKENS.astype(np.int32), (99, -1), TOKENS.astype(np.int32), -100),
        (real, real_params, inputs, (np.nan, np.inf), inputs[..., 0], np.nan),
    )
    for model, weights, tokens, dirt, targets, no_target in cases:
        at = mask if tokens.ndim == 2 else mask[..., None]
        run = jax.jit(lambda p, x, y, model=model: graded(model, x, y)(p))
        clean = run(weights, jnp.where(at, tokens, 1), targets)
        for filler in dirt:
            close(run(weights, jnp.where(at, tokens, filler), jnp.where(mask, targets, no_target)), clean, rtol=1e-6)
    with pytest.raises(UserError, match="mask has shape"):
        run(real_params, inputs[:, :5], targets)


def test_generation_is_repeated_prediction(params):
    greedy = np.asarray(generate(MODEL, params, TOKENS, 4, jax.random.key(0), temperature=0.0))
    sequence = TOKENS
    for i in range(4):
        likeliest = np.asarray(run(params, sequence)[0][:, -1]).argmax(-1)
        np.testing.assert_array_equal(greedy[:, i], likeliest)
        sequence = np.concatenate([sequence, likeliest[:, None]], 1)
    mask = jnp.asarray(np.tile(np.arange(14) >= 2, (3, 1)))
    padded = np.concatenate([np.zeros((3, 2), int), TOKENS], 1)
    again = generate(MODEL, params, padded, 4, jax.random.key(0), mask=mask, temperature=0.0)
    np.testing.assert_array_equal(again, greedy)
    one = generate(MODEL, params, TOKENS, 4, jax.random.key(0))
    other = generate(MODEL, params, TOKENS, 4, jax.random.key(1))
    assert (np.asarray(one) != other).any()


def test_sampling_follows_the_probabilities():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    draw = lambda **o: np.bincount(sample_token(jax.random.key(0), jnp.log(jnp.tile(p, (20_000, 1))), **o), minlength=4)
    np.testing.assert_allclose(draw() / 20_000, p, atol=0.015)
    np.testing.assert_allclose(draw(top_k=2) / 20_000, [0.625, 0.375, 0, 0], atol=0.015)
    np.testing.assert_allclose(draw(temperature=0.5) / 20_000, p**2 / (p**2).sum(), atol=0.015)
    assert draw(temperature=0.0)[0] == 20_000


def test_an_auto_encoder_reads_the_last_token_of_each_row():
    model = SequenceModel((kla(),), 11, 11, readout="last")
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    apply = jax.jit(lambda x, mask=None: model.apply({"params": params}, x, mask=mask)[0])
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    assert (np.abs(apply(TOKENS) - apply(changed)).max(-1) > 0).all()  # the first output knows later tokens
    mask = jnp.asarray(np.tile(np.arange(12) < 9, (3, 1)))
    close(apply(TOKENS, mask)[:, :9], apply(TOKENS[:, :9]))
    with pytest.raises(UserError, match="no single steps"):
        model.apply({"params": params}, TOKENS[:, 0], model.init_state(3), method="step")


def test_position_code_is_that_of_the_transformer():
    code = models.position_code(5, 6)
    for t, i in ((0, 0), (3, 0), (4, 2), (2, 5)):
        angle = t / 10_000 ** (2 * (i // 2) / 6)
        np.testing.assert_allclose(code[t, i], np.sin(angle) if i % 2 == 0 else np.cos(angle), rtol=1e-5)


def test_real_inputs_and_outputs():
    model = SequenceModel((kla(),), 0, 0, mlp_ratio=0.0)
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    out, params = model.init_with_output(jax.random.key(0), x)
    assert out[0].shape == (2, 5)
    assert not any("mlp" in name for name in params["params"])
    with pytest.raises(UserError, match="expected real inputs"):
        model.apply(params, TOKENS)
    with pytest.raises(UserError, match="expected \\[batch, time\\]"):
        model.apply(params, x[0, 0])


def test_decay_cast_and_size(params):
    names = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(models.decay_mask(params))}
    assert names["['mixers_0']['in_proj']['kernel']"]
    assert names["['embed']['embedding']"]
    for name in ("delta", "lambda_log", "process_noise", "lambda_skip"):
        assert not names[f"['mixers_0']['{name}']"]
    assert not names["['final_norm']['scale']"]
    half = models.cast(params, jnp.bfloat16)
    assert half["mixers_0"]["in_proj"]["kernel"].dtype == jnp.bfloat16
    assert half["mixers_0"]["delta"].dtype == jnp.float32
    exact, rough = run(params, TOKENS)[0], run(half, TOKENS)[0]
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.abs(exact - rough).max() / np.abs(exact).max() < 0.05
    assert models.count_parameters({"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}) == 10
    # window 3 and a precision and a mean a state: 16 channels, then 8, of two states, float32
    assert models.state_bytes(MODEL) == 4 * (3 + 2 * 2) * (16 + 8)


def test_reinitialise_touches_linear_weights_only(params):
    new = models.reinitialise(params, jax.random.key(5), 0.02)
    weights = np.concatenate([new["mlps_0"]["in"]["kernel"].ravel(), new["mixers_1"]["sensor"]["kernel"].ravel()])
    assert np.std(weights) == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(new["mixers_0"]["delta"], params["mixers_0"]["delta"])
    np.testing.assert_array_equal(new["final_norm"]["scale"], params["final_norm"]["scale"])


def test_the_monte_carlo_read_out_averages_over_the_belief(params):
    mean, variance = MODEL.apply({"params": params}, TOKENS, method="belief")
    plain = MODEL.apply({"params": params}, mean, method="read")
    close(plain, run(params, TOKENS)[0])
    assert (variance > 0).all()
    sample = jax.jit(lambda key: models.predictive(MODEL, params, TOKENS, key, 500))
    found = np.exp(sample(jax.random.key(0)))
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-4)
    rng = np.random.default_rng(0)
    draws = np.asarray(mean) + np.sqrt(variance) * rng.normal(size=(500, *mean.shape)).astype(np.float32)
    reference = jax.nn.softmax(jax.jit(lambda x: MODEL.apply({"params": params}, x, method="read"))(draws)).mean(0)
    np.testing.assert_allclose(found, reference, atol=0.06)
    assert np.abs(found - jax.nn.softmax(plain)).max() > 3 * np.abs(found - reference).mean()
    with pytest.raises(UserError, match="needs classes"):
        models.predictive(MODEL.clone(readout="last"), params, TOKENS, jax.random.key(0))


def test_a_belief_needs_a_mixer_with_variance():
    class Plain(ShortConv):
        pass

    model = SequenceModel((Plain(8),), 11, 11)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    with pytest.raises(UserError, match="Plain, gives no variance"):
        models.predictive(model, params, TOKENS, jax.random.key(0))


def test_logits_are_capped(params):
    capped = MODEL.clone(logit_cap=0.5)
    out = capped.apply({"params": params}, TOKENS)[0]
    np.testing.assert_allclose(out, 0.5 * np.tanh(run(params, TOKENS)[0] / 0.5), rtol=1e-3, atol=1e-5)


def test_bad_models_and_prompts_are_named(params):
    with pytest.raises(UserError, match="widths \\[8, 4\\]"):
        SequenceModel((kla(), kla(4)), 11, 11).init(jax.random.key(0), TOKENS)
    with pytest.raises(UserError, match="readout='first'"):
        SequenceModel((kla(),), 11, 11, readout="first").init(jax.random.key(0), TOKENS)
    with pytest.raises(UserError, match="prompt has shape"):
        generate(MODEL, params, TOKENS[:, :0], 2, jax.random.key(0))
    with pytest.raises(UserError, match="temperature=-1"):
        generate(MODEL, params, TOKENS, 2, jax.random.key(0), temperature=-1)
    with pytest.raises(UserError, match="cannot be fed"):
        generate(SequenceModel((kla(),), 11, 5), params, TOKENS, 2, jax.random.key(0))
    bad = TOKENS.copy()
    bad[1, 3] = 11
    with pytest.raises(UserError, match=r"prompt: found 11 at \[1, 3\], expected 0 to 10, the vocabulary"):
        generate(MODEL, params, bad, 2, jax.random.key(0))
    with pytest.raises(UserError, match="tokens: found 11"):
        models.predictive(MODEL, params, bad, jax.random.key(0))
    mask = np.ones((3, 12), bool)
    mask[1, :4] = False  # the bad token is padding now
    assert generate(MODEL, params, bad, 1, jax.random.key(0), mask=jnp.asarray(mask)).shape == (3, 1)
    with pytest.raises(UserError, match="mask: row 1 is all padding"):
        generate(MODEL, params, TOKENS, 2, jax.random.key(0), mask=jnp.asarray(mask).at[1].set(False))
    with pytest.raises(UserError, match="expected whole numbers"):
        run(params, TOKENS.astype(np.float32))
