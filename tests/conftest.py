import gc
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too: threads that wait take CPU time
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or a pool of processes imports torch to compile little

import torch
from hydra._internal.hydra import Hydra
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
gc.set_threshold(100_000, 20, 50)  # or garbage is looked for every 700 objects, of which importing torch made a million
settings.register_profile(
    "same every time",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("same every time")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def key_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key that signs runs with code from outside is kept there, not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(autouse=True, scope="session")
def composed_once() -> Iterator[None]:
    """Hydra composes a configuration twice, first to read nothing but hydra.mode, which only sweeps (-m, sweep=...) and
    overrides of its own ever set here.  Processes that tests start do it as users do."""
    read = Hydra.get_mode

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        sets_mode = any(re.match(r"[+~]*(sweep|hydra)\b", override) for override in overrides)
        return read(self, config_name, overrides) if sets_mode else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", get_mode)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collecting garbage would go through all that is imported over and over, and find nothing."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("long") and "PGSUITE_LONG" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="long: set PGSUITE_LONG=1, or make test-long"))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a script of benchmarks/ by its name, for this test only."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (folder / f"{name}.py").is_file():
            del sys.modules[name]
