"""The child process of bench_sequence.py: the released PyTorch layer, run by a Python that has torch.

    python bench_sequence_torch.py CLONE FOLDER        FOLDER has x.npy [B, T, D] and weights.npz, its state_dict

Commands come one a line on stdin, answers go one a line to stdout: {"do": "load", "d_state": S, "expand": E} -> what
runs; {"do": "output"} -> y of the last 8 tokens of the first sequence; {"do": "forward" or "gradient", "scan": NAME} ->
seconds. Ends with its input. What the package prints goes to stderr.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]


def load(folder: Path, x: Any, d_state: int, expand: float) -> Any:
    """A function from the name of a scan to the layer with it."""
    from kla import KLAConfig, KLALayer  # pyright: ignore[reportMissingImports]

    with np.load(folder / "weights.npz") as file:
        weights = {name: torch.from_numpy(np.array(value)) for name, value in file.items()}

    def layer(scan: str) -> Any:
        config = KLAConfig(d_state=d_state, expand=expand, backend="torch", scan_impl=scan)
        made = KLALayer(x.shape[-1], config)
        made.load_state_dict(weights)
        return made

    return layer


def seconds(layer: Any, x: Any, kind: str) -> float:
    begin = time.perf_counter()
    if kind == "forward":
        with torch.no_grad():
            layer(x)
    else:
        layer.zero_grad()
        x.grad = None
        (layer(x) ** 2).sum().backward()
    return time.perf_counter() - begin


def main() -> None:
    clone, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(clone / "src"))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    x = torch.from_numpy(np.load(folder / "x.npy")).requires_grad_()
    make: Any = None
    layers: dict[str, Any] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "load":
            make = load(folder, x, command["d_state"], command["expand"])
            answer: Any = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        elif command["do"] == "output":
            with torch.no_grad():
                answer = make("auto")(x)[0, -8:].tolist()
        else:
            scan = command["scan"]
            layers[scan] = layers.get(scan) or make(scan)
            answer = seconds(layers[scan], x, command["do"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
