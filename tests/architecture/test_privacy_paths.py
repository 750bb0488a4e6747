"""The path from an example to the outside has one door: who makes private types, draws noise, or writes gradients."""

from __future__ import annotations

import pytest

from architecture.path_rules import constructions, foreign_sets, grad_writes, random_draws
from architecture.reading import Source, calls_of, findings, sources

MAY_DRAW = {
    "app/stand_ins.py": "random stand-ins for examples, so that checking and measuring read no private value",
    "app/training.py": "starting weights, before any example is seen",
    "core/rng.py": "the noise source itself",
    "core/rules/elementwise.py": "names functions that models call on a parameter for its shape; draws nothing itself",
    "core/draws.py": "stands in, in the self-check, for what a forward draws by chances that are tensors",
    "core/layout.py": "fixes dropout masks while a forward pass is repeated; puts the state back",
    "privacy/sampling.py": "which examples are in a batch, from the run's key",
    "train/run_directory.py": "the random suffix of a new run folder's name",
    "train/examples.py": "a made-up example of the right shapes, the same in every run; puts the caller's state back",
    "train/elsewhere.py": "batches that nobody gave, for the self-check, from a generator of its own: always the same",
    "train/throughput.py": "random numbers of the right shapes to measure on; puts the caller's state back",
    "train/trial.py": "starting weights and dropout, from the trial's key; puts the caller's state back",
    "train/probing.py": "seeds dropout inside a probe, from the run's key, in a state that the caller puts back",
    "train/run.py": "makes the run's secret key, with the operating system's generator",
    "core/seeded.py": "seeds dropout and augmentation inside one step, from a key; puts the caller's states back",
}
"""File -> why it may draw random numbers. Everything else asks one of these."""

MAY_PIN = {
    "core/compiled.py": {"compiled": "the engine's own book notes that a compiled region ran"},
    "core/lowering.py": {
        "args": "the output node of a graph that is being compiled gets more results",
        "_boxed_call": "how the compiler knows that a function frees its arguments",
    },
    "core/traced.py": {
        "inner": "on this file's own tensor subclass, which stands for a parameter in a trace",
        "derivation": "the same",
    },
    "core/layout.py": {"training": "puts a module's mode back as it was"},
    "core/meeting.py": {"__class__": "guarding a parameter is exactly this: its class, and nothing else"},
    "core/parameter.py": {
        "derivation": "on this file's own tensor subclass, which holds a value computed from a parameter",
    },
    "core/precision.py": {
        "fp32_precision": "torch's own setting for float32 products; put back afterwards",
        "allow_tf32": "the same, of older versions",
    },
    "core/selftest.py": {
        "as_written": "the engine's own book: compare compiled code with the code as it is written",
    },
    "core/strays.py": {
        "backward": "torch's own, so that graphs made within a backward are looked at; put back afterwards"
    },
    "privacy/files.py": {"_size": "a class method fills in the file object that it has just made"},
    "train/loop.py": {
        "step": "gates the user's optimizer, so that an unfinished batch can never be stepped on",
        "ungate": "is how the next run, which gets the same optimizer, finds the gate of the one before",
        "_opt_called": "has a torch scheduler that is made later know that steps are taken",
        "_step_supports_amp_scaling": "has a GradScaler come to that gate, which refuses it by name",
    },
    "train/step.py": {"grad": "the one place that hands a released gradient to the optimizer"},
    "train/updates.py": {
        "on_halving": "hands the microbatch its call-back for a smaller size",
    },
}
"""File -> attributes that it may write on an object that is not its own, each with its reason."""


def test_released_is_made_in_one_place():
    others = [source for source in sources() if source.path != "core/noise.py"]
    assert findings(lambda source: constructions(source, "Released"), others) == []


def test_clipped_sums_are_made_where_the_bound_is_enforced():
    bounded = {"core/histogram.py", "core/score.py", "core/calibration.py", "core/probe.py"}
    makers = {"core/gradient.py", "core/world.py", *bounded}
    others = [source for source in sources() if source.path not in makers]
    assert findings(lambda source: constructions(source, "ClippedSum"), others) == []


@pytest.mark.parametrize(
    "text",
    [
        "x = Released(tensors={}, noise_std=0.0, private=True)",
        "from discreet.core import noise\nx = noise.Released(tensors={}, noise_std=0.0, private=True)",
        "from discreet.core.noise import Released as Safe\nx = Safe({}, 0.0, True)",
    ],
)
def test_a_forged_release_is_found(text):
    assert constructions(Source(path="train/loop.py", text=text), "Released")


def test_naming_a_type_is_not_making_one():
    assert (
        constructions(Source(path="train/loop.py", text="def f(x: Released) -> Released:\n    return x"), "Released")
        == []
    )


def test_random_numbers_come_from_the_noise_source():
    watched = [
        source for source in sources("core", "privacy", "train", "app", "integrations") if source.path not in MAY_DRAW
    ]
    assert findings(random_draws, watched) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nx = torch.randn(3)",
        "import torch\nx = torch.empty(3).normal_()",
        "import torch\nx = torch.normal(0.0, 1.0, (3,))",
        "import torch\nx = torch.rand_like(y)",
        "import torch\ntorch.manual_seed(0)",
        "import numpy as np\nx = np.random.default_rng(0)",
        "import numpy as np\nx = np.random.normal()",
        "import random",
        "from random import shuffle",
        "def f():\n    import secrets",
        "from numpy.random import default_rng",
        "import os\nkey = os.urandom(32)",
        "from torch.distributions import Normal",
    ],
)
def test_a_draw_elsewhere_is_found(text):
    assert random_draws(Source(path="train/step.py", text=text))


def test_starting_weights_and_the_noise_source_are_no_finding():
    text = "import torch\ntorch.nn.init.normal_(w)\nnoise = source.normal(3, position=0, name='w')\nrandomness = 3"
    assert random_draws(Source(path="app/models.py", text=text)) == []


def test_gradients_are_written_in_one_place():
    others = [source for source in sources() if source.path != "train/step.py"]
    assert findings(grad_writes, others) == []


@pytest.mark.parametrize(
    "text",
    [
        "p.grad = g",
        "p.grad += g",
        "a, p.grad = 1, g",
        "model.w.grad = None",
        "setattr(p, 'grad', g)",
        "p.grad: object = g",
    ],
)
def test_a_written_gradient_is_found(text):
    assert grad_writes(Source(path="core/book.py", text=text))


def test_reading_a_gradient_is_not_writing_it():
    assert grad_writes(Source(path="core/book.py", text="g = p.grad\nself.gradient = g\nx.grad_fn")) == []


def test_nothing_is_pinned_on_parameters_or_modules():
    def unexpected(source: Source) -> list[str]:
        allowed = MAY_PIN.get(source.path, {})
        return [line for line in foreign_sets(source) if not any(f"writes .{name} on" in line for name in allowed)]

    assert findings(unexpected, sources("core", "privacy", "train")) == []


@pytest.mark.parametrize(
    "text",
    [
        "p.noise = 1",
        "layer.activations = a",
        "setattr(m, 'x', 1)",
        "object.__setattr__(p, 'noise', 1)",
        "self.model.batch = 3\nq.n = 1",
    ],
)
def test_a_pinned_attribute_is_found(text):
    assert foreign_sets(Source(path="core/book.py", text=text))


def test_nothing_is_unpickled_or_evaluated():
    names = ("eval", "exec", "pickle.load", "pickle.loads", "torch.load", "torch.save", "yaml.load", "marshal.loads")
    assert findings(lambda source: calls_of(source, *names), sources()) == []


@pytest.mark.parametrize("text", ["torch.load('x')", "eval(text)", "pickle.loads(b)"])
def test_unpickling_is_found(text):
    assert calls_of(Source(path="train/checkpoint.py", text=text), "torch.load", "eval", "pickle.loads")


def test_putting_a_model_into_eval_mode_is_no_finding():
    assert calls_of(Source(path="train/loop.py", text="model.eval()"), "eval") == []


MAY_RUN_TRIALS = {
    "insight/curves.py": "on public data, or stamped",
    "insight/simulated_run.py": "on public data, or stamped",
    "train/contest.py": "all its trials are charged as one query before the first",
}
"""File -> why it may train without a ledger of its own."""


def test_trials_without_a_ledger_have_known_callers():
    others = [source for source in sources() if source.path not in {*MAY_RUN_TRIALS, "train/trial.py"}]
    assert findings(lambda source: calls_of(source, "run_trial"), others) == []


def test_a_trial_elsewhere_is_found():
    assert calls_of(Source(path="app/training.py", text="run_trial(model, examples)"), "run_trial")
