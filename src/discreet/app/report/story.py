"""The first half of the page, for everybody: what was made, what it promises, what it does not, and how it went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from discreet.app.report import parts
from discreet.app.report.meaning import certainty, found_members
from discreet.app.report.parts import Share
from discreet.app.report.plots import Curve, can_draw, curve_svg
from discreet.app.report.record import RunRecord, Stamp, mapping, number, records, texts, word
from discreet.app.report.text import duration, named, percent, plain, safe, scientific, upward, wilson
from discreet.insight.origin import NON_PRIVATE_STAMP
from discreet.privacy.gdp import gdp_mu, step_mu

_WIDE = ("mlp", "cnn", "transformer")
_MODELS = {
    "linear": "A linear model",
    "mlp": "A multilayer perceptron",
    "cnn": "A convolutional network",
    "transformer": "A transformer",
}
_UNMADE = (
    "The run has no certificate: it is unfinished, or its files are incomplete. Nothing on this page is a guarantee."
)


def headline(run: RunRecord) -> str:
    """Title, stamp, and the figures that matter most."""
    examples = number(run.result, "examples") or number(run.plan, "examples")
    private = run.stamp is Stamp.PRIVATE
    what = "A model trained with differential privacy" if private else "A model trained without a verified guarantee"
    model = _model(run)
    lead = f"{model + ', trained on ' if model else 'Trained on '}{plain(examples)} examples"
    seconds = number(run.result, "seconds")
    lead += f" in {duration(seconds)}." if seconds is not None else "."
    return "\n".join(
        [
            "<header>",
            parts.paragraph(what, role="eyebrow"),
            f"<h1>{named(run.name)}</h1>",
            parts.paragraph(lead, role="lead"),
            "</header>",
            _stamp(run),
            parts.facts(_figures(run)),
        ]
    )


def guarantee_section(run: RunRecord) -> str:
    """The promise in plain words, and in the words of the definition."""
    if run.stamp is not Stamp.PRIVATE or run.epsilon is None or run.delta is None or not math.isfinite(run.epsilon):
        return parts.section("The guarantee", markup=[parts.paragraph("This run carries no guarantee.", role="claim")])
    epsilon, delta = run.epsilon, run.delta
    unit = safe(word(run.certificate, "unit") or "one example")
    change = "Replacing" if _relation(run) == "replace_one" else "Adding or leaving out"
    chance = max(2.0, 1.0 / delta) if delta > 0 else math.inf
    factor = f" ≈ {upward(math.exp(epsilon), digits=1)}" if epsilon < 12 else ""
    claim = (
        f"{change} {unit} changes the probability of every possible outcome by at most a factor of "
        f"e<sup>{upward(epsilon)}</sup>{factor}, but for a chance of at most 1 in {plain(math.floor(chance))}."
    )
    prior_rows = [
        (percent(prior, digits=0), percent(math.ceil(certainty(epsilon, delta=delta, prior=prior) * 1000) / 1000))
        for prior in (0.01, 0.1, 0.5)
    ]
    found = math.ceil(found_members(epsilon, delta=delta, false_alarms=0.01) * 1000) / 1000
    return parts.section(
        "The guarantee",
        markup=[
            parts.paragraph(claim, role="claim"),
            parts.paragraph(
                "This holds against anybody who sees the model and everything in this folder, whatever they know "
                "already, even every other row, and whatever they compute. It does not weaken with time."
            ),
            parts.table(
                (
                    "Sure beforehand that you were in the data",
                    f"At most this sure afterwards, except with probability δ = {scientific(delta)}",
                ),
                rows=prior_rows,
                role="pairs",
            ),
            parts.paragraph(
                f"A test that wrongly accuses at most 1 in 100 outsiders finds at most {percent(found)} of the others. "
                "These are limits for the best attacker there can be; practical attacks do less.",
                role="note",
            ),
            _definition(run),
        ],
    )


def limits_section(run: RunRecord) -> str:
    """What the guarantee leaves open, as the certificate lists it."""
    return parts.section(
        "What is not covered", markup=[parts.listing(texts(run.certificate, "not_covered"), role="open")]
    )


def metrics_section(run: RunRecord) -> str:
    """Quality on held-out data, with the uncertainty that the size of the test set leaves."""
    test = mapping(run.result, "test")
    count = number(test, "examples")
    rows = []
    accuracy = number(test, "accuracy")
    if accuracy is not None:
        spread = ""
        if count is not None and count >= 1 and 0 <= accuracy <= 1:
            low, high = wilson(accuracy, count=int(count))
            spread = f"{percent(low)} to {percent(high)}"
        rows.append(
            (
                f"{_stamped('Accuracy', run)}<small>share of all test rows whose class is right</small>",
                percent(accuracy, digits=2),
                spread,
            )
        )
    constant = number(test, "constant_accuracy")
    if constant is not None:
        name = _stamped("Always the commonest class", run)
        note = "a constant answer, on the same test rows; it needs no model"
        rows.append((f"{name}<small>{note}</small>", percent(constant, digits=2), ""))
    unlisted, over = number(test, "unlisted"), ""
    if unlisted:
        over = f"; over the {plain(number(test, 'listed'))} rows of a listed class"
    if not run.calibration:
        rows += [
            (f"{name}<small>{note}{over}</small>", f"{value:.4f}", "")
            for key, name, note in _PROBABILITIES
            if (value := number(test, key)) is not None
        ]
    if not rows:
        return ""
    return parts.section(
        "How good the model is",
        markup=[
            parts.table(("Measure", "Value", "95 % interval"), rows=rows, numeric=(1, 2)),
            parts.paragraph(
                f"Measured on {plain(count)} test rows. {_of_no_class(unlisted)}These figures are about the test "
                "rows, and the guarantee of the training rows does not cover them.",
                role="note",
            ),
        ],
    )


def _of_no_class(unlisted: float | None) -> str:
    if not unlisted:
        return ""
    return f"{plain(unlisted)} of them are of no listed class, and count as wrong. "


_PROBABILITIES = (
    ("nll", "Negative log-likelihood", "nats per row; lower is better, a sure wrong answer is expensive"),
    ("ece", "Expected calibration error", "how far stated confidence is from the share that is right"),
)
"""Shown here where the run has no calibration report; see `discreet.app.report.believed`."""


def budget_section(run: RunRecord) -> str:
    """Where the privacy loss came from: training, and private statistics before it."""
    shares = budget_shares(run)
    if not shares:
        return ""
    spent, target = run.epsilon, number(run.plan, "epsilon")
    state = f"Spent: ε = {upward(spent)}" + (f" of the {upward(target)} allowed." if target is not None else ".")
    names = sum(number(query, "delta") or 0.0 for query in _queries(run) if query.get("type") == "selection")
    released = f" Names released by threshold take {scientific(names)} of δ." if names > 0 else ""
    return parts.section(
        "Where the budget went",
        markup=[
            parts.paragraph(state),
            parts.bar(shares),
            _apart(run),
            parts.paragraph(
                "Shares of the squared signal-to-noise ratio, in which independent queries add up; epsilon itself does "
                f"not add. The exact account is in the ledger.{released}",
                role="note",
            ),
        ],
    )


def _apart(run: RunRecord) -> str:
    """What was asked of rows that no other query touched; it adds nothing to the rest."""
    part = mapping(run.certificate, "calibration")
    own, rest = number(run.certificate, "epsilon_calibration"), number(run.certificate, "epsilon_training")
    if part.get("charged") is not True or own is None or rest is None:
        return ""
    return parts.paragraph(
        f"{plain(number(part, 'examples'))} further rows, set apart by a public hash, were asked for a temperature at "
        f"ε = {upward(own)}, and for nothing else; all others were asked at ε = {upward(rest)}. No row is in both, so "
        "the larger of the two counts."
    )


def budget_shares(run: RunRecord) -> list[Share]:
    """Squared GDP parameters of training and of earlier queries (Corollary 2, arXiv:1905.02383).

    A search has no GDP parameter of its own: it gets what the earlier queries leave of the whole.
    """
    if run.stamp is Stamp.NOT_PRIVATE:
        return []
    training, steps, before = 0.0, 0.0, 0.0
    for query in _queries(run):
        sigma, count = number(query, "noise_multiplier") or 0.0, number(query, "count") or 0.0
        rate = number(query, "sample_rate")
        if sigma <= 0 or count <= 0:
            continue
        if query.get("type") == "sampled_gaussian" and rate is not None and 0 < rate <= 1:
            steps += count
            training += count * step_mu(rate, noise_multiplier=sigma) ** 2
        elif query.get("type") == "gaussian":
            before += count / sigma**2
    searches = [query for query in _queries(run) if query.get("type") == "repeated"]
    if searches:
        runs = plain(number(searches[0], "mean_runs") or 0.0)
        name = f"The search: {runs} runs expected, their scores and the choice"
        shares = [Share(name, max(0.0, _whole(run) - before)), Share("Private statistics before it", before)]
        return [share for share in shares if 0 < share.share < math.inf]
    shares = [Share(f"Training, {plain(steps)} steps", training), Share("Private statistics before training", before)]
    return [share for share in shares if 0 < share.share < math.inf]


def _whole(run: RunRecord) -> float:
    """Squared GDP parameter of the whole run; 0 where epsilon or delta make no sense."""
    if run.epsilon is None or run.delta is None or not (0 < run.epsilon < math.inf and 0 < run.delta < 1):
        return 0.0
    return gdp_mu(run.epsilon, delta=run.delta) ** 2


def curves_section(run: RunRecord) -> str:
    """How epsilon, learning rate and test quality went, as far as they were recorded."""
    target = number(run.plan, "epsilon")
    wanted = [
        ("epsilon", "Privacy spent (ε)", ("budget", target) if target is not None else None, False),
        ("test_accuracy", _stamped("Test accuracy", run), None, True),
        ("test_nll", _stamped("Test negative log-likelihood", run), None, False),
        ("learning_rate", "Learning rate", None, False),
        ("probe_rate", "Learning rate, as probes found it", None, False),
    ]
    drawings = []
    for key, label, limit, is_share in wanted:
        points = [(metric.step, metric.values[key]) for metric in run.metrics if key in metric.values]
        curve = Curve(name=key.replace("_", ""), label=label, points=points, limit=limit, percent=is_share)
        drawings.append(parts.figure(curve_svg(curve), caption=""))
    shown = [drawing for drawing in drawings if drawing]
    if not shown:
        missing = run.metrics and not can_draw()
        hint = (
            "Curves need the extra “report”: <code>pip install 'discreet[report]'</code>, then write the report again."
        )
        return parts.section("How it went", markup=[parts.paragraph(hint, role="note") if missing else ""])
    return parts.section("How it went", markup=['<div class="grid">', *shown, "</div>"])


def _queries(run: RunRecord) -> list[Mapping[str, Any]]:
    """What the certificate charges; without one, what the plan foresees."""
    charged = records(run.certificate, "queries")
    if charged:
        return charged
    size, examples = number(run.plan, "batch_size"), number(run.plan, "examples")
    training = {
        "type": "sampled_gaussian",
        "sample_rate": size / examples if size and examples else None,
        "noise_multiplier": run.plan.get("noise_multiplier"),
        "count": run.plan.get("steps"),
    }
    return [training, *records(run.plan, "before")]


def _model(run: RunRecord) -> str:
    model = mapping(run.result, "model")
    name, width = word(model, "name") or word(model, "kind"), number(model, "width")
    if not name:
        return ""
    return _MODELS.get(name, named(name)) + (f" of width {plain(width)}" if width is not None and name in _WIDE else "")


def _stamp(run: RunRecord) -> str:
    if run.stamp is Stamp.PRIVATE:
        return ""
    if run.stamp is Stamp.NOT_PRIVATE:
        reason = (
            "No noise was added, or the noise came from a test seed that anybody can repeat. Do not share this model."
        )
        return f'<div class="stamp" role="alert"><strong>NOT PRIVATE</strong>{reason}</div>'
    reason = _UNMADE
    if run.contradictions:
        listed = ", ".join(run.contradictions)
        reason = f"The files of this run state different values of {listed}. Run <code>discreet verify</code>."
    return f'<div class="stamp caution" role="alert"><strong>UNVERIFIED</strong>{reason}</div>'


def _figures(run: RunRecord) -> list[tuple[str, str, str]]:
    figures = [
        ("Epsilon", upward(run.epsilon), "privacy loss, at most"),
        ("Delta", scientific(run.delta, digits=1), "chance that the bound fails"),
    ]
    if run.stamp is Stamp.NOT_PRIVATE:
        figures = [("Epsilon", "∞", "no guarantee")]
    test = mapping(run.result, "test")
    accuracy, constant = number(test, "accuracy"), number(test, "constant_accuracy")
    if accuracy is not None:
        beside = "" if constant is None else f"; always the commonest class: {percent(constant)}"
        figures.append(("Test accuracy", percent(accuracy), _stamped("on held-out rows", run) + beside))
    figures.append(("Examples", plain(number(run.plan, "examples")), "in training"))
    return figures


def _stamped(words: str, run: RunRecord) -> str:
    """With the stamp on exact figures of rows that were not said to be public."""
    return f"{words}, {NON_PRIVATE_STAMP}" if word(mapping(run.result, "test"), "stamp") else words


def _definition(run: RunRecord) -> str:
    statement = word(run.certificate, "statement") or (
        f"({upward(run.epsilon)}, {scientific(run.delta)})-differentially private; {_relation(run)}"
    )
    assumption = word(run.certificate, "accountant", part="assumes")
    assumed = f"that {parts.sentence(assumption)}, " if assumption else ""
    rests = f"This assumes {assumed}that the run's key stays secret, and that the code does what it says."
    return parts.paragraph(f"Formally: {parts.sentence(statement)} {rests}", role="note")


def _relation(run: RunRecord) -> str:
    return word(run.certificate, "relation") or word(run.certificate, "adjacency") or word(run.plan, "relation")
