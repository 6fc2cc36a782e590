"""Folders of Minari (Younis et al., 2024): episodes in HDF5, Arrow or Parquet are read, HDF5 is written.

The library minari is not needed: HDF5 needs h5py, the others pyarrow (extra `offline`). What Minari has no place for,
such as reference scores, lies in a file of ours beside its folder `data`.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.data.offline import DatasetInfo, OfflineDataset, dataset

META, HDF5, OWN = "data/metadata.json", "data/main_data.hdf5", "jaxstack.json"
VERSION = "0.5.0"
"""Of Minari, whose form is written."""
KEYS = {
    "observations": "obs",
    "actions": "action",
    "rewards": "reward",
    "terminations": "terminated",
    "truncations": "truncated",
}
LOG_PROB = "infos/log_prob"
"""Of each step's action, behind one of the reset that says nothing."""
IMAGE = 32
"""Images of at least so many rows and columns are stored as JPEG."""
Actions = tuple[Any, Any] | int | tuple[int, ...] | None


def find(path: str | Path) -> Path | None:
    """Return the folder of the data set that `path` is, or whose id it is in MINARI_DATASETS_PATH; None for others."""
    for folder in (Path(path), root() / path):
        if (folder / META).is_file() or (folder / HDF5).is_file():
            return folder
    return None


def root() -> Path:
    """Return the folder in which Minari looks for ids."""
    return Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()


def h5py_for(path: Path) -> Any:
    """Return the module. Raises `UserError` where it is not installed."""
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"{path}: HDF5 needs h5py, expected `pip install 'jaxstack[offline]'`") from e
    return h5py


# --- reading


def read(path: Path, folder: Path) -> OfflineDataset:
    """Read a data set.

    Args:
        path: what messages call it.
        folder: where it lies.

    Raises:
        UserError: naming what is missing, damaged or of a kind that is not read.
    """
    about = _about(path, folder)
    form = about.get("data_format", "hdf5")
    readers = {"hdf5": _hdf5, "arrow": _arrow, "parquet": _arrow}
    if form not in readers:
        raise UserError(f"{path}: data_format: found {form!r}, expected one of {', '.join(readers)}")
    shapes = {key: _shape(path, about, f"{key[:-1]}_space") for key in ("observations", "actions")}
    rows: dict[str, list[np.ndarray]] = {}
    try:
        for number, (name, found) in enumerate(readers[form](path, folder, form)):
            for key, x in _episode(path, name, found, shapes).items():
                rows.setdefault(key, []).append(x)
            rows.setdefault("episode", []).append(np.full(len(rows["reward"][-1]), number, np.int32))
    except UserError:
        raise
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable {form} file ({' '.join(str(e).split())[:120]})") from e
    if not rows:
        raise UserError(f"{path}: found no episodes, expected at least one")
    if len(uneven := {k for k, x in rows.items() if len(x) != len(rows["reward"])}):
        raise UserError(f"{path}: {min(uneven)}: found in some episodes, expected in all or in none")
    arrays = {k: np.concatenate(x) for k, x in rows.items()}
    arrays["terminated"] = arrays["terminated"].reshape(-1).astype(bool)
    arrays["truncated"] = arrays["truncated"].reshape(-1).astype(bool) & ~arrays["terminated"]
    if np.issubdtype(arrays["action"].dtype, np.integer):
        arrays["action"] = arrays["action"].astype(np.int32)
    return dataset(str(path), _info(path, folder, about), **arrays)


def _about(path: Path, folder: Path) -> dict[str, Any]:
    file = folder / META
    try:
        about = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {META}: not a readable JSON file ({' '.join(str(e).split())[:80]})") from e
    return about if isinstance(about, dict) else {}


def _shape(path: Path, about: dict[str, Any], key: str) -> tuple[int, ...] | None:
    """The shape of one observation or action, where the description tells it."""
    text = about.get(key)
    try:
        space = json.loads(text) if isinstance(text, str) else {}
    except ValueError as e:
        raise UserError(f"{path}: {META}: {key}: not readable ({e})") from e
    shape = tuple(space.get("shape", ())) if space.get("type") == "Box" else None
    stored = about.get("jpeg_encoding", True) and space.get("dtype") == "uint8"
    if shape and stored and len(shape) in (2, 3) and min(shape[:2]) >= IMAGE:
        raise UserError(f"{path}: {key}: found images {shape} as JPEG, expected numbers")
    return shape


def _info(path: Path, folder: Path, about: dict[str, Any]) -> DatasetInfo:
    if not (folder / OWN).is_file():
        return DatasetInfo(env=str(about.get("dataset_id", path.name)))
    try:
        return info_from(str(folder / OWN), (folder / OWN).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{folder / OWN}: cannot be read ({e.strerror})") from e


def info_from(name: str, text: str) -> DatasetInfo:
    """Read what `info_text` wrote. Raises `UserError`."""
    try:
        fields = json.loads(text)
        form = fields.pop("format", None)
        info = DatasetInfo(**fields | {"env_args": tuple(fields.get("env_args", ()))})
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{name}: info: not a description of a data set ({e})") from e
    if form != FORMAT:
        raise UserError(f"{name}: format {form!r}, expected {FORMAT}")
    return info


FORMAT = 1


def info_text(info: DatasetInfo) -> str:
    """Return the fields as JSON."""
    return json.dumps({"format": FORMAT} | dataclasses.asdict(info), sort_keys=True)


def _hdf5(path: Path, folder: Path, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    h5py = h5py_for(path)
    with h5py.File(folder / HDF5, "r") as content:
        for name in sorted((n for n in content if n.startswith("episode_")), key=lambda n: int(n.partition("_")[2])):
            group = content[name]
            yield name, {k: _plain(group[k], h5py.Group) for k in (*KEYS, LOG_PROB) if k in group}


def _plain(item: Any, kind: type) -> Any:
    """An array, or the names of its parts."""
    return list(item) if isinstance(item, kind) else np.asarray(item)


def _arrow(path: Path, folder: Path, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow as pa  # pyright: ignore[reportMissingImports]
        from pyarrow import dataset as tables  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"{path}: {form} needs pyarrow, expected `pip install 'jaxstack[offline]'`") from e

    def plain(column: Any) -> Any:
        if pa.types.is_struct(column.type):
            return [field.name for field in column.type]
        if pa.types.is_fixed_size_list(column.type):
            return np.asarray(column.flatten()).reshape(len(column), -1)
        return column.to_numpy(zero_copy_only=False)

    infos, chance = LOG_PROB.split("/")
    whole = ("observations", LOG_PROB)
    numbers = sorted(int(x.name) for x in (folder / "data").iterdir() if x.is_dir() and x.name.isdigit())
    for number in numbers:
        where = folder / "data" / str(number)
        table = tables.dataset(where, format=form, ignore_prefixes=["_", ".", "metadata.json"]).to_table()
        columns = {k: table.column(k).combine_chunks() for k in (*KEYS, infos) if k in table.column_names}
        found = {k: plain(x) for k, x in columns.items() if k != infos}
        if infos in columns and pa.types.is_struct(columns[infos].type) and chance in plain(columns[infos]):
            found[LOG_PROB] = plain(columns[infos].field(chance)).reshape(-1)
        # all columns are as long as the observations
        yield (
            f"episode_{number}",
            {k: x if k in whole or isinstance(x, list) else x[:-1] for k, x in found.items()},
        )


def _episode(path: Path, name: str, found: dict[str, Any], shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """The rows of one episode of T steps with T + 1 observations."""
    for key in KEYS:
        if key not in found:
            raise UserError(f"{path}: {name}: key {key!r} is missing, found {', '.join(found) or 'none'}")
        if isinstance(found[key], list):
            raise UserError(f"{path}: {name}: {key}: found parts {', '.join(found[key])}, expected one array")
        if (shape := shapes.get(key)) is not None:
            found[key] = found[key].reshape(-1, *shape)
    obs, steps = found["observations"], len(found["rewards"])
    if len(obs) != steps + 1:
        raise UserError(f"{path}: {name}: observations: found {len(obs)}, expected {steps + 1}, one more than rewards")
    rows = {ours: found[theirs] for theirs, ours in KEYS.items()} | {"obs": obs[:-1], "next_obs": obs[1:]}
    if (chance := found.get(LOG_PROB)) is not None and len(chance) == steps + 1:
        rows["log_prob"] = chance[1:]
    return rows


# --- writing


def check_target(folder: Path) -> None:
    """Raise `UserError` unless a data set can be written there: a name of Minari's form that is not taken."""
    if not re.fullmatch(r"[-\w]+-v\d+", folder.name):
        raise UserError(f"{folder}: expected a name ending in .npz, or in -v and a number for a folder of Minari")
    if (folder / "data").exists():
        raise UserError(f"{folder}: found a data set of Minari, expected a new name")


def write(folder: Path, data: OfflineDataset, actions: Actions = None) -> None:
    """Write a data set as HDF5 of Minari; equal data give equal bytes.

    Args:
        folder: of the data set, such as `pendulum/medium-v0`; in MINARI_DATASETS_PATH that is its id.
        data: whose next observation within an episode is that of the next row, as Minari stores each once.
        actions: lowest and highest real action, or the number of choices; default: no bounds, the choices that occur.

    Raises:
        UserError: for data that the form cannot hold, or a folder that cannot be written.
    """
    check_target(folder)
    h5py = h5py_for(folder)
    inside = ~data.ends
    apart = np.zeros(data.size, bool)
    apart[:-1] = (data.next_obs[:-1] != data.obs[1:]).reshape(data.size - 1, -1).any(1) if data.size > 1 else False
    if (apart & inside).any():
        row = int((apart & inside).argmax())
        raise UserError(
            f"{folder}: next_obs: row {row} is followed by another observation, expected that of row {row + 1}, since "
            "Minari stores each once"
        )
    unknown = ~(data.has_next | data.terminated)
    if unknown.any():
        raise UserError(
            f"{folder}: found {int(unknown.sum())} rows without a known next observation, first at row "
            f"{int(unknown.argmax())}, expected none; `learning_view()` leaves them out"
        )
    starts = np.flatnonzero(np.append(True, data.ends[:-1]))
    bounds = list(zip(starts, np.append(starts[1:], data.size)))
    part = folder / ".data"
    try:
        part.mkdir(parents=True, exist_ok=True)
        with h5py.File(part / Path(HDF5).name, "w") as file:
            for number, (a, b) in enumerate(bounds):
                group = file.create_group(f"episode_{number}")
                group.attrs.update({"id": number, "total_steps": int(b - a)})
                group["observations"] = np.concatenate([data.obs[a:b], data.next_obs[b - 1 : b]])
                for theirs, ours in KEYS.items():
                    if ours != "obs":
                        group[theirs] = getattr(data, ours)[a:b]
                if data.log_prob is not None:
                    group[LOG_PROB] = np.append(np.float32("nan"), data.log_prob[a:b])
        about = _description(folder, data, len(bounds), actions)
        about["dataset_size"] = round((part / Path(HDF5).name).stat().st_size / 1e6, 1)
        (part / Path(META).name).write_text(json.dumps(about, sort_keys=True) + "\n", encoding="utf-8")
        (folder / OWN).write_text(info_text(data.info) + "\n", encoding="utf-8")
        part.rename(folder / "data")  # half a data set is none
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror or e})") from e


def _description(folder: Path, data: OfflineDataset, episodes: int, actions: Actions) -> dict[str, Any]:
    absolute, home = folder.resolve(), root().resolve()
    return {
        "dataset_id": absolute.relative_to(home).as_posix() if absolute.is_relative_to(home) else folder.name,
        "minari_version": VERSION,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "total_episodes": episodes,
        "total_steps": data.size,
        "observation_space": json.dumps(_box(data.obs, None)),
        "action_space": json.dumps(_action_space(data.action, actions)),
    }


def _box(x: np.ndarray, bounds: Any) -> dict[str, Any]:
    """gymnasium's Box of the rows of x."""
    low, high = ((0, 255) if x.dtype == np.uint8 else (-np.inf, np.inf)) if bounds is None else bounds
    full = lambda bound: np.broadcast_to(np.asarray(bound, x.dtype), x.shape[1:]).tolist()
    return {"type": "Box", "dtype": str(x.dtype), "shape": list(x.shape[1:]), "low": full(low), "high": full(high)}


def _action_space(action: np.ndarray, actions: Any) -> dict[str, Any]:
    if not np.issubdtype(action.dtype, np.integer):
        return _box(action, actions)
    if action.ndim == 1:
        count = int(action.max()) + 1 if actions is None else int(actions)
        return {"type": "Discrete", "dtype": "int64", "start": 0, "n": count}
    counts = np.broadcast_to(action.max(0) + 1 if actions is None else actions, action.shape[1:]).tolist()
    start = np.zeros(action.shape[1:], int).tolist()
    return {"type": "MultiDiscrete", "dtype": str(action.dtype), "nvec": counts, "start": start}
