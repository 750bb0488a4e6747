"""Write ``docs/models.md``: every model of the zoo with its errors, made by the function that the tests assert on.

python tests/zoo/table.py
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402 - the path comes first

from zoo.compare import Comparison, Gap, compare  # noqa: E402
from zoo.model import B, ZooModel  # noqa: E402
from zoo.table_of_models import ZOO  # noqa: E402

INTRODUCTION = f"""# Models that are checked by name

{len(ZOO)} architectures from transformers, timm, diffusers, peft and torch, as their authors wrote them: no module is
replaced. Each is built from a small configuration, and a batch of {B} examples goes through the engine and, one example
at a time, through autograd in float64. Columns give the largest relative error of an example's norm, of one
parameter's norm, and of the clipped sum; `tests/zoo` fails above 1e-9 in float64 and 1e-4 in float32, and when the
self-check refuses the model. Sequence models have one loss per sequence, the mean over its own tokens.

`python tests/zoo/table.py` writes this file, with torch {torch.__version__.split("+")[0]}.

| model | class | trained numbers | exercises | norm, float64 | parameter | sum | norm, float32 | parameter | sum |
|---|---|---:|---|---:|---:|---:|---:|---:|---:|
"""

ENDING = """
## What to know

- **Mixtures of experts.** All three of transformers' ways are exact: `eager`, `batched_mm`, and its default,
  `grouped_mm`, which torch offers in float32 and below. Their load-balancing loss couples the examples of a batch:
  leave it off (`output_router_logits=False`, the default).
- **Losses.** Most models average over the tokens of the batch when they are given labels. Take the logits, and average
  within each example.
- **T5 with activation checkpointing** is refused: its forward makes a tensor of zeros that wants a gradient.
- **BatchNorm** mixes examples: the models here that usually have it are built with GroupNorm.
- **Activation checkpointing, dropout, bfloat16 autocast and unused parameters** are tested on about ten of them each
  (`tests/zoo/test_modes.py`).
"""


def line(zoo: ZooModel, found: Comparison) -> str:
    """One row of the table."""
    cells = (zoo.name, f"{zoo.family}.{found.class_name}" if zoo.family != "torch" else found.class_name)
    errors = (*_errors(found.float64), *_errors(found.float32))
    return "| " + " | ".join((*cells, f"{found.parameters:,}", zoo.notes, *errors)) + " |"


def _errors(gap: Gap) -> tuple[str, str, str]:
    return tuple(f"{error:.0e}" for error in (gap.norm, gap.parameter_norm, gap.total))


def main() -> None:
    """Compare every model, and write the document."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = []
    for zoo in ZOO.values():
        lines.append(line(zoo, compare(zoo)))
        print(lines[-1], flush=True)
    (ROOT / "docs" / "models.md").write_text(INTRODUCTION + "\n".join(lines) + "\n" + ENDING, encoding="utf-8")


if __name__ == "__main__":
    main()
