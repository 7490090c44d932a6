"""What a request's `model` may name: points of the front, weights written out, single policies, and what was made of them.

>>> models.find("emorl/front/3")
>>> models.find("emorl/soup/reflection=0.7,empathy=0.3")
>>> models.find("emorl", prefer={"reflection": 1.0})
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from emorl.config import UserError, nearest
from emorl.objectives.preference import check_weights, choose, parse_numbers
from emorl.runs.results import Point
from emorl.serving.voices import AnyVoice, Voice

OWNER = "emorl"
BEST, FRONT = "best", "front"


class UnknownModelError(UserError):
    """No model of that name is served."""


@dataclass(frozen=True)
class Model:
    """A name, and what is known of it: what kind it is, its weights, and the search's scores of that point."""

    name: str
    kind: str
    voice: AnyVoice
    weights: Mapping[str, float] | None = None
    scores: Mapping[str, float] | None = None
    value: float | None = None

    @property
    def described(self) -> dict[str, Any]:
        """For answers and for the list of models."""
        weights = None if self.weights is None else dict(self.weights)
        scores = None if self.scores is None else {name: round(score, 6) for name, score in self.scores.items()}
        return {"model": self.name, "kind": self.kind, "weights": weights, "scores": scores, "value": self.value}


@dataclass(frozen=True, eq=False)
class Steered:
    """What answers at any weights of the policies.

    Args:
        prefix: of its names, behind `emorl/`; empty for what a plain `emorl` means.
        front: best value first.
        voice: makes it, for weights by policy.
        is_scored: whether the front's scores are its own: not those of a soup, or of an adapter, beside the ensemble's.
    """

    prefix: str
    front: Sequence[Point]
    best: Point
    policies: Sequence[str]
    voice: Callable[[Mapping[str, float]], Voice]
    is_scored: bool = True

    def named(self, rest: str) -> str:
        return "/".join(filter(None, (OWNER, self.prefix, rest)))

    def at(self, point: Point, name: str, kind: str) -> Model:
        kind = self.prefix or kind
        scores, value = (point.scores, point.value) if self.is_scored else (None, None)
        return Model(name, kind, self.voice(point.weights), point.weights, scores, value)

    def find(self, rest: str, weights: Mapping[str, float], prefer: Mapping[str, float]) -> Model:
        """The point that is named by the rest of the name, or else by weights or a preference; the best one by nothing."""
        if rest and (weights or prefer):
            field = "weights" if weights else "prefer"
            raise UserError(f"model: {self.named(rest)!r:.80} names a trade-off already; send {field} with {self.named('')!r}")
        if prefer:
            point = _point(choose([vars(point) for point in self.front], prefer))
            return self.at(point, self._name_of(point), FRONT)
        if rest in ("", BEST) and not weights:
            return self.at(self.best, self.named(BEST), BEST)
        if rest.startswith(f"{FRONT}/"):
            return self._numbered(rest.removeprefix(f"{FRONT}/"))
        if rest and "=" not in rest:
            raise UnknownModelError(f"model: no model is called {self.named(rest)!r:.80}")
        option = "model" if rest else "weights"
        given = check_weights(option, parse_numbers(option, rest) if rest else weights, self.policies)
        text = ",".join(f"{name}={weight:g}" for name, weight in given.items())
        known = next((point for point in self.front if dict(point.weights) == given), None)
        if known is not None:
            return self.at(known, self.named(text), FRONT)
        return Model(self.named(text), self.prefix or "weights", self.voice(given), given)

    def listed(self) -> Iterator[Model]:
        yield self.at(self.best, self.named(BEST), BEST)
        for number, point in enumerate(self.front, 1):
            yield self.at(point, self.named(f"{FRONT}/{number}"), FRONT)

    def _numbered(self, text: str) -> Model:
        is_number = text.isascii() and text.isdigit() and len(text) < 10
        if not is_number or not 1 <= int(text) <= len(self.front):
            raise UnknownModelError(f"model: the front has points 1 to {len(self.front)}, got {text!r:.40}")
        return self.at(self.front[int(text) - 1], self.named(f"{FRONT}/{int(text)}"), FRONT)

    def _name_of(self, point: Point) -> str:
        return self.named(f"{FRONT}/{1 + list(self.front).index(point)}")


class Models:
    """All that a server offers.

    Args:
        steered: those that take weights. `emorl` alone means the one without a prefix; else the first, else the first that is
            fixed.
        fixed: single policies, the base, one fused: those that do not.
    """

    def __init__(self, steered: Sequence[Steered], fixed: Sequence[Model]) -> None:
        self._steered = sorted(steered, key=lambda each: -len(each.prefix))
        self._fixed = {model.name: model for model in fixed}

    def listed(self) -> list[Model]:
        """Every name that does not carry weights, the best first."""
        return [*(model for each in reversed(self._steered) for model in each.listed()), *self._fixed.values()]

    def find(self, name: str, weights: Mapping[str, float] | None = None, prefer: Mapping[str, float] | None = None) -> Model:
        """The model that a request means.

        Raises:
            UnknownModelError: no such name.
            UserError: weights of no policy, a preference of no objective, both at once, or either for one that is fixed.
        """
        weights, prefer = weights or {}, prefer or {}
        if weights and prefer:
            raise UserError("prefer: it chooses the weights and weights gives them; send one of both")
        fixed = self._fixed.get(name)
        if name == OWNER and not any(each.prefix == "" for each in self._steered):
            if self._steered:
                return self._steered[0].find("", weights, prefer)
            fixed = next(iter(self._fixed.values()), None)
        if fixed is not None:
            if weights or prefer:
                field = "weights" if weights else "prefer"
                raise UserError(f"{field}: {name!r:.80} is one policy, without a trade-off to choose")
            return fixed
        owner, _, rest = name.partition("/")
        if owner == OWNER:
            for each in self._steered:
                if each.prefix == "" or rest == each.prefix or rest.startswith(f"{each.prefix}/"):
                    return self._of(each, rest[len(each.prefix) :].removeprefix("/"), weights, prefer)
        raise self._unknown(name)

    def _of(self, each: Steered, rest: str, weights: Mapping[str, float], prefer: Mapping[str, float]) -> Model:
        try:
            return each.find(rest, weights, prefer)
        except UnknownModelError as error:
            raise error if rest.startswith(f"{FRONT}/") else self._unknown(each.named(rest)) from None

    def _unknown(self, name: str) -> UnknownModelError:
        names = [OWNER, *(model.name for model in self.listed())]
        close = get_close_matches(name[:80], names, n=1, cutoff=0.8)
        few = [each for each in names if not each.rpartition("/")[2].isdigit()]
        near = nearest(name[:80], close or few)
        return UnknownModelError(f"model: no model is called {name!r:.80}; {near} (GET /v1/models lists all)")


def _point(chosen: Mapping[str, Any]) -> Point:
    return Point(chosen["weights"], chosen["scores"], chosen["value"])
