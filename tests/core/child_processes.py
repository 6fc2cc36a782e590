"""Run by test_distributed.py as one of two processes: PROCESS PORT FOLDER."""

import sys
from pathlib import Path

import numpy as np
import pytest

from jaxstack.core import distributed

if __name__ == "__main__":
    process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    distributed.start(f"127.0.0.1:{port}", 2, process, timeout=120)
    import jax
    from toy_envs import tracker

    from jaxstack.core.errors import UserError
    from jaxstack.core.runner import resume, train

    assert (jax.device_count(), jax.local_device_count(), distributed.count()) == (4, 2, 2)
    assert distributed.is_first() == (process == 0)
    assert distributed.largest(2**40 + process) == 2**40 + 1
    assert distributed.share({"of": process}) == {"of": 0}
    minus_zero = distributed.share_arrays({"x": np.float32([-0.0, np.nan, 3.0])} if process == 0 else None)["x"]
    assert minus_zero.tobytes() == np.float32([-0.0, np.nan, 3.0]).tobytes()

    def fail():
        assert process == 0
        raise UserError("disk full")

    for call, message in (
        (lambda: distributed.on_first(fail), "disk full"),
        (lambda: train(tracker(), 1, 4, progress=False, devices=2), "a product of 4, the devices of all 2 processes"),
        (lambda: train(tracker(), 1, 4, progress=False, devices=4, run_dir=folder), "is not empty and not a run"),
    ):
        with pytest.raises(UserError, match=message):
            call()

    run = dict(progress=False, chunk=2)
    a = train(tracker(), 4, 4, devices=2, env_devices=2, run_dir=folder / "both", **run)
    assert not a.state.envs["target"].is_fully_addressable
    b = resume(tracker(), folder / "both", 5, devices=4, env_devices=1, **run)
    c = resume(tracker(), folder / "alone", 4, devices=2, env_devices=2, **run)
    weights = [np.asarray(distributed.fetch(r.state.params["w"])) for r in (a, b, c)]
    np.savez(folder / f"process{process}.npz", *weights, loss=b.metrics["loss/total"])
