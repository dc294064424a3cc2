"""Drawing tools for a batch of pictures: coordinates, random numbers, colours and soft edges.

Everything here is a torch tensor of shape [B, C, H, W] (or broadcasts to it), so one call draws
the same kind of thing in every picture of the batch.  Positions and lengths are in picture
widths, x to the right and y downwards, both from 0 to 1; colours are linear in 0..1.
"""

import torch
import torch.nn.functional as F


def mix(a, b, amount):
    """a where amount is 0, b where it is 1."""
    return a + (b - a) * amount


def ramp(low, high, value):
    """Smooth step from 0 at low to 1 at high; low may be above high."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def hypot(dx, dy):
    """Distance of each pixel, [B, 1, S, S]."""
    return (dx * dx + dy * dy).sqrt()


class Canvas:
    """Coordinates and random numbers of one batch of square pictures."""

    def __init__(self, batch, size, generator, device):
        self.batch, self.size, self.generator, self.device = batch, size, generator, device
        centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
        self.x = centres.view(1, 1, 1, size)
        self.y = centres.view(1, 1, size, 1)
        self.pixel = 1.0 / size

    def uniform(self, low, high, channels=1):
        """A number per picture in [low, high): [B, channels, 1, 1]."""
        shape = (self.batch, channels, 1, 1)
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def chance(self, probability):
        """1.0 with this probability, else 0.0, for each picture: [B, 1, 1, 1]."""
        return (self.uniform(0, 1) < probability).float()

    def tint(self, amount):
        """A small random colour offset per picture: [B, 3, 1, 1]."""
        return self.uniform(-amount, amount, 3)

    def _smooth(self, rows, columns, height, width):
        """Gaussian noise on a rows x columns grid, smoothly enlarged to [B, 1, height, width]."""
        knots = torch.randn(
            self.batch, 1, rows + 2, columns + 2, generator=self.generator, device=self.device
        )
        size = (
            height if rows == 1 else height * (rows + 2) // rows,
            width if columns == 1 else width * (columns + 2) // columns,
        )
        field = F.interpolate(knots, size=size, mode="bicubic", align_corners=False)
        return field[:, :, :height, :width]

    def field(self, rows, columns):
        """Smooth noise over the picture, [B, 1, S, S], with about rows x columns bumps."""
        return self._smooth(rows, columns, self.size, self.size)

    def curve(self, knots, octaves=2, falloff=0.4):
        """A smooth random function of x, [B, 1, 1, S]: a sum of octaves, each finer and lower."""
        total, height = 0, 1.0
        for _ in range(octaves):
            total = total + height * self._smooth(1, knots, 1, self.size)
            knots, height = knots * 2, height * falloff
        return total

    def column(self, knots):
        """A smooth random function of y, [B, 1, S, 1]."""
        return self._smooth(knots, 1, self.size, 1)

    def cover(self, distance, softness=1.0):
        """Coverage 0..1 from a signed distance (negative inside); softness in pixels."""
        return (0.5 - distance / (self.pixel * softness)).clamp(0, 1)

    def rgb(self, colour):
        """One colour for the whole batch, [1, 3, 1, 1]."""
        return torch.tensor(colour, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)

    def table(self, rows, index):
        """Row index[b] of a table for each picture, [B, C, 1, 1]."""
        rows = torch.tensor(rows, dtype=torch.float32, device=self.device)
        return rows[index].view(len(index), -1, 1, 1)

    def at(self, curve, x):
        """Value of a curve [B, 1, 1, S] at x [B, 1, 1, 1]."""
        column = (x * self.size).long().clamp(0, self.size - 1)
        return curve.gather(3, column)
