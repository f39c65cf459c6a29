"""The report: one page about a compiled model, made from a recording and nothing else.

It is one file of HTML that needs no network and no script to be read, and forbids itself both but
for a button. `story.py` finds out what is to be said, `page.py` says it, `timeline.py` and
`drawing.py` draw. Whatever a recording holds is text to them: nothing of it becomes markup.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from precast.monitoring.recording import write_whole
from precast.monitoring.report.page import render
from precast.monitoring.report.story import Story

__all__ = ["Story", "render", "write_report"]


def write_report(path: str | os.PathLike[str], recording: Mapping[str, Any]) -> int:
    """Write the page of a recording; return its bytes.

    Raises:
        RecordingError: The file cannot be written.
    """
    data = render(recording).encode()
    write_whole(path, data)
    return len(data)
