# Generated from book/batches.md: edit the chapter, not this file.
"""Batches: rows of a token stream, in an order that anyone can compute.

Notable here:
- the batch of step n is a function of (seed, n) alone: resuming costs nothing;
- an epoch takes every row once, shuffled across all shards;
- any number of ranks reads the same batches, each rank its part of every one;
- on an accelerator the stream lives on the device, and batches are gathered there;
  a stream too large for it comes from the map, through pinned buffers.
"""

import numpy as np
import torch

from albor.shards import DataError, TokenStream

__all__ = ["Batches", "fits", "load"]


def fits(device: torch.device, size: int) -> bool:
    """Whether so many bytes may stay on the device, for they take little of it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return size <= free // 4
    return device.type != "cpu" and size <= 2**30  # elsewhere it cannot be asked


def load(stream: TokenStream, device: torch.device) -> torch.Tensor:
    """All tokens of a stream on a device: int16 (N,), a shard at a time."""
    tokens = torch.empty(len(stream), dtype=torch.int16, device=device)
    for place, piece in zip(stream.bounds.tolist(), stream.pieces(), strict=False):
        part = torch.from_numpy(np.array(piece).view(np.int16))
        tokens[place : place + len(piece)].copy_(part)
    return tokens


class Batches:
    """Shuffled batches of a token stream, each a function of (seed, step) alone.

    Row i starts at token `i * stride`. Its inputs are the `seq_len` tokens from
    there, its targets the same shifted by one, so the last target is the next token
    of the stream. `rows="pack"` cuts the stream every `seq_len` tokens;
    `rows="truncate"` cuts it every `row_tokens` and throws the tail of each row
    away, as the original did. An epoch takes every row once, in its own order, but
    for the last `sequences % batch_size`.

    `batch_size` counts a whole step's rows. Of these, rank 0 of `ranks` takes the
    first part, rank 1 the next: together they read what one would have read alone.

    `resident`: whether the stream lives on `device`, as int16. None decides: on an
    accelerator it does, if it takes at most a quarter of the free memory.
    """

    def __init__(
        self,
        tokens: TokenStream | np.ndarray,
        seq_len: int,
        batch_size: int,
        *,
        seed: int = 0,
        rows: str = "pack",
        row_tokens: int = 2048,
        device: str | torch.device = "cpu",
        rank: int = 0,
        ranks: int = 1,
        resident: bool | None = None,
    ):
        self.stream = TokenStream.of(tokens)
        if seq_len < 1 or batch_size < 1 or not 0 <= seed < 2**64:
            raise DataError(
                "seq_len and batch_size start at 1, seed is in 0 .. 2**64 - 1; got "
                f"seq_len={seq_len}, batch_size={batch_size}, seed={seed}"
            )
        if not 0 <= rank < ranks or batch_size % ranks:
            raise DataError(
                f"rank {rank} of {ranks} cannot take an equal part of batches of "
                f"{batch_size}: ranks count from 0, and must divide batch_size"
            )
        self.stride = {"pack": seq_len, "truncate": row_tokens}.get(rows, 0)
        if self.stride < seq_len:
            raise DataError(
                "rows must be 'pack', or 'truncate' with row_tokens of at least "
                f"seq_len={seq_len}; got {rows!r} with row_tokens={row_tokens}"
            )
        filled = self.stream.meta.get("inputs", {}).get("row_tokens", 1)
        if self.stride % filled:
            raise DataError(
                f"the stream has infilling samples in rows of {filled} tokens, and "
                f"rows of {self.stride} would cut them; prepare() the data with "
                f"row_tokens={self.stride}"
            )
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.share = slice(
            rank * (batch_size // ranks), (rank + 1) * (batch_size // ranks)
        )
        whole_rows = len(self.stream) // self.stride
        with_a_target = (len(self.stream) - seq_len - 1) // self.stride + 1
        self.sequences = max(0, min(whole_rows, with_a_target))
        if self.sequences < batch_size:
            raise DataError(
                f"{len(self.stream):,} tokens make {self.sequences:,} rows of "
                f"{self.stride:,}, too few for one batch of {batch_size:,}; "
                "use more text, a shorter seq_len or a smaller batch"
            )
        self.steps_per_epoch = self.sequences // batch_size
        self.device = torch.device(device)
        if resident is None:
            resident = fits(self.device, 2 * len(self.stream))
        self.resident = load(self.stream, self.device) if resident else None
        home = self.device if resident else torch.device("cpu")
        self.window = torch.arange(seq_len + 1, device=home)
        self.orders: dict[int, torch.Tensor] = {}  # of the epochs at hand
        self.pinned: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        if self.device.type == "cuda" and not resident:
            shape = (batch_size // ranks, seq_len + 1)
            for _ in range(2):  # one is filled while the other is under way
                buffer = torch.empty(shape, dtype=torch.int16, pin_memory=True)
                self.pinned.append((buffer, torch.cuda.Event()))

    def permutation(self, epoch: int) -> torch.Tensor:
        """The order in which this epoch takes the rows: int64 (sequences,).

        Rows are sorted by random keys: the raw output of a counter-based generator
        under the key (seed, epoch), the same with every NumPy on every machine.
        """
        key = np.array([self.seed, epoch], dtype=np.uint64)
        keys = np.random.Philox(key=key).random_raw(self.sequences)
        order = torch.from_numpy(np.argsort(keys, kind="stable"))
        return order.to(self.window.device)

    def look_ahead(self, start: int, end: int) -> None:
        """Sort the epochs of steps start to end - 1, and forget all others.

        Sorting is the host's work, and its result a copy to the device: done here,
        none of these steps has to wait for it.
        """
        first, last = (max(0, n) // self.steps_per_epoch for n in (start, end - 1))
        self.orders = {
            epoch: self.orders[epoch]
            if epoch in self.orders
            else self.permutation(epoch)
            for epoch in range(first, last + 1)
        }

    def places(self, step: int) -> torch.Tensor:
        """Numbers of the rows that this rank takes at a step: int64 (B,)."""
        if step < 0:
            raise DataError(f"step must be at least 0, got {step}")
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch not in self.orders:  # without a look at any epoch before
            self.look_ahead(step, step + 1)
        order = self.orders[epoch]
        return order[within * self.batch_size :][: self.batch_size][self.share]

    def rows_of(self, step: int) -> list[int]:
        """The same as a list, to say which rows a bad step has read."""
        return self.places(step).tolist()

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of step 0, 1, 2, ...: int64 (B, T) each."""
        starts = self.places(step) * self.stride
        if self.resident is not None:
            taken = self.resident[starts[:, None] + self.window]
        else:
            rows = self.stream.gather(starts.tolist(), self.seq_len + 1)
            taken = self.send(torch.from_numpy(rows.view(np.int16)))
        taken = taken.long() & 0xFFFF  # int16 back to uint16
        return taken[:, :-1].contiguous(), taken[:, 1:].contiguous()

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows from the map to the device, while the device still computes."""
        if not self.pinned:
            return rows.to(self.device)
        buffer, copied = self.pinned[0]
        copied.synchronize()  # the copy from this buffer, two steps ago, is done
        buffer.copy_(rows)
        moved = buffer.to(self.device, non_blocking=True)
        copied.record(torch.cuda.current_stream(self.device))
        self.pinned.reverse()
        return moved
