"""The guard that every test runs under does see what is left behind."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import zmq

from tests.leaks import belongings, leaks_since

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the guard is for Unix")


def test_a_thread_is_seen_until_it_ends():
    before, stop = belongings(), threading.Event()
    thread = threading.Thread(target=stop.wait, name="forgotten", daemon=True)
    thread.start()
    assert leaks_since(before, grace_s=0.1) == ["thread 'forgotten'"]
    stop.set()
    assert leaks_since(before) == []


def test_a_child_process_is_seen_until_it_ends():
    before = belongings()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        [words] = leaks_since(before, grace_s=0.1)
        assert words.startswith(f"process {child.pid}: ")
        child.communicate(b"\n")
    assert leaks_since(before) == []


def test_a_socket_is_seen_until_it_is_closed():
    before = belongings()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    [words] = leaks_since(before, grace_s=0.1)
    assert words.startswith("socket <zmq.Socket(zmq.DEALER)")
    socket.close()
    assert leaks_since(before) == []
    context.term()


def test_what_was_there_before_is_no_leak():
    context = zmq.Context()
    with context.socket(zmq.ROUTER):
        assert leaks_since(belongings(), grace_s=0.1) == []
    context.term()
