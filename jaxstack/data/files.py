"""Files of transitions: NPZ of this project, HDF5 in the form of D4RL (Fu et al., 2020), folders of Minari (Younis et
al., 2024, see minari.py), and JSON in the form of PTGOOD (McInroe et al., 2024).

Nothing is unpickled. HDF5 needs the extra `offline` (h5py).
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.data import minari
from jaxstack.data.offline import DatasetInfo, OfflineDataset, dataset

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
JSON_NEEDED = ("observations", "actions", "next_observations", "rewards", "terminals")


def load_dataset(path: str | Path) -> OfflineDataset:
    """Read a data set from its file.

    Args:
        path: `.npz` as `save_dataset` writes it, `.hdf5` (`.h5`) with the keys of D4RL, `.json` with the five keys of
            PTGOOD's release, or the folder of a Minari data set, or its id where it lies in MINARI_DATASETS_PATH.

    Returns:
        All rows; `learning_view()` are those that a learner can bootstrap from.

    Raises:
        UserError: naming the file and the array that is missing, damaged or does not fit.

    Example:
        data = jaxstack.load_dataset("medium.npz")
        data.episode_returns().mean()
    """
    path, folder = Path(path), minari.find(path)
    if folder is not None:
        return minari.read(path, folder)
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
    """Return the file that changes with the rows of a data set: `path` itself, or one in the folder of Minari which
    `path` is or whose id it is."""
    folder = minari.find(path)
    files = [] if folder is None else [folder / name for name in (minari.HDF5, minari.META)]
    return next((file for file in files if file.is_file()), Path(path))


def is_dataset(name: str) -> bool:
    """Return whether a name is that of a data set's file, or of an existing folder of Minari or its id."""
    return name.endswith(SUFFIXES) or minari.find(name) is not None


def check_target(path: str | Path) -> None:
    """Make the folder that `save_dataset` writes into. Raises `UserError` where it could write nothing."""
    path = Path(path)
    if path.suffix != ".npz":
        minari.check_target(path)
    elif path.is_dir():
        raise UserError(f"{path}: found a folder, expected the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e


def save_dataset(path: str | Path, data: OfflineDataset, actions: minari.Actions = None) -> Path:
    """Write a data set as NPZ, or as a folder of Minari; equal data give equal bytes.

    Args:
        path: of the file, ending in `.npz`; or of a new folder, ending in `-v` and a number, as ids of Minari do.
        data: the data set.
        actions: for Minari the lowest and highest real action, or the number of choices.

    Raises:
        UserError: for another ending, a folder that is taken or cannot be written, or rows that Minari cannot hold.
    """
    path = Path(path)
    check_target(path)
    if path.suffix != ".npz":
        minari.write(path, data, actions)
        return path
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, info=np.array(minari.info_text(data.info)), **data.arrays())
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e
    return path


def _npz(path: Path) -> OfflineDataset:
    try:
        if not zipfile.is_zipfile(path):  # else numpy takes it for a pickle
            raise zipfile.BadZipFile("it is no zip archive")
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
    text = arrays.pop("info", None)
    info = DatasetInfo() if text is None else minari.info_from(str(path), str(text))
    return dataset(str(path), info, **arrays)


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


def _d4rl(path: Path) -> OfflineDataset:
    h5py = minari.h5py_for(path)
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
