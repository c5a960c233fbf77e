"""Elementwise steps on a CPU, compiled by numba: each in one pass where torch takes four to ten.

The search repeats them for every point of the grid, and with a few hundred tokens to an expert torch's passes take as
long as the matrix products. All take bfloat16 tensors that lie contiguous in memory, and let other threads run; what is
around them is numpy's, since Python's lock changes hands with each of torch's operations. `int4` and `experts` say what
they compute, and compute it by torch everywhere else.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from mmq.tensors.codes import HALF_RANGE, Q_MAX, Q_MIN, SMALLEST_GROUP

_BF16 = torch.finfo(torch.bfloat16)
_EPSILON, _TINY = np.float32(_BF16.eps), np.float32(_BF16.tiny)
_HALF_RANGE, _Q_MIN, _Q_MAX = np.float32(HALF_RANGE), np.float32(Q_MIN), np.float32(Q_MAX)
# torch rounds a number that is added to a tensor to the tensor's dtype.
_SMALLEST_GROUP = np.float32(torch.tensor(SMALLEST_GROUP, dtype=torch.bfloat16).item())
# bf16 is the upper half of fp32; rounding to nearest even adds just under half of the last kept bit, and that bit.
_HALF, _SHIFT, _ONE = np.uint32(0x7FFF), np.uint32(16), np.uint32(1)
_UNIT, _TWO, _NO_GAIN = np.float32(1), np.float32(2), np.float32(-np.inf)
# Rows whose columns are rounded at a time, at most, in vectors of eight; columns whose errors are passed on to all
# before them in one pass, which `_round_side_by_side` spells out.
_SIDE_BY_SIDE, _VECTOR, _PASSED = 32, 8, 8
# Bits of numbers below zero, turned around, have the numbers' order.
_SIGN, _ALL_BUT_SIGN, _LEAST = np.int32(31), np.int32(0x7FFFFFFF), np.int32(-0x80000000)
_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
# e4m3: a sign, four bits of exponent with a bias of 7 (fp32: 127), three of mantissa, which lie 20 bits lower in fp32.
_BLOCK = 128
_E4M3_SIGN, _E4M3_MAGNITUDE, _E4M3_NAN = np.uint32(0x80), np.uint32(0x7F), np.uint8(0x7F)
_E4M3_SHIFT, _E4M3_SIGN_SHIFT = np.uint32(20), np.uint32(24)
_E4M3_BIAS = np.uint32((127 - 7) << 23)
# Codes below have exponent 0, which stands for 1 - 7 without the leading one.
_E4M3_NORMAL, _E4M3_LEAST_BIAS, _E4M3_LEAST = np.uint32(8), np.uint32((127 - 7 + 1) << 23), np.float32(2.0**-6)


def fake_quantize_scaled(
    weight: torch.Tensor, scales: torch.Tensor, group_size: int, out: torch.Tensor, change: bool
) -> None:
    """`int4.fake_quantize_scaled`, bit for bit."""
    columns = weight.shape[2]
    by_channel = np.ascontiguousarray(np.broadcast_to(scales.numpy(), (weight.shape[0], 1, columns)))
    by_channel = by_channel.reshape(-1, columns // group_size, group_size)
    with np.errstate(all="ignore"):
        inverse = 1 / by_channel
    _quantize(_groups(weight, group_size), by_channel, inverse, _groups(out, group_size), change)


def normalized_mean(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """`int4.normalized_mean`, bit for bit where no weight is infinite."""
    experts, _, columns = weight.shape
    sums = torch.zeros(experts, columns, dtype=torch.float64)
    _normalize(_groups(weight, group_size), sums.view(experts, -1, group_size).numpy())
    return sums


def combine(
    outputs: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, start: torch.Tensor, first: int
) -> torch.Tensor:
    """`experts.combine`, bit for bit."""
    _combine(_bits(outputs), place.numpy(), weights.numpy(), start.numpy(), first)
    return start


def token_losses(
    outputs: torch.Tensor, place: torch.Tensor, weights: torch.Tensor, reference: torch.Tensor, first: int
) -> torch.Tensor:
    """`experts.token_losses`."""
    sums = torch.empty(place.shape[0])
    _token_losses(_bits(outputs), place.numpy(), weights.numpy(), reference.numpy(), first, sums.numpy())
    return sums


def squares_by_expert(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`experts.squares_by_expert`."""
    sums = torch.zeros(ends.shape[0], dtype=torch.float64)
    _squares_by_expert(_bits(rows), ends.numpy(), sums.numpy())
    return sums


def searched_scale(
    weight: torch.Tensor, importance: torch.Tensor, group_size: int, shares: tuple[float, ...]
) -> torch.Tensor:
    """`rounding.searched_scale` of float32 weights."""
    count, rows, columns = weight.shape
    found = torch.empty(count, rows, columns // group_size, dtype=torch.bfloat16)
    groups = weight.numpy().reshape(count, rows, -1, group_size)
    factors = importance.numpy().reshape(count, -1, group_size)
    _search_scale(groups, factors, np.array(shares, np.float32), _bits(found))
    return found


def round_columns(
    aim: torch.Tensor, lower: torch.Tensor, scale: torch.Tensor, left: torch.Tensor, codes: torch.Tensor
) -> None:
    """`rounding._round_columns`, bit for bit."""
    _round_columns(aim.numpy(), lower.numpy(), scale.numpy(), left.numpy(), codes.numpy())


def descend_group(
    slope: torch.Tensor,
    own: torch.Tensor,
    error: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tries: int,
    slack: float,
) -> None:
    """`rounding._descend_group`."""
    curved = torch.bmm(codes.float(), own).numpy()
    given = slope.numpy(), own.numpy(), curved, error.numpy(), codes.numpy(), _bits(scale)
    _descend_group(*given, tries, np.float32(slack))


def dequantize_block(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """`fp8.dequantize_block`, bit for bit where no scale is NaN."""
    _dequantize(_codes(weight), scale.contiguous().numpy(), _bits(out))


def has_nan(weight: torch.Tensor) -> bool:
    """`fp8.has_nan`."""
    return bool(_largest_code(_codes(weight).reshape(-1)) == _E4M3_NAN)


def _codes(weight: torch.Tensor) -> np.ndarray:
    """The bytes of a float8_e4m3fn tensor."""
    return weight.contiguous().view(torch.uint8).numpy()


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy()


def _groups(tensor: torch.Tensor, group_size: int) -> np.ndarray:
    """The bits of [n, out, in] as [n, out, in/group, group]."""
    bits = _bits(tensor)
    return bits.reshape(*bits.shape[:2], -1, group_size)


@numba.njit
def _wide(bits: np.uint16) -> np.float32:
    return np.uint32(np.uint32(bits) << _SHIFT).view(np.float32)


@numba.njit
def _rounded(value: np.float32) -> np.uint16:
    """Of NaN, only for what operations on numbers give: others could become a number."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + _HALF + ((bits >> _SHIFT) & _ONE)) >> _SHIFT)


@numba.njit
def _magnitude(value: np.float32) -> np.uint32:
    """As integers, magnitudes have the order of floats; infinity is larger than all, and NaN larger still."""
    return np.uint32(np.float32(value).view(np.uint32) & _MAGNITUDE)


@numba.njit(nogil=True, error_model="numpy")
def _quantize(weight: np.ndarray, scales: np.ndarray, inverse: np.ndarray, out: np.ndarray, change: bool) -> None:
    experts, rows, groups, size = weight.shape
    scaled, steps = np.empty((groups, size), np.float32), np.empty(groups, np.float32)
    for expert in range(experts):
        for row in range(rows):
            # All of a row's groups first: the processor works on the next one while it waits for the largest of one.
            for group in range(groups):
                largest = np.uint32(0)
                for i in range(size):
                    value = _wide(weight[expert, row, group, i]) * scales[expert, group, i]
                    scaled[group, i] = value
                    largest = max(largest, _magnitude(value))
                step = _wide(_rounded(np.uint32(largest).view(np.float32) / _HALF_RANGE))
                steps[group] = np.nan if largest >= _INFINITY else _EPSILON if step == 0 else max(step, _TINY)
            for group in range(groups):
                step = steps[group]
                for i in range(size):
                    code = min(max(np.rint(scaled[group, i] / step), _Q_MIN), _Q_MAX)
                    bits = _rounded(code * step * inverse[expert, group, i])
                    if change:
                        bits = _rounded(_wide(bits) - _wide(weight[expert, row, group, i]))
                    out[expert, row, group, i] = bits


@numba.njit(nogil=True, error_model="numpy")
def _normalize(weight: np.ndarray, sums: np.ndarray) -> None:
    experts, rows, groups, size = weight.shape
    for expert in range(experts):
        for row in range(rows):
            for group in range(groups):
                largest = np.uint32(0)
                for i in range(size):
                    largest = max(largest, _magnitude(_wide(weight[expert, row, group, i])))
                if largest >= _INFINITY:
                    for i in range(size):
                        sums[expert, group, i] = np.nan
                    continue
                unit = _wide(_rounded(np.uint32(largest).view(np.float32) + _SMALLEST_GROUP))
                for i in range(size):
                    share = abs(_wide(weight[expert, row, group, i])) / unit
                    sums[expert, group, i] += np.float64(_wide(_rounded(share)))


# Products and sums in one rounding, as torch's addcmul has them.
@numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _combine(outputs: np.ndarray, place: np.ndarray, weights: np.ndarray, start: np.ndarray, first: int) -> None:
    rows, hidden = outputs.shape
    for token in range(place.shape[0]):
        for j in range(place.shape[1]):
            row, weight = place[token, j] - first, weights[token, j]
            if 0 <= row < rows:
                for i in range(hidden):
                    start[token, i] += weight * _wide(outputs[row, i])


# A slice has no more columns than are there, and what is known of it lets a block's columns be taken by vectors.
@numba.njit(nogil=True, error_model="numpy")
def _dequantize(codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    for row in range(codes.shape[0]):
        for block in range(scales.shape[1]):
            scale = scales[row // _BLOCK, block]
            begin, end = block * _BLOCK, (block + 1) * _BLOCK
            some, target = codes[row, begin:end], out[row, begin:end]
            for i in range(some.shape[0]):
                code = np.uint32(some[i])
                magnitude = code & _E4M3_MAGNITUDE
                # Exponent and mantissa where fp32 has them, and the exponent's bias changed. A subnormal has no leading
                # one: it is read with one, and that taken off. Nothing on the way is a subnormal of fp32, with which
                # some processors take a hundred times as long.
                moved = np.uint32(magnitude << _E4M3_SHIFT)
                normal = np.uint32(moved + _E4M3_BIAS).view(np.float32)
                subnormal = np.uint32(moved + _E4M3_LEAST_BIAS).view(np.float32) - _E4M3_LEAST
                value = normal if magnitude >= _E4M3_NORMAL else subnormal
                value = np.float32(np.nan) if magnitude == _E4M3_NAN else value
                sign = np.uint32((code & _E4M3_SIGN) << _E4M3_SIGN_SHIFT)
                signed = np.uint32(np.float32(value * scale).view(np.uint32) ^ sign).view(np.float32)
                target[i] = _rounded(signed)


@numba.njit(nogil=True)
def _largest_code(codes: np.ndarray) -> np.uint8:
    largest = np.uint8(0)
    for i in range(codes.shape[0]):
        largest = max(largest, np.uint8(codes[i] & _E4M3_NAN))
    return largest


# Sums in another order let a row be summed by vectors.
@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _token_losses(
    outputs: np.ndarray,
    place: np.ndarray,
    weights: np.ndarray,
    reference: np.ndarray,
    first: int,
    sums: np.ndarray,
) -> None:
    rows, hidden = outputs.shape
    difference = np.empty(hidden, np.float32)
    for token in range(place.shape[0]):
        for i in range(hidden):
            difference[i] = -reference[token, i]
        for j in range(place.shape[1]):
            row, weight = place[token, j] - first, weights[token, j]
            if 0 <= row < rows:
                for i in range(hidden):
                    difference[i] += weight * _wide(outputs[row, i])
        squares = np.float32(0)
        for i in range(hidden):
            squares += difference[i] * difference[i]
        sums[token] = squares


@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _squares_by_expert(rows: np.ndarray, ends: np.ndarray, sums: np.ndarray) -> None:
    begin = 0
    for expert in range(ends.shape[0]):
        for row in range(begin, ends[expert]):
            squares = np.float32(0)
            for i in range(rows.shape[1]):
                value = _wide(rows[row, i])
                squares += value * value
            sums[expert] += squares
        begin = ends[expert]


@numba.njit(nogil=True, error_model="numpy")
def _round_columns(aim: np.ndarray, lower: np.ndarray, scale: np.ndarray, left: np.ndarray, codes: np.ndarray) -> None:
    experts, rows, columns = aim.shape
    # Rows side by side: one alone would wait for each of its codes.
    shape = (columns, min(-(-rows // _VECTOR) * _VECTOR, _SIDE_BY_SIDE))
    aims, steps = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    lefts, found = np.zeros(shape, np.float32), np.empty(shape, np.float32)
    for expert in range(experts):
        for first in range(0, rows, shape[1]):
            count = min(shape[1], rows - first)
            for row in range(count):
                for i in range(columns):
                    aims[i, row] = aim[expert, first + row, i]
                    steps[i, row] = scale[expert, first + row, i]
                    lefts[i, row] = left[expert, first + row, i]
            _round_side_by_side(aims, steps, lefts, found, lower[expert])
            for row in range(count):
                for i in range(columns):
                    codes[expert, first + row, i] = np.int8(found[i, row])
                    aim[expert, first + row, i] = aims[i, row]
                    left[expert, first + row, i] = lefts[i, row]


@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _descend_group(
    slope: np.ndarray,
    own: np.ndarray,
    curved: np.ndarray,
    error: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    tries: int,
    slack: np.float32,
) -> None:
    experts, rows, columns = slope.shape
    square = np.empty((columns, columns), np.float32)
    least, reach = np.empty(columns, np.float32), np.empty(columns, np.float32)
    code, pull = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for expert in range(experts):
        for i in range(columns):
            reach[i] = 0
            for j in range(columns):
                square[i, j] = own[expert, i, j]
                if i != j:
                    reach[i] = max(reach[i], _TWO * abs(square[i, j]))
            least[i] = (_UNIT + slack) * square[i, i]
        for row in range(rows):
            by_scale, curvature = np.float32(0), np.float32(0)
            for i in range(columns):
                code[i] = np.float32(codes[expert, row, i])
                by_scale += slope[expert, row, i] * code[i]
                curvature += curved[expert, row, i] * code[i]
            step, change = _wide(scale[expert, row]), np.float32(0)
            bits = _rounded(step + by_scale / curvature)
            moved = _wide(bits) - step
            # NaN, of a group of zeros, is no gain.
            if _wide(bits) >= _TINY and moved * (_TWO * by_scale - moved * curvature) > 0:
                change, step = moved, _wide(bits)
                scale[expert, row] = bits
            for i in range(columns):
                pull[i] = (slope[expert, row, i] - change * curved[expert, row, i]) / step
                # The weight, for a moment.
                error[expert, row, i] += code[i] * (step - change)
            _settle(pull, square, least, reach, code, tries)
            for i in range(columns):
                codes[expert, row, i] = np.int8(code[i])
                error[expert, row, i] -= code[i] * step


@numba.njit(nogil=True, error_model="numpy")
def _settle(
    pull: np.ndarray, square: np.ndarray, least: np.ndarray, reach: np.ndarray, code: np.ndarray, tries: int
) -> None:
    """`rounding._settle` of one row."""
    columns = pull.shape[0]
    gain, second, tried = np.empty(columns, np.float32), np.empty(columns, np.float32), np.zeros(columns, np.float32)
    for _ in range(columns):
        _gains(pull, least, code, gain)
        most = _largest(gain)
        if not most > 0:
            break
        place = _first(gain, most)
        way = _way(pull[place])
        code[place] += way
        of_place = square[place]
        for i in range(columns):
            pull[i] -= way * of_place[i]
    _gains(pull, least, code, gain)
    _leave_out(gain, reach, tried)
    for _ in range(min(tries, columns)):
        most = _largest(gain)
        if not most > _NO_GAIN:
            break
        one = _first(gain, most)
        gain[one] = _NO_GAIN
        tried[one] = _NO_GAIN
        way, of_one = _way(pull[one]), square[one]
        for i in range(columns):
            left = pull[i] - way * of_one[i]
            second[i] = _gain(left, least[i], code[i])
        second[one] = _NO_GAIN
        more = _largest(second)
        if not most + more > 0:
            continue
        other = _first(second, more)
        back, of_other = _way(pull[other] - way * of_one[other]), square[other]
        code[one] += way
        code[other] += back
        for i in range(columns):
            left = pull[i] - way * of_one[i]
            pull[i] = left - back * of_other[i]
        _gains(pull, least, code, gain)
        _leave_out(gain, reach, tried)


@numba.njit
def _way(pull: np.float32) -> np.float32:
    return np.float32(-1) if pull < 0 else np.float32(1)


@numba.njit
def _gain(pull: np.float32, least: np.float32, code: np.float32) -> np.float32:
    """Of moving a code as it is pulled."""
    after = code + _way(pull)
    return _TWO * abs(pull) - least if _Q_MIN <= after <= _Q_MAX else _NO_GAIN


@numba.njit(nogil=True, error_model="numpy")
def _gains(pull: np.ndarray, least: np.ndarray, code: np.ndarray, gain: np.ndarray) -> None:
    for i in range(pull.shape[0]):
        gain[i] = _gain(pull[i], least[i], code[i])


@numba.njit(nogil=True, error_model="numpy")
def _leave_out(gain: np.ndarray, reach: np.ndarray, tried: np.ndarray) -> None:
    """Codes that were tried, and those that no other's move could help."""
    for i in range(gain.shape[0]):
        gain[i] = gain[i] + tried[i] if gain[i] + reach[i] > 0 else _NO_GAIN


@numba.njit(nogil=True, error_model="numpy")
def _largest(gain: np.ndarray) -> np.float32:
    """By integers: numba takes no vectors for floats, which may be NaN."""
    bits, most = gain.view(np.int32), _LEAST
    for i in range(bits.shape[0]):
        most = max(most, _ordered(bits[i]))
    return np.int32(_ordered(most)).view(np.float32)


@numba.njit(nogil=True, error_model="numpy")
def _first(gain: np.ndarray, number: np.float32) -> int:
    place = 0
    while gain[place] != number:
        place += 1
    return place


@numba.njit
def _ordered(bits: np.int32) -> np.int32:
    """Integers in the order of the numbers whose bits they have, and back."""
    return bits ^ ((bits >> _SIGN) & _ALL_BUT_SIGN)


# No product and sum in one rounding, as torch has them.
@numba.njit(nogil=True, error_model="numpy")
def _round_side_by_side(
    aims: np.ndarray, steps: np.ndarray, lefts: np.ndarray, found: np.ndarray, factors: np.ndarray
) -> None:
    """Columns of rows side by side, the last one first, each one's error passed on to those before it."""
    columns, rows = aims.shape
    for stop in range(columns, 0, -_PASSED):
        start = max(0, stop - _PASSED)
        for column in range(stop - 1, start - 1, -1):
            aim, step, error, code = aims[column], steps[column], lefts[column], found[column]
            for row in range(rows):
                code[row] = min(max(np.rint(aim[row] / step[row]), _Q_MIN), _Q_MAX)
                error[row] -= code[row] * step[row]
            for i in range(start, column):
                before, factor = aims[i], factors[column, i]
                for row in range(rows):
                    before[row] += error[row] * factor
        if start == 0:
            break
        e0, e1, e2, e3 = lefts[start], lefts[start + 1], lefts[start + 2], lefts[start + 3]
        e4, e5, e6, e7 = lefts[start + 4], lefts[start + 5], lefts[start + 6], lefts[start + 7]
        for i in range(start):
            before = aims[i]
            f0, f1, f2, f3 = factors[start, i], factors[start + 1, i], factors[start + 2, i], factors[start + 3, i]
            f4, f5, f6, f7 = factors[start + 4, i], factors[start + 5, i], factors[start + 6, i], factors[start + 7, i]
            for row in range(rows):
                aim = before[row] + e7[row] * f7
                aim += e6[row] * f6
                aim += e5[row] * f5
                aim += e4[row] * f4
                aim += e3[row] * f3
                aim += e2[row] * f2
                aim += e1[row] * f1
                before[row] = aim + e0[row] * f0


# As above: sums in another order.
@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _group_error(group: np.ndarray, factors: np.ndarray, step: np.float32) -> np.float32:
    total = np.float32(0)
    for i in range(group.shape[0]):
        code = min(max(np.rint(group[i] / step), _Q_MIN), _Q_MAX)
        difference = code * step - group[i]
        total += difference * difference * factors[i]
    return total


@numba.njit(nogil=True, error_model="numpy")
def _search_scale(weight: np.ndarray, factors: np.ndarray, shares: np.ndarray, found: np.ndarray) -> None:
    experts, rows, groups, size = weight.shape
    for expert in range(experts):
        for row in range(rows):
            for group in range(groups):
                values = weight[expert, row, group]
                largest = np.uint32(0)
                for i in range(size):
                    largest = max(largest, _magnitude(values[i]))
                unit = np.uint32(largest).view(np.float32) / _HALF_RANGE
                best = np.float32(np.inf)
                found[expert, row, group] = _stored(unit)
                for share in shares:
                    bits = _stored(unit * share)
                    error = _group_error(values, factors[expert, group], _wide(bits))
                    if error < best:
                        best = error
                        found[expert, row, group] = bits


@numba.njit
def _stored(scale: np.float32) -> np.uint16:
    """A group's scale in bf16: epsilon for zero, never denormal."""
    bits = _rounded(scale)
    if _magnitude(scale) >= _INFINITY:
        return bits
    value = _wide(bits)
    return _rounded(_EPSILON if value == 0 else max(value, _TINY))
