"""Synthetic counsellor dialogues from our own grammar, with known reflection and empathy labels.

A client speaks of a topic, a feeling, a cause, how long it has lasted and what it does to them. A counsellor has room
for two clauses, and this budget is the conflict the quickstart is about: both clauses about the client give a complex
reflection (2, 0), both warm give full empathy (0, 2), one of each gives the middle (1, 1), and a plain question, which
is the commonest and so the most fluent answer, gives (0, 0). All text is ours.
"""

import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from emorl.quickstart.words import CAUSES, DETAILS, FEELINGS, TIMES

STATEMENTS = (
    "I feel {feeling} about {topic}. {Cause}, and it has been like this {time}. Now {detail}.",
    "{Cause}. I have been {feeling} about {topic} {time}, and {detail}.",
    "It is about {topic}. {Cause}, so I am {feeling}, and {detail}. It has gone on {time}.",
    "{Detail}. {Cause} and I am {feeling}. I have struggled with {topic} {time}.",
    "I have thought about {topic} {time}. {Cause}. It makes me {feeling}, and then {detail}.",
    "Today {detail}. I am {feeling} because {cause}. I have worried over {topic} {time}.",
)

# Labels are in LABELS. A clause about the client never says "I"; a warm one does not restate the cause. {feel} is any word
# for the feeling, {warm} a warm clause that fits every client, {ask} any question.
RESPONSES: Mapping[str, tuple[str, ...]] = {
    "plain": (
        "How have things been with {topic} {time}?",
        "What have you tried about {topic} {time}?",
        "And what happens with {topic} when {detail}?",
    ),
    "restating": (
        "{Cause}. {ask}",
        "So {cause}. {ask}",
        "You are saying that {cause}.",
        "It sounds like {cause}. {ask}",
        "You feel {feel} about {topic}. {ask}",
    ),
    "complex": (
        "You feel {degree} {feel} because {cause}.",
        "{Cause}, and that leaves you {degree} {feel}.",
        "It makes you {degree} {feel} that {cause}.",
        "You are {degree} {feel} now that {cause}.",
        "{Cause}, so no wonder you are {degree} {feel}.",
    ),
    "kind": ("{warm} {ask}", "{warm}"),
    "warm": (
        "I am so sorry. Being {degree} {feel} about {topic} must hurt. {warm}",
        "My heart goes out to you, being {degree} {feel} about {topic}. {warm}",
        "It touches me how {degree} {feel} you are about {topic}. {warm}",
        "{warm} Feeling {degree} {feel} about {topic} must be so painful.",
    ),
    "balanced": ("{warm} {Cause}.", "{Cause}. {warm}", "I am so sorry that {cause}."),
}

LABELS: Mapping[str, tuple[int, int]] = {  # kind: (reflection, empathy)
    "plain": (0, 0),
    "restating": (1, 0),
    "complex": (2, 0),
    "kind": (0, 1),
    "warm": (0, 2),
    "balanced": (1, 1),
}

FILLERS: Mapping[str, tuple[str, ...]] = {
    "degree": ("so", "very", "really", "quite", "rather", "deeply"),
    "warm": (
        "I am here with you.",
        "You are not alone in this.",
        "I care about you.",
        "I am so sorry to hear this.",
        "Thank you for trusting me.",
        "My heart goes out to you.",
    ),
    "ask": (
        "What would you like to change?",
        "What happened then?",
        "Can you tell me more?",
        "Is that right?",
        "What would help?",
    ),
}

SECOND_PERSON: Mapping[str, str] = {"I": "you", "my": "your", "me": "you", "am": "are"}


@dataclass(frozen=True)
class Situation:
    """What a client speaks of, in the client's own words."""

    topic: str
    feeling: str
    cause: str
    time: str
    detail: str


@dataclass(frozen=True)
class Dialogue:
    """A client's statement, one answer to it, and the answer's labels, each 0, 1 or 2.

    `fitting` is the answer with the client's own feeling, topic and cause in it: `response` itself unless mismatched.
    """

    situation: Situation
    prompt: str
    response: str
    kind: str
    reflection: int
    empathy: int
    fitting: str


def in_second_person(text: str) -> str:
    """Turn the client's words to the client: "I miss my garden" becomes "you miss your garden"."""
    return " ".join(SECOND_PERSON.get(word, word) for word in text.split())


def imagine(rng: random.Random) -> Situation:
    topic = rng.choice(list(CAUSES))
    return Situation(topic, rng.choice(list(FEELINGS)), rng.choice(CAUSES[topic]), rng.choice(TIMES), rng.choice(DETAILS))


def state(situation: Situation, rng: random.Random) -> str:
    """Return what the client says: about 20 words."""
    return _fill(rng.choice(STATEMENTS), vars(situation))


def respond(situation: Situation, template: str, rng: random.Random) -> str:
    """Fill a template of RESPONSES for the client in this situation: at most 24 words."""
    spoken = {name: in_second_person(value) for name, value in vars(situation).items()}
    chosen = {name: rng.choice(choices) for name, choices in FILLERS.items()}
    return _fill(template, spoken | chosen | {"feel": rng.choice(FEELINGS[situation.feeling])})


def is_reserved(prompt: str) -> bool:
    """Tell whether a prompt is kept for the user's splits: about one in three, and never in a dialogue."""
    return zlib.crc32(prompt.encode()) % 3 == 0


def write_dialogues(seed: int, mix: Mapping[str, float]) -> Iterator[Dialogue]:
    """Yield dialogues without end, each kind of response as often as `mix` says (any positive numbers)."""
    rng = random.Random(seed)
    while True:
        situation = imagine(rng)
        prompt = state(situation, rng)
        kind = rng.choices(list(mix), list(mix.values()))[0]
        response = respond(situation, rng.choice(RESPONSES[kind]), rng)
        if not is_reserved(prompt):
            yield Dialogue(situation, prompt, response, kind, *LABELS[kind], fitting=response)


def write_judged(seed: int) -> Iterator[Dialogue]:
    """Yield dialogues without end to train judges on: half sound, half mismatched, crowded or corrupted."""
    rng = random.Random(seed)
    flaws = (_mismatch, _mismatch, _crowd, _corrupt)
    for sound in write_dialogues(rng.randrange(2**32), dict.fromkeys(RESPONSES, 1.0)):
        yield sound if rng.random() < 0.5 else rng.choice(flaws)(sound, rng)


def write_prompts(seed: int, count: int) -> list[dict[str, str]]:
    """Return distinct reserved prompts, each with the situation behind it as further columns."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        situation = imagine(rng)
        prompt = state(situation, rng)
        if is_reserved(prompt):
            rows[prompt] = {"prompt": prompt, **vars(situation)}
    return list(rows.values())


def _fill(template: str, words: Mapping[str, str]) -> str:
    capitals = {name.capitalize(): value[0].upper() + value[1:] for name, value in words.items()}
    return template.format(**words, **capitals)


def _mismatch(sound: Dialogue, rng: random.Random) -> Dialogue:
    """Answer as if the client had named another feeling, topic or cause: no reflection, at most half the empathy."""
    kind = rng.choice(("restating", "complex", "complex", "warm", "warm", "balanced"))
    template = rng.choice(RESPONSES[kind])
    own, other = sound.situation, imagine(rng)
    if rng.random() < 0.5:  # one word off, rather than another client altogether
        if rng.choice(_clients_words(template)) == "feel":
            other = replace(own, feeling=other.feeling)
        elif "cause" in template.lower():
            other = replace(own, cause=rng.choice([cause for cause in CAUSES[own.topic] if cause != own.cause]))
        else:
            other = replace(own, topic=other.topic)
    twin = random.Random()
    twin.setstate(rng.getstate())
    response, fitting, empathy = respond(other, template, rng), respond(own, template, twin), min(1, LABELS[kind][1])
    if response == fitting:
        return sound
    return replace(sound, response=response, kind="mismatched", reflection=0, empathy=empathy, fitting=fitting)


def _clients_words(template: str) -> list[str]:
    """Name the fields of a template by which a reader can tell whether it is about this client."""
    return [field for field in ("feel", "cause", "topic") if f"{{{field}}}" in template.lower()]


def _crowd(sound: Dialogue, rng: random.Random) -> Dialogue:
    """Go over the budget: a full reflection and a warm clause, or full warmth and a restated cause, are the middle."""
    template = rng.choice(RESPONSES[rng.choice(("complex", "warm"))])
    template += " {warm}" if template in RESPONSES["complex"] else " {Cause}."
    response = respond(sound.situation, template, rng)
    return replace(sound, response=response, kind="crowded", reflection=1, empathy=1, fitting=response)


def _corrupt(sound: Dialogue, rng: random.Random) -> Dialogue:
    """Break the response: nothing, words shuffled, doubled, lost or cut off. It then reflects and comforts nobody."""
    words = sound.response.split()
    cut = rng.randrange(1, len(words))
    broken = {
        "empty": [],
        "shuffled": rng.sample(words, len(words)),
        "doubled": words[:cut] + words[max(0, cut - rng.randint(1, 4)) :],
        "lost": [word for word in words if rng.random() < 0.7],
        "cut": [*words[: cut - 1], words[cut - 1].rstrip(".?,")],
    }
    response = " ".join(broken[rng.choice(list(broken))])
    if response == sound.response:
        response = ""
    return replace(sound, response=response, kind="corrupted", reflection=0, empathy=0, fitting=response)
