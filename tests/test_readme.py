"""The README's example runs in a notebook; its commands and links exist."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jaxstack import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


FEWER = {"total_steps=40_000": "total_steps=4_096", "train(learner, 10, ": "train(learner, 1, "}
"""What the example is run with here: the same programs for fewer updates."""


def test_the_example_runs_in_a_notebook(tmp_path):
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line]) <= 15
    for long, short in FEWER.items():
        assert long in example
        example = example.replace(long, short)
    check = (
        "assert actions.shape == (1, 4) and sweep.alive.all()\nfrom IPython.display import Image\nImage('curves.png')"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (example, check)])
    NotebookClient(book, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "image/png" in book.cells[1].outputs[0].data


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("line", [x for b in blocks("bash") for x in b.splitlines() if x.startswith("jaxstack ")])
def test_commands_exist_with_their_options(line, capsys):
    words = line.split("#")[0].split()
    args, rest = cli.parser().parse_known_args(words[1:])
    assert args.command == words[1]
    if args.command == "train":
        learner = rest[0] if not args.config else "ippo"
        with pytest.raises(SystemExit) as e:
            cli.main(["train", learner, "--help"])
        assert e.value.code == 0
        text = capsys.readouterr().out
        assert all(option in text for option in rest if option.startswith("--"))
    else:
        assert not rest


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{t}:", makefile, re.M) for t in targets)
