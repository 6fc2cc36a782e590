"""Zero-shot knowledge transfer: searching for disagreement teaches a student what neither noise nor a few images do.

Two experiments. In the plane, points that search are compared with points that stay and points drawn anew. On images of
digits, a student that never sees one is compared with students of noise, of a few images per class and of all of them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Row, Scale
from jaxstack.core import runner
from jaxstack.core.learner import Learner
from jaxstack.core.runner import RunOptions
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.nn import classifier as classifiers
from jaxstack.nn.attention_transfer import attention_weight
from jaxstack.nn.vision import zoo
from jaxstack.vision import few_shot_kt, zero_shot_toy
from jaxstack.vision import zero_shot_kt as kt
from jaxstack.vision.zero_shot_toy import Matching

QUIET = RunOptions(progress=False)
Seeds = tuple[int, ...]

# In the plane

CORNER, CENTRE = 3.0, 0.0
TOY = {
    "adversarial": Matching("adversarial", CORNER),
    "frozen": Matching("frozen", CORNER),
    "adversarial, N(0, I)": Matching("adversarial", CENTRE, epochs=200),
    "frozen, N(0, I)": Matching("frozen", CENTRE),
    "fresh, normal": Matching("fresh normal"),
    "fresh, uniform": Matching("fresh uniform"),
}
EVERY = 200
"""Epochs between measurements."""


@functools.lru_cache(1)
def toy_teachers(seeds: Seeds) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """(teacher's weights, test points, their labels) of each seed, which has blobs of its own."""
    train, found = jax.jit(zero_shot_toy.train_teacher), []
    for seed in seeds:
        (x, y), (test_x, test_y) = zero_shot_toy.blobs(seed)
        found.append((train(jax.random.key(seed), x, y), test_x, test_y))
    return found


@functools.lru_cache(8)
def matched(arm: str, seeds: Seeds) -> list[np.ndarray]:
    """Agreement of an arm's students with their teachers, every 200 epochs."""
    learn = jax.jit(lambda key, teacher, x: zero_shot_toy.match(key, teacher, x, TOY[arm], EVERY)[0])
    students = zip(seeds, toy_teachers(seeds))
    return [np.asarray(learn(jax.random.key(1000 + seed), w, x)) for seed, (w, x, _) in students]


def toy(arm: str, seeds: Seeds) -> Iterator[Row]:
    """Agreement on the data's points, of which the student has seen none."""
    for n, seed in enumerate(seeds):
        weights, x, y = toy_teachers(seeds)[n]
        agreement = matched(arm, seeds)[n]
        row: Row = {"seed": seed, "agreement": float(agreement[-1]), "agreement after 200": float(agreement[0])}
        row |= {f"agreement@{EVERY * (i + 1)}": float(a) for i, a in enumerate(agreement)}
        row["teacher's accuracy"] = float(
            (np.asarray(zero_shot_toy.mlp(weights, jnp.asarray(x))).argmax(-1) == y).mean()
        )
        if arm == "adversarial":
            row["gain over frozen"] = row["agreement"] - float(matched("frozen", seeds)[n][-1])
        yield row


# On images


class Budget(NamedTuple):
    """Sizes and lengths that all arms share."""

    data: str = "digits"
    size: int = 0
    """Pixels on a side; 0: as they are."""
    teacher: str = "wrn-10-1"
    student: str = "wrn-10-0.5"
    teacher_updates: int = 400
    rounds: int = 400
    batch_size: int = 64
    widths: tuple[int, int, int] = (32, 32, 16)
    """Of the generator."""
    few_updates: int = 300
    few_batch: int = 50
    all_updates: int = 400
    walks: int = 50
    """Images whose transition curves are followed."""
    walk_steps: int = 100


class Parts(NamedTuple):
    """What the arms of a budget and its seeds have in common."""

    config: classifiers.Config
    image: tuple[int, int, int]
    teacher: kt.Net
    student: kt.Net
    teachers: Any
    """Variables [S, ...]."""
    test: tuple[np.ndarray, np.ndarray]
    """Images as the networks take them, and labels."""


@functools.lru_cache(1)
def parts(budget: Budget, seeds: Seeds) -> Parts:
    """Networks, a trained teacher for each seed, and the test images."""
    config = classifiers.Config(
        data=budget.data, size=budget.size, model=budget.teacher, num_updates=budget.teacher_updates, eval_split="test"
    )
    state, _ = trained(classifiers.classifier(config), seeds)
    image, classes = classifiers.image_shape(config), classifiers.network(config).classes
    teacher, student = (kt.of_module(zoo.network(name, classes), image) for name in (budget.teacher, budget.student))
    x, y = classifiers.arrays(config, "test")
    test = np.asarray(classifiers.prepared(config, x)), y
    return Parts(config, image, teacher, student, {"params": state.params, **state.stats}, test)


def trained(learner: Learner, seeds: Seeds) -> tuple[Any, dict[str, np.ndarray]]:
    """Last states [S, ...] and what is measured of them [S], one seed after another by one program: the program of all
    seeds side by side takes longer to compile than it saves."""
    found = []
    for n, seed in enumerate(seeds):
        own = learner._replace(given=jax.tree.map(lambda x, n=n: x[n : n + 1], learner.given))
        found.append(runner.train(own, seeds=[seed], options=QUIET))
    last = [r.metrics.iloc[-1] for r in found]
    names = [k for k in last[0].index if k.startswith("eval/")]
    return runner.side_by_side([r.state for r in found]), {k: np.array([row[k] for row in last]) for k in names}


def tested(p: Parts) -> Callable[[Any], SplitData]:
    """The test images as a source."""
    return lambda config: SplitData(p.test, 512)


@functools.lru_cache(2)
def without_data(budget: Budget, seeds: Seeds, adversarial: bool) -> tuple[Any, dict[str, np.ndarray]]:
    """Students [S, ...] of the adversary or of noise, and what is measured of them."""
    p = parts(budget, seeds)
    generator = kt.ZeroShotGenerator(p.image, budget.widths) if adversarial else None
    setup = kt.Setup(p.teacher, p.student, p.image, generator, budget.batch_size)
    learner = kt.zero_shot(setup, p.teachers, budget.rounds, kt.Hypers(beta=attention_weight(p.image)), tested(p))
    state, measured = trained(learner, seeds)
    return kt.student_variables(state), measured


def with_data(budget: Budget, seeds: Seeds, loss: Any, images: int, start: Any = None) -> tuple[Any, np.ndarray]:
    """Students [S, ...] of `images` per class (0: of all images), and their test accuracy [S]."""
    p = parts(budget, seeds)
    batch_size = budget.few_batch if images else budget.batch_size
    everything = lambda: ArrayData(
        classifiers.arrays(p.config, "train"),
        batch_size,
        per_seed=True,
        augment=functools.partial(few_shot_kt.moved, p.config),
    )
    learner = few_shot_kt.few_shot(
        p.teacher,
        p.student,
        p.image,
        p.teachers,
        loss,
        num_updates=budget.few_updates if images else budget.all_updates,
        batch_size=batch_size,
        # a student that is tuned further begins near its end
        hypers=few_shot_kt.FewShotHypers(beta=attention_weight(p.image, 1000.0), lr=0.1 if start is None else 0.01),
        start=start,
        source=lambda config: few_shot_kt.few_source(p.config, images, seeds, batch_size) if images else everything(),
        eval_source=tested(p),
    )
    state, measured = trained(learner, seeds)
    return {"params": state.params, **state.stats}, measured["eval/accuracy"]


def transition_errors(budget: Budget, seeds: Seeds, students: Any) -> list[float]:
    """MTE of each seed's student against its teacher."""
    p = parts(budget, seeds)
    classes = classifiers.network(p.config).classes

    @jax.jit
    def error(student: Any, teacher: Any, x: jax.Array, targets: jax.Array) -> jax.Array:
        apply = lambda net, variables: lambda x: net.apply(variables, x, False)[0][0]
        curves = kt.transition_curves(
            apply(p.student, student), apply(p.teacher, teacher), x, targets, budget.walk_steps
        )
        return kt.mean_transition_error(*curves)

    found = []
    for n, seed in enumerate(seeds):
        student, teacher = (jax.tree.map(lambda v, n=n: v[n], tree) for tree in (students, p.teachers))
        answer = lambda net, variables: net.apply(variables, jnp.asarray(p.test[0]), False)[0][0]
        own = answer(p.student, student)
        rows = kt.matching(own, answer(p.teacher, teacher), budget.walks, seed)
        targets = kt.other_classes(np.asarray(own).argmax(-1)[rows], classes)
        found.append(float(error(student, teacher, jnp.asarray(p.test[0][rows]), targets)))
    return found


def images(budget: Budget) -> Experiment:
    """Students by what they learn from."""

    def run(arm: str, seeds: Seeds) -> Iterator[Row]:
        name, _, amount = arm.partition(", ")
        count = 0 if amount in ("", "all images") else int(amount.removeprefix("M="))
        more: dict[str, Any] = {}
        if arm in ("zero-shot", "noise"):
            students, measured = without_data(budget, seeds, arm == "zero-shot")
            accuracy = measured["eval/accuracy"]
            more = {"agreement": measured["eval/agreement"], "teacher's accuracy": measured["eval/teacher_accuracy"]}
            more |= {"accuracy, batch statistics": measured["eval/accuracy_batch_statistics"]}
        else:
            start = without_data(budget, seeds, True)[0] if name == "zero-shot" else None
            students, accuracy = with_data(budget, seeds, LOSSES[name], count, start)
        if arm in ("zero-shot", ALL):
            more["MTE"] = np.asarray(transition_errors(budget, seeds, students))
        for n, seed in enumerate(seeds):
            yield {"seed": seed, "accuracy": float(accuracy[n]), **{k: float(v[n]) for k, v in more.items()}}

    return Experiment(IMAGES, ARMS, run)


LOSSES = {"zero-shot": "kd+at", "KD+AT": "kd+at", "no teacher": "labels", "VID": "vid"}
ALL, FEW = "KD+AT, all images", (5, 50)
ARMS = ("zero-shot", "noise", ALL, *(f"{name}, M={m}" for m in FEW for name in LOSSES))
IN_PLANE, IMAGES = "plane", "digits"

small = Scale(
    experiments=(Experiment(IN_PLANE, tuple(TOY), toy), images(Budget())),
    checks=(
        Check(IN_PLANE, "adversarial", "gain over frozen", "share", 1.0, target=0.3),
        Check(IN_PLANE, "adversarial", "agreement", "share", 0.5, target=0.98),
        Check(IN_PLANE, "adversarial, N(0, I)", "agreement after 200", "share", 1.0, target=0.98),
        Check(
            IN_PLANE,
            "adversarial, N(0, I)",
            "agreement after 200",
            "above",
            0.1,
            other=("fresh, normal", "fresh, uniform"),
            paired=True,
        ),
        Check(IMAGES, "zero-shot", "accuracy", "above", 0.2, other="noise", paired=True),
        Check(IMAGES, "zero-shot", "accuracy", "above", 0.0, other="KD+AT, M=5", paired=True),
        Check(IMAGES, "zero-shot", "MTE", "below", 0.0, other=ALL, paired=True),
        Check(IN_PLANE, "adversarial", "agreement", "above", 0.3, other="frozen", paired=True, report=True),
        Check(IN_PLANE, "adversarial", "agreement", "above", 0.0, other="fresh, normal", paired=True, report=True),
        Check(IMAGES, "zero-shot", "accuracy", "above", 0.0, other="no teacher, M=5", paired=True, report=True),
        Check(IMAGES, "zero-shot", "accuracy", "above", 0.0, other="VID, M=5", paired=True, report=True),
        Check(IMAGES, "zero-shot", "accuracy", "above", 0.0, other="KD+AT, M=50", paired=True, report=True),
        Check(IMAGES, "zero-shot, M=5", "accuracy", "above", 0.0, other="KD+AT, M=5", paired=True, report=True),
        Check(IMAGES, "zero-shot, M=50", "accuracy", "above", 0.0, other="KD+AT, M=50", paired=True, report=True),
        Check(IMAGES, "zero-shot", "accuracy", "above", 0.0, other=ALL, paired=True, report=True),
    ),
    seeds=5,
    minutes=19.0,
)
claim = Claim(
    method="zero-shot-kt",
    paper="Micaelli & Storkey (NeurIPS 2019)",
    statement=(
        "In the plane, points that search for disagreement bring a student from a start where frozen points fail to "
        "its teacher's beliefs, and from a good start within 200 epochs, when fresh random points are at least 0.1 "
        "behind. On digits, a student taught by a generator and the teacher's weights alone is at least 20 points "
        "better than one taught on noise and better than KD+AT with five images per class; near decision boundaries "
        "it is closer to its teacher than a student of KD+AT with all images."
    ),
    scope=(
        "The paper's points in the plane; scikit-learn's digits of 8x8 pixels, WRN-10-1 and WRN-10-0.5, a generator of "
        "32 channels, 400 rounds with batches of 64 (the paper: CIFAR-10 and SVHN, WRN-40-2 and WRN-16-1, 128 "
        "channels, 80,000 rounds of 128). All arms have the settings of the released code, none is tuned; the weight "
        "of the attention follows the number of pixels. In the plane random points catch up with more epochs."
    ),
    scales={"small": small},
    baselines=("frozen", "fresh, normal", "fresh, uniform", "noise", "KD+AT, M=5", "no teacher, M=5", "VID, M=5", ALL),
    ours="zero-shot",
    curves=(Curve(IN_PLANE, "agreement", "epochs", "linear"),),
)
