"""What is checked, and what came of it: plain data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vnet.check.trial import Trial

Verdict = Literal["held", "fell", "skipped"]
Family = Literal[4, 6]

ROLES: Mapping[str, str] = {
    "holder": 'raw = "own", holds the ports and the address that the others try to use',
    "own": 'raw = "own", holds one port that nobody else wants',
    "deny": 'raw = "deny", holds nothing',
    "full": 'raw = "full", holds nothing',
    "node": "root, outside every slice",
}
"""Who tries: the columns of the matrix."""
OTHERS = ("own", "deny", "full", "node")
"""Everybody but the holder."""
WITH_RAW = ("own", "full", "node")
"""Who has raw sockets, and is not the holder."""
SLICES = ("holder", "own", "deny", "full")


LACKING = {
    "lsm": "packet sockets are not guarded on this node: its kernel runs no BPF LSM programs "
    '(vnet.toml says packet_sockets = "unguarded")',
}
"""Why something is skipped."""


@dataclass(frozen=True)
class Property:
    """Something that a node promises."""

    name: str
    why: str
    """Why it matters, in one sentence."""
    attempts: Callable[["Trial"], None]
    needs: tuple[str, ...] = ()
    """What not every kernel has (vnet.check.bed.what_it_has): without it, it is skipped."""
    where: tuple[str, ...] = ()
    """What not every node has: without it there is nothing to check, which is a skip only if the
    property was asked for by name."""
    families: tuple[Family, ...] = (4, 6)


@dataclass(frozen=True)
class Outcome:
    """One attempt."""

    property: str
    role: str
    family: int
    """4, 6, or 0: of neither."""
    verdict: Verdict
    tried: str
    expected: str
    happened: str


@dataclass
class Report:
    """All of ``vnet check --json``."""

    datapath: str = ""
    live: bool = False
    kernel: str = ""
    properties: list[str] = field(default_factory=list)
    seconds: float = 0.0
    allowed_skips: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def of(self, name: str, role: str = "") -> list[Outcome]:
        """The outcomes of a property, or of one of its cells."""
        return [o for o in self.outcomes if o.property == name and role in ("", o.role)]

    def fallen(self) -> list[str]:
        """The properties that fell, in order."""
        return [name for name in self.properties if verdict(self.of(name)) == "fell"]

    def skipped(self) -> list[str]:
        """Those that were skipped without being asked to."""
        return [
            name
            for name in self.properties
            if any(o.verdict == "skipped" for o in self.of(name)) and name not in self.allowed_skips
        ]

    @property
    def good(self) -> bool:
        """Every property held, and none was skipped without being asked to."""
        return not self.fallen() and not self.skipped()

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        summary = {name: verdict(self.of(name)) or "nothing to check" for name in self.properties}
        return {
            "good": self.good,
            "fell": self.fallen(),
            "skipped": self.skipped(),
            "summary": summary,
            **asdict(self),
        }


def verdict(outcomes: Iterable[Outcome]) -> Verdict | None:
    """The worst of several; None: there was nothing to check."""
    found = {outcome.verdict for outcome in outcomes}
    for worst in ("fell", "skipped", "held"):
        if worst in found:
            return worst
    return None
