"""The key/value cache. B batch, T new tokens, S slots, K key/value heads, H head width, R rows of a call.

A layer with a window of W sees no token older than W - 1 before the newest. When told that little will be taken back, the cache
keeps for such a layer only a few more than W: new tokens are appended, and when the slots are full the last W - 1 tokens move
to the front, in one step of W or so. So a row's tokens stand in order, and every attention kernel can read them as it reads a
whole cache, with the tokens that it holds for its length.
"""

from __future__ import annotations

import torch
from torch import Tensor

import grist_kernels
from grist_kernels.native.step import Place
from grist_model import few_rows
from grist_model.config import ModelConfig


class KVCache:
    """Keys and values of the tokens so far: one (B, S, K, H) buffer of each per layer, filled from slot 0.

    A call of the model is begin, attend in every layer, commit. The buffers take type and device from the first keys
    written. There is one per layer: a single stacked tensor makes compilers copy the stack at every layer.

    rollback None: every layer keeps every token. rollback=n: layers with a window keep what they can still see, and n more:
    `truncate` can take back the tokens of the last call, up to n of them (and all, to length 0), and refuses more.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        slots: int,
        device: torch.device | str | None = None,
        *,
        rollback: int | None = None,
    ):
        if rollback is not None and rollback < 0:
            raise ValueError(f"rollback must be 0 or more tokens (or None), but is {rollback}")
        self.slots = slots
        self.used = 0  # by the longest sequence; kept here so that nobody has to ask the device
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)  # tokens of each sequence
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * config.layers
        self._new_tokens = 0
        self._lengths_with_new_B = self.lengths_B
        self._equal_lengths = True
        self._angles: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._all = Slots(slots, None, self.lengths_B)
        self._last = self._all
        if rollback is not None and config.window is not None:
            capacity = config.window - 1 + max(config.window, rollback + 1)
            if capacity < slots:
                self._last = Slots(capacity, config.window, self.lengths_B)
        windows = [config.layer_window(layer) for layer in range(config.layers)]
        self._slots = [self._all if window is None else self._last for window in windows]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers made so far: those of all layers once the model has run."""
        return sum(buffer.nbytes for pair in self._buffers if pair is not None for buffer in pair)

    def begin(self, new_tokens: int, lengths_B: Tensor | None = None) -> Tensor:
        """-> (B, T): where the next new_tokens tokens of each sequence stand.

        lengths_B, for prompts padded on the right, the first in the cache: how many of the tokens are real. Raises ValueError
        if there is no room, or for lengths_B later on.
        """
        if self.used + new_tokens > self.slots:
            raise ValueError(
                f"the key/value cache has {self.slots} slots, {self.used} of them used: no room for {new_tokens} more"
            )
        if lengths_B is not None and self.used:
            raise ValueError("lengths_B belongs to the first call on a cache, the prompt")
        self._new_tokens = new_tokens
        positions_BT = self.lengths_B[:, None] + torch.arange(new_tokens, device=self.lengths_B.device)
        real = new_tokens if lengths_B is None else lengths_B.to(self.lengths_B)
        self._lengths_with_new_B = self.lengths_B + real
        for slots in self._kinds():
            slots.begin(new_tokens, real, self._equal_lengths)
        self._equal_lengths = self._equal_lengths and lengths_B is None
        return positions_BT

    def whole_heads(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`few_rows.whole_heads` of a step's angles, made once rather than in every layer."""
        if self._angles is None or self._angles[0] is not cos:
            self._angles = (cos, few_rows.whole_heads(cos, sin))
        return self._angles[1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        """Store the new tokens' k and v (B, T, K, H), then attend from q (B, T, N, H) to everything stored."""
        slots = self._slots[layer]
        buffers = self._layer_buffers(layer, k, v)
        k_BSKH, v_BSKH = (slots.write(buffer, new.detach()) for buffer, new in zip(buffers, (k, v), strict=True))
        if self.used == 0:  # a prompt sees only itself
            return grist_kernels.attention(q, k, v, window=window, sinks=sinks)  # pyright: ignore[reportReturnType]
        return grist_kernels.decode_attention(q, k_BSKH, v_BSKH, slots.with_new_B, window=window, sinks=sinks)

    def place(self, layer: int) -> Place | None:
        """Where `attend` would store a step's tokens, for a kernel that stores them itself. None if there is more to it: for a
        prompt, when slots are full, or in a cache that attends in its own way."""
        buffers = self._buffers[layer]
        if self.used == 0 or buffers is None or type(self).attend is not KVCache.attend:
            return None
        return self._slots[layer].place(*buffers)

    def commit(self) -> None:
        """Count the new tokens."""
        self.used += self._new_tokens
        self.lengths_B = self._lengths_with_new_B
        for slots in self._kinds():
            slots.commit()

    def truncate(self, length: int) -> None:
        """Forget what stands at position `length` and after it in every sequence, such as tokens tried and rejected.

        Raises ValueError for a negative length, and where layers with a window have dropped what they would see again.
        """
        if length < 0:
            raise ValueError(f"a cache can be truncated to a length of 0 or more, but not to {length}")
        cut = max(0, self.used - length)
        if length and self._last is not self._all and cut > self._last.returnable:
            raise ValueError(
                f"layers with a window can take back {self._last.returnable} tokens, but truncate({length}) asks for {cut}: "
                "make the cache with a larger rollback, or with rollback=None, which keeps everything"
            )
        shorter_B = self.lengths_B.clamp(max=length)
        for slots in self._kinds():
            slots.take_back(self.lengths_B - shorter_B, cut, length, self._equal_lengths)
        self.used -= cut
        self.lengths_B = shorter_B

    def recount(self, longest: int) -> None:
        """The longest sequence that anybody still wants has `longest` tokens: read no further, whatever else is here."""
        self.used = min(self.used, longest)
        self._all.held = self.used
        self.lengths_B = self.lengths_B.clamp(max=longest)
        self._all.held_B = self.lengths_B

    def replace(self, rows: list[int], other: KVCache) -> None:
        """The sequences of `rows` become those of another cache, of len(rows) sequences; this one may still be empty.

        Raises ValueError if they do not fit, or if the other cache has dropped tokens that this one keeps.
        """
        if len(rows) != len(other.lengths_B) or other.used > self.slots:
            raise ValueError(
                f"{len(rows)} rows of a cache of {self.slots} slots cannot become the {len(other.lengths_B)} sequences, "
                f"of up to {other.used} tokens, of another"
            )
        if self._last is self._all and other._last is not other._all:
            raise ValueError(
                "the other cache keeps a window of some layers, this one everything: make both with rollback"
            )
        row_R = torch.tensor(rows, device=self.lengths_B.device)
        for layer, given in enumerate(other._buffers):
            if given is None:
                raise ValueError(f"the other cache has no keys of layer {layer} yet: run the model on it first")
            for own, new in zip(self._layer_buffers(layer, *given), given, strict=True):
                self._slots[layer].copy_rows(own, row_R, new, other._slots[layer])
        self.lengths_B = self.lengths_B.index_copy(0, row_R, other.lengths_B)
        self.used = max(self.used, other.used)
        self._equal_lengths = False
        theirs = {id(self._all): other._all, id(self._last): other._last}
        for slots in self._kinds():
            slots.count_rows(row_R, theirs[id(slots)])

    def keep(self, rows: list[int]) -> None:
        """Forget every sequence but those of `rows`, which become the batch, in this order."""
        row_R = torch.tensor(rows, device=self.lengths_B.device)
        self.lengths_B = self.lengths_B[row_R]
        for slots in self._kinds():
            slots.held_B = slots.held_B[row_R]
        self._buffers = [None if pair is None else (pair[0][row_R], pair[1][row_R]) for pair in self._buffers]

    def _kinds(self) -> list[Slots]:
        return [self._all] if self._last is self._all else [self._all, self._last]

    def _layer_buffers(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's buffers, made on first use with the head count, head width, type and device of k and v."""
        buffers = self._buffers[layer]
        if buffers is None:
            shape = (len(self.lengths_B), self._slots[layer].capacity, *k.shape[2:])
            buffers = self._buffers[layer] = (k.new_empty(shape), v.new_empty(shape))
        return buffers


class Slots:
    """Where the tokens of each row stand in the buffers of some layers: the last held_B of them, from slot 0 on, in order.

    Without a window nothing is ever dropped, and the caller sees to it that all fits.
    """

    def __init__(self, capacity: int, window: int | None, zero_B: Tensor):
        self.capacity = capacity
        self.kept = capacity if window is None else window - 1  # what a new token sees, and so what stays
        self.held_B = zero_B
        self.held = 0  # at least the most of held_B, on the host
        self.returnable = capacity  # tokens that can be taken back and leave what a row's next token sees
        self.with_new_B = zero_B
        self._moves = self._equal = False
        self._new_tokens = self._before = 0
        self._moved_BS = self._target_BT = zero_B

    def begin(self, new_tokens: int, real: int | Tensor, equal: bool) -> None:
        """Make room for new_tokens. real: how many of them count, of every row or (B,). equal: all rows hold as many."""
        self._new_tokens, self._equal = new_tokens, equal
        self._moves = self.held + new_tokens > self.capacity and self.held > self.kept
        if self._moves:
            self._before = self.held
            self._moved_BS = _last_slots(self.held_B, self.kept)
            self.held_B, self.held = self.held_B.clamp(max=self.kept), self.kept
            self.returnable = 0
        self.with_new_B = self.held_B + real
        if not equal:
            self._target_BT = self.held_B[:, None] + torch.arange(new_tokens, device=self.held_B.device)

    def write(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Store new (B, T, K, H) in a layer's buffer -> what the new tokens attend to, up to the last slot in use."""
        if self._moves and self.kept:
            buffer[:, : self.kept] = self._last_held(buffer)
        end = self.held + self._new_tokens
        if end <= self.capacity:
            self._put(buffer, new)
            return buffer[:, :end]
        # More than the slots are for, such as a long prompt: attended to in passing, and the end of it stays.
        whole = new
        if self.held:
            whole = new.new_empty(new.shape[0], end, *new.shape[2:])
            whole[:, : self.held] = buffer[:, : self.held]
            self._put(whole, new)
        if self.kept:
            buffer[:, : self.kept] = _taken(whole, _last_slots(self.with_new_B, self.kept))
        return whole

    def place(self, k: Tensor, v: Tensor) -> Place | None:
        """Where `write` would put new tokens in buffers, if it would do nothing else."""
        if self._moves or self.held + self._new_tokens > self.capacity:
            return None
        return Place(k, v, self.with_new_B, self.held, None if self._equal else self._target_BT)

    def commit(self) -> None:
        end = self.held + self._new_tokens
        if end <= self.capacity:
            self.held_B, self.held = self.with_new_B, end
            self.returnable = min(self.capacity, self.returnable + self._new_tokens)
        else:
            self.held_B, self.held, self.returnable = self.with_new_B.clamp(max=self.kept), self.kept, 0

    def take_back(self, tokens_B: Tensor, cut: int, length: int, equal: bool) -> None:
        """Rows lose their last tokens_B tokens, at most `cut` of them, and are then at most `length` long."""
        self.held_B = (self.held_B - tokens_B).clamp(min=0)
        # Of rows that differ, one that is shorter than `length` anyway may hold the most.
        self.held = self.held - cut if equal else min(self.held, length)
        if length == 0:
            self.held, self.returnable = 0, self.capacity
        else:
            self.returnable -= cut

    def copy_rows(self, own: Tensor, row_R: Tensor, given: Tensor, theirs: Slots) -> None:
        """Rows of a layer's buffer take what those of another cache's buffer hold, as far as this one keeps it."""
        if theirs.held <= self.capacity:
            own[row_R, : theirs.held] = given[:, : theirs.held]
        elif self.kept:
            own[row_R, : self.kept] = _taken(given, _last_slots(theirs.held_B, self.kept))

    def count_rows(self, row_R: Tensor, theirs: Slots) -> None:
        """After copy_rows in every layer."""
        held = theirs.held if theirs.held <= self.capacity else self.kept
        self.held_B = self.held_B.index_copy(0, row_R, theirs.held_B.clamp(max=held))
        self.held = max(self.held, held)
        self.returnable = min(self.returnable, theirs.returnable)

    def _last_held(self, buffer: Tensor) -> Tensor:
        if self._equal:
            return buffer[:, self._before - self.kept : self._before].clone()
        return _taken(buffer, self._moved_BS)

    def _put(self, buffer: Tensor, new: Tensor) -> None:
        if self._equal:
            buffer[:, self.held : self.held + self._new_tokens] = new
        else:
            buffer[torch.arange(len(new), device=new.device)[:, None], self._target_BT] = new


def _last_slots(held_B: Tensor, count: int) -> Tensor:
    """(B, count): the last `count` of the slots that each row holds; a row that holds fewer: all, then any."""
    return (held_B - count).clamp(min=0)[:, None] + torch.arange(count, device=held_B.device)


def _taken(buffer: Tensor, slot_BS: Tensor) -> Tensor:
    row_B1 = torch.arange(len(slot_BS), device=slot_BS.device)[:, None]
    return buffer[row_B1, slot_BS.clamp(max=buffer.shape[1] - 1)]
