"""docs/architecture.md to the letter: its environment, learners and claim are written to files, registered and run."""

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parent.parent / "docs" / "architecture.md"
BLOCK = re.compile(r"```python(?: file=(\S+))?\n(.*?)```", re.DOTALL)


def test_the_guide_works_as_it_stands(tmp_path):
    registrations = []
    for name, code in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if name:
            (tmp_path / name).write_text(code, encoding="utf-8")
        else:
            registrations.append(code)
    assert len(list(tmp_path.glob("*.py"))) == 6
    assert len(registrations) == 3
    main = "\n".join(registrations) + "\nimport sys\nfrom jaxstack.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    (tmp_path / "main.py").write_text(main, encoding="utf-8")

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "main.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    done = subprocess.run([sys.executable, "coverage.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[0.25 0.75]", done.stderr
    assert "countdown" in run("list", "envs", "--family", "native")
    out = run(
        *"train ippo --env countdown --env-args agents=3 --total-steps 3840 --num-envs 8 --num-steps 12".split(),
        *"--num-minibatches 2 --lr 0.01 --gamma 0.9 --run-dir ippo".split(),
    )
    assert float(re.search(r"eval/return: ([\d.]+)", out).group(1)) == 3.0
    run(*"train hillclimb --size 8 --lr 0.2 --seeds 0 1 --run-dir climb".split())
    out = run(*"train moons:classify --width 64 --lr 0.2 --run-dir moons".split())
    assert float(re.search(r"eval/accuracy: ([\d.]+)", out).group(1)) > 0.9
    out = run(*"train transfer:transfer --seeds 0 1 --run-dir transfer".split())
    assert float(re.search(r"eval/accuracy: ([\d.]+)", out).group(1)) > 0.8
    assert {p.name for p in (tmp_path / "transfer").iterdir()} >= {"run.yaml", "1_pretrain", "2_tune"}
    assert "eval/accuracy" in run("evaluate", "transfer")
    assert "eval/accuracy" in run("resume", "transfer")
    assert "holds" in run("reproduce", "hillclimb", "--out", "results")
    assert (tmp_path / "results" / "hillclimb-small.png").stat().st_size > 5000
