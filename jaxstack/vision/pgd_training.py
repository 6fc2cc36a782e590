"""The learner of prediction-guided distillation: a teacher is trained, or taken from a run, and teaches a student.

Both are detectors of `jaxstack.nn.detector` with the same pyramid and head. The student's loss is its own plus what
`jaxstack.vision.pgd` says of its features; it is evaluated, and predicts, as any detector.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least, require_positive
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner
from jaxstack.core.stages import Stage, Staged
from jaxstack.nn import detector as detectors
from jaxstack.nn.supervised import variables
from jaxstack.nn.teachers import stored_teacher, with_one_teacher
from jaxstack.nn.vision.boxes import level_counts, locations
from jaxstack.nn.vision.detection import Outputs
from jaxstack.vision import pgd as guided
from jaxstack.vision.pgd import Region

NAME = "pgd"
SHARED = ("size", "kind", "levels", "channels", "towers", "scale")
"""Fields of a detector's config that student and teacher have in common."""


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once. The first are those of the detector, the
    others those of `pgd.Settings`."""

    lr: float = 0.08
    min_lr: float = 0.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    max_grad_norm: float = 35.0
    alpha: float = 0.1
    """Weight of the imitation of the branch for classes; the released 0.04 is for a loss that mixes images."""
    beta: float = 0.5
    """Weight of the background, as a multiple of alpha."""
    gamma: float = 1.6
    """Weight of the imitation of the branch for boxes, as a multiple of alpha."""
    delta: float = 8e-4
    """Weight of the attentions' distance."""
    tau: float = 0.8
    """Temperature of the attentions."""
    xi_cls: float = 0.8
    """Share of the IoU in the quality, for classes."""
    xi_reg: float = 0.6
    """The same for boxes."""
    ridge: float = 1e-3
    """Added to the Gaussian's variances, in squared pixels."""
    cls_weight: float = 1.0
    """0: the branch for classes is not imitated."""
    reg_weight: float = 1.0
    """0: the branch for boxes is not imitated."""


@dataclass(frozen=True)
class Config(detectors.Config):
    """The student is what a detector's config says."""

    teacher: str = ""
    """A run of `detector` whose first seed teaches; default: a teacher is trained first."""
    teacher_backbone: str = ""
    """Of a teacher that is trained; default: the student's."""
    teacher_backbone_weights: str = ""
    """Of a teacher that is trained, as `backbone_weights` is of the student."""
    teacher_width: int = 32
    """Likewise, of the small backbone."""
    teacher_updates: int = 3000
    """Of a teacher that is trained."""
    inherit: bool = True
    """The student's neck and head start from the teacher's."""
    region: Region = "pgw"
    """Where the student imitates: pgw, or box, topk, quality, box-gaussian, kde for comparison."""
    best: int = 9
    """K, the locations of each object that count; with 256 channels and images of COCO 30 (fcos) or 9 (atss)."""
    cross_image_masks: bool = False
    """As released: images are weighted by the masks of all images of their batch."""
    reference_compat: bool = False
    """As released for detectors without anchors: x and y are exchanged, and K are chosen also outside of the box."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "teacher_width", "teacher_updates")
        require_at_least(self, 0, *(f"hypers.{name}" for name in ("alpha", "beta", "gamma", "delta")))
        require_positive(self, "hypers.tau", "hypers.ridge")
        for name in ("xi_cls", "xi_reg"):
            require(self, f"hypers.{name}", 0 <= getattr(self.hypers, name) <= 1, "0 to 1")
        count = sum(level_counts((self.size, self.size), detectors.strides(self)))
        require(self, "best", 1 <= self.best <= count, f"1 to {count}, the number of locations")


def teacher_config(config: Config) -> detectors.Config:
    """Of a teacher that is trained."""
    own: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(detectors.Config)}
    own["backbone"] = config.teacher_backbone or config.backbone
    own["backbone_weights"] = config.teacher_backbone_weights
    own["hypers"] = detectors.Hypers(*(getattr(config.hypers, name) for name in detectors.Hypers._fields))
    own |= dict(width=config.teacher_width, num_updates=config.teacher_updates)
    return detectors.Config(**own)


def student(config: Config, taught_by: detectors.Config, teachers: Any) -> Learner:
    """The learner of a student.

    Args:
        config: of the student.
        taught_by: config of the teacher.
        teachers: its variables, leaves [S, ...], one row per seed.

    Raises:
        UserError: for a teacher of other levels or another head.
    """
    for field in SHARED:
        if (found := getattr(taught_by, field)) != (own := getattr(config, field)):
            raise UserError(f"teacher: found {field}={found}, expected {own} as of the student")
    if (found := detectors.strides(taught_by)) != (own := detectors.strides(config)):
        raise UserError(f"teacher: found strides {found} of {taught_by.backbone}, expected {own} of {config.backbone}")
    model, own_loss = detectors.model_of(taught_by), detectors.loss_of(config)
    xy = locations((config.size, config.size), detectors.strides(config))
    options: dict[str, Any] = {name: getattr(config, name) for name in ("region", "cross_image_masks")}
    options |= dict(topk=config.best, reference_compat=config.reference_compat)

    def imitation(outputs: Outputs, targets: Any, hypers: Any) -> Array:
        """One number: locations are counted over the whole batch."""
        truth, taught = targets
        return guided.imitation_loss(outputs, tuple(truth), taught, xy, hypers, **options)[0]

    def loss(outputs: Outputs, targets: Any, hypers: Any) -> Array:
        return own_loss(outputs, targets, hypers) + imitation(outputs, targets, hypers)

    return detectors.learner_of(
        config,
        loss=loss,
        metrics=detectors.metrics_of(config) | {"imitation_loss": imitation},
        teacher=lambda given, images: guided.taught(model.apply(given, images)),
        teachers=teachers,
        start=guided.init_student if config.inherit else None,
        name=NAME,
    )


def pgd(config: Config = Config(), /, **changes: Any) -> Staged | Learner:
    """The method of a config or of field values, hyperparameters among them.

    Returns:
        Two stages, teacher and student; with `teacher`, the learner of the student alone.

    Raises:
        UserError: for options or a teacher that do not fit.
    """
    config = configs.replace(config, **changes) if changes else config
    if config.teacher:
        known, row = stored_teacher(config.teacher, "detector", detectors.Config, detectors.detector)
        return with_one_teacher(student(config, known, jax.tree.map(lambda x: x[None], row)), row)
    large = teacher_config(config)

    def taught(states: Mapping[str, Any]) -> Learner:
        return student(config, large, variables(states["teacher"]))

    first = Stage("teacher", lambda states: detectors.detector(large), steps=large.num_updates)
    return Staged(NAME, (first, Stage("student", taught, steps=config.num_updates)), config)
