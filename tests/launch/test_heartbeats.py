"""Lost processes are detected from heartbeats and reported in one line."""

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
    """An in-process key-value store; `broken`: the error raised by writes."""

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


def test_a_process_without_new_heartbeats_is_lost_and_one_that_counts_on_is_not():
    clock = Time()
    survey, signs = PeerStatus(clock), {0: Heartbeat(1), 1: Heartbeat(1, step=7, host="node7"), 2: Heartbeat(1)}
    assert survey.failures(signs) == {}
    clock.now += 2
    signs[0].count = signs[2].count = 2
    assert survey.failures(signs) == {}
    clock.now += 2
    signs[0].count = signs[2].count = 3
    assert survey.failures(signs) == {1: "(node7) is lost: no heartbeat for 4 s, the last after step 7"}
    signs[1].count = 2  # it was only slow
    assert survey.failures(signs) == {}


def test_a_process_that_leaves_with_an_error_is_reported_but_not_before_one_that_was_killed():
    clock = Time()
    survey, signs = (
        PeerStatus(clock),
        {0: Heartbeat(1), 1: Heartbeat(1, left=1, host="a"), 2: Heartbeat(1, left=75), 3: Heartbeat(1, left=0)},
    )
    assert survey.failures(signs) == {1: "(a) is lost: exited with code 1, see its output"}
    signs[4] = Heartbeat(1, host="b")
    survey.failures(signs)
    clock.now += 3
    signs[0].count = 2
    assert [*survey.failures(signs)] == [4]


@pytest.fixture
def three():
    store, left = Store(), []
    made = [Peers(store, i, 3, None, pause=0.05, leave=left.append) for i in range(3)]
    return store, made, left


def test_all_processes_receive_the_lost_ones_from_process_0(three, capsys, monkeypatch):
    monkeypatch.setattr("launch.heartbeats.HEARTBEAT_TIMEOUT", 0.1)
    store, peers, left = three
    for peer in reversed(peers):
        peer.publish()
    time.sleep(0.15)
    for peer in (peers[0], peers[1], peers[0], peers[1]):  # the third one stops
        peer.publish()
    peers[1].exit_lost("a collective failed", patience=1)
    assert left == [75]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "process 1 of 3" in said and "process 2 (" in said
    assert "no heartbeat" in said and "(a collective failed); exiting with code 75" in said
    assert Heartbeat(**json.loads(store["meshwright/signs/1"])).left == 75  # a clean exit, not a lost process


def test_an_unknown_peer_is_reported_after_the_timeout(three, capsys):
    _, peers, left = three
    for peer in peers:
        peer.publish()
    peers[1].exit_lost("a collective failed", patience=0.1)
    assert left == [75] and "another process is lost (a collective failed)" in capsys.readouterr().err


def test_a_call_that_fails_is_nothing_until_jax_aborts(three, capsys, monkeypatch):
    store, peers, left = three
    for peer in peers:
        peer.publish()
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
    assert left[:1] == [75] and "process 0 is lost: no answer for" in said and "JAX is aborting" in said


def test_a_lost_coordinator_is_reported_although_calls_to_it_never_return(capsys):
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
    assert left[:1] == [75] and f"process 0 is lost: no connection to 127.0.0.1:{port}" in capsys.readouterr().err


def test_processes_that_are_behind_are_listed_first(three):
    _, peers, _ = three
    for peer, step, doing in zip(peers, (42, 41, 42), ("devices", "data", "devices"), strict=True):
        peer.progress = lambda step=step, doing=doing: (step, f"waiting for {doing}")
        peer.publish()
    host = Heartbeat().host
    assert peers[0].compared() == (
        f"process 1 ({host}) after step 41: waiting for data; "
        f"processes 0 ({host}), 2 ({host}) after step 42: waiting for devices"
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


def test_an_abort_leaves_time_for_a_last_message():
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
