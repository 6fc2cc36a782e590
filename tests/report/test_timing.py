import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.report.timing import in_turn, interleaved, quartiles, timed


def test_measures_take_turns_and_the_warm_up_does_not_count():
    seen = []
    measure = lambda name: lambda repeat: seen.append((name, repeat)) or 10 * repeat + len(seen)
    assert in_turn({"a": measure("a"), "b": measure("b")}, 2) == {"a": [13, 25], "b": [14, 26]}
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert in_turn({"a": lambda repeat: repeat}, 2, warm_up=False) == {"a": [0, 1]}


def test_a_call_that_waits_takes_time_of_the_clock_alone():
    taken = timed(lambda: time.sleep(0.05))
    assert taken.wall >= 0.05
    assert taken.cpu < taken.wall


def test_ratios_are_taken_within_a_repeat():
    assert quartiles([2.0, 30.0, 6.0], [1.0, 10.0, 3.0]) == [2.0, 2.0, 2.5]


def test_functions_are_compiled_and_timed_in_turn():
    x = jnp.arange(8.0)
    found = interleaved({"sum": lambda x: x.sum(), "sort": lambda x: jnp.sort(x)}, [(x,), (x + 1,)], repeats=3)
    assert {n: len(t.seconds) for n, t in found.items()} == {"sum": 3, "sort": 3}
    for t in found.values():
        assert 0 < t.best <= t.median
        assert t.median == pytest.approx(np.median(t.seconds))
