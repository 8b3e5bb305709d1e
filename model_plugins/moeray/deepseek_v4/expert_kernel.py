"""The experts' products on a CPU: vectors of 16 fp32 lanes, compiled by numba for the machine it runs on.

Suffixes: T tokens, P (token, k) pairs, R pairs sorted by expert, D hidden, I expert width, E experts.

Weights lie in blocks of 32 output rows, [blocks, depth, 32], so that every lane of a sum belongs to one output row and
the depth is walked upwards by fused multiply-adds from zero. Nothing else touches a sum: **a row's bits depend on its
own token and expert alone**, not on the other rows of the call, on how experts or rows are split, on the number of
threads, or on how wide the machine's vectors are.

A bf16 block holds two rows in each 32-bit word: the low half is one of its first 16 rows, the high half one of the
others; one shift and one mask widen them. In block j of w13 these are rows 16 j..16 j + 15 of w1 and of w3, so that
gate and up of one unit meet in one tile. Several tokens share one reading of a block, and while one panel of blocks
is used the next one is fetched: where every expert has one or two tokens (decode) a call takes as long as a plain sum
over the same bytes.

What is compiled takes addresses, because NumPy has no bf16. All of it is in this file, apart from the size of a block,
because the copy on disk is renewed when this file changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numpy.typing import NDArray

from moeray.deepseek_v4.expert_layout import BLOCK, LANES, Ints
from moeray.transport.compiled import compiled

TILE_ROWS, TILE_BLOCKS = (6, 2) if "+avx512f" in (config.CPU_FEATURES or get_host_cpu_features()) else (2, 1)
"""Tokens and blocks whose sums fit the registers beside the weights: 24 of 32 with AVX-512, 8 of 16 half as wide with
AVX2, 16 of 32 a quarter as wide with NEON. One token more, and what is spilled takes as long as the products."""
TILE_FLOATS = TILE_ROWS * TILE_BLOCKS * BLOCK
CHUNK_ROWS = 8 * TILE_ROWS
"""Tokens of one expert that are widened to fp32 at a time; they stay in the core's own cache."""

Addresses = NDArray[np.int64]

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_BYTES = ir.IntType(8).as_pointer()

# --- vectors ------------------------------------------------------------------------------------------------------


def _index(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [float(np.float32(value))] * LANES)


def _words(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * LANES)


def _splat(b: ir.IRBuilder, value: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, ir.Constant(_I32, 0)), undefined, _words(0))


def _fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    of_type = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, of_type, f"llvm.fma.v{LANES}f32"), [x, y, z])


def _prefetch(b: ir.IRBuilder, pointer: Any) -> None:
    """Into the second-level cache, for reading."""
    of_type = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(b.module, of_type, "llvm.prefetch.p0i8")
    b.call(function, [pointer, *(ir.Constant(_I32, value) for value in (0, 2, 1))])


def _round_to_bf16(b: ir.IRBuilder, floats: Any) -> Any:
    """The nearest bf16, ties to even, as fp32; NaN stays NaN."""
    bits = b.bitcast(floats, _WORDS)
    odd = b.and_(b.lshr(bits, _words(16)), _words(1))
    rounded = b.and_(b.add(bits, b.add(odd, _words(0x7FFF))), _words(0xFFFF0000))
    is_nan = b.fcmp_unordered("uno", floats, floats)
    return b.bitcast(b.select(is_nan, _words(0x7FC00000), rounded), _FLOATS)


def _exp(b: ir.IRBuilder, z: Any) -> Any:
    """e^z to 2 units in the last place for -87 <= z <= 88; e^-87 below, infinity above. Not for NaN.

    Source: Cephes' expf (S. Moshier): z = n ln 2 + r, a polynomial of degree 7 in r, times 2^n.
    """
    inside = b.select(b.fcmp_ordered("<", z, _floats(-87.0)), _floats(-87.0), z)
    inside = b.select(b.fcmp_ordered("<=", inside, _floats(88.0)), inside, _floats(88.0))  # NaN becomes 88
    to_integer = _floats(1.5 * 2**23)
    n = b.fsub(b.fadd(b.fmul(inside, _floats(1.44269504088896341)), to_integer), to_integer)
    r = _fma(b, n, _floats(2.12194440e-4), _fma(b, n, _floats(-0.693359375), inside))
    polynomial = _floats(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        polynomial = _fma(b, polynomial, r, _floats(term))
    mantissa = b.fadd(_fma(b, polynomial, b.fmul(r, r), r), _floats(1.0))
    power = b.bitcast(b.shl(b.add(b.fptosi(n, _WORDS), _words(127)), _words(23)), _FLOATS)
    return b.select(b.fcmp_ordered(">", z, _floats(88.0)), _floats(np.inf), b.fmul(mantissa, power))


# --- what one tile needs: `element` is uint16 for bf16, float32 for fp32 --------------------------------------------


def _is_bf16(element: Any) -> bool:
    return bool(element == types.uint16)


def _block_at(b: ir.IRBuilder, block: Any, k: Any, *, bf16: bool) -> list[Any]:
    """The 2 x 16 weights of depth k, in fp32."""
    if not bf16:
        first = b.shl(k, _index(1))
        return [b.load(b.gep(block, [b.add(first, _index(half))]), align=64) for half in (0, 1)]
    words = b.load(b.gep(block, [k]), align=64)
    low, high = b.shl(words, _words(16)), b.and_(words, _words(0xFFFF0000))
    return [b.bitcast(low, _FLOATS), b.bitcast(high, _FLOATS)]


def _emit_products(b: ir.IRBuilder, rows: int, blocks: int, arguments: list[Any], *, bf16: bool) -> None:
    """The loop over the depth for one size of tile."""
    x, x_stride, weights, block_bytes, depth, ahead, tile = arguments
    before, loop, after = b.block, b.append_basic_block("depth"), b.append_basic_block("summed")
    x_rows = [b.inttoptr(b.add(x, b.mul(x_stride, _index(4 * row))), _F32.as_pointer()) for row in range(rows)]
    vector = (_WORDS if bf16 else _FLOATS).as_pointer()
    starts = [b.inttoptr(b.add(weights, b.mul(block_bytes, _index(block))), vector) for block in range(blocks)]
    b.branch(loop)
    b.position_at_end(loop)
    k = b.phi(_I64)
    sums = [b.phi(_FLOATS) for _ in range(rows * 2 * blocks)]
    for start in starts:
        line = b.gep(start, [k if bf16 else b.shl(k, _index(1))])
        _prefetch(b, b.gep(b.bitcast(line, _BYTES), [ahead]))
    columns = [half for start in starts for half in _block_at(b, start, k, bf16=bf16)]
    x_of_row = [_splat(b, b.load(b.gep(x_row, [k]), align=4)) for x_row in x_rows]
    added = [_fma(b, column, x_of_row[at // len(columns)], sums[at]) for at, column in enumerate(columns * rows)]
    following = b.add(k, _index(1))
    for phi, start, step in ((k, _index(0), following), *zip(sums, [_floats(0.0)] * len(sums), added, strict=True)):
        phi.add_incoming(start, before)
        phi.add_incoming(step, loop)
    b.cbranch(b.icmp_signed("<", following, depth), loop, after)
    b.position_at_end(after)
    vectors = b.inttoptr(tile, _FLOATS.as_pointer())
    for at, total in enumerate(added):
        row, column = divmod(at, 2 * blocks)
        b.store(total, b.gep(vectors, [_index(row * 2 * TILE_BLOCKS + column)]), align=64)


def _typed_products(
    _: Any, element: Any, rows: Any, blocks: Any, x: Any, x_stride: Any, weights: Any, block_bytes: Any, depth: Any,
    ahead: Any, tile: Any,
) -> Any:  # fmt: skip
    """Sums over the depth of a tile.

    x: fp32 rows, x_stride floats apart. weights: `blocks` blocks, block_bytes apart. ahead: bytes from a weight to what
    is fetched meanwhile. tile: [TILE_ROWS, TILE_BLOCKS * 32] fp32.
    """

    def generate(context: Any, b: ir.IRBuilder, _: Any, arguments: list[Any]) -> Any:
        _, rows, blocks, *others = arguments
        end = b.append_basic_block("end")
        sizes = b.switch(b.add(b.mul(rows, _index(TILE_BLOCKS + 1)), blocks), end)
        for num_rows in range(1, TILE_ROWS + 1):
            for num_blocks in range(1, TILE_BLOCKS + 1):
                case = b.append_basic_block(f"tile_{num_rows}x{num_blocks}")
                sizes.add_case(_index(num_rows * (TILE_BLOCKS + 1) + num_blocks), case)
                b.position_at_end(case)
                _emit_products(b, num_rows, num_blocks, others, bf16=_is_bf16(element))
                b.branch(end)
        b.position_at_end(end)
        return context.get_dummy_value()

    return types.void(element, *[types.int64] * 9), generate


def _typed_activate(_: Any, element: Any, tile: Any, limit: Any, h: Any) -> Any:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) of 16 units.

    tile: 16 gates, then 16 ups. h: 16 fp32, rounded to the element. The comparisons let NaN pass.
    """

    def generate(context: Any, b: ir.IRBuilder, _: Any, arguments: list[Any]) -> Any:
        _, tile, limit, h = arguments
        vectors = b.inttoptr(tile, _FLOATS.as_pointer())
        gate, up = (b.load(b.gep(vectors, [_index(half)]), align=64) for half in (0, 1))
        if _is_bf16(element):
            gate, up = _round_to_bf16(b, gate), _round_to_bf16(b, up)
        high, low = _splat(b, limit), _splat(b, b.fneg(limit))
        gate = b.select(b.fcmp_ordered(">", gate, high), high, gate)
        up = b.select(b.fcmp_ordered(">", up, high), high, up)
        up = b.select(b.fcmp_ordered("<", up, low), low, up)
        silu = b.fdiv(gate, b.fadd(_floats(1.0), _exp(b, b.fneg(gate))))
        product = b.fmul(silu, up)
        if _is_bf16(element):
            product = _round_to_bf16(b, product)
        b.store(product, b.inttoptr(h, _FLOATS.as_pointer()), align=64)
        return context.get_dummy_value()

    return types.void(element, types.int64, types.float32, types.int64), generate


def _typed_put(_: Any, element: Any, tile: Any, out: Any, lanes: Any) -> Any:
    """Round 16 sums, write the first `lanes`; non-zero if one is NaN or Inf."""

    def generate(_: Any, b: ir.IRBuilder, __: Any, arguments: list[Any]) -> Any:
        _, tile, out, lanes = arguments
        floats = b.load(b.inttoptr(tile, _FLOATS.as_pointer()), align=64)
        if _is_bf16(element):
            bits = b.bitcast(_round_to_bf16(b, floats), _WORDS)
            written, width = b.trunc(b.lshr(bits, _words(16)), ir.VectorType(_I16, LANES)), 2
        else:
            bits = written = b.bitcast(floats, _WORDS)
            width = 4
        exponent = _words(0x7F800000)
        not_finite = b.bitcast(b.icmp_unsigned("==", b.and_(bits, exponent), exponent), _I16)
        with b.if_else(b.icmp_signed(">=", lanes, _index(LANES))) as (whole, part):
            with whole:
                b.store(written, b.inttoptr(out, written.type.as_pointer()), align=width)
            with part:
                single = b.inttoptr(out, written.type.element.as_pointer())
                for lane in range(LANES - 1):
                    with b.if_then(b.icmp_signed(">", lanes, _index(lane))):
                        value = b.extract_element(written, ir.Constant(_I32, lane))
                        b.store(value, b.gep(single, [_index(lane)]))
        return b.zext(not_finite, _I64)

    return types.int64(element, types.int64, types.int64, types.int64), generate


def _typed_widen(_: Any, element: Any, x: Any, count: Any, to: Any) -> Any:
    """`count` numbers at x as fp32."""

    def generate(context: Any, b: ir.IRBuilder, _: Any, arguments: list[Any]) -> Any:
        _, x, count, to = arguments
        bf16 = _is_bf16(element)
        source = b.inttoptr(x, (_I16 if bf16 else _I32).as_pointer())
        target = b.inttoptr(to, _I32.as_pointer())
        with cgutils.for_range(b, count) as loop:
            bits = b.load(b.gep(source, [loop.index]))
            if bf16:
                bits = b.shl(b.zext(bits, _I32), ir.Constant(_I32, 16))
            b.store(bits, b.gep(target, [loop.index]))
        return context.get_dummy_value()

    return types.void(element, *[types.int64] * 3), generate


_products: Any = intrinsic(_typed_products)
_activate: Any = intrinsic(_typed_activate)
_put: Any = intrinsic(_typed_put)
_widen: Any = intrinsic(_typed_widen)

# --- compiled functions -------------------------------------------------------------------------------------------


def _gate_up(element: Any, size: int, x: int, top_k: int, hidden: int, width: int, limit: Any, w13_at: Addresses,
             order_R: Ints, starts: Ints, slots: Ints, active: int, x_chunk: int, tile: int, h: int, share: int,
             num_shares: int) -> None:  # fmt: skip
    """h = silu(gate) * up for every pair; this share's units of every expert.

    Args:
        size: bytes of an element.
        x: [T, hidden] elements. w13_at: address of every slot's blocks.
        x_chunk: scratch of this share, [CHUNK_ROWS, hidden] fp32. tile: the same, TILE_FLOATS fp32.
        h: written: [R, width rounded up to 16] fp32.
    """
    num_blocks = (width + LANES - 1) // LANES
    first, last = num_blocks * share // num_shares, num_blocks * (share + 1) // num_shares
    h_row, block_bytes = num_blocks * LANES * 4, hidden * BLOCK * size
    for at in range(active):
        matrix, next_matrix = w13_at[slots[at]], w13_at[slots[min(at + 1, active - 1)]]
        for begin in range(starts[at], starts[at + 1], CHUNK_ROWS):
            num_rows = min(CHUNK_ROWS, starts[at + 1] - begin)
            for row in range(num_rows):
                token = order_R[begin + row] // top_k
                _widen(element, x + token * hidden * size, hidden, x_chunk + row * hidden * 4)
            for block in range(first, last, TILE_BLOCKS):
                blocks, row, panel = min(TILE_BLOCKS, last - block), 0, matrix + block * block_bytes
                ahead = blocks * block_bytes if block + blocks < last else next_matrix + first * block_bytes - panel
                while row < num_rows:
                    tiles_left = (num_rows - row + TILE_ROWS - 1) // TILE_ROWS
                    rows = (num_rows - row) // tiles_left
                    _products(element, rows, blocks, x_chunk + row * hidden * 4, hidden, panel, block_bytes, hidden,
                              ahead, tile)  # fmt: skip
                    for r in range(rows):
                        for c in range(blocks):
                            target = h + (begin + row + r) * h_row + (block + c) * LANES * 4
                            _activate(element, tile + (r * TILE_BLOCKS + c) * BLOCK * 4, limit, target)
                    row, ahead = row + rows, 0


def _down(element: Any, size: int, h: int, hidden: int, width: int, w2_at: Addresses, row_R: Ints, starts: Ints,
          slots: Ints, active: int, tile: int, out: int, bad_P: NDArray[np.uint8], share: int,
          num_shares: int) -> int:  # fmt: skip
    """out = w2 h for every pair; this share's columns of every row. Returns how many rows hold NaN or Inf there.

    Args:
        out: written: [P, hidden] elements. bad_P: set to 1 for such rows.
    """
    num_blocks = (hidden + BLOCK - 1) // BLOCK
    first, last = num_blocks * share // num_shares, num_blocks * (share + 1) // num_shares
    h_floats, block_bytes, num_bad = (width + LANES - 1) // LANES * LANES, width * BLOCK * size, 0
    for at in range(active):
        matrix, end = w2_at[slots[at]], starts[at + 1]
        next_matrix = w2_at[slots[min(at + 1, active - 1)]]
        for block in range(first, last, TILE_BLOCKS):
            blocks, begin, panel = min(TILE_BLOCKS, last - block), np.int64(starts[at]), matrix + block * block_bytes
            ahead = blocks * block_bytes if block + blocks < last else next_matrix + first * block_bytes - panel
            while begin < end:
                tiles_left = (end - begin + TILE_ROWS - 1) // TILE_ROWS
                rows = (end - begin) // tiles_left
                _products(element, rows, blocks, h + begin * h_floats * 4, h_floats, panel, block_bytes, width,
                          ahead, tile)  # fmt: skip
                for r in range(rows):
                    row = row_R[begin + r]
                    for column in range(block * BLOCK, min(hidden, (block + blocks) * BLOCK), LANES):
                        sums = tile + (r * TILE_BLOCKS * BLOCK + column - block * BLOCK) * 4
                        if _put(element, sums, out + (row * hidden + column) * size, hidden - column) != 0:
                            num_bad += 1
                            bad_P[row] = 1
                begin, ahead = begin + rows, 0
    return num_bad


class Products(NamedTuple):
    """See the functions of the same names."""

    gate_up: Callable[..., None]
    down: Callable[..., int]


@cache
def products(*, bf16: bool) -> Products:
    """Compile for bf16 or fp32, or take from disk: seconds the first time on a machine, a fraction of one later."""
    element = types.uint16 if bf16 else types.float32
    i64, ints, addresses = types.int64, types.int32[::1], types.int64[::1]
    gate_up = (element, *[i64] * 5, types.float32, addresses, ints, ints, ints, *[i64] * 6)
    down = (element, *[i64] * 4, addresses, ints, ints, ints, i64, i64, i64, types.uint8[::1], i64, i64)
    return Products(compiled(_gate_up, gate_up), compiled(_down, down))
