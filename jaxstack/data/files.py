"""Files of transitions: NPZ of this project, HDF5 in the form of D4RL (Fu et al., 2020), folders of Minari (Younis et
al., 2024), and JSON in the form of PTGOOD (McInroe et al., 2024).

Nothing is unpickled. HDF5 needs the extra `offline` (h5py); the library minari is not needed.
"""

import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.data.offline import DatasetInfo, OfflineDataset, dataset

FORMAT = 1
SUFFIXES = (".npz", ".hdf5", ".h5", ".json")
D4RL_KEYS = {
    "observations": "obs",
    "actions": "action",
    "rewards": "reward",
    "next_observations": "next_obs",
    "terminals": "terminated",
    "timeouts": "truncated",
    "infos/action_log_probs": "log_prob",
}
NEEDED = ("observations", "actions", "rewards", "terminals")
MINARI_FILE = "data/main_data.hdf5"
MINARI_KEYS = {
    "observations": "obs",
    "actions": "action",
    "rewards": "reward",
    "terminations": "terminated",
    "truncations": "truncated",
}
JSON_NEEDED = ("observations", "actions", "next_observations", "rewards", "terminals")


def load_dataset(path: str | Path) -> OfflineDataset:
    """Read a data set from its file.

    Args:
        path: `.npz` as `save_dataset` writes it, `.hdf5` (`.h5`) with the keys of D4RL, `.json` with the five keys of
            PTGOOD's release, or the folder of a Minari data set, whose id does where it lies in MINARI_DATASETS_PATH.

    Returns:
        All rows; `learning_view()` are those that a learner can bootstrap from.

    Raises:
        UserError: naming the file and the array that is missing, damaged or does not fit.

    Example:
        data = jaxstack.load_dataset("medium.npz")
        data.episode_returns().mean()
    """
    path, file = Path(path), main_file(path)
    if file != path:
        return _minari(path, file)
    if path.suffix not in SUFFIXES:
        endings = ", ".join(SUFFIXES)
        raise UserError(
            f"{path}: found a name ending in {path.suffix!r}, expected one of {endings} or a folder of Minari"
        )
    if not path.is_file():
        raise UserError(f"{path}: found no such file, expected a data set")
    readers = {".npz": _npz, ".json": _json}
    return readers.get(path.suffix, _d4rl)(path)


def main_file(path: str | Path) -> Path:
    """Return the file in which the rows of a data set lie: `path` itself, or that in the folder of Minari which `path`
    is or whose id it is."""
    root = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()
    for folder in (Path(path), root / path):
        if (folder / MINARI_FILE).is_file():
            return folder / MINARI_FILE
    return Path(path)


def save_dataset(path: str | Path, data: OfflineDataset) -> Path:
    """Write a data set as NPZ; equal data give equal bytes.

    Args:
        path: of the file, ending in `.npz`.
        data: the data set.

    Raises:
        UserError: for another ending, or a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: found a name ending in {path.suffix!r}, expected .npz")
    text = json.dumps({"format": FORMAT} | dataclasses.asdict(data.info), sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, info=np.array(text), **data.arrays())
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e
    return path


def _npz(path: Path) -> OfflineDataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {}
            for key in file.files:
                try:
                    arrays[key] = file[key]
                except ValueError as e:
                    if "pickle" in str(e).lower():
                        raise UserError(f"{path}: {key}: found pickled objects, expected numbers") from e
                    raise
    except UserError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as e:
        raise UserError(f"{path}: not a readable NPZ file ({' '.join(str(e).split())[:120]})") from e
    known = {*OfflineDataset._fields, "info"}
    if unknown := sorted(set(arrays) - known):
        raise UserError(f"{path}: found array {unknown[0]!r}, expected only {', '.join(sorted(known))}")
    info = _info(path, arrays.pop("info", None))
    return dataset(str(path), info, **arrays)


def _info(path: Path, text: Any) -> DatasetInfo:
    if text is None:
        return DatasetInfo()
    try:
        fields = json.loads(str(text))
        form = fields.pop("format", None)
        info = DatasetInfo(**fields | {"env_args": tuple(fields.get("env_args", ()))})
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: info: not a description of a data set ({e})") from e
    if form != FORMAT:
        raise UserError(f"{path}: format {form!r}, expected {FORMAT}")
    return info


def _json(path: Path) -> OfflineDataset:
    """An object of lists: no flag tells of time limits, so an episode was cut where the next observation is not that of
    the next row."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable JSON file ({' '.join(str(e).split())[:120]})") from e
    found = sorted(fields) if isinstance(fields, dict) else []
    for key in JSON_NEEDED:
        if key not in found:
            raise UserError(f"{path}: key {key!r} is missing, found {', '.join(found) or 'none'}")
    arrays: dict[str, np.ndarray] = {}
    for key in JSON_NEEDED:
        try:
            arrays[D4RL_KEYS[key]] = np.asarray(fields[key], np.float32)
        except (ValueError, TypeError) as e:
            raise UserError(f"{path}: {key}: expected numbers in rows of one length ({str(e)[:80]})") from e
    terminated = arrays.pop("terminated").reshape(-1).astype(bool)
    obs, after = arrays["obs"], arrays["next_obs"]
    truncated = np.zeros(len(terminated), bool)
    if obs.shape == after.shape and len(obs) == len(terminated):  # else `dataset` says what does not fit
        goes_on = (after[:-1] == obs[1:]).reshape(len(obs) - 1, -1).all(1)
        truncated[:-1] = ~terminated[:-1] & ~goes_on
    return dataset(str(path), DatasetInfo(env=path.stem), **arrays, terminated=terminated, truncated=truncated)


def _h5py(path: Path) -> Any:
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"{path}: HDF5 needs h5py, expected `pip install 'jaxstack[offline]'`") from e
    return h5py


def _minari(path: Path, file: Path) -> OfflineDataset:
    """Episodes of T steps with T + 1 observations."""
    h5py = _h5py(path)
    rows: dict[str, list[np.ndarray]] = {k: [] for k in (*MINARI_KEYS.values(), "next_obs", "episode")}
    try:
        with h5py.File(file, "r") as content:
            names = sorted((n for n in content if n.startswith("episode_")), key=lambda n: int(n.partition("_")[2]))
            for number, name in enumerate(names):
                for key, x in _episode(path, name, content[name], h5py.Dataset).items():
                    rows[key].append(x)
                rows["episode"].append(np.full(len(rows["reward"][-1]), number, np.int32))
    except UserError:
        raise
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable HDF5 file ({' '.join(str(e).split())[:120]})") from e
    if not rows["reward"]:
        raise UserError(f"{path}: found no episodes, expected at least one")
    arrays = {k: np.concatenate(x) for k, x in rows.items()}
    arrays["terminated"] = arrays["terminated"].reshape(-1).astype(bool)
    arrays["truncated"] = arrays["truncated"].reshape(-1).astype(bool) & ~arrays["terminated"]
    if np.issubdtype(arrays["action"].dtype, np.integer):
        arrays["action"] = arrays["action"].astype(np.int32)
    return dataset(str(path), DatasetInfo(env=_minari_id(path, file)), **arrays)


def _episode(path: Path, name: str, group: Any, kind: type) -> dict[str, np.ndarray]:
    """The rows of one episode."""
    found = {}
    for theirs, ours in MINARI_KEYS.items():
        if theirs not in group:
            raise UserError(f"{path}: {name}: key {theirs!r} is missing, found {', '.join(group) or 'none'}")
        if not isinstance(group[theirs], kind):
            parts = ", ".join(group[theirs])
            raise UserError(f"{path}: {name}: {theirs}: found parts {parts}, expected one array")
        found[ours] = np.asarray(group[theirs])
    obs, steps = found["obs"], len(found["reward"])
    if len(obs) != steps + 1:
        raise UserError(f"{path}: {name}: observations: found {len(obs)}, expected {steps + 1}, one more than rewards")
    return found | {"obs": obs[:-1], "next_obs": obs[1:]}


def _minari_id(path: Path, file: Path) -> str:
    """The id in the description of a data set, else the folder's name."""
    try:
        return str(json.loads((file.parent / "metadata.json").read_text(encoding="utf-8"))["dataset_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return path.name


def _d4rl(path: Path) -> OfflineDataset:
    h5py = _h5py(path)
    try:
        with h5py.File(path, "r") as file:
            read = lambda key: np.asarray(file[key])
            found = [*file.keys()]
            for key in NEEDED:
                if key not in file:
                    raise UserError(f"{path}: key {key!r} is missing, found {', '.join(found) or 'none'}")
            arrays = {ours: read(theirs) for theirs, ours in D4RL_KEYS.items() if theirs in file}
    except OSError as e:
        raise UserError(f"{path}: not a readable HDF5 file ({' '.join(str(e).split())[:120]})") from e
    terminated = arrays["terminated"].reshape(-1).astype(bool)
    # a time limit that falls onto a termination says nothing more
    if "truncated" in arrays:
        arrays["truncated"] = arrays["truncated"].reshape(-1).astype(bool) & ~terminated
    if np.issubdtype(arrays["action"].dtype, np.integer) and arrays["action"].ndim == 1:
        arrays["action"] = arrays["action"].astype(np.int32)
    return dataset(str(path), DatasetInfo(env=path.stem), **arrays)
