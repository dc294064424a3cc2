"""The land: mountains, hills and the plain, painted from far to near."""

import torch
import torch.nn.functional as F

from .draw import mix, ramp

PEAKS = 4
ROCK = ((0.42, 0.43, 0.52), (0.50, 0.42, 0.41))
GRASS = (0.36, 0.59, 0.25)
AUTUMN_GRASS = (0.62, 0.55, 0.25)
GRASS_SHADE = (0.55, 0.64, 0.70)  # times the grass colour
SNOW = (0.97, 0.98, 1.0)
SNOW_SHADE = (0.74, 0.82, 0.95)


class Relief:
    """Outlines of the land: peaks and hills as curves y(x), and the skyline above all of them."""

    def __init__(self, canvas, setting):
        x, horizon = canvas.x, setting.horizon
        places = torch.rand(canvas.batch, PEAKS, generator=canvas.generator, device=canvas.device)
        order = torch.argsort(places, 1)
        self.peaks = []
        for i in range(PEAKS):
            slot = order[:, i].view(-1, 1, 1, 1).float()
            centre = (slot + 0.5) / PEAKS * 1.1 - 0.05 + canvas.uniform(-0.06, 0.06)
            height = canvas.uniform(0.24, 0.38) * (1 - 0.12 * i)  # nearer peaks are lower
            half = height * canvas.uniform(0.95, 1.25)
            slope = (1 - (x - centre).abs() / half).clamp(-0.3, 1)
            edge = horizon - height * slope + 0.008 * canvas.curve(8, 3, 0.55)
            self.peaks.append((centre, height, half, edge))
        self.hills = []
        flat = setting.mountains
        for rise, extra, wave, swell, knots in (
            (0.100, 0.075, 0.026, 0.034, 3),
            (0.050, 0.035, 0.022, 0.026, 2),
            (0.010, 0.005, 0.016, 0.014, 2),
        ):
            base = horizon - rise - (1 - flat) * extra
            self.hills.append(base + (wave + (1 - flat) * swell) * canvas.curve(knots, 2, 0.25))
        tops = torch.stack([peak[3] for peak in self.peaks]).amin(0)
        tops = mix(torch.ones_like(tops), tops, setting.mountains)
        self.skyline = torch.minimum(tops, self.hills[0])


def _mountain(canvas, setting, picture, peak, rock, haze):
    """One peak: a lit and a shadowed face that meet in a jagged line, snow above a jagged edge."""
    centre, height, half, edge = peak
    colours = setting.colours
    down = ((canvas.y - setting.horizon + height) / height).clamp(0, 1.2)  # 0 at the summit
    zigzag = canvas.column(9) * 0.13 + canvas.column(20) * 0.05
    crease = canvas.x - centre - zigzag * height * (0.11 + 0.9 * down)
    lit = canvas.cover(crease * torch.where(setting.light_x > centre, -1.0, 1.0), 1.5)
    across = (canvas.x - centre) / (down * half + 0.05)
    phase = canvas.uniform(0, 6.28)
    teeth = torch.sin(across * 7 + phase) + 0.5 * torch.sin(across * 15 + 2 * phase)
    face = rock * mix(colours.ambient * 0.58, colours.ambient * 0.45 + colours.rim * 0.62, lit)
    ambient, rim = colours.ground_ambient, colours.ground_rim
    snow = mix(canvas.rgb(SNOW_SHADE) * ambient * 0.92, canvas.rgb(SNOW) * rim * 0.98, lit)
    line = down - canvas.uniform(0.46, 0.60) - 0.085 * teeth - 0.3 * zigzag
    face = mix(face, snow, canvas.cover(line * height, 1.5) * setting.snow)
    face = mix(face, colours.haze, (haze + 0.45 * ramp(0.45, 1.05, down)).clamp(0, 0.8))
    return mix(picture, face, canvas.cover((edge - canvas.y) * 0.8) * setting.mountains)


def _ground(canvas, setting):
    """Colours of lit and of shadowed ground, grass or snow: two of [B, 3, 1, 1]."""
    colours, snow = setting.colours, setting.snow
    grass = canvas.rgb(GRASS) + canvas.tint(0.04)
    grass = mix(grass, canvas.rgb(AUTUMN_GRASS), 0.65 * setting.mask("trees", 3))
    shade = grass * canvas.rgb(GRASS_SHADE)
    lit = mix(grass, canvas.rgb(SNOW), snow)
    shade = mix(shade, canvas.rgb(SNOW_SHADE), snow)
    lit = lit * (colours.ground_ambient * 0.62 + colours.ground_rim * 0.36)
    return lit, shade * colours.ground_ambient * 0.92


def paint(canvas, setting, relief, picture):
    """Mountains, three rows of hills, the plain; returns the picture."""
    rock = torch.where(canvas.uniform(0, 1) < 0.5, canvas.rgb(ROCK[0]), canvas.rgb(ROCK[1]))
    rock = rock + canvas.tint(0.03)
    for i, peak in enumerate(relief.peaks):
        picture = _mountain(canvas, setting, picture, peak, rock, 0.30 - 0.07 * i)
    setting.ground_lit, setting.ground_shade = lit, shade = _ground(canvas, setting)
    haze = setting.colours.haze
    for edge, fog in zip(relief.hills, (0.40, 0.26, 0.12)):
        down = (canvas.y - edge) / 0.15
        padded = F.pad(edge, (4, 4, 0, 0), "replicate")
        slope = (padded[..., 8:] - padded[..., :-8]) / (8 * canvas.pixel)
        facing = slope * torch.tanh((setting.light_x - canvas.x) / 0.3)
        colour = mix(lit, shade, (0.10 + 0.70 * ramp(0, 1.1, down) + 0.6 * facing).clamp(0, 1))
        colour = mix(colour, haze, fog * (1 - 0.4 * setting.snow))
        picture = mix(picture, colour, canvas.cover((edge - canvas.y) * 0.9))
    edge = setting.horizon + 0.015 + 0.006 * canvas.curve(2, 2, 0.3)
    down = ((canvas.y - edge) / (1 - setting.horizon)).clamp(0, 1)
    colour = mix(lit, shade, (0.10 + 0.72 * down + 0.05 * canvas.field(9, 4)).clamp(0, 1))
    return mix(picture, colour, canvas.cover((edge - canvas.y) * 0.9))
