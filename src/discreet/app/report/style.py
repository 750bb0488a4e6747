"""The page's one style sheet: one accent colour, a light and a dark palette, phones and paper."""

from __future__ import annotations

STYLE = """
:root {
  --paper: #fdfdfb; --ink: #1c2321; --soft: #5d6864; --line: #e3e7e3; --wash: #f3f6f4;
  --accent: #0f6b5c; --accent2: #5aa393; --accent3: #9ccbbf; --accent4: #cfe5df;
  --alarm: #a3231d; --alarmwash: #fbeceb; --caution: #7a5200; --cautionwash: #fdf4e0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131716; --ink: #e6ebe8; --soft: #9aa7a2; --line: #2b3330; --wash: #1b211f;
    --accent: #63c7b2; --accent2: #3f8f7f; --accent3: #2c665b; --accent4: #20473f;
    --alarm: #ff9c93; --alarmwash: #36191a; --caution: #f0c778; --cautionwash: #2f2613;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; overflow-wrap: anywhere; }
header { margin-bottom: 2.5rem; }
.eyebrow { margin: 0 0 .4rem; color: var(--accent); font-size: .8125rem; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: 0 0 .6rem; font-size: clamp(1.6rem, 1.1rem + 2.4vw, 2.3rem); line-height: 1.2; font-weight: 650;
  letter-spacing: -.015em; }
.lead { margin: 0; font-size: 1.125rem; color: var(--soft); }
section { margin-top: 3.25rem; }
h2 { margin: 0 0 .9rem; padding-top: 1.1rem; border-top: 1px solid var(--line); font-size: 1.3rem; line-height: 1.3;
  font-weight: 620; letter-spacing: -.01em; }
h3 { margin: 1.8rem 0 .5rem; font-size: 1rem; font-weight: 620; }
p { margin: 0 0 1rem; }
.note, figcaption, .small { color: var(--soft); font-size: .875rem; line-height: 1.5; }
.claim { margin: 0 0 1.25rem; padding: .15rem 0 .15rem 1.1rem; border-left: 3px solid var(--accent);
    font-size: 1.125rem; }
.stamp { margin: 0 0 2rem; padding: 1.1rem 1.25rem; border: 2px solid var(--alarm); border-radius: .5rem;
  background: var(--alarmwash); color: var(--alarm); }
.stamp strong { display: block; font-size: 1.6rem; line-height: 1.2; letter-spacing: .06em; }
.stamp.caution { border-color: var(--caution); background: var(--cautionwash); color: var(--caution); }
.facts { display: flex; flex-wrap: wrap; gap: 1px; margin: 2rem 0 0;
  border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; background: var(--line); }
.facts div { flex: 1 1 9.5rem; padding: 1rem 1.1rem; background: var(--paper); }
.facts dt { color: var(--soft); font-size: .8125rem; }
.facts dd { margin: 0; font-size: 1.6rem; line-height: 1.35; font-weight: 600; letter-spacing: -.02em;
    white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.facts dd.note { font-size: .8125rem; font-weight: 400; letter-spacing: 0; white-space: normal; }
.facts .unit { font-size: 1rem; }
ul { margin: 0 0 1rem; padding-left: 1.25rem; }
li { margin: .3rem 0; }
li::marker { color: var(--accent); }
.open { list-style: none; padding: 0; }
.open li { position: relative; margin: 0; padding: .6rem 0 .6rem 1.6rem; border-bottom: 1px solid var(--line); }
.open li::before { content: ""; position: absolute; left: .2rem; top: 1.2rem; width: .6rem; height: .6rem;
  border: 2px solid var(--accent); border-radius: 50%; }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
table { width: 100%; border-collapse: collapse; font-size: .9375rem; line-height: 1.45; }
th { padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--ink); text-align: left; font-size: .8125rem;
  font-weight: 600; color: var(--soft); white-space: nowrap; }
td { padding: .5rem 1rem .5rem 0; border-bottom: 1px solid var(--line); vertical-align: top; min-width: 5rem;
  overflow-wrap: break-word; }
td bdi { display: inline-block; max-width: 16rem; }
th:last-child, td:last-child { padding-right: 0; }
.num { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td small { display: block; color: var(--soft); font-size: .8125rem; overflow-wrap: break-word; }
table.plan td:nth-child(2) { width: 42%; font-variant-numeric: tabular-nums; font-weight: 600; }
table.pairs td { font-variant-numeric: tabular-nums; }
table.pairs td:last-child { font-weight: 600; }
table.pairs th { white-space: normal; vertical-align: bottom; }
table.wide th { white-space: normal; overflow-wrap: normal; vertical-align: bottom; }
table.wide th, table.wide td { padding-right: .7rem; min-width: 3.5rem; }
.ok { color: var(--accent); font-weight: 600; white-space: nowrap; }
.bad { color: var(--alarm); font-weight: 700; white-space: nowrap; }
.bar { display: flex; height: 1.5rem; margin: .4rem 0 .8rem; border-radius: .35rem; overflow: hidden;
  background: var(--wash); }
.bar span { display: block; min-width: 2px; }
.tone0 { background: var(--accent); } .tone1 { background: var(--accent3); }
.tone2 { background: var(--accent2); } .tone3 { background: var(--accent4); }
.legend { list-style: none; padding: 0; font-size: .9375rem; }
.legend li { display: flex; align-items: baseline; gap: .6rem; }
.legend .key { flex: none; width: .75rem; height: .75rem; border-radius: .2rem; }
.legend .figure { margin-left: auto; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 1.25rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.5rem 2rem; }
figure svg { display: block; width: 100%; height: auto; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .9em; }
code { padding: .1em .3em; border-radius: .25rem; background: var(--wash); }
pre { margin: 0 0 1rem; padding: .9rem 1.1rem; border-radius: .5rem; background: var(--wash); overflow-x: auto;
  line-height: 1.5; }
pre code { padding: 0; background: none; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
    font-size: .8125rem; }
@media (max-width: 30rem) {
  main { padding: 2rem 1.1rem 3rem; }
  body { font-size: 1rem; }
  .facts div { flex-basis: 42%; padding: .8rem .85rem; }
  .facts dd { font-size: 1.35rem; }
  table { font-size: .875rem; }
  th { white-space: normal; overflow-wrap: normal; vertical-align: bottom; }
  th, td { padding-right: .7rem; min-width: 3.5rem; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #ccc; --wash: #f4f4f4; --accent: #0f6b5c;
    --accent2: #5aa393;
    --accent3: #9ccbbf; --accent4: #cfe5df; --alarm: #a3231d; --alarmwash: #fff; --caution: #7a5200;
    --cautionwash: #fff; }
  main { max-width: none; padding: 0; }
  body { font-size: 10.5pt; }
  section { margin-top: 1.6rem; }
  h2 { break-after: avoid; }
  figure, tr, .facts, .stamp { break-inside: avoid; }
  .bar, .key { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .scroll { overflow: visible; }
}
"""
