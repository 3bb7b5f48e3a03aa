"""Random streams: independent generators, each derived from the seed of the run and a name."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the seed and on the name of the stream.

    Two generators seeded with the same number draw the same bits, so that, say, initial states and action noise would
    be correlated; the name keeps them apart.
    """
    digest = hashlib.blake2b(f"{stream} {seed}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def number(seed: int, stream: str) -> int:
    """A 31-bit seed for a generator of another library, derived from the same two as ``generator``."""
    return int(torch.randint(2**31 - 1, (), generator=generator(seed, stream)))


def of_process(seed: int, rank: int) -> int:
    """The seed of what differs between processes.  The first keeps the one given, and so draws what it would alone."""
    return number(seed, f"process {rank}") if rank else seed
