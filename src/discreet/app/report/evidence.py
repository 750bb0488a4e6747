"""The second half of the page, for whoever checks: data, self-check, every number of the plan, how to verify."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from discreet.app.report import parts
from discreet.app.report.record import RunRecord, mapping, number, records, texts
from discreet.app.report.text import named, plain, safe, scientific, upward

_STATUS = {"passed": '<span class="ok">✓ passed</span>', "failed": '<span class="bad">✗ FAILED</span>'}
_ORIGIN = {"public": "public", "released": "computed privately, charged"}

_WORDS = {
    "add_remove": "one example more or less",
    "replace_one": "one example replaced",
    "pld": "PLD (privacy loss distributions)",
    "rdp": "RDP (Rényi divergences)",
}

_KINDS = {
    "gaussian": "counts over all examples, with Gaussian noise",
    "held_out": "sums over examples that a public hash set apart, with Gaussian noise; in parallel with all the rest",
    "selection": "names told when their noisy count passes a threshold",
    "repeated": "a secret random number of training runs, the best of which is released",
    "sampled_gaussian": "sums over Poisson batches, with Gaussian noise",
}

_PLAN_NOTES: Mapping[str, tuple[str, str]] = {
    "examples": ("Examples", "rows of the training data; a public constant of the run"),
    "batch_size": ("Batch size", "expected examples per step; the realised number is random"),
    "sample_rate": ("Sampling rate", "chance of each example to be in a batch, exactly batch size / examples"),
    "steps": ("Steps", "updates of the model"),
    "noise_multiplier": (
        "Noise multiplier",
        "standard deviation of the noise, in units of one example's largest share",
    ),
    "epsilon": ("Target epsilon", "the run stops before it would pass this"),
    "delta": ("Delta", "chance that the bound fails; below 1 / examples"),
    "relation": ("Neighbours", "what counts as one person's difference"),
    "accountant": ("Accountant", "how the losses of all steps are added up, as an upper bound"),
}


def data_section(run: RunRecord) -> str:
    """What is said about the data, and where each statistic comes from."""
    schema = run.schema
    rows = [
        (named(column.get("name", "unnamed")), _encoding(column), _origin(column))
        for column in records(schema, "columns")
    ]
    target = mapping(schema, "target")
    classes = texts(target, "classes")
    blocks = [parts.listing(texts(run.result, "statements"))]
    if rows:
        blocks.append(parts.table(("Column", "Read as", "Bounds and names are"), rows=rows))
    if classes:
        shown = ", ".join(named(name) for name in classes[:20])
        more = f" and {plain(len(classes) - 20)} more" if len(classes) > 20 else ""
        label = f"Classes of {named(target.get('name', 'the target'))} ({_origin(target)}): {shown}{more}."
        blocks.append(parts.paragraph(label, role="note"))
    return parts.section("The data", markup=blocks)


def check_section(run: RunRecord) -> str:
    """The self-check that ran before the first step."""
    rows = [
        (
            named(row.get("name", "")),
            safe(row.get("what", "")),
            _status(row),
            f"<small>{safe(row.get('detail', ''))}</small>",
        )
        for row in records(run.check, "rows")
    ]
    if not rows:
        return ""
    passed = run.check.get("passed") is True
    lead = (
        "Before the first step, on a few examples, the engine was compared with gradients computed one by one."
        if passed
        else '<span class="bad">The self-check failed.</span> What follows does not support any claim.'
    )
    header = ("Checked", "What", "Result", "Detail")
    return parts.section("The self-check", markup=[parts.paragraph(lead), parts.table(header, rows=rows)])


def plan_section(run: RunRecord) -> str:
    """Every number that determines the guarantee, each with its meaning."""
    plan = dict(run.plan)
    size, examples = number(plan, "batch_size"), number(plan, "examples")
    if "sample_rate" not in plan and size and examples:
        plan["sample_rate"] = size / examples
    rows = [
        (f"{name}<small>{note}</small>", _plan_value(key, plan))
        for key, (name, note) in _PLAN_NOTES.items()
        if key in plan
    ]
    rule = mapping(plan, "clipping")
    if rule:
        rows.append(("Clipping<small>how each example's share is bounded</small>", "<br>".join(_rule(rule))))
    apart = mapping(plan, "calibration")
    if apart:
        words = "<br>".join(f"{safe(key).replace('_', ' ')}: {safe(_figure(value))}" for key, value in apart.items())
        rows.append(("Calibration part<small>examples set apart for a private temperature</small>", words))
    rows += [
        (f"Query before training<small>{_kind(query)}</small>", _query(query)) for query in records(plan, "before")
    ]
    return parts.section("The plan", markup=[parts.table(("Number", "Value"), rows=rows, role="plan")])


def verify_section(run: RunRecord) -> str:
    """How anybody re-derives the figures, and what the run was made with."""
    ledger = mapping(run.certificate, "ledger")
    facts = []
    if ledger.get("head"):
        facts.append(f"Ledger head <code>{safe(ledger['head'])}</code>, {plain(number(ledger, 'records'))} records.")
    versions = {**mapping(run.plan, "versions"), **mapping(run.certificate, "versions")}
    if versions:
        listed = ", ".join(f"{safe(name)} {safe(version)}" for name, version in sorted(versions.items()))
        facts.append(f"Made with {listed}.")
    command = f"<pre><code>discreet verify {safe(run.name)}</code></pre>"
    return parts.section(
        "Check it yourself",
        markup=[
            parts.paragraph(
                "This needs neither the data nor the key. It reads the ledger's chain of records, adds up every query "
                "again, and compares the result with the certificate; a changed line is named."
            ),
            command,
            *[parts.paragraph(fact, role="note") for fact in facts],
        ],
    )


def _status(row: Mapping[str, Any]) -> str:
    word = str(row.get("status", "unknown"))
    return _STATUS.get(word, safe(word))


def _origin(record: Mapping[str, Any]) -> str:
    word = str(record.get("source", "unknown"))
    return _ORIGIN.get(word, safe(word))


def _encoding(column: Mapping[str, Any]) -> str:
    kinds = []
    for encoding in records(column, "encodings"):
        low, high, names = number(encoding, "min"), number(encoding, "max"), texts(encoding, "values")
        kind = safe(encoding.get("as", "unknown"))
        if low is not None and high is not None:
            kind += f", {plain(low)} to {plain(high)}"
        elif names:
            kind += f", {plain(len(names))} {'name' if len(names) == 1 else 'names'}"
        kinds.append(kind)
    return "; ".join(kinds) if kinds else safe(column.get("kind", column.get("type", "")))


def _plan_value(key: str, plan: Mapping[str, Any]) -> str:
    value = number(plan, key)
    if value is None:
        return _WORDS.get(str(plan[key]), safe(plan[key]))
    if key == "delta":
        return scientific(value)
    return upward(value) if key == "epsilon" else plain(value)


def _kind(query: Mapping[str, Any]) -> str:
    word = str(query.get("type", "unknown"))
    return _KINDS.get(word, safe(word))


def _query(query: Mapping[str, Any]) -> str:
    figures = [
        f"{safe(key).replace('_', ' ')}: {safe(_figure(value))}" for key, value in query.items() if key != "type"
    ]
    return "<br>".join(figures)


_GROUP = re.compile(r"([^=,@]*)=([0-9.e+-]{1,30})@([0-9.e+-]{1,30})")


def _rule(rule: Mapping[str, Any]) -> list[str]:
    """The lines of a clipping rule: its record, with the groups of its style one by one and in figures."""
    lines = []
    for key, value in rule.items():
        groups = _groups(str(value), bound=number(rule, "clip_bound")) if key == "style" else []
        lines.append(f"{safe(key).replace('_', ' ')}: {'groups' if groups else safe(_figure(value))}")
        lines += groups
    return lines


def _groups(style: str, *, bound: float | None) -> list[str]:
    """``groups:NAME=BOUND@NOISE,...`` in words; nothing where a style is not of this form.

    Args:
        bound: of all groups together, which their bounds divide in these proportions.
    """
    kind, _, written = style.partition(":")
    found = [match for part in written.split(",") if (match := _GROUP.fullmatch(part)) is not None]
    if kind != "groups" or bound is None or not len(found) == written.count(",") + 1 <= parts.MOST_ROWS:
        return []
    try:
        bounds, noises = [float(match[2]) for match in found], [float(match[3]) for match in found]
    except ValueError:
        return []
    whole = math.hypot(*bounds) or math.nan
    return [
        f"{named(match[1]) if match[1] else 'all else'}: bound {plain(bound * share / whole)}, noise × {plain(noise)}"
        for match, share, noise in zip(found, bounds, noises, strict=True)
    ]


def _figure(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value) if not isinstance(value, Sequence) or isinstance(value, str) else f"{len(value)} entries"
    return plain(float(value))
