"""`precast.testing` is used by other people's tests, so it is tested itself."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from precast.testing import every_fault


def write_twice(path: Path) -> None:
    for _ in range(2):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            os.write(file, b"four")
        finally:
            os.close(file)


def test_each_operation_has_its_turn(tmp_path: Path) -> None:
    operations = []
    for fault in every_fault(error_number=errno.ENOSPC):
        with fault:
            try:
                write_twice(tmp_path / str(fault.n))
            except OSError as error:
                assert error.errno == errno.ENOSPC
        operations.append(fault.operation)
    assert operations == ["open", "write", "close"] * 2 + [None]


def test_a_failing_write_has_written_half(tmp_path: Path) -> None:
    for fault in every_fault(operations=("write",)):
        with fault:
            try:
                write_twice(tmp_path / str(fault.n))
            except OSError:
                assert fault.n in (1, 2)
        assert (tmp_path / str(fault.n)).read_bytes() == (b"fo" if fault.n == 1 else b"four")


def test_a_lasting_fault_fails_cleaning_up_too(tmp_path: Path) -> None:
    for fault in every_fault(lasting=True, operations=("write", "unlink")):
        path = tmp_path / str(fault.n)
        with fault:
            for _ in range(2):
                try:
                    write_twice(path)
                    os.unlink(path)  # noqa: PTH108 - what `every_fault` sees
                except OSError:
                    pass
        assert path.exists() == (fault.n != 7)


def test_the_real_functions_come_back_and_other_threads_never_lost_them(tmp_path: Path) -> None:
    before = (os.open, os.write)
    for fault in every_fault():
        with pytest.raises(ZeroDivisionError), fault:
            thread = threading.Thread(target=write_twice, args=(tmp_path / "other",))
            thread.start()
            thread.join()
            raise ZeroDivisionError
    assert (os.open, os.write) == before
    assert (tmp_path / "other").read_bytes() == b"four"


def test_a_loop_that_forgets_to_enter_the_fault_is_told() -> None:
    with pytest.raises(RuntimeError, match="with fault"):
        for _ in every_fault():
            pass
