"""A language model of known quality: with a given probability the right answer, else a fault small models really make.

The unit is one request. Whether it is answered rightly, and which fault it gets, is a pure function of the seed and the
request, so a run with an oracle can be repeated, resumed and compared. Made for tests and for measuring optimizers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

from agentopt.errors import UserError
from agentopt.models._doubles import FunctionLM
from agentopt.models._protocol import Request

FAULTS = ("text", "empty", "truncated", "refusal")
_WORDS = (
    *("well", "the", "thing", "about", "river", "stone", "maybe", "seven", "sometimes", "table", "because", "window"),
    *("likely", "green", "answer", "paper", "would", "whether", "cloud", "often", "again", "never", "house", "story"),
)


class OracleLM(FunctionLM):
    """Answers with `answer(request)` with probability `quality`, else with one of `faults`.

    Faults: "text" (random words), "empty" (nothing), "truncated" (the right answer cut off in the middle), "refusal".

    Raises:
        UserError: a quality outside 0 to 1, an unknown fault, or no fault although some are needed.
    """

    def __init__(
        self,
        answer: Callable[[Request], str],
        *,
        quality: float = 1.0,
        faults: Sequence[str] = FAULTS,
        seed: int = 0,
        name: str = "oracle",
    ) -> None:
        if not 0.0 <= quality <= 1.0:
            raise UserError(f"OracleLM: quality must lie between 0 and 1, found {quality!r}.")
        unknown = [fault for fault in faults if fault not in FAULTS]
        if unknown or (not faults and quality < 1.0):
            found = repr(unknown[0]) if unknown else "none"
            raise UserError(f"OracleLM: faults must be some of {', '.join(FAULTS)}; found {found}.")
        super().__init__(self._reply)
        self.name = name
        self._right = answer
        self._quality = quality
        self._faults = tuple(faults)
        self._seed = seed

    def _reply(self, request: Request) -> str:
        digest = hashlib.sha256(f"{self._seed}:{request.key()}".encode("ascii")).digest()
        rng = random.Random(int.from_bytes(digest[:8], "big"))
        if rng.random() < self._quality:
            return self._right(request)
        match rng.choice(self._faults):
            case "empty":
                return ""
            case "truncated":
                text = self._right(request)
                return text[: max(1, int(len(text) * rng.uniform(0.2, 0.8)))]
            case "refusal":
                return "I'm sorry, but I can't help with that."
            case _:
                return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(3, 40)))
