"""The directions that a layer may move in: one entry each, and the record of a chosen one."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from slsgu_cli.errors import UsageError

# Damping of the covariance, as a fraction of its mean eigenvalue.
DAMPING = 0.01


class Statistic(StrEnum):
    """What a direction may need to know of a layer on the retain set."""

    INPUTS = "inputs"
    DERIVATIVES = "derivatives"


class Direction(StrEnum):
    """The directions to rank and search; `BOTH` stands for the default ones."""

    GRADIENT = "gradient"
    WHITENED = "whitened"
    KFAC = "kfac"
    BOTH = "both"

    @property
    def each(self) -> "tuple[Direction, ...]":
        """The directions that it stands for."""
        usual = tuple(kind for kind, entry in REGISTRY.items() if entry.by_default)
        return usual if self is Direction.BOTH else (self,)

    @property
    def needs(self) -> "tuple[Statistic, ...]":
        """The statistics of layers that they need."""
        return needed(self.each)

    def specs(self, damping: float | None = None) -> "tuple[DirectionSpec, ...]":
        """Return each direction with its parameters, or their defaults."""
        return tuple(DirectionSpec.of(kind, damping=damping) for kind in self.each)

    @classmethod
    def of(cls, kinds: "Collection[Direction]") -> "Direction":
        """Return the choice that stands for some directions."""
        return next(iter(kinds)) if len(kinds) == 1 else cls.BOTH

    def check(self, damping: float | None) -> None:
        """Raise UsageError if `damping` is given but no direction has it."""
        if damping is not None and not any("damping" in REGISTRY[k].parameters for k in self.each):
            able = [kind for kind, entry in REGISTRY.items() if "damping" in entry.parameters]
            raise UsageError(
                f"--damping is for the {' or '.join(able)} direction",
                hint=f"--direction {able[0]}",
            )


@dataclass(frozen=True, slots=True)
class Entry:
    """The implementation and the properties of a direction.

    `implementation` is MODULE:CLASS, called with the parameters, whose defaults `parameters`
    has. `words` names it in sentences. Layers without the statistics that it `needs` move along the
    gradient if it `falls_back`, else not at all.
    """

    implementation: str
    words: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[Statistic, ...] = ()
    falls_back: bool = False
    by_default: bool = False


REGISTRY: dict[Direction, Entry] = {
    Direction.GRADIENT: Entry(
        implementation="slsgu_cli.method.directions.gradient:Gradient",
        words="the forget gradient",
        by_default=True,
    ),
    Direction.WHITENED: Entry(
        implementation="slsgu_cli.method.directions.whitened:Whitened",
        words="the whitened gradient",
        parameters={"damping": DAMPING},
        needs=(Statistic.INPUTS,),
        falls_back=True,
        by_default=True,
    ),
    Direction.KFAC: Entry(
        implementation="slsgu_cli.method.directions.kfac:Kfac",
        words="the gradient preconditioned by both factors",
        parameters={"damping": DAMPING},
        needs=(Statistic.INPUTS, Statistic.DERIVATIVES),
    ),
}


def needed(kinds: Iterable[Direction]) -> tuple[Statistic, ...]:
    """Return the statistics of layers that some directions need, in order."""
    needs = {each for kind in kinds for each in REGISTRY[kind].needs}
    return tuple(each for each in Statistic if each in needs)


@dataclass(frozen=True, slots=True)
class DirectionSpec:
    """A direction with its parameters, as trials, rankings and edits record it."""

    kind: Direction
    parameters: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: Direction, **parameters: float | None) -> "DirectionSpec":
        """Return a direction with the given parameters that it has, else their defaults."""
        usual = REGISTRY[kind].parameters
        given = {n: v for n, v in parameters.items() if n in usual and v is not None}
        return cls(kind, {**usual, **given})

    def __hash__(self) -> int:
        return hash((self.kind, *sorted(self.parameters.items())))

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:g}" for name, value in self.parameters.items())
        return f"{self.kind} ({values})" if values else str(self.kind)

    @property
    def entry(self) -> Entry:
        """The entry of the registry."""
        return REGISTRY[self.kind]

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics of a layer that it needs."""
        return self.entry.needs

    @property
    def order(self) -> tuple[int, tuple[float, ...]]:
        """The sort key: the order of the registry, then larger parameters first."""
        values = (-value for value in self.parameters.values())
        return [*REGISTRY].index(self.kind), tuple(values)

    @property
    def slug(self) -> str:
        """The name in file names."""
        return "-".join([self.kind, *(f"{value:g}" for value in self.parameters.values())])

    @property
    def words(self) -> str:
        """The name in sentences, with parameters."""
        return self.entry.words + str(self).removeprefix(self.kind)


# The direction of layers without the inputs that another one needs.
FALLBACK = DirectionSpec(Direction.GRADIENT)
