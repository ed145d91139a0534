"""The rows as curves and as Markdown tables. Knows nothing of how they were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.compression_sweep import plan
from bench.compression_sweep.corpora import CORPORA
from bench.compression_sweep.picture import Curve, Panel, drawn
from bench.compression_sweep.rows import Gap, Row, Rows, Variant, gaps

PICTURE = "images/compression.svg"


def text(rows: Rows) -> str:
    """What stands below the figures."""
    parts = [f"![Held-out loss and gap against tokens of training]({PICTURE})", *_final(rows), *_others(rows)]
    return "\n\n".join([*parts, _provenance(list(rows))])


def picture(rows: Rows) -> str:
    """One panel of losses per corpus, then the gap against training for both, then gap against bytes."""
    panels = [_losses(rows, corpus) for corpus in CORPORA]
    return drawn([panel for panel in [*panels, _gaps(rows)] if panel.curves])


def _losses(rows: Rows, corpus: str) -> Panel:
    found = [gap for gap in _main(rows) if gap.corpus == corpus]
    names = (f"{plan.CANDIDATE.model.bytes_per_token} bytes", f"{plan.TWIN.model.bytes_per_token} bytes")
    curves = [Curve(name, [(_millions(g.steps), g.losses[i]) for g in found]) for i, name in enumerate(names) if found]
    return Panel(f"Held-out loss, {corpus}", "million tokens", "nats per byte", curves)


def _gaps(rows: Rows) -> Panel:
    curves = []
    for corpus in CORPORA:
        if found := [gap for gap in _main(rows) if gap.corpus == corpus]:
            points = [(_millions(gap.steps), 100 * gap.mean) for gap in found]
            spread = [(100 * min(gap.shares), 100 * max(gap.shares)) for gap in found]
            curves.append(Curve(corpus, points, spread))
    return Panel("Gap to the uncompressed twin", "million tokens", "% (bars: all seeds)", curves, target=1.0)


def _main(rows: Rows) -> list[Gap]:
    return gaps(rows, plan.CANDIDATE.digest(plan.BATCH), plan.TWIN.digest(plan.BATCH))


def _final(rows: Rows) -> Iterator[str]:
    lines = ["| corpus | tokens | candidate | twin | gap | each seed |", "|---|---|---|---|---|---|"]
    for gap in _main(rows):
        each = ", ".join(f"{100 * share:+.2f}%" for share in gap.shares)
        tokens = f"{_millions(gap.steps):.2f}M"
        losses = f"{gap.losses[0]:.4f} | {gap.losses[1]:.4f}"
        lines.append(f"| {gap.corpus} | {tokens} | {losses} | {100 * gap.mean:+.2f}% | {each} |")
    yield "\n".join(lines)


def _others(rows: Rows) -> Iterator[str]:
    yield "The uncompressed model over other wires, and single changes, each against the twin with its tables (seed 0):"
    lines = ["| | bytes | tokens | loss | gap |", "|---|---|---|---|---|"]
    pairs = [(variant, plan.TWIN) for variant in (*plan.other_rates(), *plan.compared())] + plan.tried()
    for variant, reference in pairs:
        lines += _row(rows, variant, reference)
    yield "\n".join(lines)


def _row(rows: Rows, variant: Variant, reference: Variant) -> Iterator[str]:
    ours, theirs = rows.of(variant.digest(plan.BATCH)), rows.of(reference.digest(plan.BATCH))
    for place in sorted(ours.keys() & theirs.keys()):
        row, gap = ours[place], ours[place].loss / theirs[place].loss - 1
        yield f"| {variant.name} | {row.bytes:g} | {row.tokens / 1e6:.2f}M | {row.loss:.4f} | {100 * gap:+.2f}% |"


def _provenance(rows: Sequence[Row]) -> str:
    machines, commits = sorted({row.cpu for row in rows}), sorted({row.commit for row in rows})
    hours = sum(row.cpu_seconds for row in rows) / 3600
    return f"{len(rows)} rows, {hours:.1f} CPU hours on {', '.join(machines)}; commits {', '.join(commits)}."


def _millions(steps: int) -> float:
    return steps * plan.BATCH * plan.CANDIDATE.model.context / 1e6
