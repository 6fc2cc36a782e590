"""What is installed: contents of wheel and sdist, what an import costs, and that it starts nothing."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "jaxstack/__init__.py",
    "jaxstack/py.typed",
    "jaxstack/cli/__init__.py",
    "jaxstack/methods.py",
    "jaxstack/core/runner.py",
    "jaxstack/envs/__init__.py",
    "jaxstack/envs/dispersion.py",
    "jaxstack/envs/jaxmarl/storm.py",
    "jaxstack/agents/hypermarl.py",
    "jaxstack/sequence/scan_table.json",
    "jaxstack/vision/cells.json",
)


def python(code: str, **options) -> str:
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel from the tree, sdist, wheel from the sdist), built from a copy without caches."""
    base = tmp_path_factory.mktemp("package")
    source = base / "source"
    source.mkdir()
    for name in ("jaxstack", "envs", "agents"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build(source, base / "dist", "--wheel", "--sdist")
    (sdist,) = (base / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(base / "unpacked", filter="data")
    (unpacked,) = (base / "unpacked").iterdir()
    build(unpacked, base / "again", "--wheel")
    (wheel,), (again,) = (base / "dist").glob("*.whl"), (base / "again").glob("*.whl")
    return wheel, sdist, again


def build(source: Path, out: Path, *what: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *what, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert set(NEEDED) <= set(names)
    assert {n.split("/")[0] for n in names} == {"jaxstack", next(n for n in names if "dist-info" in n).split("/")[0]}
    assert any(n.endswith("licenses/LICENSE") for n in names)
    tracked = {f"jaxstack/{p.relative_to(ROOT / 'jaxstack')}" for p in (ROOT / "jaxstack").rglob("*.py")}
    tracked |= {f"jaxstack/{p.relative_to(ROOT)}" for f in ("envs", "agents") for p in (ROOT / f).rglob("*.py")}
    assert tracked <= set(names)


def test_a_wheel_made_from_the_sdist_is_the_same(built):
    wheel, _, again = (zipfile.ZipFile(p) if p.suffix == ".whl" else None for p in built)
    assert wheel is not None
    assert again is not None
    assert sorted(wheel.namelist()) == sorted(again.namelist())
    same = [n for n in wheel.namelist() if n.startswith("jaxstack/") and wheel.read(n) != again.read(n)]
    assert not same


def test_an_installed_wheel_works_away_from_the_repository(built, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*command, str(built[0])], check=True, timeout=300, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import jaxstack\n"
        f"assert jaxstack.__file__.startswith({str(tmp_path)!r}), jaxstack.__file__\n"
        "from jaxstack.sequence import scan\n"
        "learner = jaxstack.make_agent('ippo', env='matrix_game', num_envs=2, num_steps=4, num_minibatches=1)\n"
        "print(learner.name, jaxstack.make_env('dispersion').spec.num_agents)"
    )
    assert python(code, cwd=tmp_path).split()[-2:] == ["ippo", "4"]


def test_metadata_names_licence_python_and_extras(built):
    with zipfile.ZipFile(built[0]) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith("METADATA"))
        text = wheel.read(name).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: <3.14,>=3.11" in text
    extras = {line.split(": ")[1] for line in text.splitlines() if line.startswith("Provides-Extra")}
    assert {"cuda", "tpu", "cluster", "wandb", "docs", "dev"} <= extras


def test_importing_costs_nothing_and_takes_no_names_of_others():
    code = (
        "import sys; import jaxstack\n"
        "heavy = {'jax', 'numpy', 'flax', 'pandas', 'matplotlib', 'jaxmarl', 'gymnax', 'brax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not {'agents', 'envs'} & set(sys.modules)\n"
        "assert {'train', 'make_env', 'make_agent', 'envs'} <= set(dir(jaxstack))"
    )
    python(code)


def test_no_module_starts_a_backend_or_an_environment_library():
    code = (
        "import importlib, pkgutil, sys\n"
        "import jaxstack\n"
        "for m in pkgutil.walk_packages(jaxstack.__path__, 'jaxstack.'): importlib.import_module(m.name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        "assert not {'jaxmarl', 'gymnax', 'brax', 'wandb', 'ray', 'tensorboardX'} & set(sys.modules)\n"
        "jaxstack.envs.ids()\n"
        "assert not xla_bridge._backends, 'listing environments started a backend'"
    )
    python(code)


def test_unknown_names_are_attribute_errors():
    import jaxstack

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        jaxstack.trian


def test_the_lock_has_hashes_and_no_index():
    text = (ROOT / "requirements.lock").read_text()
    assert "index-url" not in text
    assert "://" not in text
    pins = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert all("==" in line and line.endswith("\\") for line in pins)
    assert {"jax", "flax", "optax", "chex", "jaxmarl", "gymnax", "brax", "distrax"} <= {p.split("==")[0] for p in pins}
