"""The two dialects of the front door. Every difference between them is a field here or a branch on one.

``nim`` is the table of contract section 1. ``openai`` is what an OpenAI client takes for granted: JSON unless a stream
is asked for, more effort names, temperature up to 2, ``developer`` for ``system``, and turns in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from headrace.engine.request import Effort

JSON = "application/json"
EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Profile:
    """What a dialect accepts and assumes."""

    name: str
    stream_default: bool
    max_temperature: float
    efforts: Mapping[str, Effort]
    roles: Mapping[str, str]
    alternating: bool

    def wants_stream(self, explicit: bool | None, accept: str | None, default: bool | None = None) -> bool:
        """Whether to answer with events: an explicit ``stream`` always wins; then Accept; then the path's default."""
        if explicit is not None:
            return explicit
        json, events = _quality(accept, JSON), _quality(accept, EVENTS)
        default = self.stream_default if default is None else default
        return default if json == events else events > json


_EFFORTS: dict[str, Effort] = {"none": "none", "low": "low", "high": "high"}
_ROLES = {role: role for role in ("system", "user", "assistant", "context")}

NIM = Profile(
    name="nim",
    stream_default=True,
    max_temperature=1.0,
    efforts=MappingProxyType(_EFFORTS),
    roles=MappingProxyType(_ROLES),
    alternating=True,
)
OPENAI = Profile(
    name="openai",
    stream_default=False,
    max_temperature=2.0,
    efforts=MappingProxyType(_EFFORTS | {"minimal": "low", "medium": "high", "xhigh": "high", "max": "high"}),
    roles=MappingProxyType(_ROLES | {"developer": "system"}),
    alternating=False,
)
PROFILES: Mapping[str, Profile] = MappingProxyType({profile.name: profile for profile in (NIM, OPENAI)})


def _quality(accept: str | None, media: str) -> float:
    """The weight that an Accept header gives to one media type by name or by family; ``*/*`` names nothing."""
    family = media.split("/", 1)[0] + "/*"
    weights = {}
    for entry in (accept or "").split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        weights[name] = _weight(parameters)
    return weights.get(media, weights.get(family, 0.0))


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return min(max(float(parameter[2:]), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0
