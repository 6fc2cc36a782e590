"""The compile ledger: what was traced and compiled, how long it took, what it costs to run."""

import contextlib
import functools
import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from jaxstack.core import aside, memo
from jaxstack.core.errors import UserError

CHEAP = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Options of XLA's CPU compiler for a program that runs once: 1.6 s of CPU time for the initialisation of IPPO on MPE,
3.0 with the first alone, 6.1 in full. A program that runs long is two times slower with the second."""


@functools.lru_cache
def known_options(options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The compile options that the backend has: XLA drops some between versions, and refuses what it does not know."""
    kept = {}
    for name, value in options:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: jax.numpy.int32(0)).lower().compile({name: value})
            kept[name] = value
    return kept


class DoesNotFit(UserError):
    """The run needs more memory than there is; `fit` seeds would fit at once (0: not even one)."""

    def __init__(self, message: str, fit: int):
        super().__init__(message)
        self.fit = fit


@dataclass
class Program:
    """One compiled program: how often it was traced, seconds of tracing and of compiling, flops and bytes of XLA's cost
    analysis (loop bodies count once), bytes of its memory analysis (of one device)."""

    name: str
    traces: int
    trace_seconds: float
    compile_seconds: float
    flops: float
    bytes_accessed: float
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    donated_bytes: int
    seeds: int = 0
    """Seeds that one device holds; 0 for a program that is not divided among seeds."""
    envs: int = 0
    """Environments of a seed that one device holds; 0 for a learner without any."""
    reused: bool = False
    """Made by an earlier call in this process: nothing was traced or compiled."""
    shared_bytes: int = 0
    """Arguments that all seeds share: a dataset, batches."""

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs and temporaries, less what is reused through donation."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.donated_bytes

    @property
    def bytes_per_seed(self) -> float | None:
        """The peak without what all seeds share, over the seeds. Temporaries that XLA holds once for all seeds are
        spread over them too, so one more seed may need a little less."""
        return (self.peak_bytes - self.shared_bytes) / self.seeds if self.seeds else None

    @property
    def bytes_per_env(self) -> float | None:
        """A seed's bytes over its environments: rollout, environment states and minibatches, but parameters, gradients
        and optimiser state too, which do not grow with the environments. So one more environment needs at most this,
        but for how XLA packs buffers (7% more between 8 and 32 environments of a tiny task)."""
        per_seed = self.bytes_per_seed
        return per_seed / self.envs if per_seed is not None and self.envs else None


@dataclass
class Ledger:
    """Compiles ahead of time, so that nothing compiles unseen; `max_compiles` makes a further compile an error.

    Programs that an earlier call in this process made are listed as reused and count as no compile."""

    max_compiles: int | None = None
    programs: list[Program] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of everything that counts as compiling, on the clock of `time.perf_counter`."""

    def compile(self, name: str, function: Callable, *args: Any, **options: Any) -> Any:
        """Lower and compile `function` for `args` (arrays or shapes); returns the executable. Options as in `begin`."""
        return self.begin(name, function, *args, **options)()

    def begin(
        self,
        name: str,
        function: Callable,
        *args: Any,
        donate: tuple[int, ...] = (),
        out_shardings: Any = None,
        once: bool = False,
        early: bool = False,
        store: OrderedDict[Any, Any] | None = None,
        tag: Any = None,
        notes: list[Any] | None = None,
    ) -> Callable[[], Any]:
        """Lower `function` now; the function that is returned gives the executable and enters it into the ledger.

        `once`: it runs a single time, so on CPU, where optimising takes longer than running, it is not optimised.
        `early`: it is compiled from now on, beside others; XLA keeps one core busy most of the time. On CPU alone:
        elsewhere kernels are tuned by timing them.
        `store` (see memo.py) has or gets the executable; `tag` is what the function depends on beside what the store is
        for, and `notes` what tracing wrote down, which is filled again when nothing is traced.
        Raises `UserError` when `max_compiles` programs were compiled already, and so does what is returned.
        """
        key = None
        if store is not None:
            outs = None if out_shardings is None else tuple(jax.tree.leaves(out_shardings))
            key = (name, tag, memo.signature(args), donate, outs, once)
            if key in store:
                store.move_to_end(key)
                executable, program, written = store[key]
                if notes is not None:
                    notes[:] = written

                def reuse() -> Any:
                    self.programs.append(
                        replace(program, traces=0, trace_seconds=0.0, compile_seconds=0.0, reused=True)
                    )
                    return executable

                return reuse
        self._refuse(name)
        cpu = jax.default_backend() == "cpu"
        traces = 0

        def counted(*inputs: Any) -> Any:
            nonlocal traces
            traces += 1
            return function(*inputs)

        def work() -> tuple[Any, float]:
            with self.clock() as seconds:
                compiled = lowered.compile(known_options(tuple(CHEAP.items())) if once and cpu else None)
            return compiled, seconds()

        def finish() -> Any:
            self._refuse(name)
            compiled, compile_seconds = (begun or aside.begin(name, work)).result()
            self._enter(name, traces, traced(), compile_seconds, compiled)
            if store is not None:
                memo.keep(store, key, (compiled, self.programs[-1], list(notes or ())))
            return compiled

        spare_mappings()
        with self.clock() as traced:
            lowered = jax.jit(counted, donate_argnums=donate, out_shardings=out_shardings).lower(*args)
        begun = aside.begin(name, work) if early and cpu else None
        return finish

    def _refuse(self, name: str) -> None:
        compiled = [p.name for p in self.programs if not p.reused]
        if self.max_compiles is not None and len(compiled) >= self.max_compiles:
            done = ", ".join(compiled)
            raise UserError(f"max_compiles={self.max_compiles}: {name!r} would be one more compile after {done}")

    def _enter(self, name: str, traces: int, trace_seconds: float, compile_seconds: float, compiled: Any) -> None:
        cost = compiled.cost_analysis() or {}
        cost = cost[0] if isinstance(cost, list) else cost
        memory = compiled.memory_analysis()
        size = lambda field: int(getattr(memory, field, 0) or 0)
        self.programs.append(
            Program(
                name=name,
                traces=traces,
                trace_seconds=trace_seconds,
                compile_seconds=compile_seconds,
                flops=float(cost.get("flops", 0.0)),
                bytes_accessed=float(cost.get("bytes accessed", 0.0)),
                argument_bytes=size("argument_size_in_bytes"),
                output_bytes=size("output_size_in_bytes"),
                temp_bytes=size("temp_size_in_bytes"),
                donated_bytes=size("alias_size_in_bytes"),
            )
        )

    @contextlib.contextmanager
    def clock(self) -> Iterator[Callable[[], float]]:
        """Count the block as compiling; gives a function that says afterwards how many seconds it took."""
        begin = time.perf_counter()
        span: list[float] = []
        try:
            yield lambda: span[0]
        finally:
            end = time.perf_counter()
            span.append(end - begin)
            self.spans.append((begin, end))

    @property
    def seconds(self) -> float:
        """Wall time of tracing and compiling; what ran side by side counts once."""
        total, until = 0.0, float("-inf")
        for begin, end in sorted(self.spans):
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        return total

    def rows(self) -> list[dict[str, Any]]:
        """One dict a program, as stored in ledger.json."""
        derived = ("peak_bytes", "bytes_per_seed", "bytes_per_env")
        return [asdict(p) | {name: getattr(p, name) for name in derived} for p in self.programs]

    def summary(self) -> str:
        """One line a program."""
        lines = [
            f"{p.name}: "
            + ("reused, " if p.reused else f"traced {p.trace_seconds:.1f} s, compiled {p.compile_seconds:.1f} s, ")
            + f"{p.flops:.3g} flops, peak memory {_size(p.peak_bytes)}"
            + (f", {_size(p.bytes_per_seed)} a seed" if p.bytes_per_seed is not None else "")
            + (f", {_size(p.bytes_per_env)} an environment" if p.bytes_per_env is not None else "")
            for p in self.programs
        ]
        return "\n".join(lines)


def spare_mappings(share: float = 0.7) -> None:
    """Let go of the programs that jax caches when this process holds more than `share` of the memory mappings that
    Linux gives it (`vm.max_map_count`, 65,530 by default). They are compiled again when they are called.

    On CPU a compiled program takes dozens of mappings. Where they run out XLA raises no error, but any later exception
    in native code ends the process with a segmentation fault (seen with jaxlib 0.10.2: the frames of code that could
    not be mapped stay registered with the unwinder).
    """
    maps, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if maps.exists() and most.exists() and maps.read_bytes().count(b"\n") > share * int(most.read_text()):
        memo.forget()
        jax.clear_caches()
        gc.collect()


def _size(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def available_bytes() -> int | None:
    """Free memory of the default device, or of the host for CPU; None where nothing tells."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def check_memory(program: Program, num_seeds: int, limit: int | None = None, copies: int = 1) -> None:
    """Raise `DoesNotFit` with a split of the seeds when `copies` of the program need more than `limit` bytes (default:
    what is free)."""
    limit = available_bytes() if limit is None else limit
    peak = program.peak_bytes * copies
    if limit is None or peak <= limit:
        return
    fit = min(int(num_seeds * limit / peak), num_seeds - 1)
    if fit < 1:
        advice = "even one seed does not fit: use fewer environments, shorter rollouts or smaller networks"
    else:
        advice = (
            f"{fit} of {num_seeds} seeds fit at once: split_seeds={fit} (or 'auto') runs "
            f"{-(-num_seeds // fit)} groups one after another"
        )
    raise DoesNotFit(f"the run needs {peak / 2**20:.1f} MiB and {limit / 2**20:.1f} MiB are free; {advice}", fit)
