"""`jaxstack weights`: what a file of released weights holds, and whether it gives the outputs that are published."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxstack.cli.parsing import Commands


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    p = commands.add("weights", _run, "Read released weights of a medical method, and check their published outputs.")
    p.add_argument("method", choices=tuple(KINDS), help="whose weights these are")
    p.add_argument("file", metavar="FILE", help="a state dict: .pt, .pth, .safetensors or .npz")
    p.add_argument(
        "--check", action="store_true", help="compute what is published and compare; exit code 1 if it differs"
    )
    p.add_argument(
        "--image",
        metavar="FILE",
        help="the published example: a B-scan of Choroidalyzer's release, EyePACS's 10036_left for quickqual",
    )


class Output(NamedTuple):
    """A published number."""

    name: str
    found: float
    published: float
    tolerance: float


class Kind(NamedTuple):
    """The weights of a method."""

    load: Callable[[str], tuple[Any, Any]]
    """File -> network and variables. Raises `UserError`."""
    check: Callable[[Any, Any, Any], list[Output]] | None
    """(network, variables, path of the image or None) -> what is compared; None: nothing is published."""
    image: bool = False
    """Whether an image is needed."""


def _uwf(path: str) -> tuple[Any, Any]:
    from jaxstack.medical import uwf

    return uwf.load_weights(path)


def _uwf_outputs(network: Any, variables: Any, image: Any) -> list[Output]:
    import jax
    import jax.numpy as jnp

    from jaxstack.medical import uwf

    found = jax.jit(network.apply)(variables, jnp.zeros((1, *uwf.RELEASED_SIZE, 2)))[0]
    rows = zip(uwf.LABELS, found, uwf.RELEASED_LOGITS)
    return [Output(f"logit of {name}, zeros", float(x), published, 1e-3) for name, x, published in rows]


def _dart(path: str) -> tuple[Any, Any]:
    from jaxstack.medical import dart

    return dart.load_weights(path)


def _dart_outputs(network: Any, variables: Any, image: Any) -> list[Output]:
    import jax
    import jax.numpy as jnp

    from jaxstack.medical import dart

    side = dart.RELEASED_SIZE
    found = float(jax.jit(network.apply)(variables, jnp.zeros((1, side, side, 3)))[0])
    published = dart.RELEASED_ZEROS
    return [
        Output("output, zeros", found, published, 1e-4),
        Output(
            "fractal dimension", dart.to_trait(found, *dart.RELEASED), dart.to_trait(published, *dart.RELEASED), 1e-5
        ),
    ]


def _choroidalyzer(path: str) -> tuple[Any, Any]:
    from jaxstack.medical import oct_networks

    return oct_networks.load_weights(path)


def _choroidalyzer_outputs(network: Any, variables: Any, image: Any) -> list[Output]:
    """Against the example that is nearest; the published numbers have the release's rounding and its row of vessels."""
    import jax
    import numpy as np

    from jaxstack.medical import choroid, io
    from jaxstack.medical import choroidalyzer as ch

    p = np.asarray(jax.jit(lambda x: ch.predict(network, variables, x))(io.read_scan(image).image[None]))[0]
    region, vessel = (p[..., i] >= ch.THRESHOLDS[i] for i in (ch.REGION, ch.VESSEL))
    fovea = ch.fovea_from_prob(p[..., ch.FOVEA], joint=False)
    at = np.array([float(fovea.x), float(fovea.y)], np.float32)
    found = ch.measure(choroid.largest_component(region), vessel, at, cvi_row_offset=1, released=True)
    thickness = np.asarray(found.thickness_um)
    nearest = min(ch.EXAMPLES, key=lambda e: float(np.abs(thickness - e[0]).sum()))
    rows = [
        Output(f"thickness {w}, um", float(t), e, 4.0)
        for w, t, e in zip("left fovea right".split(), thickness, nearest[0])
    ]
    rows += [
        Output("area, mm2", float(found.area_mm2), nearest[1], 5e-3),
        Output("CVI", float(found.cvi), nearest[2], 5e-3),
    ]
    return rows + (
        [] if nearest[3] is None else [Output("vessels, mm2", float(found.vessel_area_mm2), nearest[3], 5e-3)]
    )


def _deepgpet(path: str) -> tuple[Any, Any]:
    from jaxstack.medical import deepgpet

    return deepgpet.load_weights(path)


def _quickqual(path: str) -> tuple[Any, Any]:
    from jaxstack.medical import quickqual

    net = quickqual.backbone(f"densenet121={path}")
    return net, net.variables


def _quickqual_outputs(network: Any, variables: Any, image: Any) -> list[Output]:
    import jax.numpy as jnp

    from jaxstack.medical import quickqual
    from jaxstack.medical.fundus import read_pixels

    pixels = quickqual.preprocess_fundus(read_pixels(image))
    features = quickqual.features_of(network, pixels[None], 512, 1)
    return [Output("MEME", float(quickqual.meme_score(jnp.asarray(features))[0]), quickqual.MEME_EXAMPLE, 1e-3)]


KINDS = {
    "choroidalyzer": Kind(_choroidalyzer, _choroidalyzer_outputs, True),
    "dart": Kind(_dart, _dart_outputs),
    "deepgpet": Kind(_deepgpet, None),
    "quickqual": Kind(_quickqual, _quickqual_outputs, True),
    "reachnet": Kind(_choroidalyzer, None),
    "uwf-diseases": Kind(_uwf, _uwf_outputs),
}


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from jaxstack.cli import folders
    from jaxstack.core.errors import UserError

    kind = KINDS[args.method]
    check = kind.check
    if args.check and check is None:
        raise UserError(f"--check: no output of {args.method}'s weights is published, expected another method")
    if args.check and kind.image and args.image is None:
        raise UserError("--image: expected the published example, as --check compares what is measured in it")
    if args.image is not None and not (args.check and kind.image):
        raise UserError("--image: expected none, it is for --check of choroidalyzer or quickqual")
    network, variables = kind.load(args.file)
    facts = folders.model_facts("weights", Path(args.file), variables, (), 1)
    print(f"{args.file}: {facts['parameters']:,} parameters of {args.method}, digest {facts['sha256']}")
    if not args.check or check is None:
        return 0
    outputs = check(network, variables, args.image)
    for o in outputs:
        verdict = "agrees" if abs(o.found - o.published) <= o.tolerance else "DIFFERS"
        print(f"{o.name}: {o.found:.6g}, published {o.published:.6g} (within {o.tolerance:g}): {verdict}")
    return int(any(not abs(o.found - o.published) <= o.tolerance for o in outputs))
