"""The rows as curves and as Markdown, and which planned rows are missing. Knows nothing of how they came about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.compression_sweep import plan
from bench.compression_sweep.corpora import CORPORA
from bench.compression_sweep.picture import Curve, Panel, drawn
from bench.compression_sweep.rows import Gap, Row, Rows, Variant, gaps

PICTURE = "images/compression.svg"


def text(rows: Rows) -> str:
    """What stands below the figures."""
    image = f"![Held-out loss, and the gap to the uncompressed twin, against tokens of training]({PICTURE})"
    parts = [_setting(), image, *_final(rows), *_missing(rows), *_others(rows), _provenance(list(rows))]
    return "\n\n".join(parts)


def picture(rows: Rows) -> str:
    """Losses of both sides, a panel per corpus, and how the gap moves with training."""
    panels = [*(_losses(rows, corpus) for corpus in CORPORA), _gap_panel(rows)]
    return drawn([panel for panel in panels if panel.curves])


def _setting() -> str:
    model, rates = plan.CANDIDATE.model, plan.TUNED
    lost = ", ".join(f"{other.muon:g} and {other.adamw:g}" for other in plan.SEARCHED.values())
    return (
        f"Width {model.size}, {model.layers} layers in {model.stages} stages, sequences of {model.context} bytes, "
        f"{plan.BATCH * model.context:,} tokens a step. The candidate sends {model.rank} coefficients in {model.codec} "
        "and one scale. Its twin sends the whole stream in fp32 and has the same local tables, the same number of "
        "trained parameters and the same text in the same order; it finds an n-gram under "
        f"{plan.TWIN.model.hashes} hash and the candidate under {model.hashes}, which is what suits either. "
        f"Rates of both: Muon {rates.muon:g}, "
        f"AdamW {rates.adamw:g} (also tried on both sides: {lost}); warm-up, steady rate, linear decay over the last "
        "fifth. Texts: *code* is the source of Python's standard library; *prose* is pydoc's help topics and the "
        "docstrings of the standard library and of numpy. Losses are in nats per byte on 256 held-out sequences. "
        "Not tested: larger models, larger vocabularies, longer training."
    )


def _losses(rows: Rows, corpus: str) -> Panel:
    found = [gap for gap in _main(rows) if gap.corpus == corpus]
    names = (f"candidate, {plan.CANDIDATE.model.bytes_per_token} bytes", f"twin, {plan.TWIN.model.bytes_per_token}")
    curves = [Curve(name, [(_millions(g.steps), g.losses[i]) for g in found]) for i, name in enumerate(names) if found]
    return Panel(f"Held-out loss, {corpus}", "million tokens", "nats per byte", curves)


def _gap_panel(rows: Rows) -> Panel:
    curves = [_gap_curve(corpus, [gap for gap in _main(rows) if gap.corpus == corpus]) for corpus in CORPORA]
    for variant, reference in plan.tried():
        found = gaps(rows, variant.digest(plan.BATCH), reference.digest(plan.BATCH))
        curves.append(_gap_curve(variant.name, [gap for gap in found if gap.corpus == "code"]))
    drawable = [curve for curve in curves if len(curve.points) > 1]
    return Panel("Gap to the uncompressed twin", "million tokens", "% (bars: all seeds)", drawable, 1.0, rises=True)


def _gap_curve(name: str, found: Sequence[Gap]) -> Curve:
    points = [(_millions(gap.steps), 100 * gap.mean) for gap in found]
    return Curve(name, points, [(100 * min(gap.shares), 100 * max(gap.shares)) for gap in found])


def _main(rows: Rows) -> list[Gap]:
    return gaps(rows, plan.CANDIDATE.digest(plan.BATCH), plan.TWIN.digest(plan.BATCH))


def _final(rows: Rows) -> Iterator[str]:
    lines = ["| corpus | tokens | candidate | twin | gap | each seed |", "|---|---|---|---|---|---|"]
    for gap in _main(rows):
        each = ", ".join(f"{100 * share:+.2f}%" for share in gap.shares)
        losses = f"{gap.losses[0]:.4f} | {gap.losses[1]:.4f}"
        lines.append(f"| {gap.corpus} | {_millions(gap.steps):.2f}M | {losses} | {100 * gap.mean:+.2f}% | {each} |")
    yield "\n".join(lines)


def _missing(rows: Rows) -> Iterator[str]:
    """Which planned cells of the table above nobody has measured yet."""
    sides = [rows.of(variant.digest(plan.BATCH)) for variant in (plan.CANDIDATE, plan.TWIN)]
    wanted = [(c, seed, steps) for c in CORPORA for steps in plan.HORIZONS for seed in plan.SEEDS]
    absent = [place for place in wanted if not all(place in side for side in sides)]
    if absent:
        cells = ", ".join(f"{c} {_millions(steps):.2f}M seed {seed}" for c, seed, steps in absent)
        yield f"Planned and not measured yet ({len(absent)} of {len(wanted)} cells; the same command goes on): {cells}."


def _others(rows: Rows) -> Iterator[str]:
    yield "Other wires, other rates and other shapes, each against the twin with its tables and cuts (code, seed 0):"
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
