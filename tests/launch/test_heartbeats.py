"""Who is gone is found out from signs of life, and told in one line."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch.heartbeats import Heartbeat, Peers, PeerStatus, _aborting


class Store(dict):
    """What processes write, in this one; `broken` as when the coordinator refuses."""

    broken = ""

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.broken:
            raise RuntimeError(self.broken)
        self[key] = value

    def key_value_try_get(self, key):
        if key not in self:
            raise RuntimeError(f"NOT_FOUND: {key}")
        return self[key]

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in self.items() if name.startswith(key)]


class Time:
    now = 100.0

    def __call__(self):
        return self.now


def test_who_stands_still_is_silent_and_who_counts_on_is_not():
    clock = Time()
    survey, signs = PeerStatus(clock), {0: Heartbeat(1), 1: Heartbeat(1, step=7, host="node7"), 2: Heartbeat(1)}
    assert survey.news(signs) == {}
    clock.now += 2
    signs[0].count = signs[2].count = 2
    assert survey.news(signs) == {}
    clock.now += 2
    signs[0].count = signs[2].count = 3
    assert survey.news(signs) == {1: "(node7) is gone: no sign of life for 4 s, the last after step 7"}
    signs[1].count = 2  # it was only slow
    assert survey.news(signs) == {}


def test_who_leaves_with_an_error_is_named_but_not_before_one_who_could_say_nothing():
    clock = Time()
    survey, signs = (
        PeerStatus(clock),
        {0: Heartbeat(1), 1: Heartbeat(1, left=1, host="a"), 2: Heartbeat(1, left=75), 3: Heartbeat(1, left=0)},
    )
    assert survey.news(signs) == {1: "(a) is gone: left with 1, its own output says why"}
    signs[4] = Heartbeat(1, host="b")
    survey.news(signs)
    clock.now += 3
    signs[0].count = 2
    assert [*survey.news(signs)] == [4]


@pytest.fixture
def three():
    store, left = Store(), []
    made = [Peers(store, i, 3, None, pause=0.05, leave=left.append) for i in range(3)]
    return store, made, left


def test_all_learn_from_process_0_who_is_gone(three, capsys, monkeypatch):
    monkeypatch.setattr("launch.heartbeats.SILENT", 0.1)
    store, peers, left = three
    for peer in reversed(peers):
        peer.give_sign()
    time.sleep(0.15)
    for peer in (peers[0], peers[1], peers[0], peers[1]):  # the third gives none any more
        peer.give_sign()
    peers[1].leave_alone("a collective failed", patience=1)
    assert left == [75]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "process 1 of 3" in said and "process 2 (" in said
    assert "no sign of life" in said and "(a collective failed); leaving with 75" in said
    assert Heartbeat(**json.loads(store["meshwright/signs/1"])).left == 75  # and is not taken for lost


def test_nobody_to_name_is_said_after_the_patience(three, capsys):
    _, peers, left = three
    for peer in peers:
        peer.give_sign()
    peers[1].leave_alone("a collective failed", patience=0.1)
    assert left == [75] and "another process is gone (a collective failed)" in capsys.readouterr().err


def test_a_call_that_fails_is_nothing_until_jax_aborts(three, capsys, monkeypatch):
    store, peers, left = three
    for peer in peers:
        peer.give_sign()
    store.broken = "DEADLINE_EXCEEDED"
    peers[1].start()
    time.sleep(0.5)
    assert not left
    monkeypatch.setattr("launch.heartbeats._aborting", lambda: True)
    until = time.monotonic() + 10
    while not left and time.monotonic() < until:
        time.sleep(0.02)
    peers[1].stop()
    said = capsys.readouterr().err
    assert left[:1] == [75] and "process 0 is gone: no answer from it for" in said and "JAX cannot go on" in said


def test_a_lost_coordinator_is_told_although_calls_to_it_never_return(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        left = []
        peer = Peers(Store(), 1, 2, f"127.0.0.1:{port}", pause=0.05, leave=left.append)
        assert peer._answers()
    assert not peer._answers()
    peer._threads[1].start()
    until = time.monotonic() + 10
    while not left and time.monotonic() < until:
        time.sleep(0.02)
    peer.stop()
    assert left[:1] == [75] and f"process 0 is gone: nobody answers at 127.0.0.1:{port}" in capsys.readouterr().err


def test_who_is_behind_is_told_first(three):
    _, peers, _ = three
    for peer, step, doing in zip(peers, (42, 41, 42), ("its devices", "data", "its devices"), strict=True):
        peer.progress = lambda step=step, doing=doing: (step, f"waits for {doing}")
        peer.give_sign()
    host = Heartbeat().host
    assert peers[0].compared() == (
        f"process 1 ({host}) after step 41: waits for data; "
        f"processes 0 ({host}), 2 ({host}) after step 42: waits for its devices"
    )


def test_a_thread_that_is_being_made_is_no_abort():
    seen, done = threading.Event(), threading.Event()

    def blocks_all():  # as the C library does for a moment in each new thread
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        seen.set()
        done.wait(10)

    thread = threading.Thread(target=blocks_all)
    thread.start()
    assert seen.wait(10)
    found = _aborting()
    done.set()
    thread.join()
    assert not found


def test_an_abort_leaves_time_for_last_words():
    code = """
import ctypes, os, threading, time
from launch import heartbeats as peers
assert not peers._aborting()
peers._delay_aborts()
threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
until = time.monotonic() + 5
while not peers._aborting() and time.monotonic() < until:
    time.sleep(0.01)
print("last words", flush=True)
os._exit(75)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (75, "last words\n")
