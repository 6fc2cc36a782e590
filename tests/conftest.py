import os
from importlib.metadata import version

import pytest

# before jax starts: a compilation cache shared by all workers, no accelerator, no threads fighting over two cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAXSTACK_PROGRESS", "off")
os.environ.setdefault("MPLBACKEND", "agg")
# tests compile far longer than they compute; XLA's cheapest code generation halves their time
FAST_COMPILE = {"--xla_backend_optimization_level": "0"}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones do not know it, and end the process
    FAST_COMPILE["--xla_cpu_use_fusion_emitters"] = "false"
for flag, value in FAST_COMPILE.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
if os.environ.get("JAXSTACK_CACHE") != "off":
    cache = os.environ.get("JAXSTACK_CACHE") or os.path.expanduser("~/.cache/jaxstack/xla")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def pytest_configure(config):
    # slow tests and claims run only when asked for: -m slow, -m claim, -m "slow or claim"
    if not config.option.markexpr:
        config.option.markexpr = "not slow and not claim"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    # a worker that runs hundreds of tests would run out of memory mappings and die in XLA
    item.session.tests_run = count = getattr(item.session, "tests_run", 0) + 1
    if count % 8 == 0:
        from jaxstack.core import ledger

        ledger.spare_mappings(0.3)


@pytest.fixture
def untrained():
    """(learner or method in stages, directory, seeds) -> its states [S, ...], random numbers that are stored as a
    finished run: for what reads runs, without a program that is compiled."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxstack.core import program, runner, stages
    from jaxstack.core.rundir import RunDir

    def leaf(path, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), x.shape)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        name = getattr(path[-1], "key", "")
        size = 0.3 if name in ("bias", "mean") or len(x.shape) < 2 else np.prod(x.shape[1:-1]) ** -0.5
        drawn = size * np.random.default_rng(len(x.shape)).normal(size=x.shape)
        return jnp.asarray(1.0 + np.abs(drawn) if name in ("scale", "var", "std") else drawn, x.dtype)

    def states_of(learner, seeds):
        shapes = program.shapes_of(learner, range(seeds))[0]
        return jax.tree_util.tree_map_with_path(leaf, shapes)

    def store(learner, folder, seeds=1):
        if not isinstance(learner, stages.Staged):
            states = states_of(learner, seeds)
            runner.save(learner, states, range(seeds), folder)
            return states
        names, states = [f"{i}_{stage.name}" for i, stage in enumerate(learner.stages, 1)], {}
        plan = {"agent": learner.name, "config": runner.plain_config(learner), "seeds": list(range(seeds))}
        run = RunDir.create(folder, plan | {"num_steps": 0, "stages": names})
        for name, stage in zip(names, learner.stages):
            states[stage.name] = store(stage.make(dict(states)), folder / name, seeds)
        run.status("finished")
        run.close()
        return states

    return store
