"""Do the lowest, or the newest, versions that pyproject.toml allows import, and do they train one step?

    python scripts/versions.py lowest              in a fresh environment in a temporary directory (a download of 1 GB)
    python scripts/versions.py newest --keep DIR   makes it in DIR and leaves it there

`newest` is what a user's `pip install .` resolves to today, which the lock does not know. Needs Python and pip only.
Exits with 1 and the output of the step that failed.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ONE_STEP = """
import importlib, pkgutil, warnings
warnings.simplefilter("ignore")
import jax, jaxstack
for module in pkgutil.walk_packages(jaxstack.__path__, "jaxstack."):
    importlib.import_module(module.name)
from jaxstack import envs
small = dict(num_envs=2, num_steps=4, num_minibatches=1, num_epochs=1, hidden=(8,), total_steps=8)
for agent, env in (
    ("hypermarl", "jaxmarl/MPE_simple_spread_v3"),
    ("mappo", "dispersion"),
    ("ppo", "gymnax/CartPole-v1"),
    ("ppo", "brax/reacher"),
):
    learner = jaxstack.make_agent(agent, env=env, **small)
    result = jaxstack.train(learner, progress=False, eval_every=-1)
    print(agent, env, "trained", int(result.state.step[0]), "step")
"""


def run(*command: str | Path) -> None:
    print("+", *map(str, command[:6]), "..." if len(command) > 6 else "", flush=True)
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tempfile.gettempdir())
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command[:6]))}\n{done.stderr[-4000:]}")


RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
"""Of the lowest, only what pyproject.toml names is at its lowest; what those need in turn is resolved as usual."""


def check(folder: Path, which: str) -> None:
    venv.create(folder, with_pip=True)
    python, uv = folder / "bin" / "python", folder / "bin" / "uv"
    run(python, "-m", "pip", "install", "--quiet", "uv>=0.9")
    run(uv, "pip", "install", "--quiet", "--python", python, "--resolution", RESOLUTION[which], ROOT)
    versions = "from importlib.metadata import version as v; print(*(f'{p}=={v(p)}' for p in %r))"
    run(python, "-c", versions % ["jax", "flax", "optax", "numpy", "gymnax", "jaxmarl", "brax", "distrax"])
    run(python, "-c", ONE_STEP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=list(RESOLUTION))
    parser.add_argument("--keep", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.keep is not None:
        check(args.keep, args.which)
        return
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), args.which)


if __name__ == "__main__":
    sys.exit(main())
