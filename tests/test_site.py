"""The pages of the site: links lead somewhere, commands exist, and Python blocks run as they stand, in order."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from jaxstack import cli
from jaxstack.cli.flags import job_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_links_lead_to_files_of_the_site():
    missing = []
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            target = (page.parent / link).resolve()
            if "://" not in link and not (target.is_file() and target.is_relative_to(DOCS)):
                missing.append((page.name, link))
    assert missing == []


def test_every_page_is_in_the_navigation_or_linked_from_a_page():
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    named = set(re.findall(r"[\w/-]+\.md", str(site["nav"])))
    assert all((DOCS / name).exists() for name in named)
    linked = {
        str((page.parent / link).resolve().relative_to(DOCS))
        for page in PAGES
        for link in re.findall(r"\]\(([\w./-]+\.md)", page.read_text(encoding="utf-8"))
    }
    assert {str(p.relative_to(DOCS)) for p in PAGES} <= named | linked


@pytest.mark.parametrize("name", ["training", "sequence-models", "customise", "images"])
def test_python_of_a_page_runs_as_it_stands(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Once upon a time there was a fox. " * 40, encoding="utf-8")
    code = "\n".join(blocks(DOCS / f"{name}.md", "python"))
    space: dict = {}
    exec(compile(code, f"{name}.md", "exec"), space)
    assert space


LINES = [
    line.split("#")[0].strip()
    for name in ("index", "training", "sequence-models", "customise", "sweeps", "gpu", "detection", "images")
    for block in blocks(DOCS / f"{name}.md", "bash")
    for line in block.splitlines()
    if line.startswith("jaxstack ")
]


@pytest.mark.parametrize("line", dict.fromkeys(LINES))
def test_commands_of_a_page_are_read(line):
    words = [w.strip('"') for w in re.findall(r'"[^"]*"|\S+', line)][1:]
    args, rest = cli.parser().parse_known_args(words)
    assert args.command == words[0]
    if args.command == "train" and not args.config:
        job_of(rest[0], rest[1:])
    elif not args.takes_options:
        assert not rest


def test_the_api_page_names_modules_and_members_that_exist():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for module, members in re.findall(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", text, re.M):
        found = importlib.import_module(module)
        assert found.__doc__
        assert all(hasattr(found, name) for name in filter(None, members.split(", ")))
