"""Other ways to train on the devices of `jaxstack.edge.cleave`, by the same times of bytes and operations.

Each gets the best division of its work that its rules allow; where a device would not hold what it must, `fits` is
false, and the time is that of devices which would.
"""

from typing import NamedTuple

import numpy as np

from jaxstack.edge.cleave import Devices, Model, works

KEPT = 2
"""Numbers per parameter on a device, weight and gradient; the optimiser's state stays at the PS."""


class Estimate(NamedTuple):
    """Of one training step."""

    seconds: float
    bytes_each: float
    """Both directions together, of the device with most."""
    fits: bool
    restart: float = 0.0
    """Seconds that the failure of one device costs beside noticing it: its parameters sent anew, and the step again."""


def operations(model: Model, sequences: int, length: int) -> float:
    """Of a training step."""
    return sum(times * work.operations for _, times, work in works(model, sequences, length))


def cloud(model: Model, sequences: int, length: int, speed: float) -> float:
    """Seconds on one accelerator of so many operations per second, which nothing slows down."""
    return operations(model, sequences, length) / speed


def data_parallel(devices: Devices, model: Model, sequences: int, length: int, width: int = 2) -> Estimate:
    """Each device has all parameters and part of the batch, in proportion to its speed; gradients go up to a server and
    parameters come down, once per step."""
    weights = model.parameters * width
    compute = operations(model, sequences, length) / devices.speed.sum()
    link = (devices.latency + weights / devices.down + weights / devices.up).max()
    seconds = compute + link
    again = float((weights / devices.down).max())
    return Estimate(seconds, 2 * weights, bool((devices.memory >= KEPT * weights).all()), again + seconds)


def ring(devices: Devices, model: Model, sequences: int, length: int, width: int = 2) -> Estimate:
    """Tensor parallel: each layer is divided in proportion to speed, and its activations are summed around a ring,
    twice forward and twice backward; the slowest link sets the pace."""
    p = devices.count
    each = 2.0 * (p - 1) / p * sequences * length * model.features * width
    sums = 4 * model.layers
    pace = float(np.minimum(devices.down, devices.up).min())
    seconds = operations(model, sequences, length) / devices.speed.sum()
    seconds += sums * (each / pace + 2 * (p - 1) * float(devices.latency.max()))
    kept = KEPT * model.parameters * width * devices.speed / devices.speed.sum()
    own = float((model.parameters * width * devices.speed / devices.speed.sum() / devices.down).max())
    return Estimate(float(seconds), 2 * sums * each, bool((devices.memory >= kept).all()), own + float(seconds))


def pipeline(
    devices: Devices, model: Model, sequences: int, length: int, width: int = 2, parts: tuple[int, ...] = (1, 4, 16, 64)
) -> Estimate:
    """Stages of whole layers on devices, the fastest first, in the best division: layers are alike, so the least
    slowest stage gives each device as many layers as it can do in that time. The best of several numbers of
    micro-batches and of devices, among those that fit into memory if any does."""
    layer = operations(model._replace(layers=1, vocabulary=1), sequences, length)
    head = operations(model, sequences, length) - model.layers * layer
    order = np.argsort(-devices.speed, kind="stable")
    best = Estimate(np.inf, 0.0, False)
    for count in sorted({c for c in (1, 2, 4, 8, 16, 32, 64, model.layers) if c <= min(devices.count, model.layers)}):
        d = devices.take(order[:count])
        for micro in (m for m in parts if m <= sequences):
            activations = sequences * length * model.features * width / micro
            # activations forward and their gradients backward, over links of both neighbours; one device has none
            talk = (2 * activations / d.up + 2 * activations / d.down + 2 * d.latency) * (count > 1)
            each = layer / micro / d.speed
            low, high = 0.0, float((talk + model.layers * each).max())
            for _ in range(60):
                middle = 0.5 * (low + high)
                enough = np.floor(np.maximum(middle - talk, 0.0) / each + 1e-9).sum() >= model.layers
                low, high = (low, middle) if enough else (middle, high)
            layers = np.floor(np.maximum(high - talk, 0.0) / each + 1e-9)
            seconds = (micro + count - 1) * high + head / float(d.speed[0])
            own = layers * model.layer_parameters * width
            # the inputs of a stage are kept for backward, what lies between is computed again
            fits = bool((d.memory >= KEPT * own + activations * micro).all())
            if (not fits, seconds) < (not best.fits, best.seconds):
                restart = float((own / d.down).max()) + seconds
                best = Estimate(seconds, float(4 * activations * micro * (count > 1)), fits, restart)
    return best
