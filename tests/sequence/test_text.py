import jax
import numpy as np
import pytest

from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.core.runner import train
from jaxstack.core.source import Feed
from jaxstack.data.sources import HostData, WholeData
from jaxstack.sequence import tasks, text, trainer


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(bytes(range(200)))
    return path


def test_the_default_corpus_is_documentation():
    data = text.load()
    assert data.dtype == np.uint8
    assert len(data) > 300_000
    words = text.decode(data)
    assert 'The "if" statement' in words
    np.testing.assert_array_equal(text.encode(words), data)


def test_files_and_folders(tmp_path, corpus):
    (tmp_path / "b.txt").write_text("bb")
    (tmp_path / "c.md").write_text("no")
    np.testing.assert_array_equal(text.load(corpus), np.arange(200))
    joined = text.load(tmp_path)
    assert bytes(joined[-2:]) == b"\nb" or bytes(joined).startswith(b"bb\n")
    assert len(joined) == 203


def test_bytes_that_are_no_text_survive():
    assert text.decode(text.encode("aä€")) == "aä€"
    assert text.decode(np.array([255, 65])) == "\ufffdA"


def test_windows_come_from_their_part(corpus):
    task = tasks.make("text", length=8, path=str(corpus))
    for test, low, high in ((False, 0, 180), (True, 180, 200)):
        batch = jax.jit(lambda k, test=test: task.sample(k, 512, test))(jax.random.key(0))
        assert (np.diff(batch.tokens, axis=1) == 1).all()
        np.testing.assert_array_equal(batch.targets, batch.tokens + 1)
        assert batch.tokens.min() == low  # every place occurs, also the first and the last
        assert batch.targets.max() == high - 1
        assert batch.mask.all()


def test_the_corpus_is_an_argument_of_the_programs():
    """Not a constant: the sizes of the executables' arguments say so."""
    small = dict(task="text", features=4, depth=1, batch_size=2, num_updates=2, eval_examples=4, mixers=("mingru",))
    learner = trainer.sequence(task_args=("length=8",), **small)
    run = train(learner, progress=False)
    task = tasks.make("text", length=8)
    whole, held_out = (len(task.data(test)) for test in (False, True))
    sizes = {p.name: p.argument_bytes for p in run.ledger.programs}
    params = sum(x.nbytes for x in jax.tree.leaves(run.state.params))
    assert whole <= sizes["chunk"] < whole + 20 * params
    assert held_out <= sizes["evaluate"] < held_out + 20 * params
    # the same examples as where the corpus is a constant
    state = learner.init(jax.random.key(0), learner.hypers)
    with_data, without = (jax.jit(learner.step)(state, *data)[1]["loss/train"] for data in ((task.data(False),), ()))
    assert with_data == without
    last = run.metrics.iloc[-1]
    assert last["eval/perplexity"] == pytest.approx(np.exp(last["eval/loss"]), rel=1e-5)
    again = runner.evaluate(learner, run.state)
    assert again["eval/loss"].item() == pytest.approx(last["eval/loss"], rel=1e-6)
    with pytest.raises(UserError, match="batches=2: expected 1"):
        WholeData(np.zeros(3), batches=2)


def test_blocks_predict_every_byte_once():
    data = np.arange(1, 24, dtype=np.uint8)
    batches = text.blocks(data, length=4, batch_size=4)
    assert [b.tokens.shape for b in batches] == [(4, 4)] * 2
    targets = np.concatenate([b.targets[b.mask] for b in batches])
    inputs = np.concatenate([b.tokens[b.mask] for b in batches])
    np.testing.assert_array_equal(targets, data[1:])
    np.testing.assert_array_equal(inputs, data[:-1])


def test_windows_for_the_host_depend_on_the_step_alone(corpus):
    function = text.windows(text.load(corpus), length=8, batch_size=3, seed=1)
    source = HostData(function)
    chunk = Feed(source, [0], 2).take(5, 2)
    np.testing.assert_array_equal(chunk.tokens[1], function(6).tokens)
    assert (function(5).tokens != function(6).tokens).any()
    np.testing.assert_array_equal(chunk.targets[0], function(5).tokens + 1)


def test_perplexity_and_bits():
    assert text.perplexity(np.log(256)) == pytest.approx(256)
    assert text.bits_per_byte(np.log(256)) == pytest.approx(8)


def test_bad_corpora_are_named(tmp_path, corpus):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, message in (("nothing", "cannot be read"), ("empty", "is empty"), ("folder", "no .txt")):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            text.load(tmp_path / name)
    with pytest.raises(UserError, match="length=50: expected less than 20, the bytes"):
        tasks.make("text", length=50, path=str(corpus))
    with pytest.raises(UserError, match="valid_fraction=0"):
        tasks.make("text", valid_fraction=0.0)
    with pytest.raises(UserError, match="length=0"):
        text.windows(text.load(corpus), 0, 1)
    with pytest.raises(UserError, match="1 bytes"):
        text.blocks(np.zeros(1, np.uint8), 4, 4)
    with pytest.raises(UserError, match=r"tokens: found 300 at \[1\], expected 0 to 255"):
        text.decode(np.array([72, 300]))
