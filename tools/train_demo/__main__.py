"""python -m tools.train_demo --out DIR [--minutes 8]: make the demo model, or go on making it."""

import argparse
import json
import os
import sys
from pathlib import Path


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tools.train_demo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, help="stop after so long; call again to go on")
    parser.add_argument("--scale", type=float, default=1.0, help="times each stage's seconds")
    parser.add_argument("--scenes", type=int, help="rendered training pictures")
    parser.add_argument("--until", help="leave after this stage")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything (dry run)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--evaluate", type=Path, help="only evaluate this diffusers folder")
    return parser.parse_args()


def stages():
    """[(name, function of the session)] in order."""
    from . import diffusion, judge, vae

    return [
        ("judge", judge.train),
        ("vae128", lambda session: vae.train(session, "vae128")),
        ("vae256", lambda session: vae.train(session, "vae256")),
        ("unet128", lambda session: diffusion.train(session, "unet128", watch)),
        ("unet256", lambda session: diffusion.train(session, "unet256", watch)),
        ("export", export_and_evaluate),
    ]


def watch(trainer, pacer):
    """Now and then in training: the grid and a short score."""
    from . import diffusion, evaluate, judge, vae

    session = trainer.session
    decoder = vae.build().to(session.device).eval()
    decoder.load_state_dict(session.load("vae.pt"))
    size = trainer.means.shape[-1] * 8
    networks = (trainer.unet.eval(), trainer.text.eval(), decoder)
    picture = evaluate.grid(session, *networks, size=size)
    picture.save(session.folder / f"grid-{size}.jpg", quality=90)
    if size == 256:
        found = evaluate.prompted(session, judge.load(session), networks, session.plan.prompts)
        session.log(f"at {pacer.spent:.0f} s:", found["score"])
    trainer.unet.train(), trainer.text.train()
    diffusion.save_generator(session, trainer, "generator.pt")


def export_and_evaluate(session):
    """Write the folder, then judge what was written."""
    from . import evaluate, export

    folder = session.folder / "model"
    export.save(session, folder, export.networks(session))
    session.log(f"wrote {folder}: {export.size(folder)} bytes")
    report(session, folder)
    prompts = evaluate.GRID_PROMPTS.read_text(encoding="utf-8").splitlines()
    if session.gpu:
        peaks = export.largest(session, export.load(session, folder), prompts)
        session.log("largest values in fp16:", peaks)


def report(session, folder):
    """results.json and grid.png for a diffusers folder."""
    from . import evaluate, export

    networks = export.load(session, folder)
    evaluate.grid(session, *networks).save(session.folder / "grid.png")
    results = evaluate.whole(session, networks)
    results["bytes"] = export.size(folder)
    text = json.dumps(results, indent=1)
    (session.folder / "results.json").write_text(text + "\n", encoding="utf-8")
    session.log("prompts:", results["prompts"]["score"])
    session.log("shuffled:", results["prompts"]["shuffled"])
    session.log("more prompts:", results["more prompts"]["score"])
    session.log("judge:", results["judge"])


def main():
    options = arguments()
    # Compiled kernels are kept with the run, so that the next piece of it starts at once.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.out.absolute() / "compiled"))
    import dataclasses

    import torch

    from .session import OutOfTime, Plan, Session

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    plan = Plan.tiny() if options.tiny else Plan()
    seconds = {name: value * options.scale for name, value in plan.seconds.items()}
    plan = dataclasses.replace(plan, seconds=seconds, scenes=options.scenes or plan.scenes)
    session = Session(options.out, plan, options.minutes, not options.eager)
    session.log("torch", torch.__version__, "on", session.device)
    if options.evaluate:
        report(session, options.evaluate)
        return 0
    done = session.path("done.json")
    finished = json.loads(done.read_text()) if done.exists() else []
    for name, run in stages():
        if name in finished:
            continue
        torch.manual_seed(len(finished))
        try:
            run(session)
        except OutOfTime:
            session.log(f"time is over in {name}; call again to go on")
            return 0
        finished.append(name)
        done.write_text(json.dumps(finished))
        if name == options.until:
            return 0
    session.log("finished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
