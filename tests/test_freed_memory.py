"""Memory that training freed is the system's again."""

import ctypes
import sys

import pytest
import torch
from test_cli import Cli
from test_cli import command as command

from pgsuite.training.memory import FreedMemory, freed_memory, resident_pages

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
pytestmark = pytest.mark.skipif(not GLIBC, reason="not glibc's allocator")


def test_freed_blocks_between_others_go_back_once_the_process_is_half_as_large_again() -> None:
    freed_memory.give_back()
    blocks = [torch.ones(25_000) for _ in range(2000)]  # 200 MB, each too small for pages of its own
    full = resident_pages()
    kept = blocks[::50]
    del blocks
    fragmented, small, large = resident_pages(), FreedMemory(), FreedMemory()
    assert fragmented > 0.9 * full
    small.pages, large.pages = fragmented // 2, fragmented
    large.give_back()
    assert resident_pages() > 0.9 * full and large.pages == fragmented
    small.give_back()
    assert resident_pages() < full - 30_000 and small.pages < full - 30_000
    assert all(x.sum() == 25_000 for x in kept)


def test_training_gives_freed_memory_back(command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(freed_memory, "trim", asked.append)
    monkeypatch.setattr("pgsuite.training.memory.resident_pages", lambda: 100)
    monkeypatch.setattr(freed_memory, "pages", 0)
    assert command("train", "algo=ppo", "env=CartPole", "num_envs=4", "horizon=8", "total_steps=96")[0] == 0
    assert asked == [0]  # in three iterations, the later of which are no larger than the first
