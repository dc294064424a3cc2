"""Importing accel is cheap and needs no PyTorch, not even installed."""

import subprocess
import sys

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "peft", "accelerate"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


def run(code, *args):
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_no_torch_and_little_else():
    out = run("import sys, accel; print(*sorted(m.split('.')[0] for m in sys.modules))")
    heavy = {"torch", "diffusers", "transformers", "numpy", "tokenizers", "PIL", "tqdm"}
    assert not heavy & set(out.split())


def test_every_public_name_resolves_without_torch():
    run(BLOCK + "import accel\nfor n in accel.__all__: getattr(accel, n)")


def test_public_names_are_no_modules():
    """A submodule of the same name would take a function's place once it is imported."""
    for names in ("accel.__all__", "reversed(accel.__all__)"):
        out = run(f"import accel\nfor n in {names}: getattr(accel, n)\n"
                  "print(*[n for n in accel.__all__ if type(getattr(accel, n)) is type(accel)])")
        assert out.strip() == ""


def test_a_picture_without_torch(sd_folder):
    out = run(BLOCK + """
import accel
pipe = accel.Pipeline.from_pretrained(sys.argv[1])
image = pipe("the red house", num_inference_steps=2, seed=1).images[0]
report = accel.report(pipe)
print(image.size, report["components"]["unet"]["native_runs"], 'torch' in sys.modules)
""", sd_folder)
    assert out.split("\n")[0] == "(16, 16) 1 False"


def test_compile_without_torch_names_what_it_takes():
    out = run(BLOCK + """
import accel
for x in (None, 3, object()):
    try:
        accel.compile(x)
    except accel.UnsupportedError as error:
        print(error)
""")
    assert out.count("expected a module of diffusers or transformers") == 3


def test_one_build_for_all_pythons():
    import accel

    assert ".abi3." in accel._core.__file__
