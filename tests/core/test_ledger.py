from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_learners import regression

from jaxstack.core import ledger
from jaxstack.core.errors import UserError
from jaxstack.core.progress import Progress
from jaxstack.core.runner import train


def test_costs_of_a_matrix_product():
    book = ledger.Ledger()
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = book.compile("product", lambda a, b: a @ b, shape, shape)
    row = book.rows()[0]
    assert row["name"] == "product"
    assert row["traces"] == 1
    assert row["flops"] == pytest.approx(2 * 64**3, rel=0.1)
    assert row["argument_bytes"] == 2 * 64 * 64 * 4
    assert row["output_bytes"] == 64 * 64 * 4
    assert row["peak_bytes"] >= 3 * 64 * 64 * 4
    assert (compiled(jnp.eye(64), jnp.ones((64, 64))) == 1).all()
    assert "product: traced" in book.summary()


def test_donation_is_counted_once():
    book = ledger.Ledger()
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    book.compile("kept", lambda x: x + 1, x)
    book.compile("donated", lambda x: x + 1, x, donate=(0,))
    kept, donated = book.programs
    assert donated.donated_bytes == 4000
    assert donated.peak_bytes == kept.peak_bytes - 4000


def test_a_compile_too_many_is_an_error():
    book = ledger.Ledger(max_compiles=1)
    book.compile("a", jnp.sin, 1.0)
    with pytest.raises(UserError, match="max_compiles=1: 'b' would be one more compile after a"):
        book.compile("b", jnp.cos, 1.0)


def test_a_program_compiled_early_is_entered_when_it_is_asked_for():
    book = ledger.Ledger(max_compiles=2)
    x = jnp.arange(3.0)
    later = book.begin("early", lambda x: jnp.cumsum(x) * 2, x, early=True, once=True)
    assert book.compile("first", jnp.sin, x)(x).shape == (3,)
    np.testing.assert_array_equal(later()(x), [0, 2, 6])
    assert [p.name for p in book.programs] == ["first", "early"]
    assert all(p.traces == 1 for p in book.programs)
    assert all(p.compile_seconds > 0 for p in book.programs)
    with pytest.raises(UserError, match="max_compiles=2: 'more' would be one more compile after first, early"):
        book.begin("more", jnp.sin, x, early=True)()


def test_what_goes_wrong_early_is_raised_where_the_program_is_asked_for(monkeypatch):
    monkeypatch.setattr(ledger, "known_options", lambda _: {"no_such_option": True})
    later = ledger.Ledger().begin("early", jnp.sin, 1.0, early=True, once=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        later()


def test_what_ran_side_by_side_counts_once():
    book = ledger.Ledger()
    book.spans += [(3.0, 5.0), (0.0, 2.0), (1.0, 2.5), (1.5, 1.75), (7.0, 8.0)]
    assert book.seconds == 2.5 + 2.0 + 1.0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone limits the mappings of a process")
def test_cached_programs_go_when_mappings_run_short():
    count = lambda: len(Path("/proc/self/maps").read_text().splitlines())
    functions = [jax.jit(lambda x, i=i: jnp.sin(x * i) @ jnp.ones((3, 3))) for i in range(8)]
    for f in functions:
        f(jnp.arange(3.0))
    ledger.spare_mappings(1.0)
    assert [f._cache_size() for f in functions] == [1] * 8
    before = count()
    ledger.spare_mappings(0.0)
    assert [f._cache_size() for f in functions] == [0] * 8
    assert count() < before
    np.testing.assert_allclose(functions[2](jnp.arange(3.0)), [np.sin([0, 2, 4]).sum()] * 3, rtol=1e-6)


def test_a_run_stores_its_ledger(tmp_path):
    import json

    train(regression(), 2, progress=False, max_compiles=3, run_dir=tmp_path / "r")
    rows = json.loads((tmp_path / "r" / "ledger.json").read_text())
    assert [(r["name"], r["traces"]) for r in rows] == [("chunk", 1), ("init", 1), ("evaluate", 1)]
    assert all(r["flops"] > 0 and r["peak_bytes"] > 0 for r in rows)


def test_memory_advice(monkeypatch):
    program = ledger.Program(
        "chunk", 1, 0.0, 0.0, 0.0, 0.0, argument_bytes=0, output_bytes=0, temp_bytes=100, donated_bytes=0
    )
    ledger.check_memory(program, 4, 100)
    with pytest.raises(ledger.DoesNotFit, match=r"split_seeds=2 \(or 'auto'\) runs 2 groups") as e:
        ledger.check_memory(program, 4, 60)
    assert e.value.fit == 2
    with pytest.raises(ledger.DoesNotFit, match="even one seed does not fit"):
        ledger.check_memory(program, 4, 20)
    with pytest.raises(ledger.DoesNotFit):
        ledger.check_memory(program, 4, 100, copies=2)
    monkeypatch.setattr(ledger, "available_bytes", lambda: None)
    ledger.check_memory(program, 4)


def test_free_memory_is_read_from_the_system():
    free = ledger.available_bytes()
    assert free is not None
    assert 2**20 < free < 2**50


def test_progress_prints_lines_without_a_terminal_and_can_be_silenced(capsys, monkeypatch):
    monkeypatch.setenv("JAXSTACK_PROGRESS", "on")
    train(regression(), 3, 2)
    out = capsys.readouterr().out
    assert "toy: 3 steps x 8 samples, 2 seed(s)" in out
    assert "compiled" in out
    assert "step 3/3" in out
    assert "eval/return" in out
    monkeypatch.setenv("JAXSTACK_PROGRESS", "off")
    train(regression(), 3, 2)
    assert capsys.readouterr().out == ""


def test_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("JAXSTACK_PROGRESS", "on")
    progress = Progress(regression(), 4, 0, 1, ledger.Ledger(), True)
    progress.live = True
    with progress:
        progress.update(2, [{"loss/total": 0.5}], 2, 1.0)
        progress.say("something matters")
        progress.update(4, [{"loss/total": 0.25}], 2, 1.0)
    out = capsys.readouterr().out
    assert "something matters" in out
    assert "4/4" in out


def test_options_that_the_backend_does_not_have_are_left_out():
    options = {"xla_backend_optimization_level": 0, "xla_cpu_no_such_option": True}
    assert ledger.known_options(tuple(options.items())) == {"xla_backend_optimization_level": 0}
    assert set(ledger.known_options(tuple(ledger.CHEAP.items()))) <= set(ledger.CHEAP)
