"""_core.pyi and the extension list the same names, arguments and bases."""

import ast
import inspect
from pathlib import Path

import pytest

import accel
from accel import _core

STUB = ast.parse(Path(accel.__file__).with_name("_core.pyi").read_text())
CLASSES = {n.name: n for n in STUB.body if isinstance(n, ast.ClassDef)}
FUNCTIONS = {n.name: n for n in STUB.body if isinstance(n, ast.FunctionDef)}


def public(thing):
    return {n for n in vars(thing) if not n.startswith("_")}


def arguments(node):
    a = node.args
    names = [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs]
    return [n for n in names if n not in ("self", "cls")]


def test_module():
    assert public(_core) == {*CLASSES, *FUNCTIONS, "version"}


@pytest.mark.parametrize("name", CLASSES)
def test_class(name):
    node, cls = CLASSES[name], getattr(_core, name)
    if issubclass(cls, Exception):
        assert [b.id for b in node.bases] == [b.__name__ for b in cls.__bases__]
        return
    stubs = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    assert {n for n in stubs if not n.startswith("_")} == public(cls)
    for method, stub in stubs.items():
        if method.startswith("_") or stub.decorator_list:
            continue
        text = getattr(cls, method).__doc__ or inspect.getdoc(getattr(cls, method))
        assert text, f"{name}.{method} has no docstring"
    assert cls.__doc__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    function = getattr(_core, name)
    assert function.__doc__
    assert list(inspect.signature(function).parameters) == arguments(FUNCTIONS[name])
