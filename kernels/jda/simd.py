"""Vector operations that numba has no words for: bytes through tables, and taps over four rows at once.

Both are LLVM intermediate code, which is exact integer arithmetic on any processor; `look_up` alone asks for an
instruction of AVX-512 VBMI, and has a scalar twin for processors without.
"""

from typing import Any

from llvmlite import binding, ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

LOOKED_UP = 192  # bytes: 64 pixels, and three vectors, after which the channels begin anew

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_BYTES, _SUMS = ir.VectorType(_I8, 64), ir.VectorType(_I32, 16)
_VBMI = bool(binding.get_host_cpu_features().get("avx512vbmi"))


def _data(context, builder, kind, array):
    return context.make_array(kind)(context, builder, array).data


def _load(builder, data, at, kind):
    value = builder.load(builder.bitcast(builder.gep(data, [at]), kind.as_pointer()))
    value.align = 1
    return value


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 1


@intrinsic
def _look_up(typing_context, row, at, lut, out):
    def code(context, builder, signature, arguments):
        row, lut, out = (_data(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 3))
        at = arguments[1]
        i64 = at.type
        kind = ir.FunctionType(_BYTES, [_BYTES] * 3)
        permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.qi.512")
        quarters = [_load(builder, lut, ir.Constant(i64, 64 * i), _BYTES) for i in range(12)]
        for vector in range(3):
            here = builder.add(at, ir.Constant(i64, 64 * vector))
            values = _load(builder, row, here, _BYTES)
            upper = builder.icmp_signed("<", values, ir.Constant(_BYTES, [0] * 64))
            result = values
            for c in range(3):
                low, low2, high, high2 = quarters[4 * c : 4 * c + 4]
                low, high = builder.call(permute, [low, values, low2]), builder.call(permute, [high, values, high2])
                of_channel = [(64 * vector + i) % 3 == c for i in range(64)]
                mask = ir.Constant(ir.VectorType(ir.IntType(1), 64), of_channel)
                result = builder.select(mask, builder.select(upper, high, low), result)
            _store(builder, result, builder.gep(out, [here]))
        return context.get_dummy_value()

    return types.void(row, types.int64, lut, out), code


@njit
def _look_up_scalar(row, at, lut, out):
    for x in range(at // 3, (at + LOOKED_UP) // 3):
        for c in range(3):
            out[3 * x + c] = lut[c, row[3 * x + c]]


look_up: Any = _look_up if _VBMI else _look_up_scalar
"""look_up(row, at, lut, out): the 64 pixels of `row` u8 (3·W,) from byte `at`, a multiple of 3, through `lut` u8
(3, 256) to the same place in `out`."""


@intrinsic
def _weigh_rows(typing_context, pixels, at, rows, taps, first, count, out, to, rows_out):
    def code(context, builder, signature, arguments):
        _, at, rows, _, first, count, _, to, rows_out = arguments
        pixels, taps, out = (_data(context, builder, signature.args[i], arguments[i]) for i in (0, 3, 6))
        sums = cgutils.alloca_once(builder, _SUMS)
        builder.store(ir.Constant(_SUMS, [1 << 21] * 16), sums)
        with cgutils.for_range(builder, count, intp=count.type) as loop:
            column = builder.add(at, builder.mul(loop.index, ir.Constant(count.type, 3)))
            words = ir.Constant(ir.VectorType(_I32, 4), ir.Undefined)
            for r in range(4):
                word = _load(builder, pixels, builder.add(column, builder.extract_value(rows, r)), _I32)
                words = builder.insert_element(words, word, ir.Constant(_I32, r))
            values = builder.zext(builder.bitcast(words, ir.VectorType(_I8, 16)), _SUMS)
            tap = builder.load(builder.gep(taps, [builder.add(first, loop.index)]))
            tap = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), tap, ir.Constant(_I32, 0))
            tap = builder.shuffle_vector(tap, tap, ir.Constant(_SUMS, [0] * 16))
            builder.store(builder.add(builder.load(sums), builder.mul(values, tap)), sums)
        rounded = builder.ashr(builder.load(sums), ir.Constant(_SUMS, [22] * 16))
        words = builder.bitcast(builder.trunc(rounded, ir.VectorType(_I8, 16)), ir.VectorType(_I32, 4))
        for r in range(4):
            word = builder.extract_element(words, ir.Constant(_I32, r))
            place = builder.gep(out, [builder.add(to, builder.extract_value(rows_out, r))])
            _store(builder, builder.trunc(word, _I16), place)
            third = builder.trunc(builder.lshr(word, ir.Constant(_I32, 16)), _I8)
            _store(builder, third, builder.gep(place, [ir.Constant(to.type, 2)]))
        return context.get_dummy_value()

    four, i64 = types.UniTuple(types.int64, 4), types.int64
    return types.void(pixels, i64, four, taps, i64, i64, out, i64, four), code


weigh_rows: Any = _weigh_rows
"""weigh_rows(pixels, at, rows, taps, first, count, out, to, rows_out): one pixel of four rows.

Writes Σₖ pixel(at + 3k + rows[r]) · taps[first + k], rounded from 22 fractional bits, to byte to + rows_out[r] of
`out`, for r < 4 and k < `count`; `pixels` and `out` are flat u8 arrays. Reads the byte behind each pixel as well.
"""
