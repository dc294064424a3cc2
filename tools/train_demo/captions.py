"""Words for scenes: training captions that name some attributes, prompts that name all.

Each attribute value has a handful of synonyms.  A training caption leaves attributes out (the
picture then shows any value) and comes as a list of tags or as a sentence, its parts in any
order.  No phrase is ambiguous: "the moon" is the full one, a crescent is always called so.
"""

import random

from . import scene

PHRASES = {
    ("time", 0): ("at dawn", "at dawn", "at sunrise", "at daybreak", "in the early morning"),
    ("time", 1): ("by day", "during the day", "in daylight", "at noon", "at midday"),
    ("time", 2): ("at sunset", "at sunset", "at dusk", "in the evening", "at sundown"),
    ("time", 3): ("at night", "at night", "at midnight", "on a dark night", "after dark"),
    ("light", 0): ("no sun or moon", "no sun and no moon", "without sun or moon"),
    ("light", 1): ("the sun", "the sun", "a bright sun", "the shining sun", "a yellow sun"),
    ("light", 2): ("a full moon", "a full moon", "the full moon", "the moon", "a round moon"),
    ("light", 3): ("a crescent moon", "a crescent moon", "the crescent moon", "a thin crescent"),
    ("clouds", 0): ("a clear sky", "a cloudless sky", "no clouds"),
    ("clouds", 1): ("clouds", "a cloudy sky", "puffy clouds", "some clouds", "white clouds"),
    ("terrain", 0): ("hills", "hills", "rolling hills", "soft hills", "a hilly land"),
    ("terrain", 1): (
        "mountains", "mountains", "high mountains", "mountain peaks", "a mountain range"
    ),
    ("snow", 0): ("no snow", "green grass", "grassland", "meadows"),
    ("snow", 1): ("snow", "snow", "deep snow", "fresh snow", "winter", "a snowy landscape"),
    ("trees", 0): ("no trees", "no trees", "a treeless land", "without trees"),
    ("trees", 1): ("pine trees", "pine trees", "pines", "fir trees", "a pine forest"),
    ("trees", 2): ("leafy trees", "green trees", "oak trees", "round trees"),
    ("trees", 3): ("autumn trees", "autumn trees", "orange trees", "fall foliage"),
    ("lake", 0): ("no lake", "no water", "without a lake"),
    ("lake", 1): ("a lake", "a lake", "a calm lake", "still water", "a blue lake"),
    ("house", 0): ("no house", "no house", "no buildings", "without a house"),
}  # fmt: skip
HOUSE_SIZES = ("", "", "", "", "small ", "little ", "lonely ")
HOUSE_WORDS = ("house", "house", "house", "cottage", "cabin", "home")
PREFIXES = (
    "", "", "", "", "", "a landscape with", "a painting of", "a picture of", "a scene with",
    "a view of", "a beautiful landscape,", "an illustration of", "a photo of", "a drawing of",
)  # fmt: skip
SUFFIXES = (", beautiful", ", high quality", ", detailed", ", calm", ", digital art")
LINKS = {
    "light": (" under ", " under ", " and ", " with ", ", "),
    "clouds": (" under ", " and ", " with ", ", "),
    "lake": (" by ", " near ", " with ", " and ", ", "),
    "terrain": (" in front of ", " with ", " and ", " near ", ", "),
    "trees": (" among ", " with ", " and ", " near ", ", "),
    "snow": (" in ", " with ", " and ", ", "),
    "house": (" with ", " and ", ", "),
    "time": (" ", " ", ", "),
}
DROP_RATES = (0.0, 0.1, 0.25, 0.45, 0.7)
NAMED_WHEN_ABSENT = {
    "light": 0.4, "clouds": 0.5, "snow": 0.4, "trees": 0.45, "lake": 0.4, "house": 0.4
}  # fmt: skip
WITHOUT_WORDS = ("no ", "without ", "a treeless")


def _phrase(name, value, rng):
    if name == "house" and value:
        colour = scene.ATTRIBUTES["house"][value]
        return f"a {rng.choice(HOUSE_SIZES)}{colour} {rng.choice(HOUSE_WORDS)}"
    return rng.choice(PHRASES[name, value])


def _phrases(row, named, rng):
    """[(attribute, phrase)] in random order; sometimes two attributes share a phrase."""
    named = dict.fromkeys(named)
    phrases = []
    if "snow" in named and "terrain" in named and row["snow"] and rng.random() < 0.25:
        noun = "mountains" if row["terrain"] else "hills"
        phrases.append(("terrain", f"{rng.choice(('snowy', 'snow covered'))} {noun}"))
        del named["snow"], named["terrain"]
    if "time" in named and row["time"] == 3 and rng.random() < 0.12:
        phrases.append(("clouds", "a starry night"))
        del named["time"]
    phrases += [(name, _phrase(name, row[name], rng)) for name in named]
    rng.shuffle(phrases)
    return phrases


def _join(phrases, rng):
    """Tags separated by commas, or one sentence whose links suit what they introduce."""
    if rng.random() < 0.4:
        text = ", ".join(phrase for _, phrase in phrases)
    else:
        text = phrases[0][1] if phrases else ""
        for name, phrase in phrases[1:]:
            absent = phrase.startswith(WITHOUT_WORDS)
            text += (", " if absent else rng.choice(LINKS[name])) + phrase
    text = f"{rng.choice(PREFIXES)} {text}".strip()
    if text and rng.random() < 0.08:
        text += rng.choice(SUFFIXES)
    if text and rng.random() < 0.15:
        text = text[0].upper() + text[1:] + "."
    return text


def caption(row, rng):
    """A training caption for one scene ({attribute: int}); leaves some attributes unnamed."""
    drop = rng.choice(DROP_RATES)
    named = []
    for name, value in row.items():
        keep = 1 - drop * (0.5 if name in ("house", "time") else 1)
        if value == 0 and name in NAMED_WHEN_ABSENT and drop:
            keep *= NAMED_WHEN_ABSENT[name]
        if rng.random() < keep:
            named.append(name)
    return _join(_phrases(row, named, rng), rng)


def captions(scenes, each, seed):
    """each captions for every scene: list of lists of str."""
    rng = random.Random(seed)
    return [[caption(row, rng) for _ in range(each)] for row in scene.rows(scenes)]


def prompts(count, seed):
    """Evaluation prompts: (text, {attribute: wanted value}) for reserved combinations.

    Every attribute is named, absent things too, so each prompt asks for a combination that no
    training picture shows.
    """
    rng = random.Random(seed)
    scenes = scene.sample(count, seed, reserved=True)
    return [(_join(_phrases(row, row, rng), rng), row) for row in scene.rows(scenes)]
