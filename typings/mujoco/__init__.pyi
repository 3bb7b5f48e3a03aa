# mujoco's classes live in a compiled module that ships no stubs, so their types are unknown to a checker.
from typing import Any

def __getattr__(name: str) -> Any: ...
