"""What is asked, and how hard: the same requests whether they go over HTTP or through the Python API."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from typing import Any

Row = dict[str, Any]

MAX_STREAMS = 4000
MAX_RATE = 10_000.0
MAX_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Conversations of one question. Every answer has exactly ``max_tokens`` tokens: end of sequence is ignored."""

    prompt_words: int = 16
    max_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0

    def messages(self, number: int) -> list[Row]:
        """The conversation of request ``number``; no two are alike, so that none is found in a cache."""
        draw = random.Random(f"{self.seed} {number}")
        terms = " + ".join(str(draw.randrange(1000)) for _ in range(max(1, (self.prompt_words + 1) // 2)))
        return [{"role": "user", "content": f"What is {terms}?"}]

    def sampling(self, number: int) -> Row:
        """The fields that HTTP and SamplingParams share."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed + number,
            "ignore_eos": True,
        }

    def body(self, number: int) -> bytes:
        """The request over HTTP."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({"messages": self.messages(number), **self.sampling(number), **options}).encode()


@dataclass(frozen=True, slots=True)
class Load:
    """Closed: ``streams`` clients, each asking again when it is answered. Open: arrivals of a Poisson process.

    A closed load ends after ``requests`` of each client, or once ``seconds`` are over and what runs is answered; an
    open one begins requests for ``seconds``. ``first`` is the number of its first request. Raises ValueError naming the
    field that is out of range.
    """

    workload: Workload = Workload()
    streams: int | None = None
    rate: float | None = None  # requests a second
    seconds: float | None = None
    requests: int | None = None
    first: int = 0

    def __post_init__(self) -> None:
        if (self.streams is None) == (self.rate is None):
            raise ValueError("a load has streams or a rate, and not both")
        if self.seconds is None and (self.requests is None or self.rate is not None):
            raise ValueError("a load ends after so many seconds, or a closed one after so many requests of each stream")
        for name, highest in (("streams", MAX_STREAMS), ("rate", MAX_RATE), ("seconds", MAX_SECONDS)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= highest:
                raise ValueError(f"{name} must be more than 0 and at most {highest:g}, got {value:g}")

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Load:
        """What ``to_json`` wrote."""
        values = json.loads(text)
        return cls(Workload(**values.pop("workload")), **values)

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.streams} streams" if self.streams else f"{self.rate:g} requests/s"
