"""docs/architecture.md to the letter: its environment, learners and claim are written to files, registered and run."""

import json
import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parent.parent / "docs" / "architecture.md"
BLOCK = re.compile(r"```python(?: file=(\S+))?\n(.*?)```", re.DOTALL)
# one process for all commands, which would otherwise import everything anew
MAIN = """
import contextlib, io, json, sys
from jaxstack.cli import main

for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(words)
    print(json.dumps([code, out.getvalue()]))
"""


def test_the_guide_works_as_it_stands(tmp_path):
    registrations = []
    for name, code in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if name:
            (tmp_path / name).write_text(code, encoding="utf-8")
        else:
            registrations.append(code)
    assert len(list(tmp_path.glob("*.py"))) == 6
    assert len(registrations) == 3
    (tmp_path / "main.py").write_text("\n".join(registrations) + MAIN, encoding="utf-8")

    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert python("coverage.py").strip() == "[0.25 0.75]"
    commands = (
        "list envs --family native",
        "train ippo --env countdown --env-args agents=3 --total-steps 3840 --num-envs 8 --num-steps 12"
        " --num-minibatches 2 --lr 0.01 --gamma 0.9 --run-dir ippo",
        "train hillclimb --size 8 --lr 0.2 --seeds 0 1 --run-dir climb",
        "train moons:classify --width 64 --lr 0.2 --run-dir moons",
        "train transfer:transfer --seeds 0 1 --run-dir transfer",
        "evaluate transfer",
        "resume transfer",
        "reproduce hillclimb --out results",
    )
    found = [json.loads(x) for x in python("main.py", json.dumps([x.split() for x in commands])).splitlines()]
    assert [code for code, _ in found] == [0] * len(commands), found
    envs, ippo, _, moons, transfer, evaluated, resumed, claim = (out for _, out in found)
    assert "countdown" in envs
    score = lambda name, out: float(re.search(rf"eval/{name}: ([\d.]+)", out).group(1))
    assert score("return", ippo) == 3.0
    assert score("accuracy", moons) > 0.9
    assert score("accuracy", transfer) > 0.8
    assert {p.name for p in (tmp_path / "transfer").iterdir()} >= {"run.yaml", "1_pretrain", "2_tune"}
    assert "eval/accuracy" in evaluated
    assert "eval/accuracy" in resumed
    assert "holds" in claim
    assert (tmp_path / "results" / "hillclimb-small.png").stat().st_size > 5000
