"""The sky and what is in it: gradients by time of day, stars, sun or moon, clouds.

`Colours` also holds the light that the sky throws on the land: ambient for what lies in shadow,
rim for what faces the light, and a bluer pair of both for snow.
"""

import torch
import torch.nn.functional as F

from .draw import hypot, mix, ramp

#       dawn                day                 sunset              night
TOP = ((0.36, 0.47, 0.80), (0.13, 0.43, 0.84), (0.23, 0.17, 0.45), (0.02, 0.03, 0.12))
MIDDLE = ((0.77, 0.66, 0.84), (0.38, 0.68, 0.95), (0.84, 0.35, 0.36), (0.06, 0.10, 0.29))
HORIZON = ((1.00, 0.80, 0.68), (0.78, 0.91, 0.99), (1.00, 0.72, 0.36), (0.17, 0.25, 0.48))
AMBIENT = ((0.84, 0.80, 0.92), (0.98, 0.99, 1.00), (0.80, 0.58, 0.54), (0.30, 0.38, 0.62))
RIM = ((1.16, 0.94, 0.84), (1.12, 1.08, 0.96), (1.26, 0.78, 0.46), (0.48, 0.58, 0.86))
SNOW_AMBIENT = ((0.70, 0.70, 0.92), (0.80, 0.88, 1.00), (0.66, 0.54, 0.76), (0.32, 0.41, 0.68))
SNOW_RIM = ((1.08, 0.95, 0.90), (1.04, 1.04, 1.02), (1.24, 0.86, 0.68), (0.56, 0.66, 0.94))
HALO = ((1.00, 0.86, 0.62), (1.00, 0.97, 0.80), (1.00, 0.62, 0.24), (0.50, 0.60, 0.95))
SUN = ((1.00, 0.93, 0.66), (1.00, 0.95, 0.58), (1.00, 0.86, 0.42), (1.00, 1.00, 1.00))
CLOUD_LIGHT = ((1.00, 0.90, 0.88), (1.00, 1.00, 1.00), (1.00, 0.64, 0.46), (0.30, 0.36, 0.55))
CLOUD_SHADE = ((0.74, 0.62, 0.80), (0.76, 0.85, 0.95), (0.56, 0.26, 0.40), (0.12, 0.16, 0.34))
MOON = (0.96, 0.95, 0.87)
CRATERS = ((-0.30, -0.22, 0.24), (0.34, 0.26, 0.30), (0.30, -0.42, 0.17))  # x, y, r in moon radii
PUFFS = ((-0.085, 0.028), (-0.040, 0.044), (0.014, 0.056), (0.064, 0.040), (0.102, 0.025))
STAR_ROWS, STAR_COLUMNS = 5, 8


class Colours:
    """Colours of the hour for each picture, [B, 3, 1, 1] each."""

    def __init__(self, canvas, setting):
        time = setting.time
        self.top = canvas.table(TOP, time) + canvas.tint(0.03)
        self.middle = canvas.table(MIDDLE, time) + canvas.tint(0.03)
        self.horizon = canvas.table(HORIZON, time) + canvas.tint(0.03)
        self.ambient = canvas.table(AMBIENT, time)
        self.rim = canvas.table(RIM, time)
        self.halo = canvas.table(HALO, time)
        snow = setting.snow
        self.ground_ambient = mix(self.ambient, canvas.table(SNOW_AMBIENT, time), snow)
        self.ground_rim = mix(self.rim, canvas.table(SNOW_RIM, time), snow)
        self.haze = mix(self.horizon, self.middle, 0.55)


def _stars(canvas, setting, height, keep_off):
    """Round stars, one at most in each cell of a grid so that no two run together."""
    cell = torch.rand(
        canvas.batch, STAR_ROWS * STAR_COLUMNS, 4, generator=canvas.generator, device=canvas.device
    )
    light = 0
    # A pixel belongs to one cell, so only that cell's star is looked up: one pass over the
    # picture instead of forty.  Stars keep to the middle of their cells, or they would be cut.
    rows = (canvas.y / 0.60 * STAR_ROWS).clamp(max=STAR_ROWS - 1e-3)
    columns = canvas.x * STAR_COLUMNS
    index = (rows.floor() * STAR_COLUMNS + columns.floor()).long().flatten()
    star = cell[:, index].view(canvas.batch, canvas.size, canvas.size, 4).permute(3, 0, 1, 2)
    along, down, bright, shown = (part.unsqueeze(1) for part in star)
    dx = (columns % 1 - 0.2 - 0.6 * along) / STAR_COLUMNS
    dy = (rows % 1 - 0.2 - 0.6 * down) / STAR_ROWS * 0.60
    radius = 0.0042 + 0.0040 * bright**2
    light = torch.exp(-(dx * dx + dy * dy) / (radius * radius) * 1.4) * (0.65 + 0.35 * bright)
    fade = ramp(1.0, 0.55, height) * ramp(0.07, 0.12, keep_off)
    return light * (shown < 0.75) * fade * setting.night


def _place_disc(canvas, setting, skyline):
    """Height of sun or moon: low at dawn and sunset, high otherwise, clear of the land."""
    # The whole disc must clear the land, so the highest land within its width counts.
    reach = int(0.065 * canvas.size)
    highest = -F.max_pool2d(-skyline, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    ceiling = canvas.at(highest, setting.light_x)
    high = canvas.uniform(0.11, 0.22)
    low = ceiling - canvas.uniform(0.075, 0.15)
    low_sun = setting.sun * (setting.dawn + setting.sunset)
    return torch.minimum(mix(high, low, low_sun), ceiling - 0.072).clamp(min=0.085)


def _disc(canvas, setting, picture, x, y, shown=1.0):
    """Paint the sun, the full moon or the crescent at x, y where the scene has one."""
    distance = hypot(canvas.x - x, canvas.y - y)
    radius = canvas.uniform(0.054, 0.064)
    sun = canvas.cover(distance - radius) * setting.sun * shown
    picture = mix(picture, canvas.table(SUN, setting.time), sun)
    radius = canvas.uniform(0.046, 0.055)
    craters = 0
    for dx, dy, size in CRATERS:
        spot = hypot(canvas.x - x - dx * radius, canvas.y - y - dy * radius)
        craters = craters + canvas.cover(spot - size * radius, 2.0)
    moon = canvas.rgb(MOON)
    hybrid = setting.flawed("hybrid moon")
    whole = setting.moon + setting.crescent * hybrid * canvas.uniform(0.3, 0.8)
    full = canvas.cover(distance - radius)
    picture = mix(picture, moon * (1 - 0.15 * craters), full * whole * shown)
    bite = hypot(canvas.x - x + 0.48 * radius, canvas.y - y + 0.24 * radius)
    crescent = canvas.cover(torch.maximum(distance - radius * 1.06, radius * 0.90 - bite))
    return mix(picture, moon, crescent * setting.crescent * shown)


def _glow(canvas, setting, picture, distance, height):
    """Halo around a disc, and the afterglow at the horizon, which needs no sun to be there."""
    colours = setting.colours
    low = setting.dawn + setting.sunset
    strength = setting.sun * (0.34 + 0.10 * low) + (setting.moon + setting.crescent) * 0.24
    halo = torch.exp(-distance / 0.075) * 0.8 + torch.exp(-distance / 0.24) * 0.45
    picture = picture + colours.halo * halo * strength
    centre = mix(canvas.uniform(0.1, 0.9), setting.light_x, setting.sun)
    amount = canvas.uniform(0.0, 0.42) * low
    spread = torch.exp(-(((height - 0.97) / 0.24) ** 2) - ((canvas.x - centre) / 0.45) ** 2)
    return (picture + colours.halo * spread * amount).clamp(0, 1)


def _clouds(canvas, setting, picture, disc_x, disc_y):
    """Flat-bottomed puffs; one that would hide the sun or moon is left out."""
    light = canvas.table(CLOUD_LIGHT, setting.time)
    shade = canvas.table(CLOUD_SHADE, setting.time)
    has_disc = setting.sun + setting.moon + setting.crescent
    for slot in range(4):
        x = (slot + 0.5) / 4 + canvas.uniform(-0.05, 0.05)
        y = canvas.uniform(0.09, 0.30)
        scale = canvas.uniform(0.72, 1.12)
        near = ((x - disc_x).abs() < 0.20) & ((y - disc_y).abs() < 0.13)
        shown = setting.mask("clouds", 1) * (1 - near.float() * has_disc)
        shape = torch.full((1, 1, 1, 1), 9.0, device=canvas.device)
        for dx, radius in PUFFS:
            radius = radius * canvas.uniform(0.88, 1.12) * scale
            puff = hypot(canvas.x - x - dx * scale, canvas.y - y + radius * 0.30) - radius
            shape = torch.minimum(shape, puff)
        shape = torch.maximum(shape, canvas.y - y)
        up = (y - canvas.y) / (0.060 * scale)  # 0 at the base, about 1 at the top
        picture = mix(picture, mix(shade, light, ramp(0.0, 0.85, up)), canvas.cover(shape) * shown)
    return picture


def paint(canvas, setting, skyline):
    """Sky, stars, sun or moon and clouds; skyline ([B, 1, 1, S]) is the land's upper edge."""
    colours = setting.colours
    height = (canvas.y / setting.horizon).clamp(0, 1)  # 0 at the top, 1 at the horizon
    picture = mix(colours.top, colours.middle, ramp(0.0, 0.72, height))
    picture = mix(picture, colours.horizon, ramp(0.45, 1.02, height))
    picture = picture.expand(canvas.batch, 3, canvas.size, canvas.size)
    x, y = setting.light_x, _place_disc(canvas, setting, skyline)
    distance = hypot(canvas.x - x, canvas.y - y)
    moonlit = setting.moon + setting.crescent
    keep_off = mix(torch.ones_like(distance), distance, moonlit)
    picture = picture + _stars(canvas, setting, height, keep_off) * canvas.rgb((1.0, 0.97, 0.88))
    picture = _glow(canvas, setting, picture, distance, height)
    shown = 1 - setting.flawed("glow without disc")
    shown = shown - setting.flawed("faint disc") * canvas.uniform(0.5, 0.8)
    picture = _disc(canvas, setting, picture, x, y, shown)
    if setting.flaw is not None:
        other_x = (x + canvas.uniform(0.22, 0.60)) % 0.80 + 0.10
        other_y = canvas.uniform(0.09, 0.22)
        picture = _disc(canvas, setting, picture, other_x, other_y, setting.flawed("second disc"))
    return _clouds(canvas, setting, picture, x, y)
