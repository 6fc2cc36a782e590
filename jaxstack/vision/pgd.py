"""Prediction-guided distillation: a small dense detector imitates a large one where the large one predicts well.

Yang, Ochal, Storkey and Crowley, ECCV 2022 (arXiv 2203.05469). A frozen teacher's predictions tell the quality of each
location for each object (`quality`); the best K locations of an object, over all levels of the pyramid, are fitted by a
Gaussian (`prediction_guided_weights`), whose values weigh the distance of the student's features from the teacher's
(`pgd_loss`). Both branches of the head have weights and losses of their own.

Locations of all levels stand in one axis A, level by level, rows first. Objects are padded to G: boxes [G, 4] as
(x1, y1, x2, y2) in pixels, labels [G], `valid` [G]. Features are [B, H, W, C] for each level.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.boxes import iou
from jaxstack.nn.vision.detection import Outputs, inherited

Region = Literal["pgw", "box", "topk", "quality", "box-gaussian", "kde"]
"""Where and how strongly a student imitates; see `foreground_weights`."""
REGIONS: tuple[str, ...] = get_args(Region)


class Settings(NamedTuple):
    """Numbers of the distillation, all traced. Defaults are those of the released configuration for FCOS."""

    alpha: float = 0.04
    """Weight of the classification branch's foreground. The released value belongs to a loss in which images are mixed
    (`cross_image_masks`) and to 256 channels: tune it."""
    beta: float = 0.5
    """Weight of the background, as a multiple of alpha."""
    gamma: float = 1.6
    """Weight of the regression branch, as a multiple of alpha."""
    delta: float = 8e-4
    """Weight of the attentions' distance."""
    tau: float = 0.8
    """Temperature of the attentions."""
    xi_cls: float = 0.8
    """Share of the IoU in the quality for the classification branch; of the class probability it is 1 - xi."""
    xi_reg: float = 0.6
    """Likewise for the regression branch."""
    ridge: float = 1e-3
    """Added to the Gaussian's variances, in squared pixels: points on a line have a singular covariance."""
    cls_weight: float = 1.0
    """Factor of the classification branch's loss; 0: regression alone."""
    reg_weight: float = 1.0
    """Factor of the regression branch's loss; 0: classification alone."""


class Maps(NamedTuple):
    """Weights of the locations, for each image."""

    cls: Float[Array, "b a"]
    """Of the classification branch."""
    reg: Float[Array, "b a"]
    """Of the regression branch."""
    background: Float[Array, "b a"]
    """1 where a location is in no object's box."""


class Features(NamedTuple):
    """What is imitated: the first convolution of each tower of the head, after normalisation and ReLU, level by
    level."""

    cls: Sequence[Float[Array, "b h w c"]]
    reg: Sequence[Float[Array, "b h w c"]]


# Quality


def inside_boxes(
    xy: Float[Array, "a 2"], gt: Float[Array, "g 4"], valid: Bool[Array, " g"] | Float[Array, " g"]
) -> Bool[Array, "a g"]:
    """Which locations lie strictly inside which valid boxes."""
    x, y = xy[:, :1], xy[:, 1:]
    return (x > gt[:, 0]) & (x < gt[:, 2]) & (y > gt[:, 1]) & (y < gt[:, 3]) & (valid > 0)


def raw_quality(
    cls_logits: Float[Array, "a k"],
    boxes: Float[Array, "a 4"],
    gt: Float[Array, "g 4"],
    labels: Int[Array, " g"],
    xi: Any,
) -> Float[Array, "a g"]:
    """p^(1 - xi) IoU^xi of every location, wherever it lies; arguments as of `quality`."""
    p = jnp.take(jax.nn.sigmoid(cls_logits), labels, axis=1, mode="clip")
    return p ** (1.0 - xi) * iou(boxes[:, None], gt) ** xi


def quality(
    cls_logits: Float[Array, "a k"],
    boxes: Float[Array, "a 4"],
    gt: Float[Array, "g 4"],
    labels: Int[Array, " g"],
    valid: Bool[Array, " g"] | Float[Array, " g"],
    xi: Any,
    xy: Float[Array, "a 2"],
) -> Float[Array, "a g"]:
    """How well each location predicts each object: q = [inside the box] sigmoid(class logit)^(1 - xi) IoU^xi.

    Args:
        cls_logits: the teacher's, one per class.
        boxes: the teacher's, decoded, in pixels.
        gt: boxes of the objects, in pixels.
        labels: their classes.
        valid: which of them exist.
        xi: share of the IoU, 0 to 1.
        xy: centres of the locations in pixels.

    Returns:
        Values in 0..1; 0 outside an object's box and for objects that do not exist.
    """
    return jnp.where(inside_boxes(xy, gt, valid), raw_quality(cls_logits, boxes, gt, labels, xi), 0.0)


# Weights


def top_locations(
    q: Float[Array, "a g"], inside: Bool[Array, "a g"], topk: int, inside_last: bool = False
) -> tuple[Int[Array, "g k"], Bool[Array, "g k"]]:
    """Each object's K locations of largest quality over all levels, and which of them count.

    Locations outside the box, and those of quality 0, do not count, so an object may keep fewer than K.

    Args:
        q: quality.
        inside: as of `inside_boxes`.
        topk: K.
        inside_last: as released: all K count, chosen by `raw_quality` whether inside the box or not.

    Raises:
        UserError: for more than there are locations, or fewer than one.
    """
    if not 1 <= topk <= len(q):
        raise UserError(f"topk={topk}: expected 1 to {len(q)}, the number of locations")
    values, index = lax.top_k((q if inside_last else jnp.where(inside, q, 0.0)).T, topk)
    return index, jnp.ones_like(values, bool) if inside_last else values > 0


def gaussian_values(points: Float[Array, "g k 2"], kept: Bool[Array, "g k"], ridge: Any = 1e-3) -> Float[Array, "g k"]:
    """exp(-d^2 / 2) of each point, d its Mahalanobis distance in the Gaussian of largest likelihood of an object's
    points: their mean, and the mean of the outer products of their deviations plus `ridge` times the identity.

    The covariance is factored through the deviations themselves: in float32 the determinant of a large, flat one would
    be rounding alone.
    """
    n = jnp.maximum(kept.sum(-1, keepdims=True), 1).astype(points.dtype)
    mean = jnp.where(kept[..., None], points, 0.0).sum(-2, keepdims=True) / n[..., None]
    x, y = jnp.moveaxis(jnp.where(kept[..., None], points - mean, 0.0), -1, 0)
    var_x = (x * x).sum(-1, keepdims=True) / n + ridge
    slope = (x * y).sum(-1, keepdims=True) / n / var_x
    rest = y - slope * x
    var_rest = (rest * rest).sum(-1, keepdims=True) / n + ridge * (1.0 + slope**2)
    return jnp.where(kept, jnp.exp(-0.5 * (x * x / var_x + rest * rest / var_rest)), 0.0)


def density_values(points: Float[Array, "g k 2"], kept: Bool[Array, "g k"], ridge: Any = 1e-3) -> Float[Array, "g k"]:
    """Kernel density of an object's points at each of them, over its largest value: an isotropic Gaussian kernel with
    Scott's bandwidth, h^2 = n^(-1/3) times the mean of both variances, plus `ridge`."""
    n = jnp.maximum(kept.sum(-1, keepdims=True), 1).astype(points.dtype)
    mean = jnp.where(kept[..., None], points, 0.0).sum(-2, keepdims=True) / n[..., None]
    away = jnp.where(kept[..., None], points - mean, 0.0)
    h2 = n ** (-1.0 / 3.0) * jnp.square(away).sum((-2, -1))[..., None] / (2.0 * n) + ridge
    apart = jnp.square(points[..., :, None, :] - points[..., None, :, :]).sum(-1)
    density = jnp.where(kept[..., None, :], jnp.exp(-0.5 * apart / h2[..., None]), 0.0).sum(-1)
    density = jnp.where(kept, density, 0.0)
    return density / jnp.maximum(density.max(-1, keepdims=True), 1e-12)


def _placed(values: Float[Array, "g k"], index: Int[Array, "g k"], inside: Bool[Array, "a g"]) -> Float[Array, " a"]:
    """Values of objects' locations as a map; the largest where several objects share one, 0 outside their boxes."""
    own = jnp.take_along_axis(inside.T, index, 1)
    return jnp.zeros(len(inside), values.dtype).at[index].max(jnp.where(own, values, 0.0))


def prediction_guided_weights(
    q: Float[Array, "a g"],
    inside: Bool[Array, "a g"],
    xy: Float[Array, "a 2"],
    topk: int,
    ridge: Any = 1e-3,
    inside_last: bool = False,
) -> Float[Array, " a"]:
    """Weight of each location: the Gaussian of the positions of each object's best K, the largest over objects.

    Args:
        q: quality for each object, as of `quality`; with `inside_last` as of `raw_quality`.
        inside: as of `inside_boxes`.
        xy: centres of the locations, in pixels of the image on all levels.
        topk: K.
        ridge: see `gaussian_values`.
        inside_last: see `top_locations`.

    Returns:
        Values in 0..1; a single location has 1, one that no object keeps has 0.

    Raises:
        UserError: for more than there are locations, or fewer than one.
    """
    index, kept = top_locations(q, inside, topk, inside_last)
    return _placed(gaussian_values(jnp.asarray(xy)[index], kept, ridge), index, inside)


def box_gaussian_weights(
    inside: Bool[Array, "a g"], xy: Float[Array, "a 2"], gt: Float[Array, "g 4"]
) -> Float[Array, " a"]:
    """A Gaussian around each box's centre whose deviations are a quarter of its sides; the largest over objects."""
    centre, side = (gt[:, :2] + gt[:, 2:]) / 2, jnp.maximum(gt[:, 2:] - gt[:, :2], 1e-6)
    away = (xy[:, None] - centre) / (side / 4)
    return jnp.where(inside, jnp.exp(-0.5 * jnp.square(away).sum(-1)), 0.0).max(1, initial=0.0)


def background_weights(
    xy: Float[Array, "a 2"], gt: Float[Array, "g 4"], valid: Bool[Array, " g"] | Float[Array, " g"]
) -> Float[Array, " a"]:
    """1 for locations in no object's box, else 0."""
    return 1.0 - inside_boxes(xy, gt, valid).any(1).astype(jnp.float32)


def foreground_weights(
    region: Region | Int[Array, ""],
    q: Float[Array, "a g"],
    inside: Bool[Array, "a g"],
    xy: Float[Array, "a 2"],
    gt: Float[Array, "g 4"],
    topk: int,
    ridge: Any = 1e-3,
    inside_last: bool = False,
) -> Float[Array, " a"]:
    """Weights by one of the ways that the paper compares.

    Args:
        region: "pgw" (`prediction_guided_weights`, the method), "box" (1 in every box), "topk" (1 at the best K),
            "quality" (the quality itself, in the whole box), "box-gaussian" (`box_gaussian_weights`), "kde"
            (`density_values` of the best K); or a traced place in `REGIONS`, so that one program serves all.
        q, inside, xy, topk, ridge, inside_last: as of `prediction_guided_weights`.
        gt: boxes of the objects.

    Raises:
        UserError: for an unknown region, or as `top_locations`.
    """
    if not isinstance(region, str):
        one = lambda name: lambda: foreground_weights(name, q, inside, xy, gt, topk, ridge, inside_last)
        return lax.switch(region, [one(name) for name in REGIONS])
    if region == "pgw":
        return prediction_guided_weights(q, inside, xy, topk, ridge, inside_last)
    if region == "box":
        return inside.any(1).astype(q.dtype)
    if region == "quality":
        return jnp.where(inside, q, 0.0).max(1, initial=0.0)
    if region == "box-gaussian":
        return box_gaussian_weights(inside, xy, gt)
    if region not in REGIONS:
        raise UserError(f"region={region!r}: expected one of {', '.join(REGIONS)}")
    index, kept = top_locations(q, inside, topk, inside_last)
    values = density_values(jnp.asarray(xy)[index], kept, ridge) if region == "kde" else kept.astype(q.dtype)
    return _placed(values, index, inside)


def weight_maps(
    cls_logits: Float[Array, "b a k"],
    boxes: Float[Array, "b a 4"],
    gt: Float[Array, "b g 4"],
    labels: Int[Array, "b g"],
    valid: Bool[Array, "b g"] | Float[Array, "b g"],
    xy: Float[Array, "a 2"],
    settings: Any = Settings(),
    *,
    topk: int = 30,
    region: Region | Int[Array, ""] = "pgw",
    reference_compat: bool = False,
) -> Maps:
    """The three maps of a batch, as constants: no gradient passes.

    Args:
        cls_logits, boxes: the teacher's predictions, made with its stored statistics; boxes decoded in pixels.
        gt, labels, valid: objects of each image, padded to G.
        xy: centres of the locations in pixels.
        settings: with `xi_cls`, `xi_reg`, `ridge`.
        topk: K; 30 for FCOS on five levels, 9 for ATSS.
        region: see `foreground_weights`.
        reference_compat: as the released code for detectors without anchors: K are chosen before it is asked whether
            they are inside the box, and that is asked with x and y exchanged.

    Raises:
        UserError: as `foreground_weights`.
    """

    def one(logits: Array, predicted: Array, gt: Array, labels: Array, valid: Array) -> Maps:
        asked = xy[:, ::-1] if reference_compat else xy
        inside = inside_boxes(asked, gt, valid)

        def weights(xi: Any) -> Array:
            q = raw_quality(logits, predicted, gt, labels, xi)
            q = q if reference_compat else jnp.where(inside, q, 0.0)
            return foreground_weights(region, q, inside, xy, gt, topk, settings.ridge, reference_compat)

        found = Maps(weights(settings.xi_cls), weights(settings.xi_reg), background_weights(asked, gt, valid))
        return jax.tree.map(lambda x: x.astype(jnp.float32), found)

    return lax.stop_gradient(jax.vmap(one)(cls_logits, boxes, gt, labels, valid))


# Losses


def spatial_attention(f: Float[Array, "b h w c"], tau: Any) -> Float[Array, "b h w"]:
    """P = H W softmax over an image's pixels of the mean over channels of |f| / tau."""
    b, h, w, _ = f.shape
    flat = jnp.abs(f).mean(-1).reshape(b, h * w)
    return h * w * jax.nn.softmax(flat / tau).reshape(b, h, w)


def channel_attention(f: Float[Array, "b h w c"], tau: Any) -> Float[Array, "b h w c"]:
    """A = C softmax over the channels of each pixel of |f| / tau."""
    return f.shape[-1] * jax.nn.softmax(jnp.abs(f) / tau)


def _apart(a: Array, b: Array) -> Array:
    """|a - b| of attentions, 0 within rounding: programs that compute both in different orders would otherwise have
    signs, and gradients, where they are equal."""
    return jnp.abs(jnp.where(jnp.abs(a - b) > 1e-6 * (a + b), a - b, 0.0))


def _over_count(w: Array) -> Array:
    return w / jnp.maximum((w > 0).sum((1, 2), keepdims=True), 1).astype(w.dtype)


def cls_feature_loss(
    fs: Float[Array, "b h w c"],
    ft: Float[Array, "b h w c"],
    w_fg: Float[Array, "b h w"],
    w_bg: Float[Array, "b h w"],
    alpha: Any,
    beta: Any,
    delta: Any,
    tau: Any,
    *,
    cross_image_masks: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Distance of the classification branch's features on one level.

    alpha L_fg + beta L_bg + delta L_att, with L the mean over images of the sum over pixels and channels of
    M P(T) A(T) (S - T)^2, M the weights over their number above 0 in the image, and
    L_att = sum |A(S) - A(T)| / (B H W) + sum |P(S) - P(T)| / B.

    Args:
        fs, ft: the student's and the teacher's features S and T.
        w_fg, w_bg: weights of foreground and background.
        alpha, beta, delta: weights of the three terms; a level's factor belongs to the first two.
        tau: temperature of the attentions.
        cross_image_masks: as released: each image's features are weighted by the sum of the masks of all images of the
            batch.

    Returns:
        (loss, its terms before their weights by name: fg, bg, attention).
    """
    b, h, w, _ = fs.shape
    p_t, a_t = spatial_attention(ft, tau), channel_attention(ft, tau)
    error = p_t * (a_t * jnp.square(fs - ft)).sum(-1)

    def masked(weights: Array) -> Array:
        mask = _over_count(weights)
        return (error * (mask.sum(0, keepdims=True) if cross_image_masks else mask)).sum() / b

    apart = _apart(channel_attention(fs, tau), a_t).sum() / (b * h * w)
    apart = apart + _apart(spatial_attention(fs, tau), p_t).sum() / b
    parts = {"fg": masked(w_fg), "bg": masked(w_bg), "attention": apart}
    return alpha * parts["fg"] + beta * parts["bg"] + delta * apart, parts


def reg_feature_loss(
    fs: Float[Array, "b h w c"],
    ft: Float[Array, "b h w c"],
    w: Float[Array, "b h w"],
    gamma: Any,
    delta: Any,
    tau: Any,
) -> tuple[Array, dict[str, Array]]:
    """Distance of the regression branch's features on one level, at the M locations of the batch whose weight is
    above 0.

    gamma / M sum w mean over channels of A(T) (S - T)^2 + delta / M sum |A(S) - A(T)|; 0 for M = 0.

    Args:
        fs, ft: the student's and the teacher's features S and T.
        w: weights.
        gamma, delta: weights of the two terms.
        tau: temperature of the attention.

    Returns:
        (loss, its terms before their weights by name: fg, attention).
    """
    a_t = channel_attention(ft, tau)
    count = jnp.maximum((w > 0).sum(), 1).astype(fs.dtype)
    fg = (w * (a_t * jnp.square(fs - ft)).mean(-1)).sum() / count
    apart = jnp.where(w > 0, _apart(channel_attention(fs, tau), a_t).sum(-1), 0.0).sum() / count
    return gamma * fg + delta * apart, {"fg": fg, "attention": apart}


def by_level(weights: Float[Array, "b a"], levels: Sequence[Array]) -> list[Float[Array, "b h w"]]:
    """A map of all locations as one for each level's features [B, H, W, C].

    Raises:
        UserError: for another number of locations than the levels have together.
    """
    sizes = [level.shape[1] * level.shape[2] for level in levels]
    if sum(sizes) != weights.shape[1]:
        raise UserError(f"maps: found {weights.shape[1]} locations, expected {sum(sizes)} of the features' levels")
    found, start = [], 0
    for level, size in zip(levels, sizes):
        found.append(weights[:, start : start + size].reshape(level.shape[:3]))
        start += size
    return found


def pgd_loss(
    feats_s: Features,
    feats_t: Features,
    maps: Maps,
    cfg: Any = Settings(),
    *,
    cross_image_masks: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """The distillation's loss: both branches summed over levels. No gradient passes to the teacher.

    Level l, from 0, has the factor 1 + l / 4 on the classification branch's features.

    Args:
        feats_s: the student's features.
        feats_t: the teacher's.
        maps: as of `weight_maps`.
        cfg: with the fields of `Settings` but `xi_cls`, `xi_reg` and `ridge`.
        cross_image_masks: see `cls_feature_loss`.

    Returns:
        (loss, terms summed over levels by name: cls/fg, cls/bg, cls/attention, reg/fg, reg/attention).

    Raises:
        UserError: for features of other shapes in student and teacher, naming the branch and both.
    """
    feats_t, maps = lax.stop_gradient((feats_t, maps))
    for branch, s, t in (("cls", feats_s.cls, feats_t.cls), ("reg", feats_s.reg, feats_t.reg)):
        shapes = [[x.shape for x in levels] for levels in (s, t)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{branch} features: found {shapes[0]} in the student, expected the teacher's {shapes[1]}")
    total, terms = jnp.float32(0.0), {}

    def add(branch: str, weight: Any, found: tuple[Array, dict[str, Array]]) -> None:
        nonlocal total
        total = total + weight * found[0]
        for name, value in found[1].items():
            terms[f"{branch}/{name}"] = terms.get(f"{branch}/{name}", 0.0) + value

    fg, bg = by_level(maps.cls, feats_s.cls), by_level(maps.background, feats_s.cls)
    for level, (s, t) in enumerate(zip(feats_s.cls, feats_t.cls)):
        alpha = cfg.alpha * (1.0 + 0.25 * level)
        found = cls_feature_loss(
            s, t, fg[level], bg[level], alpha, cfg.beta * alpha, cfg.delta, cfg.tau, cross_image_masks=cross_image_masks
        )
        add("cls", cfg.cls_weight, found)
    for s, t, w in zip(feats_s.reg, feats_t.reg, by_level(maps.reg, feats_s.reg)):
        add("reg", cfg.reg_weight, reg_feature_loss(s, t, w, cfg.gamma * cfg.alpha, cfg.delta, cfg.tau))
    return total, terms


# Student and teacher


class Taught(NamedTuple):
    """What a teacher says of images."""

    logits: Float[Array, "b a k"]
    boxes: Float[Array, "b a 4"]
    """In pixels."""
    features: Features


def features_of(outputs: Outputs) -> Features:
    """What is imitated, of a detector's outputs."""
    return Features(outputs.class_features, outputs.box_features)


def taught(outputs: Outputs) -> Taught:
    """What a teacher says, as constants; its outputs are those with stored statistics."""
    return lax.stop_gradient(Taught(outputs.logits, outputs.boxes, features_of(outputs)))


def imitation_loss(
    outputs: Outputs,
    truth: tuple[Array, Array, Array],
    teacher: Taught,
    xy: Float[Array, "a 2"],
    settings: Any = Settings(),
    *,
    topk: int = 30,
    region: Region | Int[Array, ""] = "pgw",
    cross_image_masks: bool = False,
    reference_compat: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """`pgd_loss` of a student's outputs with the weights that its teacher gives: what is added to the detector's loss.

    Args:
        outputs: the student's.
        truth: boxes [B, G, 4], labels and validity [B, G] of the objects.
        teacher: of the same images.
        xy: centres of the locations in pixels.
        settings: with the fields of `Settings`.
        topk, region, reference_compat: as of `weight_maps`.
        cross_image_masks: as of `cls_feature_loss`.

    Raises:
        UserError: as `weight_maps` and `pgd_loss`.
    """
    maps = weight_maps(
        teacher.logits, teacher.boxes, *truth, xy, settings, topk=topk, region=region, reference_compat=reference_compat
    )
    return pgd_loss(features_of(outputs), teacher.features, maps, settings, cross_image_masks=cross_image_masks)


def init_student(variables: Any, teacher: Any) -> Any:
    """A student's variables with copies of its teacher's neck and head.

    Args:
        variables: of the student, {"params": {"backbone", "neck", "head"}, ...}.
        teacher: variables of a detector with the same neck and head. The neck's 1x1 convolutions read the backbone:
            where that has another width they stay the student's.

    Raises:
        UserError: naming other parameters of neck and head that do not fit, with both shapes.
    """
    shapes = lambda given: {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for part in ("neck", "head")
        for path, leaf in jax.tree_util.tree_leaves_with_path({part: given["params"][part]})
    }
    own, other = shapes(variables), shapes(teacher)
    reads = lambda name: name.startswith("neck/lateral") and name in own.keys() & other.keys()
    wrong = [name for name in sorted({**own, **other}) if own.get(name) != other.get(name) and not reads(name)]
    if wrong:
        found = ", ".join(f"{name} {own.get(name)} for {other.get(name)}" for name in wrong)
        raise UserError(f"student: found {found}, expected the teacher's neck and head")
    return inherited(variables, teacher)


def audible(q: Float[Array, "a g"], inside: Bool[Array, "a g"], share: Any) -> Bool[Array, " a"]:
    """Locations that are left when all but the best of each object are silenced.

    Of the n locations in an object's box its ceil(share n) of largest quality stay, and all that are in no box.

    Args:
        q: quality, as of `quality`.
        inside: as of `inside_boxes`.
        share: 0 to 1.
    """
    order = jnp.argsort(jnp.where(inside, -q, 2.0), axis=0)
    rank = jnp.argsort(order, axis=0)
    # less a little: 0.1 of 10 is one
    best = inside & (rank < jnp.ceil(share * inside.sum(0) - 1e-4))
    return best.any(1) | ~inside.any(1)
