"""NumPy references of off-policy updates in float64: forward passes by hand, gradients by central differences."""

import numpy as np


def tree_map(f, tree):
    return {k: tree_map(f, v) for k, v in tree.items()} if isinstance(tree, dict) else f(tree)


def double(tree):
    return tree_map(lambda x: np.asarray(x, np.float64), tree)


def leaves(tree):
    return [x for k in sorted(tree) for x in leaves(tree[k])] if isinstance(tree, dict) else [tree]


def net(params, x, norm="none", tiny=1e-5):
    """Dense layers with ReLU between them."""
    names = sorted((n for n in params if n.startswith("Dense")), key=lambda n: int(n.split("_")[1]))
    for i, name in enumerate(names):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        if i == len(names) - 1:
            return x
        if norm == "before":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + tiny)
        x = np.maximum(x, 0)
        if norm == "after":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + tiny)
            x = x * params[f"scale_{i}"] + params[f"shift_{i}"]


def values(params, obs, action, norm="none"):
    """[E, B] of stacked critics."""
    x = np.concatenate([obs, action], -1)
    size = len(leaves(params)[0])
    return np.stack([net(tree_map(lambda p, i=i: p[i], params), x, norm)[:, 0] for i in range(size)])


def gradient(loss, tree, step=1e-6):
    """The tree of partial derivatives of loss(tree)."""
    out = tree_map(np.zeros_like, tree)
    for x, g in zip(leaves(tree), leaves(out)):
        for at in np.ndindex(x.shape):
            kept = x[at]
            x[at] = kept + step
            up = loss(tree)
            x[at] = kept - step
            g[at] = (up - loss(tree)) / (2 * step)
            x[at] = kept
    return out


def adam(params, grads, lr, b1=0.9, b2=0.999, eps=1e-8):
    """The first step of Adam from zero moments."""
    out = tree_map(np.copy, params)
    for x, g in zip(leaves(out), leaves(grads)):
        m, v = (1 - b1) * g / (1 - b1), (1 - b2) * g**2 / (1 - b2)
        x -= lr * m / (np.sqrt(v) + eps)
    return out


def polyak(target, new, tau):
    out = tree_map(np.copy, target)
    for x, y in zip(leaves(out), leaves(new)):
        x *= 1 - tau
        x += tau * y
    return out


def tanh_normal(params, obs, noise, norm="none", low=-5):
    """(actions, log-probabilities) of a tanh-normal actor."""
    mean, log_std = np.split(net(params, obs, norm), 2, axis=-1)
    log_std = np.clip(log_std, low, 2)
    before = mean + np.exp(log_std) * noise
    logp = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - np.tanh(before) ** 2)
    return np.tanh(before), logp.sum(-1)
