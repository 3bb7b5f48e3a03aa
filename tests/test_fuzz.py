"""Whatever is written on a command line, it works or it is answered in one message."""

from pathlib import Path

import fuzz


def test_no_command_line_ends_in_a_traceback(tmp_path: Path) -> None:
    """A few of the lines of fuzz.py."""
    found = fuzz.attempt(3, 14, tmp_path)
    assert not [each.wrong for each in found if each.wrong]
    accepted = sum(each.kind in ("accepted", "trained") for each in found)
    assert 5 <= accepted <= 11  # fewer of either would try little
