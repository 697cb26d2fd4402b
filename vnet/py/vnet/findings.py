"""What ``vnet doctor`` says."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing found. ``problem``: something is attributed wrongly or not at all."""

    id: str
    level: Literal["problem", "advice"]
    what: str
    why: str
    cure: str
