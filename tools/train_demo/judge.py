"""The judge: a small convnet that reads a picture's attributes and counts its houses and discs.

A plain classifier takes the easiest cue (a glow for a sun) and cannot object to what it never
saw (a second house).  So this one also learns from spoilt renderings: each of light, trees, lake
and house has one more class, "wrong", and houses and discs are counted.  An attribute is right
only when its class is the wanted one and the count agrees.  Its inner layers also serve the
autoencoder as a perceptual distance.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .scene import ATTRIBUTES, FLAWS
from .session import Pacer, to_float

WRONG = {name: len(ATTRIBUTES[name]) for name in ("light", "trees", "lake", "house")}
CLASSES = {name: len(values) + (name in WRONG) for name, values in ATTRIBUTES.items()}
COUNTS = {"discs": "light", "houses": "house"}  # counter: the attribute it must agree with
HEADS = {**CLASSES, **dict.fromkeys(COUNTS, 3)}
UNKNOWN = -100  # cross_entropy's ignored label
SPOILS = {
    "second house": "house",
    "faint house": "house",
    "half house": "house",
    "two-coloured house": "house",
    "second disc": "light",
    "faint disc": "light",
    "hybrid moon": "light",
    "mixed trees": "trees",
    "faint trees": "trees",
    "faint lake": "lake",
}


def labels(scenes, flaw=None):
    """What the judge should answer: {head: [N] int64}."""
    answer = {name: scenes[name].clone() for name in ATTRIBUTES}
    answer["discs"] = (scenes["light"] > 0).long()
    answer["houses"] = (scenes["house"] > 0).long()
    if flaw is None:
        return answer
    for name, attribute in SPOILS.items():
        answer[attribute][flaw == FLAWS.index(name)] = WRONG[attribute]
    bare = flaw == FLAWS.index("glow without disc")
    answer["light"][bare] = answer["discs"][bare] = 0
    answer["houses"][flaw == FLAWS.index("second house")] = 2
    answer["discs"][flaw == FLAWS.index("second disc")] = 2
    for name, counter in (("faint house", "houses"), ("half house", "houses")):
        answer[counter][flaw == FLAWS.index(name)] = UNKNOWN
    answer["discs"][flaw == FLAWS.index("faint disc")] = UNKNOWN
    return answer


def _convolution(c_in, c_out, stride):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()
    )


class Judge(nn.Module):
    """[B, 3, 256, 256] in -1..1 to {head: [B, classes]}."""

    CHANNELS = (3, 32, 64, 96, 128, 192)

    def __init__(self):
        super().__init__()
        pairs = zip(self.CHANNELS, self.CHANNELS[1:])
        self.stages = nn.ModuleList(
            nn.Sequential(_convolution(a, b, 1), _convolution(b, b, 2)) for a, b in pairs
        )
        self.squeeze = nn.Conv2d(192, 32, 1)
        self.hidden = nn.Linear(192 + 32 * 64, 256)
        self.heads = nn.ModuleDict({name: nn.Linear(256, n) for name, n in HEADS.items()})

    def features(self, x, stages=5):
        """Outputs of the first stages, each half as large as the one before."""
        found = []
        for stage in self.stages[:stages]:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x):
        x = self.features(x)[-1]
        x = torch.cat([x.amax((2, 3)), self.squeeze(x).flatten(1)], 1)
        x = F.relu(self.hidden(x))
        return {name: head(x) for name, head in self.heads.items()}


def _roughen(x):
    """Blur, noise and colour casts, as a decoder may leave them."""
    if torch.rand(()) < 0.5:
        small = int(torch.randint(112, 224, ()))
        x = F.interpolate(x, size=small, mode="bilinear", antialias=True)
        x = F.interpolate(x, size=256, mode="bicubic")
    gain = 1 + 0.06 * torch.randn(len(x), 1, 1, 1, device=x.device)
    shift = 0.03 * torch.randn(len(x), 3, 1, 1, device=x.device)
    noise = torch.randn_like(x) * (0.05 * torch.rand(()).item())
    return x * gain + shift + noise


def _mirrored(x):
    """Half of the pictures from right to left: the denoiser learns from both, and paints both."""
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, x.flip(3), x)


def train(session):
    """Train the judge on clean and spoilt renderings; leaves judge.pt."""
    plan = session.plan
    clean, _, clean_pictures = session.pictures("training")
    spoilt, flaw, spoilt_pictures = session.pictures("flawed")
    clean, spoilt = labels(clean), labels(spoilt, flaw)
    judge = Judge().to(session.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.02)
    state = session.load("judge-training.pt") or {"spent": 0.0, "step": 0}
    if "judge" in state:
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
    pacer = Pacer(plan, "judge", session.deadline, state["spent"], state["step"])
    model, total = session.compile(judge), torch.zeros(())
    while pacer.running():
        curve = 0.505 + 0.495 * math.cos(math.pi * pacer.fraction())
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (pacer.step + 1) / 100) * curve
        some = plan.judge_batch * 2 // 3
        i = torch.randint(0, len(clean_pictures), (some,), device=session.device)
        j = torch.randint(0, len(flaw), (plan.judge_batch - some,), device=session.device)
        x = to_float(torch.cat([clean_pictures[i], spoilt_pictures[j]]))
        x = _roughen(_mirrored(x)).contiguous(memory_format=torch.channels_last)
        with session.autocast():
            answer = model(x)
        total = 0
        for name, logits in answer.items():
            wanted = torch.cat([clean[name][i], spoilt[name][j]])
            loss = F.cross_entropy(logits.float(), wanted, reduction="sum", ignore_index=UNKNOWN)
            total = total + loss / len(x)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        pacer.step += 1
        if pacer.step % 20 == 0:
            session.synchronize()
    record = {"judge": judge.state_dict(), "optimizer": optimizer.state_dict()}
    session.save("judge-training.pt", {**record, "spent": pacer.spent, "step": pacer.step})
    session.log(f"judge: last loss {float(total):.4f}")
    session.end_of_stage("judge", pacer)
    session.save("judge.pt", judge.state_dict())
    _report(session, judge.eval())


def _report(session, judge):
    for name in ("validation", "flawed validation"):
        scenes, flaw, pictures = session.pictures(name)
        answer = read(session, judge, to_float(pictures))
        session.log(f"judge on {name}:", accuracy(answer, labels(scenes, flaw)))


def load(session):
    """The trained judge, frozen."""
    judge = Judge().to(session.device)
    judge.load_state_dict(session.load("judge.pt"))
    return judge.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def read(session, judge, pictures):
    """The judge's answers for pictures in -1..1: {head: [N] int64}."""
    parts = []
    for some in pictures.split(250):
        some = some.to(session.device).contiguous(memory_format=torch.channels_last)
        with session.autocast():
            parts.append({k: v.float().argmax(1) for k, v in judge(some).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in HEADS}


def accuracy(answer, wanted):
    """Percent right for each head, unknown labels left out."""
    result = {}
    for name in HEADS:
        known = wanted[name] != UNKNOWN
        right = (answer[name] == wanted[name])[known]
        result[name] = round(100 * right.float().mean().item(), 2)
    return result


def right(answer, wanted):
    """{attribute: [N] bool}: class as wanted and, for light and house, the count as well."""
    result = {name: answer[name] == wanted[name] for name in ATTRIBUTES}
    for counter, attribute in COUNTS.items():
        result[attribute] &= answer[counter] == (wanted[attribute] > 0).long()
    return result
