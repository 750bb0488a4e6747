"""Run directories written by hand, as the tests of the report read them, and the page as a reader sees it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from discreet.app.report import write_report

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>1</script>",
    "javascript:alert(1)",
    "\u202egnp.exe\u202c",
    "\u2066\u2069\u200f\u061c",
    "\x00\x1b[31m\r\n",
    "\ud800",
    "<!--",
    "]]><svg onload=1>",
    "=HYPERLINK(1)",
    "&lt;b&gt;",
    "N" * 1_000_000,
]


PLAN = {
    "examples": 32561,
    "batch_size": 2048,
    "steps": 1200,
    "noise_multiplier": 3.41,
    "epsilon": 3.0,
    "delta": 1.086e-5,
    "relation": "add_remove",
    "accountant": "pld",
    "clipping": {"kind": "automatic", "style": "flat", "clip_bound": 1.0, "gamma": 0.01},
    "before": [
        {"type": "gaussian", "noise_multiplier": 9.0, "count": 1},
        {"type": "selection", "delta": 1e-7},
    ],
    "versions": {"torch": "2.13.0"},
}
CERTIFICATE = {
    "private": True,
    "epsilon": 2.9984,
    "delta": 1.086e-5,
    "unit": "one row",
    "adjacency": "add_remove",
    "accountant": "pld",
    "queries": [
        {"type": "gaussian", "noise_multiplier": 9.0, "count": 1},
        {"type": "selection", "delta": 1e-7},
        {"type": "sampled_gaussian", "sample_rate": 2048 / 32561, "noise_multiplier": 3.41, "count": 1200},
    ],
    "not_covered": ["the test rows", "other runs on the same data"],
    "ledger": {"head": "9f2c", "records": 1207},
}
RESULT = {
    "epsilon": 2.9984,
    "delta": 1.086e-5,
    "noise_multiplier": 3.41,
    "steps": 1200,
    "examples": 32561,
    "seconds": 143.2,
    "private": True,
    "model": {"kind": "mlp", "width": 128, "classes": 2, "input": {"kind": "table", "features": 104}},
    "test": {"accuracy": 0.8493, "nll": 0.3262, "ece": 0.0121, "examples": 16281},
    "statements": ["Bounds are public."],
}
CHECK = {"passed": True, "rows": [{"name": "w", "what": "norms", "status": "passed", "detail": "error 1e-7"}]}
SCHEMA = {
    "columns": [{"name": "age", "source": "public", "encodings": [{"as": "number", "min": 17, "max": 90}]}],
    "target": {"name": "income", "classes": ["no", "yes"], "source": "public"},
}
METRICS = [
    {"step": step, "epsilon": step / 400, "learning_rate": 0.001, "test_accuracy": 0.8} for step in range(0, 1201, 100)
]


class Page(HTMLParser):
    """What a browser would see: elements, attributes, and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts = [], [], []
        self.open = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.texts).split())


def make_run(folder, **changes):
    """A run folder with good files, except for those that ``changes`` replaces; None leaves a file out."""
    files = {
        "plan": PLAN,
        "certificate": CERTIFICATE,
        "result": RESULT,
        "check": CHECK,
        "schema": SCHEMA,
        **changes,
    }
    metrics = files.pop("metrics", METRICS)
    release = folder / "release"
    release.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (release / f"{name}.json").write_text(text, encoding="utf-8")
    if metrics is not None:
        text = metrics if isinstance(metrics, str) else "".join(json.dumps(line) + "\n" for line in metrics)
        (release / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))
