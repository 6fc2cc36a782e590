"""The audit's report: one self-contained HTML page with tables, figures and a reading in plain words."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxstack.agents.probe_audit import Audited, Run, discoveries, table
from jaxstack.core.errors import UserError
from jaxstack.report import stats

WARNINGS = (
    "Feed-forward and recurrent probes measure different things (a window of steps against the whole recurrent state): "
    "never compare HAR, PIF or DAI across them.",
    "AA conditions on observations only, not on histories: two recurrent agents with a common past show it without any "
    "agreement between them.",
    "Normalised values are unstable where H(A | O) is near 0, as for nearly deterministic policies: read the bits.",
    "The flag is the released rule (above the mean of five null values by 0.01), which is no test; the p-value is.",
)

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:13px}th,td{border-bottom:1px solid #ddd;padding:.3rem .5rem;
text-align:right}th:first-child,td:first-child{text-align:left}h2{margin-top:2.5rem}img{max-width:100%}
td{white-space:pre;vertical-align:top}
.flag{font-weight:600;color:#0072B2}.note{color:#555;font-size:13px}li{margin:.2rem 0}
"""


def write(audited: Sequence[Audited], out: str | Path) -> Path:
    """Write `report.html`, `probes.csv` and `audit.json` into the folder `out`; returns the page.

    Raises:
        UserError: a folder that cannot be written.
    """
    out = Path(out)
    rows = [_row(a, r, name) for a in audited for r in a.runs for name in r.probes]
    try:
        out.mkdir(parents=True, exist_ok=True)
        import pandas as pd

        pd.DataFrame(rows).to_csv(out / "probes.csv", index=False)
        facts = [
            {"env": a.scenario.env, "suite": a.scenario.suite, "gaps": {k: g._asdict() for k, g in a.gaps.items()}}
            for a in audited
        ]
        (out / "audit.json").write_text(json.dumps({"scenarios": facts, "table": table(audited)}, indent=1), "utf-8")
        page = out / "report.html"
        page.write_text(render(audited), "utf-8")
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror})") from e
    return page


def render(audited: Sequence[Audited]) -> str:
    """Return the page."""
    found = discoveries(audited)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Dec-POMDP audit</title>",
        f"<style>{STYLE}</style></head><body><h1>Dec-POMDP audit</h1>",
        "<p>What the greedy play of trained teams says about memory, hidden information and coordination "
        "(Tessera et al., AAMAS 2026). Every value is read against a permutation null.</p>",
        _table(table(audited)),
        "<ul class='note'>" + "".join(f"<li>{html.escape(w)}</li>" for w in WARNINGS) + "</ul>",
    ]
    for a in audited:
        parts.append(f"<h2>{html.escape(a.scenario.env)}</h2>")
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in reading(a, found)) + "</ul>")
        parts.append(_scenario_table(a))
        parts.append(f"<img alt='probes of {html.escape(a.scenario.env)}' src='data:image/png;base64,{_figure(a)}'>")
        notes = sorted({n for r in a.runs for p in r.probes.values() for n in p.notes})
        parts.append("".join(f"<p class='note'>{html.escape(n)}</p>" for n in notes))
    return "\n".join([*parts, "</body></html>"])


def reading(a: Audited, found: Any) -> list[str]:
    """Say in plain words what a scenario's probes and gaps mean."""
    env, lines = a.scenario.env, []
    for base, gap in a.gaps.items():
        size = (
            f"recurrent less feed-forward {gap.mean:+.3f}, {gap.positive} of {gap.seeds} seeds better, p = {gap.p:.3g}"
        )
        if gap.benefits:
            lines.append(f"{base}: memory pays ({size}).")
        elif gap.seeds < 5:
            lines.append(f"{base}: {gap.seeds} seeds cannot show whether memory pays; at least 5 are needed ({size}).")
        else:
            lines.append(f"{base}: no significant gain from memory ({size}).")
    depends = found.get("HAR", {}).get(env, False)
    pays = any(g.benefits for g in a.gaps.values())
    if depends and not pays:
        lines.append("Policies depend on history although it does not raise their return.")
    elif depends:
        lines.append("Policies depend on history, and it raises their return.")
    else:
        lines.append("No policy depends on history beyond its null.")
    yes = lambda name: found.get(name, {}).get(env, False)
    lines.append(
        "An agent's private information predicts a teammate's action."
        if yes("PIF")
        else "No private information of an agent shows in a teammate's action."
    )
    both = (yes("AA"), yes("DAI"))
    lines.append(
        {
            (True, True): "Coordination is both synchronous and carried over time.",
            (True, False): "Coordination is synchronous: actions are coupled in a step, not through the past.",
            (False, True): "Coordination is temporal: an agent's past influences a teammate's action.",
            (False, False): "Neither synchronous nor temporal coordination shows.",
        }[both]
    )
    for name in ("HAR", "PIF", "AA", "DAI"):
        own = [r.probes[name] for r in a.runs if name in r.probes]
        above = [p for p in own if p.flag and p.norm > p.null.max()]
        if above and not yes(name):
            few = min(len(p.null) for p in above)
            lines.append(
                f"{name}: {len(above)} of {len(own)} runs lie above all their null values, but {few} null values are "
                "too few to decide at a false discovery rate of 5%; see --null-reps and --slow-null-reps."
            )
    return lines


def _row(a: Audited, run: Run, name: str) -> dict[str, Any]:
    p = run.probes[name]
    return {
        "env": a.scenario.env,
        "suite": a.scenario.suite,
        "algorithm": run.algorithm,
        "seed": run.seed,
        "return": run.score,
        "probe": name,
        "bits": p.bits,
        "norm": p.norm,
        "null": float(np.mean(p.null)),
        "null_reps": len(p.null),
        "p": p.p,
        "flag": p.flag,
        "rows": p.rows,
    }


def _scenario_table(a: Audited) -> str:
    rows = []
    for algorithm in dict.fromkeys(r.algorithm for r in a.runs):
        runs = a.of(algorithm)
        row: dict[str, Any] = {
            "algorithm": algorithm,
            "return": str(stats.estimate(stats.mean, [r.score for r in runs])).replace(" [", "\n[", 1),
        }
        for name in dict.fromkeys(n for r in runs for n in r.probes):
            own = [r.probes[name] for r in runs]
            known = [p for p in own if np.isfinite(p.norm)]
            if not known:
                row[name] = "no value"
                continue
            value, null = (np.mean([f(p) for p in known]) for f in (lambda p: p.norm, lambda p: p.null.mean()))
            flags = sum(p.flag for p in own)
            row[name] = f"{value:.3f}\nnull {null:.3f} of {len(known[0].null)}\n{flags}/{len(own)} flags"
        rows.append(row)
    return _table(rows)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(k for r in rows for k in r))
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(r.get(n, '')))}</td>" for n in names) + "</tr>" for r in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(a: Audited) -> str:
    """A panel per algorithm: value of every run beside the range of its null."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    algorithms = list(dict.fromkeys(r.algorithm for r in a.runs))
    figure = Figure(figsize=(3.1 * len(algorithms), 2.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for i, algorithm in enumerate(algorithms):
        axes = figure.add_subplot(1, len(algorithms), i + 1)
        runs = a.of(algorithm)
        names = list(dict.fromkeys(n for r in runs for n in r.probes))
        for x, name in enumerate(names):
            null = np.concatenate([r.probes[name].null for r in runs])
            null = null[np.isfinite(null)]
            if null.size:
                low, high = np.percentile(null, [2.5, 97.5])
                axes.plot([x, x], [low, high], color="#BBBBBB", linewidth=9, solid_capstyle="butt")
            values = [r.probes[name].norm for r in runs]
            axes.plot([x] * len(values), values, "o", color="#0072B2", markersize=4, alpha=0.8)
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_title(algorithm, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.set_ylim(-0.04, 1.04)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("normalised value; grey: null", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
