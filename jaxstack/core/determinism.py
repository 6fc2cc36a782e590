"""What repeats, as `jaxstack info --determinism` prints it; each line names the test that proves it."""

from typing import NamedTuple


class Guarantee(NamedTuple):
    """`level` is "bit" or the tolerance of one step from the same state."""

    what: str
    level: str
    test: str


GUARANTEES: tuple[Guarantee, ...] = (
    Guarantee(
        "a run repeated with the same seeds, versions and machine",
        "bit",
        "tests/core/test_determinism.py::test_a_repeated_run_is_the_same_to_the_bit",
    ),
    Guarantee(
        "the chunk size, and when evaluations and checkpoints happen",
        "bit",
        "tests/core/test_runner.py::test_chunk_size_changes_no_bit",
    ),
    Guarantee(
        "a run stopped (also by SIGKILL) and resumed",
        "bit",
        "tests/core/test_checkpoint.py::test_a_killed_run_resumes_to_the_bit",
    ),
    Guarantee(
        "every agent: a resumed run against a whole one",
        "bit",
        "tests/agents/test_contract.py::test_a_resumed_run_equals_a_whole_one_to_the_bit",
    ),
    Guarantee(
        "how many seeds or settings run side by side (vmap width)",
        "1e-5 relative, one step from the same state",
        "tests/core/test_determinism.py::test_vmap_width_changes_one_step_by_rounding_only",
    ),
    Guarantee(
        "over how many devices the seeds are spread",
        "1e-5 relative, one step from the same state",
        "tests/core/test_runner.py::test_seeds_spread_over_devices",
    ),
    Guarantee(
        "over how many devices the environments of a seed are spread",
        "1e-5 relative, one step from the same state",
        "tests/core/test_devices.py::test_a_ppo_step_over_devices_equals_one_device",
    ),
    Guarantee(
        "a run that is resumed on another number of devices",
        "rounding of each step, as above; the stored state itself is moved bitwise identically",
        "tests/core/test_devices.py::test_environments_spread_over_devices_and_checkpoints_move_between_layouts",
    ),
    Guarantee(
        "over how many processes a run is spread",
        "1e-5 relative over the first steps; all processes hold bitwise identical numbers",
        "tests/core/test_distributed.py::test_two_processes_equal_one",
    ),
)

NOTES = """\
Rounding differences grow: reinforcement learning is chaotic, and after some hundred updates two runs that differed in
the last bit are different runs. Compare such runs by their distribution over seeds, not seed by seed.

On NVIDIA GPUs some reductions and scatters are atomic and change from run to run; these make them repeat, at a cost:
    XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
and matrix products use TF32 unless  JAX_DEFAULT_MATMUL_PRECISION=float32  is set. On TPU results repeat by default.
Other versions of jax, another CPU or another number of its threads may round differently: run.json records versions
and device.
"""


def report() -> str:
    """The guarantees as text."""
    lines = [f"{g.what}\n    same to: {g.level}\n    tested by {g.test}" for g in GUARANTEES]
    return "\n".join([*lines, "", NOTES])
