"""A pixel at a time: 32-bit loads and stores at any byte of an array, which numba has no word for.

A pixel has three bytes, so a word holds the first byte of the next one too. Read where that byte exists; write in
ascending order, so that it is overwritten.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_WORD = ir.IntType(32)


def _address(context, builder, array_type, array, at):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _WORD.as_pointer())


@intrinsic
def _load_word(typing_context, array, at):
    """The u32 at byte `at` (u64) of a contiguous u8 array: `array[at]` in its lowest eight bits."""

    def code(context, builder, signature, arguments):
        word = builder.load(_address(context, builder, signature.args[0], *arguments))
        word.align = 1
        return word

    return types.uint32(array, types.uint64), code


@intrinsic
def _store_word(typing_context, array, at, word):
    """Write `word` (u32) to the bytes `at` to `at` + 3 of a contiguous u8 array."""

    def code(context, builder, signature, arguments):
        array, at, word = arguments
        builder.store(word, _address(context, builder, signature.args[0], array, at)).align = 1
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint32), code


# Called from compiled code without the typing context, which a type checker cannot know.
load_word: Any = _load_word
store_word: Any = _store_word
