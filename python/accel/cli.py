"""The command line: `accel generate`, `accel info`, `accel explain`."""

import argparse
import sys
import time
from pathlib import Path

import accel

from ._core import AccelError

PARTS = ("unet", "vae", "vae_encoder", "text_encoder", "text_encoder_2")


def _size(text):
    """Height and width of "512", "512x768" (width x height)."""
    parts = text.lower().split("x")
    try:
        numbers = [int(p) for p in parts]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected 512 or 512x768") from error
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected 512 or 512x768")
    return numbers[-1], numbers[0]


def _parser():
    parser = argparse.ArgumentParser(
        prog="accel", description="Stable Diffusion on a C engine, without PyTorch.",
        epilog="Without --model, the small model that ships with accel is used: landscapes of "
               "256x256 pixels.")
    parser.add_argument("--version", action="version", version=f"accel {accel.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_info(commands)
    _add_explain(commands)
    return parser


def _add_model(command):
    command.add_argument("--model", metavar="FOLDER", type=Path,
                         help="a diffusers model folder (default: the model that ships)")
    command.add_argument("--variant", help="read <name>.VARIANT.safetensors, as fp16")


def _add_device(command):
    command.add_argument("--device", default="cpu", metavar="NAME",
                         help='"cpu", "cuda", "cuda:1"; explain also takes "null", which needs no '
                              "hardware (default: cpu)")


def _add_generate(commands):
    c = commands.add_parser(
        "generate", help="make a picture from a prompt",
        description="Makes pictures from a prompt and writes them as PNG.",
        epilog='example: accel generate "a red house by a lake at night, snow" -o house.png')
    c.add_argument("prompt", help="what the picture shows")
    c.add_argument("-o", "--output", type=Path, default=Path("out.png"), metavar="FILE",
                   help="where to write (default: out.png; with -n, out-1.png, out-2.png ...)")
    c.add_argument("-n", "--number", type=int, default=1, metavar="N", help="pictures to make")
    _add_model(c)
    c.add_argument("--negative", metavar="TEXT", help="what the picture shall not show")
    c.add_argument("--steps", type=int, metavar="N",
                   help="denoising steps (default: 50; 20 for the model that ships)")
    c.add_argument("--guidance", type=float, metavar="X",
                   help="how closely to follow the prompt (default: 7.5, SDXL 5; 3 for the model "
                        "that ships)")
    c.add_argument("--guidance-rescale", type=float, default=0.0, metavar="X",
                   help="0 to 1, against washed-out colours (default: 0)")
    c.add_argument("--seed", type=int, metavar="N",
                   help="the same seed gives the same picture (default: another each time)")
    c.add_argument("--size", type=_size, metavar="WxH", help="pixels (default: the model's own)")
    c.add_argument("--scheduler", metavar="NAME",
                   help="ddim, pndm, euler, euler_a, dpm++ or dpm++_sde, or a diffusers class "
                        "name (default: the model's own)")
    c.add_argument("--eta", type=float, default=0.0, metavar="X", help="DDIM's share of noise")
    c.add_argument("--clip-skip", type=int, metavar="N", help="text encoder layers to leave out")
    _add_device(c)
    c.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                   help="what a GPU computes in (default: the dtype of the files)")
    c.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    c.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no report")
    c.set_defaults(run=_generate)


def _add_info(commands):
    c = commands.add_parser("info", help="what is here",
                            description="Version, devices, libraries, kernels, a self-test.")
    c.add_argument("--kernels", action="store_true", help="list every kernel")
    c.set_defaults(run=_info)


def _add_explain(commands):
    c = commands.add_parser(
        "explain", help="print the plan of a network",
        description="Prints what runs for a size: kernels, shapes, offsets, FLOPs, bytes. Needs "
                    "config.json; without weights float32 ones are assumed.")
    c.add_argument("part", nargs="?", default="unet", choices=PARTS, help="default: unet")
    _add_model(c)
    c.add_argument("--size", type=_size, metavar="WxH", help="pixels (default: the model's own)")
    c.add_argument("--batch", type=int, metavar="N", help="default: 2 for the UNet, else 1")
    c.add_argument("--tokens", type=int, metavar="N", help="length of the text (default: 77)")
    _add_device(c)
    c.add_argument("--json", action="store_true", help="as JSON")
    c.add_argument("--passes", action="store_true", help="also the graph after each pass")
    c.add_argument("--profile", action="store_true",
                   help="run it over random inputs: how long each step takes, and how far that is "
                        "from what the device could do")
    c.add_argument("--passes-off", default="", metavar="A,B", help="passes to leave out")
    c.set_defaults(run=_explain)


# ---- generate ------------------------------------------------------------------------------------


def _model_folder(args):
    if args.model is not None:
        return args.model
    if not (accel.demo_model() / "model_index.json").is_file():
        raise AccelError("this build has no model inside; give one with --model FOLDER")
    return accel.demo_model()


def _names(path, count):
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]


def _check_format(path):
    """Refuses a name that says no picture format, before minutes of drawing."""
    from PIL import Image

    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg") and suffix not in Image.registered_extensions():
        raise AccelError(f"--output: found {str(path)!r}, expected a name that ends in a picture "
                         "format, as .png")


def _generate(args):
    start = time.monotonic()
    _check_format(args.output)
    if args.threads is not None:
        accel.set_num_threads(args.threads)
    shipped = args.model is None
    pipe = accel.Pipeline.from_pretrained(_model_folder(args), variant=args.variant,
                                          device=args.device, dtype=args.dtype)
    height, width = args.size or (None, None)
    result = pipe(
        args.prompt, negative_prompt=args.negative, seed=args.seed, height=height, width=width,
        num_inference_steps=args.steps if args.steps is not None else 20 if shipped else 50,
        guidance_scale=args.guidance if args.guidance is not None else 3.0 if shipped else None,
        guidance_rescale=args.guidance_rescale, scheduler=args.scheduler, eta=args.eta,
        clip_skip=args.clip_skip, num_images_per_prompt=args.number, progress_bar=not args.quiet)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for image, name in zip(result.images, _names(args.output, args.number), strict=True):
        image.save(name)
        if not args.quiet:
            print(name)
    if not args.quiet:
        print(f"seed {result.seeds}, {time.monotonic() - start:.1f} s", file=sys.stderr)


# ---- info and explain ----------------------------------------------------------------------------


def _info(args):
    from .info import print_info

    return 0 if print_info(kernels=args.kernels) else 1


def _explain(args):
    from .reporting import explain_folder

    height, width = args.size or (None, None)
    print(explain_folder(_model_folder(args), args.part, height=height, width=width,
                         batch=args.batch, tokens=args.tokens, device=args.device,
                         variant=args.variant, json=args.json, passes=args.passes,
                         passes_off=args.passes_off, profile=args.profile))


def main(argv=None):
    """Entry point of `accel`; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except AccelError as error:
        print(f"accel: {error}", file=sys.stderr)
    except BrokenPipeError: # the reader, `head` for one, has enough
        sys.stdout = None   # nothing is left to flush at exit
        return 0
    except OSError as error:
        print(f"accel: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("accel: interrupted", file=sys.stderr)
        return 130
    return 1
