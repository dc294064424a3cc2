"""What stands on the land: trees, the house and the lake that mirrors them."""

import torch
import torch.nn.functional as F

from .draw import hypot, mix, ramp

PINE = (0.13, 0.34, 0.23)
LEAVES = ((0.27, 0.52, 0.20), (0.35, 0.57, 0.22), (0.22, 0.45, 0.24))
AUTUMN = ((0.88, 0.44, 0.12), (0.82, 0.26, 0.12), (0.93, 0.66, 0.16))
TRUNK = (0.33, 0.22, 0.15)
CROWN = ((-0.155, 0.40, 0.165), (0.155, 0.41, 0.165), (0.0, 0.22, 0.190), (0.0, 0.42, 0.190))
PINE_TIERS = ((0.00, 0.40, 0.155), (0.20, 0.65, 0.225), (0.43, 0.90, 0.290))  # top, base, half

WALLS = (
    (0.0, 0.0, 0.0),  # no house
    (0.86, 0.15, 0.12),
    (0.15, 0.38, 0.88),
    (0.97, 0.80, 0.14),
    (0.97, 0.96, 0.94),
    (0.18, 0.62, 0.26),
    (0.58, 0.24, 0.74),
)
ROOFS = ((0.34, 0.25, 0.24), (0.27, 0.29, 0.36))
GLASS, LAMP = (0.30, 0.40, 0.54), (1.0, 0.86, 0.45)
WATER = (0.15, 0.42, 0.60)
SAND, SNOW_BANK = (0.62, 0.54, 0.40), (0.82, 0.88, 0.97)


class Tree:
    """The kind, colours and light of the trees of each picture; draws them one at a time."""

    def __init__(self, canvas, setting):
        self.canvas, self.setting = canvas, setting
        self.pine, self.autumn = setting.mask("trees", 1), setting.mask("trees", 3)
        self.any = 1 - setting.mask("trees", 0)
        self.side = torch.where(setting.light_x > 0.5, 1.0, -1.0)
        self.alpha = 1 - setting.flawed("faint trees") * canvas.uniform(0.45, 0.75)
        self.mixed = setting.flawed("mixed trees")

    def kinds(self):
        """Pine or not, autumn or not; a picture with the flaw decides anew for every tree."""
        canvas = self.canvas
        pine = mix(self.pine, canvas.chance(0.5), self.mixed)
        return pine, mix(self.autumn, canvas.chance(0.5), self.mixed)

    def _pine(self, across, down):
        """Signed distance of the tiers, in tree heights, and 1 where snow lies on a tier."""
        shape, caps = None, 0
        for top, base, half in PINE_TIERS:
            tier = (down - top) / (base - top)
            side = (across.abs() - half * tier) * 0.88
            tier_shape = torch.maximum(side, torch.maximum(down - base, top - down))
            shape = tier_shape if shape is None else torch.minimum(shape, tier_shape)
            caps = torch.where((tier > 0.05) & (tier < 0.46), 1.0, caps)
        return shape, caps

    def _crown(self, across, down):
        """Signed distances of the crown and of its lit part."""
        shape = lit = None
        for dx, dy, radius in CROWN:
            radius = radius * self.canvas.uniform(0.94, 1.06)
            ball = hypot(across - dx, down - dy) - radius
            glint = hypot(across - dx - 0.05 * self.side, down - dy + 0.06) - radius * 0.74
            shape = ball if shape is None else torch.minimum(shape, ball)
            lit = glint if lit is None else torch.minimum(lit, glint)
        return shape, lit

    def draw(self, picture, x, base, height, shown, haze):
        """One tree per picture, foot at (x, base), where shown; haze 0..1 pales far ones."""
        canvas, setting, colours = self.canvas, self.setting, self.setting.colours
        pine, autumn = self.kinds()
        shown = shown * self.any * self.alpha
        across, down = (canvas.x - x) / height, (canvas.y - base + height) / height
        fog = colours.haze
        foot = hypot(across / 0.27, (canvas.y - base) / (0.045 * height)) - 1
        picture = mix(picture, picture * 0.74, canvas.cover(foot * 0.045 * height, 3.0) * shown)
        stem = torch.maximum(across.abs() - 0.034, torch.maximum(0.5 - down, down - 1))
        bark = mix(canvas.rgb(TRUNK) * colours.ambient, fog, haze)
        picture = mix(picture, bark, canvas.cover(stem * height) * shown)

        shape, caps = self._pine(across, down)
        lit = ramp(-0.12, 0.12, across * self.side)
        needles = canvas.rgb(PINE) * (colours.ambient * 0.72 + colours.rim * 0.42 * lit)
        white = colours.ground_ambient * 0.62 + colours.ground_rim * 0.36 * (0.4 + 0.6 * lit)
        needles = mix(needles, white, 0.92 * setting.snow * caps)
        cover = canvas.cover(shape * height) * shown
        picture = mix(picture, mix(needles, fog, haze), cover * pine)

        shape, glint = self._crown(across, down)
        hue = torch.randint(0, 3, (canvas.batch,), generator=canvas.generator, device=canvas.device)
        leaves = mix(canvas.table(LEAVES, hue), canvas.table(AUTUMN, hue), autumn)
        bright = canvas.cover(glint * height, 2.0)
        leaves = leaves * (colours.ambient * 0.66 + colours.rim * 0.50 * bright)
        cover = canvas.cover(shape * height) * shown
        return mix(picture, mix(leaves, fog, haze), cover * (1 - pine))


def far_trees(canvas, setting, picture):
    """A row of small trees along the horizon, none behind the house."""
    setting.tree = Tree(canvas, setting)
    for slot in range(6):
        x = (slot + 0.5) / 6 + canvas.uniform(-0.035, 0.035)
        clear = ((x - setting.house_x).abs() > 0.20).float()
        shown = canvas.chance(0.85) * mix(torch.ones_like(clear), clear, setting.house)
        height = canvas.uniform(0.12, 0.17)
        base = setting.horizon + canvas.uniform(0.03, 0.05)
        picture = setting.tree.draw(picture, x, base, height, shown, 0.10)
    return picture


def near_trees(canvas, setting, picture):
    """Large trees left and right in front, wholly inside the picture and apart."""
    for x, probability, low, high, drop in (
        (0.34, 0.45, 0.20, 0.25, 0.30),
        (0.66, 0.45, 0.20, 0.25, 0.30),
        (0.14, 0.90, 0.28, 0.35, 0.355),
        (0.86, 0.90, 0.28, 0.35, 0.355),
    ):
        x = x + canvas.uniform(-0.02, 0.02)
        height = canvas.uniform(low, high)
        base = torch.minimum(setting.horizon + drop + canvas.uniform(0, 0.03), 0 * height + 0.965)
        room = 0.30 if drop < 0.33 else 0.26
        clear = ((x - setting.house_x).abs() > room).float()
        shown = canvas.chance(probability) * mix(torch.ones_like(clear), clear, setting.house)
        picture = setting.tree.draw(picture, x, base, height, shown, 0.0)
    return picture


def _walls(canvas, setting, X):
    """Wall colour of each picture; the two-coloured flaw changes it half way along."""
    index = setting.scenes["house"]
    colour = canvas.table(WALLS, index) + canvas.tint(0.02)
    if setting.flaw is None:
        return colour
    other = canvas.table(WALLS, index % 6 + 1)
    split = (canvas.uniform(-0.02, 0.08) < X).float() * setting.flawed("two-coloured house")
    return mix(colour, other, split)


def _house(canvas, setting, picture, centre, base, scale, shown):
    """A gabled front and a long side under one roof, turned to the left or to the right."""
    colours, cover = setting.colours, lambda d, soft=1.0: canvas.cover(d * scale, soft) * shown
    turn = torch.where(canvas.uniform(0, 1) < 0.5, 1.0, -1.0)
    X, Y = (canvas.x - centre) * turn / scale, (canvas.y - base) / scale
    half, side, wall, rise = 0.055, 0.135, 0.080, 0.072
    x0 = -0.040  # middle of the front
    light = (colours.ambient * 0.50 + 0.50) * (1 - 0.10 * setting.night)
    paint = _walls(canvas, setting, X)
    front = torch.maximum((X - x0).abs() - half, torch.maximum(Y, -Y - wall))
    pitch = (X - x0).abs() * (rise / half) - Y - wall - rise
    gable = torch.maximum(pitch * 0.6, Y + wall - 0.003)
    long = torch.maximum(
        torch.maximum(x0 + half - X, X - x0 - half - side), torch.maximum(Y, -Y - wall)
    )
    ridge = (Y + wall + rise) / rise  # 0 at the ridge, 1 at the eaves
    roof = torch.maximum(x0 + half * ridge - X, X - x0 - side - 0.012 - half * ridge) * 0.8
    roof = torch.maximum(roof, torch.maximum(-Y - wall - rise, Y + wall - 0.012))
    trim = torch.maximum(torch.maximum(pitch - 0.013, -pitch - 0.004) * 0.6, Y + wall - 0.014)
    tiles = torch.where(canvas.uniform(0, 1) < 0.5, canvas.rgb(ROOFS[0]), canvas.rgb(ROOFS[1]))
    tiles = tiles * (light * 0.55 + colours.ambient * 0.35 + colours.rim * 0.10)
    white = colours.ground_ambient * 0.72 + colours.ground_rim * 0.26
    tiles = mix(tiles, white, setting.snow * 0.95)
    stack = torch.maximum((X - x0 - 0.115).abs() - 0.011, (Y + wall + rise - 0.004).abs() - 0.026)
    shadow = hypot((X - 0.03) / 0.16, Y / 0.018) - 1
    picture = mix(picture, picture * 0.64, cover(shadow * 0.018, 4.0))
    picture = mix(picture, canvas.rgb((0.43, 0.28, 0.25)) * light, cover(stack))
    picture = mix(picture, paint * light * 0.78, cover(long))
    picture = mix(picture, tiles * 0.96, cover(roof))
    picture = mix(picture, paint * light * 1.03, cover(torch.minimum(front, gable)))
    picture = mix(picture, tiles * 1.05, cover(trim))
    return _openings(canvas, setting, picture, X, Y, x0, light, cover)


def _openings(canvas, setting, picture, X, Y, x0, light, cover):
    """Door and windows of a house in its own coordinates; lamps are lit in the dark."""
    lit = setting.night + setting.sunset * 0.9 + setting.dawn * 0.25
    glass = mix(canvas.rgb(GLASS), canvas.rgb(LAMP), lit)
    frame = canvas.rgb((0.96, 0.94, 0.91)) * light * 0.92
    frame = mix(frame, canvas.rgb((0.36, 0.26, 0.20)) * light, setting.mask("house", 4))
    panes = None
    for x, y in ((x0, -0.094), (x0 + 0.098, -0.044), (x0 + 0.152, -0.044)):
        pane = torch.maximum((X - x).abs() - 0.0145, (Y - y).abs() - 0.0155)
        panes = pane if panes is None else torch.minimum(panes, pane)
    picture = mix(picture, frame, cover(panes - 0.0050))
    picture = mix(picture, glass, cover(panes))
    door = torch.maximum((X - x0).abs() - 0.018, torch.maximum(-Y - 0.056, Y))
    return mix(picture, canvas.rgb((0.37, 0.23, 0.15)) * light, cover(door))


def houses(canvas, setting, picture):
    """The house, by the lake where there is one; the flaws of houses are drawn here too."""
    lake = setting.lake
    base = setting.horizon + mix(canvas.uniform(0.07, 0.15), canvas.uniform(0.045, 0.062), lake)
    scale = mix(canvas.uniform(1.05, 1.30), canvas.uniform(0.98, 1.18), lake)
    shown = setting.house
    if setting.flaw is None:
        return _house(canvas, setting, picture, setting.house_x, base, scale, shown)
    shown = shown * (1 - setting.flawed("faint house") * canvas.uniform(0.35, 0.75))
    cut = ((canvas.x - setting.house_x) * torch.sign(canvas.uniform(-1, 1)) > 0.01).float()
    partial = shown * (1 - setting.flawed("half house") * cut)
    painted = _house(canvas, setting, picture, setting.house_x, base, scale, partial)
    away = torch.where(setting.house_x > 0.5, -1.0, 1.0) * canvas.uniform(0.26, 0.42)
    second = setting.house * setting.flawed("second house")
    return _house(canvas, setting, painted, setting.house_x + away, base, scale, second)


def lake(canvas, setting, picture):
    """An oval of water that mirrors what is behind it, with a bank and some glitter."""
    x, y, colours = canvas.x, canvas.y, setting.colours
    half_height = canvas.uniform(0.098, 0.118)
    centre = setting.horizon + 0.082 + half_height
    oval = ((x - canvas.uniform(0.42, 0.58)) / canvas.uniform(0.46, 0.66)) ** 2
    oval = oval + ((y - centre) / half_height) ** 2 - 1 + 0.07 * canvas.field(6, 5)
    edge = oval * half_height * 0.5
    shore = setting.horizon + 0.068
    ripple = torch.sin(y * 150 + canvas.uniform(0, 6)) * 0.0035 * (1 + 8 * (y - shore).clamp(0, 1))
    source_y = 2 * shore - y - (y - shore).clamp(min=0) * 0.25
    grid = torch.stack(
        [
            ((x + ripple) * 2 - 1).expand(canvas.batch, 1, canvas.size, canvas.size)[:, 0],
            (source_y * 2 - 1).expand(canvas.batch, 1, canvas.size, canvas.size)[:, 0],
        ],
        -1,
    )
    mirror = F.grid_sample(picture, grid, "bilinear", "border", align_corners=False)
    water = mix(colours.middle, canvas.rgb(WATER) * (colours.ambient * 0.8 + 0.1), 0.6)
    surface = mix(mirror * 0.92, water, 0.30 + 0.30 * ramp(0, 0.2, y - shore))
    beam = torch.exp(-(((x - setting.light_x) / 0.05) ** 2)) * (0.5 + 0.5 * torch.sin(y * 150))
    lit = setting.sun * 0.9 + (setting.moon + setting.crescent) * 0.5
    surface = (surface + colours.halo * beam * lit * 0.16).clamp(0, 1)
    sand = mix(canvas.rgb(SAND), canvas.rgb(SNOW_BANK), setting.snow)
    sand = sand * (colours.ground_ambient * 0.85 + colours.rim * 0.06)
    shown = setting.lake * (1 - setting.flawed("faint lake") * canvas.uniform(0.4, 0.7))
    picture = mix(picture, sand, canvas.cover(edge - 0.010, 1.5) * 0.85 * shown)
    return mix(picture, surface, canvas.cover(edge, 1.3) * shown)


def bank(canvas, setting, picture):
    """The strip of ground nearest to the viewer."""
    edge = setting.horizon + canvas.uniform(0.305, 0.335) + 0.012 * canvas.curve(2, 2, 0.3)
    down = ((canvas.y - edge) / (1 - edge)).clamp(0, 1)
    shade = (0.25 + 0.65 * down + 0.04 * canvas.field(12, 8)).clamp(0, 1)
    colour = mix(setting.ground_lit, setting.ground_shade, shade)
    return mix(picture, colour, canvas.cover((edge - canvas.y) * 0.9))
