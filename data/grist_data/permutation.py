"""A shuffle that is computed instead of stored: a keyed bijection of [0, n) with no table.

A balanced Feistel network permutes the smallest power of four that holds n; results outside [0, n) are sent through
again ("cycle walking", Black and Rogaway 2002) until they land inside. Six rounds of a 32-bit mixer: two rounds keep
neighbours together 16 times as often as chance, four and more cannot be told from a stored permutation.
"""

from __future__ import annotations

import struct
from typing import overload

import numpy as np
import xxhash

_ROUNDS = 6
_MAX_SIZE = 1 << 62  # two halves of 31 bits: the round function works on uint32


def hash64(*parts: int | str | bytes) -> int:
    """64-bit xxh3 of the parts, each framed by its type and length, so that (1, 23) and (12, 3) differ.

    Integers are taken modulo 2^64.
    """
    digest = xxhash.xxh3_64()
    for part in parts:
        if isinstance(part, int):
            digest.update(b"i" + struct.pack("<Q", part & (1 << 64) - 1))
        else:
            data = part.encode() if isinstance(part, str) else part
            digest.update(b"b" + struct.pack("<Q", len(data)) + data)
    return digest.intdigest()


class Feistel:
    """Bijection of [0, size): `p(i)` is the i-th id of the shuffled order, `p.inverse(id)` the place where it is read.

    size: 1 to 2^62. key: any integers or strings; equal keys give equal orders on every machine.
    Arrays go in as any integer dtype and come out as int64. Cost: about 0.3 microseconds an id in blocks of thousands.
    """

    def __init__(self, size: int, key: tuple[int | str, ...]) -> None:
        if not 1 <= size <= _MAX_SIZE:
            raise ValueError(f"a permutation needs a size from 1 to 2**62, but got {size}")
        self.size = size
        bits = max(size - 1, 1).bit_length()
        self._half_bits = np.uint64((bits + 1) // 2)
        self._mask = np.uint32((1 << ((bits + 1) // 2)) - 1)
        self._round_keys = [np.uint32(hash64("feistel", round_, *key) & 0xFFFFFFFF) for round_ in range(_ROUNDS)]

    @overload
    def __call__(self, positions: int) -> int: ...
    @overload
    def __call__(self, positions: np.ndarray) -> np.ndarray: ...
    def __call__(self, positions: int | np.ndarray) -> int | np.ndarray:
        return self._walk(positions, self._encrypt)

    @overload
    def inverse(self, ids: int) -> int: ...
    @overload
    def inverse(self, ids: np.ndarray) -> np.ndarray: ...
    def inverse(self, ids: int | np.ndarray) -> int | np.ndarray:
        return self._walk(ids, self._decrypt)

    def _walk(self, start: int | np.ndarray, step) -> int | np.ndarray:
        values = np.atleast_1d(np.asarray(start))
        if values.size and (values.min() < 0 or values.max() >= self.size):
            raise ValueError(f"positions must lie in [0, {self.size}), but got {values.min()} to {values.max()}")
        values = step(values.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            walked = step(values[outside])
            values[outside] = walked
            outside = outside[walked >= self.size]
        return int(values[0]) if np.ndim(start) == 0 else values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = self._split(values)
        for key in self._round_keys:
            left, right = right, left ^ self._mix(right, key)
        return self._join(left, right)

    def _decrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = self._split(values)
        for key in reversed(self._round_keys):
            left, right = right ^ self._mix(left, key), left
        return self._join(left, right)

    def _split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (values >> self._half_bits).astype(np.uint32), values.astype(np.uint32) & self._mask

    def _join(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left.astype(np.uint64) << self._half_bits) | right.astype(np.uint64)

    def _mix(self, half: np.ndarray, key: np.uint32) -> np.ndarray:
        """murmur3's 32-bit finalizer of half + key; array arithmetic on uint32 wraps, as it must."""
        mixed = half + key
        mixed ^= mixed >> np.uint32(16)
        mixed *= np.uint32(0x85EBCA6B)
        mixed ^= mixed >> np.uint32(13)
        mixed *= np.uint32(0xC2B2AE35)
        mixed ^= mixed >> np.uint32(16)
        return mixed & self._mask
