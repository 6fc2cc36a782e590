"""Textbook float64 references in numpy: scalar Kalman filters in covariance form, one after the other."""

import numpy as np


def kalman(v, precision, k, q, abar, pbar, var0=None, mean0=None, prior=False):
    """v, precision [B, T, M]; k, q [B, T, S]; abar, pbar [M, S] -> y, variance [B, T, M], var, mean [B, M, S]."""
    v, precision, k, q, abar, pbar = (np.asarray(x, np.float64) for x in (v, precision, k, q, abar, pbar))
    (batch, length, channels), d_state = v.shape, k.shape[-1]
    var = np.ones((batch, channels, d_state)) if var0 is None else np.array(var0, np.float64)
    mean = np.zeros((batch, channels, d_state)) if mean0 is None else np.array(mean0, np.float64)
    y, y_var = np.zeros(v.shape), np.zeros(v.shape)
    for b, t, m in np.ndindex(batch, length, channels):
        for s in range(d_state):
            p = abar[m, s] ** 2 * var[b, m, s] + pbar[m, s]
            mu = abar[m, s] * mean[b, m, s]
            if precision[b, t, m] > 0:
                gain = p * k[b, t, s] / (k[b, t, s] ** 2 * p + 1.0 / precision[b, t, m])
                mu, p = mu + gain * (v[b, t, m] - k[b, t, s] * mu), (1.0 - gain * k[b, t, s]) * p
            var[b, m, s], mean[b, m, s] = p, mu
            if prior:
                mu, p = abar[m, s] * mu, abar[m, s] ** 2 * p + pbar[m, s]
            y[b, t, m] += q[b, t, s] * mu
            y_var[b, t, m] += q[b, t, s] ** 2 * p
    return y, y_var, var, mean


def inputs(seed, batch=2, length=9, channels=3, d_state=4, noise=0.01):
    """As the layer makes them: unit k and q, abar = exp(-Delta), pbar of an Ornstein-Uhlenbeck process."""
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    delta = np.exp(rng.uniform(np.log(0.01), np.log(0.5), (channels, d_state)))
    return (
        rng.normal(size=(batch, length, channels)),
        np.exp(rng.normal(size=(batch, length, channels))),
        unit(rng.normal(size=(batch, length, d_state))),
        unit(rng.normal(size=(batch, length, d_state))),
        np.exp(-delta),
        noise / 2 * (1 - np.exp(-2 * delta)),
    )
