"""Independent trials over a Ray cluster: one task each, retried when its worker dies, recorded once.

Each finished trial is one file, written whole under the trial's own name, so a retry, a second driver or a driver that
is started again neither loses nor repeats a result. Needs the extra `cluster`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxstack.core.errors import UserError
from jaxstack.core.files import write_whole

Trial = dict[str, Any]


def run_trials(
    function: Callable[..., dict[str, Any]],
    trials: Sequence[Trial],
    out: str | Path,
    *,
    retries: int = 3,
    cpus: float = 1.0,
    gpus: float = 0.0,
    address: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """`function(**trial)` for each trial, in parallel; the results in the order of `trials`.

    A trial is a dict of JSON-able arguments and its result a JSON-able dict, for example the static settings of a sweep
    and its summary. Results are kept in the directory `out`; trials that have one there are not run again. `cpus` and
    `gpus` are what one trial occupies. `address` joins a running cluster ("auto" finds it); without one Ray starts on
    this machine, unless the caller has started it. A trial whose worker dies is run again up to `retries` times; one
    whose function raises is not. `progress(done, total)` is called as results come.

    Raises `UserError` for equal trials, trials or results that JSON cannot hold, a damaged or foreign file in `out`,
    or, after all others are done, naming the trials that failed.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise UserError("run_trials: needs Ray; pip install 'jaxstack[cluster]'") from None
    if retries < 0:
        raise UserError(f"retries={retries}: expected a number >= 0")
    names = [_name(trial) for trial in trials]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"trials[{i}]={trials[i]!r}: is equal to trials[{names.index(name)}]")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, trial in zip(names, trials, strict=True):
        if (out / name).exists():
            results[name] = _read(out / name, trial)
    missing = [(name, trial) for name, trial in zip(names, trials, strict=True) if name not in results]
    failed = []
    if missing:
        _connect(ray, address)
        task = ray.remote(_run).options(max_retries=retries, num_cpus=cpus, num_gpus=gpus)
        stored = ray.put(function)
        waiting = {task.remote(stored, trial): (name, trial) for name, trial in missing}
        for ref in _as_they_end(ray, list(waiting)):
            name, trial = waiting[ref]
            try:
                result = json.loads(ray.get(ref))
            except RayError as e:
                failed.append(f"{trial}: {' '.join(str(e).split())[-300:]}")
                continue
            write_whole(out / name, json.dumps({"trial": trial, "result": result}))
            results[name] = result
            progress(len(results), len(trials))
    if failed:
        raise UserError(f"{len(failed)} of {len(trials)} trials failed, the others are in {out}: {'; '.join(failed)}")
    return [results[name] for name in names]


def _run(function: Callable[..., dict[str, Any]], trial: Trial) -> str:
    """In the worker: the result as JSON, so that what cannot be stored fails there, with its trial."""
    result = function(**trial)
    if not isinstance(result, dict):
        raise UserError(f"result of type {type(result).__name__}: expected a dict")
    return json.dumps(result)


def _name(trial: Trial) -> str:
    """The file of a trial: a digest of its arguments."""
    try:
        text = json.dumps(trial, sort_keys=True)
    except (TypeError, ValueError) as e:
        raise UserError(f"trial {trial!r}: expected arguments that JSON can hold ({e})") from e
    return hashlib.sha256(text.encode()).hexdigest()[:24] + ".json"


def _read(file: Path, trial: Trial) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["trial"] == json.loads(json.dumps(trial)):
            return content["result"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: is no result of a trial ({e}); remove it to run the trial again") from e
    raise UserError(f"{file}: holds the trial {content['trial']!r}, expected {trial!r}")


def _connect(ray: Any, address: str | None) -> None:
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"include_dashboard": False} if address is None else {"address": address}
    ray.init(**local, log_to_driver=False, configure_logging=False)


def _as_they_end(ray: Any, refs: list[Any]) -> Iterator[Any]:
    while refs:
        done, refs = ray.wait(refs, num_returns=1)
        yield from done
