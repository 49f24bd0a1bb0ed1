"""Tables, pictures and sentences of the experiment `precision`."""

from __future__ import annotations

from .drawing import add_legend, panels
from .experiment import Finding, Findings, Picture, Table, number, select

RESOLUTIONS = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-6}
"""Decimal digits of a format, as `torch.finfo(dtype).resolution` and the paper have them."""
BEGINS = 10**4
"""Tokens from which on the table says what 16 bits do; below they do nothing else."""
FIRST_DROPPED = 4
"""By the paper's P = 4."""


def tables(findings: Findings) -> list[Table]:
    """Terms, reads in 16 bits and the counter; only what was measured."""
    made = (_terms(findings), _halves(findings), _counting(findings))
    return [each for each in made if each.rows]


def _terms(findings: Findings) -> Table:
    every = select(findings, what="terms")
    own = [every[0], every[-1]] if len(every) > 1 else every
    powers = range(len(own[0].values["alpha"])) if own else range(0)
    rows = [
        (
            f"{p}",
            *(f"{each.values['alpha'][p]:.1e}" for each in own),
            *(number(each.values["term"][p]) for each in own),
            f"{own[0].values['error'][p]:.1%}",
        )
        for p in powers
    ]
    columns = (
        "power",
        *(f"alpha, d = {each.case['head_dim']}" for each in own),
        *(f"term, d = {each.case['head_dim']}" for each in own),
        "stopping here",
    )
    note = (
        "alpha: scale^p / p!. term: root mean square of alpha (q . k)^p over random pairs. stopping: relative error of "
        "weights that is expected, for scores of spread 1."
    )
    return Table("Terms of the series", columns, tuple(rows), note)


def _halves(findings: Findings) -> Table:
    rows = [
        (
            f"{each.case['head_dim']}, {read['tokens']:,}",
            *(
                cell
                for name in ("float16", "bfloat16")
                for cell in (f"{read[name]['lost']:.1%}", _percent(read[name]["error"]))
            ),
            f"{max(read[name]['library_lost'] for name in ('float16', 'bfloat16')):.1%}",
        )
        for each in select(findings, what="halves")
        for read in each.values["reads"]
        if read["tokens"] >= BEGINS
    ]
    note = (
        "Degree 3. lost: rows whose N or Z is infinite. error: median of the others, relative to float32. The products "
        "as autocast makes them. library: given inputs of 16 bits, it sums and reads in float32."
    )
    columns = ("d, tokens", "float16: lost", "error", "bfloat16: lost", "error", "library: lost")
    return Table("Reading the state with products that return 16 bits", columns, tuple(rows), note)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _counting(findings: Findings) -> Table:
    rows = [
        (name, f"{each.values[key]:,}")
        for each in select(findings, what="counting")
        for name, key in (
            ("tokens", "tokens"),
            ("the recurrence in float32", "recurrence"),
            ("this library", "library"),
            ("tokens, later", "twice"),
            ("this library, later", "twice_count"),
        )
    ]
    return Table("Counting tokens one by one", ("what", "count"), tuple(rows))


def pictures(findings: Findings) -> list[Picture]:
    """Constants, terms, and rows lost in float16."""
    terms, halves = select(findings, what="terms"), select(findings, what="halves")
    if not terms:
        return []
    figure, (constants, sizes, lost) = panels(3, height=3.8)
    for axes, what, title in ((constants, "alpha", "alpha_p, as the paper has it"), (sizes, "term", "its term, rms")):
        for each in terms:
            values = each.values[what]
            axes.plot(range(len(values)), values, marker="o", label=f"d = {each.case['head_dim']}")
        for name, resolution in RESOLUTIONS.items():
            axes.axhline(resolution, color="k", linestyle=":", linewidth=1)
            axes.annotate(name, (0, resolution), fontsize="x-small", va="bottom")
        axes.set(yscale="log", ylim=(1e-10, 20), xlabel="power p of the score", title=title)
    add_legend(constants, loc="lower left")
    for each in halves:
        for name, style in (("float16", "-"), ("bfloat16", "--")):
            reads = each.values["reads"]
            shares = [read[name]["lost"] for read in reads]
            label = f"{name}, d = {each.case['head_dim']}"
            lost.plot([read["tokens"] for read in reads], shares, style, marker=".", label=label)
    lost.set(xscale="log", ylim=(-0.03, 1.03), xlabel="tokens", title="rows with an infinite sum (degree 3)")
    add_legend(lost, loc="upper left")
    caption = (
        "Left: the constants beside the resolutions of floating-point formats, as the paper draws them. Middle: the "
        "terms that they are part of. Right: queries whose sums overflow where products return 16 bits."
    )
    return [Picture("precision", caption, figure)]


def conclusions(findings: Findings) -> list[str]:
    """What alpha_p leaves out, when float16 overflows, and how far a counter counts."""
    told = []
    if terms := select(findings, what="terms"):
        alphas, sizes = ([each.values[what][FIRST_DROPPED] for each in terms] for what in ("alpha", "term"))
        first, last = terms[0].case["head_dim"], terms[-1].case["head_dim"]
        told.append(
            f"alpha_{FIRST_DROPPED}, of the first term that P = {FIRST_DROPPED} drops, is {number(max(alphas), 2)} at "
            f"d = {first} and {number(min(alphas), 2)} at d = {last}; the term itself has a root mean square of "
            f"{min(sizes):.2f} to {max(sizes):.2f} over random pairs, beside 1 of the first."
        )
    told += [_overflow(each) for each in select(findings, what="halves")]
    told += [_count(each) for each in select(findings, what="counting")]
    return told


def _overflow(finding: Finding) -> str:
    reads = finding.values["reads"]
    begins = next((read["tokens"] for read in reads if read["float16"]["lost"] > 0), None)
    half = next((read["tokens"] for read in reads if read["float16"]["lost"] >= 0.5), None)
    own = max(read[name]["library_lost"] for read in reads for name in ("float16", "bfloat16"))
    end = reads[-1]["tokens"]
    return (
        f"Where products return float16 (d = {finding.case['head_dim']}, degree 3), "
        + (f"some rows are lost at {begins:,} tokens" if begins else f"no row is lost up to {end:,} tokens")
        + (f" and half of them at {half:,}" if half else "")
        + f"; of the library's rows {own:.0%} up to {end:,}."
    )


def _count(finding: Finding) -> str:
    own = finding.values
    return (
        f"After {own['tokens']:,} tokens the recurrence in float32 counts {own['recurrence']:,}, the library "
        f"{own['library']:,}; after {own['twice']:,}, half of them worth 1 and half 0, the library's mean is "
        f"{own['twice_mean']:.6f}."
    )
