"""Which parameters share a norm: all of them, those of a layer, or groups that the user names."""

from __future__ import annotations

import enum
from collections.abc import Iterable
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

    With K groups each is clipped to ``R / sqrt(K)``, so that one example moves the whole sum by at most R in any style:
    styles differ in utility, time and memory, and never in the guarantee. The division is a function of the parameters'
    names alone. Smaller groups are settled while the backward is still running, and nothing stays booked.

    - ``Style.flat()``: one norm over all parameters; the best utility.
    - ``Style.per_layer()``: one group for each module that owns parameters (arXiv:2212.01539, section 3).
    - ``Style.per_parameter()``: one group for each parameter.
    - ``Style.groups("encoder.0", "encoder.1")``: one group for each prefix, and one for all other parameters.
    - ``Style.blocks(model)``: the same with one prefix for each block in the model's lists of equal modules.
    """

    kind: StyleKind
    prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prefixes and self.kind is not StyleKind.GROUPS:
            raise ConfigError(f"clipping style {self.kind.value} with {self.prefixes}: only groups take prefixes.")
        groups = self.kind is StyleKind.GROUPS
        if groups and (not self.prefixes or len(set(self.prefixes)) < len(self.prefixes)):
            raise ConfigError(f"groups {self.prefixes}: must be one or more different prefixes of parameter names.")
        if any("," in prefix or not prefix for prefix in self.prefixes):
            raise ConfigError(f"groups {self.prefixes}: a prefix is a module's name such as 'encoder.0'.")

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
    def groups(cls, *prefixes: str) -> Style:
        """One norm for the parameters under each of these module names, and one for the rest."""
        return cls(StyleKind.GROUPS, tuple(prefixes))

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

    def describe(self) -> str:
        """The public record, as it stands in ``plan.json``."""
        return ":".join([self.kind.value, *([",".join(self.prefixes)] if self.prefixes else [])])

    @classmethod
    def parse(cls, text: str) -> Style:
        """The style that a record stands for.

        Raises:
            ConfigError: there is none of this name, or its prefixes are none.
        """
        kind, _, prefixes = text.partition(":")
        known = [each.value for each in StyleKind]
        if kind not in known:
            raise ConfigError(f"clipping style {text!r}: must be one of {', '.join(known)}, with groups:PREFIX,PREFIX.")
        return cls(StyleKind(kind), tuple(prefixes.split(",")) if prefixes else ())


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
