"""What ties a process to the one that started it."""

from __future__ import annotations

import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from megatron_itt.config.environment import end_with_parent

fork = multiprocessing.get_context("fork")


def sleep_until_the_parent_ends(ready: Connection) -> None:
    end_with_parent()
    ready.send(multiprocessing.current_process().pid)
    time.sleep(60)


def start_a_child(ready: Connection) -> None:
    child = fork.Process(target=sleep_until_the_parent_ends, args=(ready,))
    child.start()
    child.join()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ties processes so")
def test_a_process_is_killed_with_its_parent() -> None:
    receiver, sender = fork.Pipe(duplex=False)
    parent = fork.Process(target=start_a_child, args=(sender,))
    parent.start()
    child = psutil.Process(receiver.recv())
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
