"""Which parameters share a norm: all of them, those of a layer, or groups that the user names."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from discreet.errors import ConfigError

Groups = tuple[tuple[str, ...], ...]


class StyleKind(enum.Enum):
    """The ways to divide a model's parameters into groups."""

    FLAT = "flat"
    PER_LAYER = "per_layer"
    PER_PARAMETER = "per_parameter"
    GROUPS = "groups"


@dataclass(frozen=True)
class Style:
    """How the parameters of a model are divided into groups that are clipped apart.

    With K groups each is clipped to ``R / sqrt(K)``, or in other proportions with ``sum R_r^2 = R^2``, so that one
    example moves the whole sum by at most R in any style: styles differ in utility, time and memory, and never in the
    guarantee. The division is a function of the parameters' names alone. Smaller groups are settled while the backward
    is still running, and nothing stays booked.

    - ``Style.flat()``: one norm over all parameters; the best utility.
    - ``Style.per_layer()``: one group for each module that owns parameters (arXiv:2212.01539, section 3).
    - ``Style.per_parameter()``: one group for each parameter.
    - ``Style.groups("encoder.0", "encoder.1")``: one group for each prefix, and one for all other parameters. Their
      bounds may be in any public proportion, and so may their noise: ``noise_weights`` equal to ``bounds`` gives every
      group the same ratio of bound to noise, equal ones add the same noise everywhere.
    - ``Style.blocks(model)``: the same with one prefix for each block in the model's lists of equal modules.
    """

    kind: StyleKind
    prefixes: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    noise_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.prefixes and self.kind is not StyleKind.GROUPS:
            raise ConfigError(f"clipping style {self.kind.value} with {self.prefixes}: only groups take prefixes.")
        groups = self.kind is StyleKind.GROUPS
        if groups and (not self.prefixes or len(set(self.prefixes)) < len(self.prefixes)):
            raise ConfigError(f"groups {self.prefixes}: must be one or more different prefixes of parameter names.")
        if any("," in prefix or not prefix for prefix in self.prefixes):
            raise ConfigError(f"groups {self.prefixes}: a prefix is a module's name such as 'encoder.0'.")
        for name, numbers in (("bounds", self.bounds), ("noise weights", self.noise_weights)):
            if numbers and (len(numbers) != len(self.prefixes) + 1 or not all(0 < n < math.inf for n in numbers)):
                raise ConfigError(
                    f"{name} {numbers}: must be one finite number above 0 for each prefix, and last one for the rest."
                )

    @classmethod
    def flat(cls) -> Style:
        """One norm over all parameters."""
        return cls(StyleKind.FLAT)

    @classmethod
    def per_layer(cls) -> Style:
        """One norm for each module that owns parameters."""
        return cls(StyleKind.PER_LAYER)

    @classmethod
    def per_parameter(cls) -> Style:
        """One norm for each parameter."""
        return cls(StyleKind.PER_PARAMETER)

    @classmethod
    def groups(cls, *prefixes: str, bounds: Sequence[float] = (), noise_weights: Sequence[float] = ()) -> Style:
        """One norm for the parameters under each of these module names, and one for the rest.

        Args:
            prefixes: module names.
            bounds: the bounds' proportions, one for each prefix and last one for the rest; equal by default.
            noise_weights: the noise's proportions, likewise.
        """
        numbers = (tuple(map(float, bounds)), tuple(map(float, noise_weights)))
        return cls(StyleKind.GROUPS, tuple(prefixes), *numbers)

    @classmethod
    def blocks(cls, model: nn.Module) -> Style:
        """One norm for each member of every ``nn.ModuleList`` of modules of one class, such as transformer blocks.

        A list inside such a block makes no groups of its own, and neither does a block without a trainable parameter.

        Raises:
            ConfigError: the model has no such list.
        """
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        prefixes: list[str] = []
        for name, module in model.named_modules():
            alike = isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(part) for part in module}) == 1
            if not alike or any(_is_under(name, prefix) for prefix in prefixes):
                continue
            blocks = [f"{name}.{index}" if name else str(index) for index in range(len(module))]
            prefixes += [block for block in blocks if any(_is_under(each, block) for each in trained)]
        if not prefixes:
            raise ConfigError(
                "no nn.ModuleList of equal trainable modules in this model; name the blocks with Style.groups(...)."
            )
        return cls.groups(*prefixes)

    def split(self, names: Iterable[str]) -> Groups:
        """The groups of these parameter names, in the order of their first member.

        Raises:
            ConfigError: a prefix that no parameter has.
        """
        members: dict[str, list[str]] = {}
        for name in names:
            members.setdefault(self._group_of(name), []).append(name)
        missing = set(self.prefixes) - set(members)
        if missing:
            raise ConfigError(f"groups {sorted(missing)}: no trainable parameter is under them; check the names.")
        return tuple(tuple(group) for group in members.values())

    def _group_of(self, name: str) -> str:
        if self.kind is StyleKind.FLAT:
            return ""
        if self.kind is StyleKind.PER_PARAMETER:
            return name
        if self.kind is StyleKind.PER_LAYER:
            return name.rpartition(".")[0]
        under = [prefix for prefix in self.prefixes if _is_under(name, prefix)]
        return max(under, key=len, default="")

    def proportions(self, groups: Groups) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The bounds and the noise weights of these groups, relative to each other."""
        places = [self._place_of(group[0]) for group in groups]
        ones = (1.0,) * (len(self.prefixes) + 1)
        bounds, weights = self.bounds or ones, self.noise_weights or ones
        return tuple(bounds[place] for place in places), tuple(weights[place] for place in places)

    @property
    def least_share(self) -> float:
        """The smallest share of the bound that a group can have, where the user gave proportions; else 1."""
        return min(self.bounds) / math.hypot(*self.bounds) if self.bounds else 1.0

    def _place_of(self, name: str) -> int:
        under = self._group_of(name)
        return self.prefixes.index(under) if under in self.prefixes else len(self.prefixes)

    def describe(self) -> str:
        """The public record, as it stands in ``plan.json``: ``groups:A,B``, or ``groups:A=BOUND@NOISE,B=...,=...``."""
        if not self.prefixes:
            return self.kind.value
        if not (self.bounds or self.noise_weights):
            return f"{self.kind.value}:{','.join(self.prefixes)}"
        ones = (1.0,) * (len(self.prefixes) + 1)
        numbers = zip((*self.prefixes, ""), self.bounds or ones, self.noise_weights or ones, strict=True)
        return f"{self.kind.value}:{','.join(f'{name}={bound!r}@{weight!r}' for name, bound, weight in numbers)}"

    @classmethod
    def parse(cls, text: str) -> Style:
        """The style that a record stands for.

        Raises:
            ConfigError: there is none of this name, or its prefixes are not module names.
        """
        kind, _, prefixes = text.partition(":")
        known = [each.value for each in StyleKind]
        if kind not in known:
            raise ConfigError(f"clipping style {text!r}: must be one of {', '.join(known)}, with groups:PREFIX,PREFIX.")
        if "=" not in prefixes:
            return cls(StyleKind(kind), tuple(prefixes.split(",")) if prefixes else ())
        names, bounds, weights = zip(*(_entry(text, part) for part in prefixes.split(",")), strict=True)
        if kind != StyleKind.GROUPS.value or names[-1]:
            raise ConfigError(f"clipping style {text!r}: must be groups:PREFIX=BOUND@NOISE,... and last =BOUND@NOISE.")
        return cls.groups(*names[:-1], bounds=bounds, noise_weights=weights)


def _entry(text: str, part: str) -> tuple[str, float, float]:
    """``PREFIX=BOUND@NOISE``, the noise 1 where it is not given."""
    name, _, numbers = part.partition("=")
    bound, _, weight = numbers.partition("@")
    try:
        return name, float(bound), float(weight or 1.0)
    except ValueError:
        raise ConfigError(
            f"clipping style {text!r}: {part!r} must be PREFIX=BOUND@NOISE, two numbers above 0."
        ) from None


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
