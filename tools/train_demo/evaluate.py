"""Does the model do as it is told?  Pictures for prompts, read by the judge; a grid to look at.

The prompts ask for reserved combinations and name every attribute.  Beside the score stand the
judge's own: on rendered truth, on spoilt renderings, and on prompts shuffled among the pictures
(what a model that ignores its prompt would get).
"""

from pathlib import Path

import torch

from . import captions, diffusion, vae
from . import judge as judges
from .scene import ATTRIBUTES
from .session import to_float

SEED = 2024
FIRST_SEED = 1000  # of the noise; prompt i starts from FIRST_SEED + i
GRID_PROMPTS = Path(__file__).with_name("grid_prompts.txt")


def sheet(pictures, columns, margin=4):
    """Pictures in -1..1, [N, 3, S, S], side by side as one image."""
    from PIL import Image

    data = ((pictures.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    data = data.permute(0, 2, 3, 1).numpy()
    size = data.shape[1] + margin
    lines = (len(data) + columns - 1) // columns
    image = Image.new("RGB", (columns * size - margin, lines * size - margin), "white")
    for i, picture in enumerate(data):
        image.paste(Image.fromarray(picture), (i % columns * size, i // columns * size))
    return image


def pictures(session, unet, text, decoder, prompts, seeds, **options):
    """Pictures in -1..1 for prompts."""
    parts = []
    for i in range(0, len(prompts), 250):
        some = slice(i, i + 250)
        z = diffusion.sample(session, unet, text, prompts[some], seeds[some], **options)
        parts.append(vae.decode(session, decoder, z / vae.SCALE))
    return torch.cat(parts)


def grid(session, unet, text, decoder, **options):
    """The fixed prompts' pictures, seeds 0, 1, 2, ...: none is picked."""
    prompts = GRID_PROMPTS.read_text(encoding="utf-8").splitlines()
    seeds = list(range(len(prompts)))
    return sheet(pictures(session, unet, text, decoder, prompts, seeds, **options), 4)


def score(answer, wanted):
    """Percent right per attribute, over all attributes, and of pictures right in everything."""
    table = judges.right(answer, wanted)
    result = {name: round(100 * hits.float().mean().item(), 2) for name, hits in table.items()}
    hits = torch.stack(list(table.values()))
    result["all attributes"] = round(100 * hits.float().mean().item(), 2)
    result["whole pictures"] = round(100 * hits.all(0).float().mean().item(), 2)
    return result


def _wishes(rows, device):
    return {name: torch.tensor([row[name] for row in rows], device=device) for name in ATTRIBUTES}


def prompted(session, judge, networks, count, seed=SEED, **options):
    """Score of pictures for count held-out prompts, and of the same pictures shuffled."""
    asked = captions.prompts(count, seed)
    texts = [text for text, _ in asked]
    wanted = _wishes([row for _, row in asked], session.device)
    seeds = [FIRST_SEED + i for i in range(count)]
    made = pictures(session, *networks, texts, seeds, **options)
    answer = judges.read(session, judge, made)
    other = {name: values.roll(1) for name, values in wanted.items()}
    missed = [
        {"prompt": texts[i], "wrong": name}
        for name, hits in judges.right(answer, wanted).items()
        for i in (~hits).nonzero()[:, 0].tolist()
    ]
    return {"score": score(answer, wanted), "shuffled": score(answer, other), "missed": missed}


def judged_truth(session, judge):
    """What the judge itself is worth: clean renderings, shuffled wishes, spoilt renderings."""
    scenes, _, clean = session.pictures("validation")
    answer = judges.read(session, judge, to_float(clean))
    other = {name: values.roll(1) for name, values in scenes.items()}
    spoilt, flaw, rendered = session.pictures("flawed validation")
    seen = judges.read(session, judge, to_float(rendered))
    return {
        "rendered truth": score(answer, scenes),
        "mirrored truth": score(judges.read(session, judge, to_float(clean.flip(3))), scenes),
        "shuffled": score(answer, other),
        "spoilt": judges.accuracy(seen, judges.labels(spoilt, flaw)),
    }


def whole(session, networks):
    """Everything that results.json records; networks are (unet, text, decoder)."""
    judge = judges.load(session)
    plan, results = session.plan, {}
    results["judge"] = judged_truth(session, judge)
    results["prompts"] = prompted(session, judge, networks, plan.prompts)
    results["more prompts"] = prompted(session, judge, networks, plan.more_prompts, SEED + 1)
    for guidance in (1.0, 2.0, 5.0, 7.5):
        found = prompted(session, judge, networks, plan.prompts, guidance=guidance)
        results[f"guidance {guidance:g}"] = found["score"]
    for steps in (10, 50):
        found = prompted(session, judge, networks, plan.prompts, steps=steps)
        results[f"{steps} steps"] = found["score"]
    return results
