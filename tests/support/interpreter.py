"""Triton's interpreter, for tests that run in processes of their own: it is chosen when a kernel is decorated."""

import dataclasses
import functools
import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}


def passes(*paths: Path, **environment: str) -> None:
    """Run the tests of files in one process.

    Plugins are left out: pytest compiles every file of theirs, of Hypothesis 200.
    """
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:  # among those of pytest it would delete what other runs have left
        child = subprocess.run(
            [*pytest, f"--basetemp={folder}/run", *paths],
            env=os.environ | ENVIRONMENT | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment,
            capture_output=True,
            text=True,
        )
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]


@functools.cache
def hasten() -> None:
    """Look once for what is built in, replace it once a launch, and know the types' dtypes: two thirds of the time went
    into doing so at each call of a function in a kernel. Of the rest two fifths went into sums in 64 bits, for an
    assertion of no overflow that is made with TRITON_DEBUG alone.

    And take an index out of an array by `item`: Triton 3.6 does so in a way that NumPy 2.4 refuses.
    """
    from triton import language
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    replace, dtype_of, dtypes = interpreter._patch_lang, interpreter._get_np_dtype, {}
    patch = interpreter._patch_lang_tensor

    @functools.cache
    def names(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    @functools.cache
    def languages(function) -> list:
        seen = function.__globals__.values()
        return [module for module in seen if inspect.ismodule(module) and module in (language, language.core)]

    def replace_builtins(package, builder, scope) -> None:
        for name in names(package):
            if is_builtin(member := getattr(package, name)):  # which it is not where it was replaced already
                interpreter._patch_attr(package, name, member, builder, scope)

    def replace_once(function):
        if any(is_builtin(module.arange) for module in languages(function)):
            return replace(function)
        return interpreter._LangPatchScope()

    def dtype(of):
        name = of.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype_of(of)
        return dtypes[name]

    def patch_tensor(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_builtin = replace_builtins
    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = dtype
    interpreter._patch_lang_tensor = patch_tensor
