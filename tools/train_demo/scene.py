"""Captioned landscapes: what a scene consists of, which scenes exist, and how one is painted.

A scene is eight small integers (ATTRIBUTES).  `sample` draws scenes as a viewer would expect
them (no sun at night, pines in the snow); scenes whose combination `held_out` reserves are never
used for training, so that evaluation asks for pictures the model has not seen.  `render` paints
a batch with torch on any device: sky, then land from far to near, then house, lake and trees.
"""

import torch

from . import land, props, sky
from .draw import Canvas

ATTRIBUTES = {
    "time": ("dawn", "day", "sunset", "night"),
    "light": ("none", "sun", "full moon", "crescent moon"),
    "clouds": ("clear", "clouds"),
    "terrain": ("hills", "mountains"),
    "snow": ("no snow", "snow"),
    "trees": ("none", "pines", "leafy", "autumn"),
    "lake": ("none", "lake"),
    "house": ("none", "red", "blue", "yellow", "white", "green", "purple"),
}
COMBINATION = ("time", "light", "terrain", "snow", "trees", "lake", "house")
HELD_OUT_OF = 8  # one combination in so many is kept for evaluation

LIGHT_BY_TIME = (  # none, sun, full moon, crescent
    (0.25, 0.61, 0.07, 0.07),
    (0.30, 0.70, 0.00, 0.00),
    (0.25, 0.61, 0.07, 0.07),
    (0.20, 0.00, 0.41, 0.39),
)
TREES_BY_SNOW = ((0.20, 0.30, 0.28, 0.22), (0.30, 0.70, 0.00, 0.00))

FLAWS = (
    "none",
    "second house",
    "faint house",
    "half house",
    "two-coloured house",
    "second disc",
    "glow without disc",
    "faint disc",
    "hybrid moon",
    "mixed trees",
    "faint trees",
    "faint lake",
)


def held_out(scenes):
    """True for each scene whose combination is reserved for evaluation.  [N] bool."""
    code = torch.zeros_like(scenes["time"])
    for name in COMBINATION:
        code = code * len(ATTRIBUTES[name]) + scenes[name]
    mixed = (code * 2654435761) % 4294967296  # Knuth's multiplicative hash: neighbours scatter
    return (mixed >> 16) % HELD_OUT_OF == 0


def _draw(count, generator):
    def pick(*weights):
        weights = torch.tensor(weights)
        return torch.multinomial(weights, count, replacement=True, generator=generator)

    def pick_by(table, index):
        rows = torch.tensor(table)[index]
        return torch.multinomial(rows, 1, generator=generator)[:, 0]

    scenes = {"time": pick(1.0, 1.2, 1.1, 1.1)}
    scenes["light"] = pick_by(LIGHT_BY_TIME, scenes["time"])
    scenes["clouds"] = pick(0.5, 0.5)
    scenes["terrain"] = pick(0.42, 0.58)
    scenes["snow"] = pick(0.62, 0.38)
    scenes["trees"] = pick_by(TREES_BY_SNOW, scenes["snow"])
    scenes["lake"] = pick(0.5, 0.5)
    scenes["house"] = pick(0.28, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12)
    return scenes


def sample(count, seed, reserved=False):
    """count random scenes: {attribute: [count] int64}; reserved ones only, or none of those."""
    generator = torch.Generator().manual_seed(seed)
    parts, have = [], 0
    while have < count:
        scenes = _draw(max(256, 2 * count), generator)
        keep = (held_out(scenes) == reserved).nonzero()[:, 0]
        parts.append({name: values[keep] for name, values in scenes.items()})
        have += len(keep)
    return {name: torch.cat([part[name] for part in parts])[:count] for name in ATTRIBUTES}


def spoil(scenes, seed):
    """Choose a flaw for each scene and see that it can show: (scenes, flaw [N] int64)."""
    generator = torch.Generator().manual_seed(seed)
    count = len(scenes["time"])
    flaw = torch.randint(0, len(FLAWS), (count,), generator=generator)
    scenes = {name: values.clone() for name, values in scenes.items()}

    def require(attribute, flaws, value):
        missing = scenes[attribute] == 0
        for name in flaws:
            chosen = (flaw == FLAWS.index(name)) & missing
            scenes[attribute][chosen] = value[chosen]

    wall = torch.randint(1, 7, (count,), generator=generator)
    disc = torch.where(scenes["time"] == 3, torch.randint(2, 4, (count,), generator=generator), 1)
    require("house", ("second house", "faint house", "half house", "two-coloured house"), wall)
    require("light", ("second disc", "glow without disc", "faint disc", "hybrid moon"), disc)
    scenes["light"][flaw == FLAWS.index("hybrid moon")] = 3
    require("trees", ("mixed trees", "faint trees"), torch.ones(count, dtype=torch.int64))
    require("lake", ("faint lake",), torch.ones(count, dtype=torch.int64))
    return scenes, flaw


def rows(scenes):
    """The scenes as a list of {attribute: int}."""
    columns = [values.tolist() for values in scenes.values()]
    return [dict(zip(scenes, row)) for row in zip(*columns)]


class Setting:
    """Masks ([B, 1, 1, 1] floats) and placement that every part of a picture shares."""

    def __init__(self, canvas, scenes, flaw):
        self.scenes, self.flaw = scenes, flaw
        self.time = scenes["time"]
        self.dawn, self.day, self.sunset, self.night = (self.mask("time", i) for i in range(4))
        self.sun, self.moon, self.crescent = (self.mask("light", i) for i in (1, 2, 3))
        self.mountains = self.mask("terrain", 1)
        self.snow = self.mask("snow", 1)
        self.lake = self.mask("lake", 1)
        self.house = 1 - self.mask("house", 0)
        self.horizon = canvas.uniform(0.57, 0.62)  # where the land begins
        self.light_x = canvas.uniform(0.14, 0.86)
        self.house_x = canvas.uniform(0.30, 0.70)
        self.colours = sky.Colours(canvas, self)

    def mask(self, name, value):
        return (self.scenes[name] == value).float().view(-1, 1, 1, 1)

    def flawed(self, name):
        """1.0 where a picture is to show this flaw; None-free, so that masks multiply."""
        if self.flaw is None:
            return 0.0
        return (self.flaw == FLAWS.index(name)).float().view(-1, 1, 1, 1)


def render(scenes, generator, size=256, flaw=None):
    """Paint scenes ({attribute: [B] on the device}); returns [B, 3, size, size] in 0..1.

    flaw, [B] indices into FLAWS, spoils pictures on purpose: the judge learns from them what
    is *not* a house or a moon.  Training pictures have none.
    """
    device = scenes["time"].device
    canvas = Canvas(len(scenes["time"]), size, generator, device)
    setting = Setting(canvas, scenes, flaw)
    relief = land.Relief(canvas, setting)
    picture = sky.paint(canvas, setting, relief.skyline)
    picture = land.paint(canvas, setting, relief, picture)
    picture = props.far_trees(canvas, setting, picture)
    picture = props.houses(canvas, setting, picture)
    picture = props.lake(canvas, setting, picture)
    picture = props.bank(canvas, setting, picture)
    picture = props.near_trees(canvas, setting, picture)
    vignette = 1 - 0.22 * ((canvas.x - 0.5) ** 2 + (canvas.y - 0.5) ** 2)
    return (picture * vignette).clamp(0, 1)
