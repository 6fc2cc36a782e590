"""Write what is generated from the registry (jaxstack/methods.py): README's table of methods and docs/method-list.md.

python scripts/list_methods.py            write both
python scripts/list_methods.py --check    exit with 1 if one of them is stale
"""

import argparse
import sys
from pathlib import Path

from jaxstack.claims import report
from jaxstack.methods import METHODS, Method

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- methods: written by scripts/list_methods.py -->", "<!-- end of methods -->"
INDEX = "docs/method-list.md"


def paper(m: Method) -> str:
    """Title and year with links to arXiv."""
    title = f"{m.title} ({m.year})"
    if not m.arxiv:
        return title
    first, *more = (f"https://arxiv.org/abs/{i}" for i in m.arxiv)
    return f"[{title}]({first})" + "".join(f", [part {i}]({url})" for i, url in enumerate(more, 2))


def state(m: Method, folder: str = "") -> str:
    """What a reader can do with it: the page and the verdict, as far as they exist; links begin in `folder`."""
    if m.planned:
        return "planned"
    link = lambda path: path.removeprefix(folder)
    name = f"[works]({link(m.page)})" if (ROOT / m.page).exists() else "works"
    record = f"docs/results/{m.slug}-small.json"
    if not (ROOT / record).exists():
        return name
    counts = report.load(ROOT / record)["counts"]
    return f"{name}; [results]({link(record)}): {report.summary(counts)}"


def table() -> str:
    """A row for each published method that works, and how many are planned."""
    published = [m for m in METHODS if m.published]
    rows = [f"| `{m.slug}` | {paper(m)} | {state(m)} |" for m in published if not m.planned]
    planned = f"\n{len(published) - len(rows)} more are planned: [all methods, by group]({INDEX})."
    return "\n".join(["| Method | Paper | State |", "|---|---|---|", *rows, planned])


def readme(text: str) -> str:
    """README.md with the table of today between its markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def index() -> str:
    """docs/method-list.md: methods by group, then the learners that they are compared with."""
    lines = ["# Methods", "", "Written by `scripts/list_methods.py` from `jaxstack/methods.py`."]
    for group in dict.fromkeys(m.group for m in METHODS):
        title = {"agent": "Agents to compare with", "learner": "Other learners"}.get(group, group.capitalize())
        lines += ["", f"## {title}"]
        for m in METHODS:
            if m.group == group:
                how = f"; `jaxstack train {m.slug}`" if m.factory else ""
                lines.append(f"- `{m.slug}`: {paper(m)}; {state(m, 'docs/')}{how}")
    return "\n".join(lines) + "\n"


def stale() -> list[str]:
    """The generated files that are not as they would be written now."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    old = (ROOT / INDEX).read_text(encoding="utf-8") if (ROOT / INDEX).exists() else ""
    return [name for name, same in (("README.md", readme(text) == text), (INDEX, index() == old)) if not same]


def main() -> int:
    """Write or check."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true")
    if p.parse_args().check:
        for name in stale():
            print(f"{name}: stale; run python scripts/list_methods.py")
        return 1 if stale() else 0
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (ROOT / "README.md").write_text(readme(text), encoding="utf-8")
    (ROOT / INDEX).write_text(index(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
