"""docs/methods and docs/results: generated parts are up to date, pages follow the template, named functions exist."""

import importlib
import re
from pathlib import Path

import pytest

from jaxstack import cli
from jaxstack.claims import CLAIMS, report

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
PARTS = ["Statement", "Equations and functions", "Commands", "Results", "Deviations", "Data"]


def test_generated_parts_are_those_of_the_records():
    """Stale? `jaxstack reproduce --docs` writes them."""
    texts = report.generated(DOCS / "results", DOCS / "methods")
    assert len(texts) >= 3
    for path, text in texts.items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is stale: run `jaxstack reproduce --docs`"


def test_every_claim_has_a_page_that_is_linked():
    index = (DOCS / "methods" / "README.md").read_text(encoding="utf-8")
    pages = {p.stem for p in (DOCS / "methods").glob("*.md")} - {"README"}
    assert set(CLAIMS) <= pages
    assert pages == set(re.findall(r"\]\(([\w-]+)\.md\)", index))


@pytest.mark.parametrize("name", list(CLAIMS))
def test_pages_follow_the_template_and_name_what_exists(name):
    text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.M) == PARTS
    named = re.findall(r"`(jaxstack(?:\.\w+)+)(?::(\w+))?`", text)
    assert named
    for module, attribute in named:
        found = importlib.import_module(module)
        assert not attribute or hasattr(found, attribute), f"{name}.md: {module}:{attribute}"
    assert (DOCS / "results" / f"{name}-small.json").exists()
    for line in re.findall(r"^jaxstack reproduce .*$", text, re.M):
        args, rest = cli.parser().parse_known_args(line.split()[1:])
        assert args.method == name
        assert not rest
