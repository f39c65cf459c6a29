"""What may be chosen as a compiler."""

from __future__ import annotations

import pytest

from precast.compilers.chosen import check_compiler
from precast.errors import ConfigError


def test_what_is_no_compiler_is_refused() -> None:
    with pytest.raises(ConfigError, match="is_saveable"):
        check_compiler(object())
