"""Serving under bad input, full queues, clients that leave and failing engines: errors in words, and nothing leaks."""

import asyncio
import gc
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from configs.tasks import ServeConfig
from launch.serving.api import page_headers
from launch.serving.middleware import is_loopback
from launch.tasks.serve import check, listen
from tests.launch.served import Scripted, engine, metric, serving, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving(Scripted(list(b"abc ")), slots=2, max_queue=3, max_request_bytes=5000) as client:
        yield client


BAD = [
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": 5}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": "x" * 256}, "prompt"),
    (TEXT, {"prompt": "x", "temperature": 2.5}, "temperature"),
    (TEXT, {"prompt": "x", "temperature": "hot"}, "temperature"),
    (TEXT, {"prompt": "x", "temperature": True}, "temperature"),
    (TEXT, {"prompt": "x", "top_p": -0.1}, "top_p"),
    (TEXT, {"prompt": "x", "top_k": 10**30}, "top_k"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "x", "n": 0}, "n"),
    (TEXT, {"prompt": "x", "n": 6}, "n"),  # more than the slots and the queue hold
    (TEXT, {"prompt": "x", "stop": ["a"] * 5}, "stop"),
    (TEXT, {"prompt": "x", "stop": "a" * 1001}, "stop"),
    (TEXT, {"prompt": "x", "seed": 1.5}, "seed"),
    (TEXT, {"prompt": "x", "echo": True}, "echo"),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
    (TEXT, {"prompt": "x", "best_of": 2}, "best_of"),
    (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs"),
    (TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    (TEXT, {"prompt": "x", "temprature": 1}, "temprature"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": ["hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "human", "content": "hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "a <|endoftext|> b"}]}, "messages[0].content"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": HELLO, "logit_bias": {"5": 100}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": HELLO, "\ud800": 1}, "body"),
    (CHAT, {"messages": HELLO, "": 1}, ""),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
def test_what_is_wrong_is_refused_with_400_naming_the_field(client, path, body, param):
    content = json.dumps({"model": "tiny", "max_tokens": 2} | body)
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"].startswith(param) and error["message"].startswith(param)


def test_harmless_parameters_and_empty_wishes_are_let_be(client):
    body = {"user": "me", "metadata": {"a": "b"}, "store": False, "logit_bias": {}, "response_format": {"type": "text"}}
    body |= {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    assert client.post(CHAT, json=body | {"max_tokens": 1, "tools": [], "n": None}).status_code == 200


def test_bodies_that_are_no_object_are_refused_in_the_same_shape(client):
    deep = b'{"model": "tiny", "messages": [{"role": "user", "content": "x", "a": ' + b"[" * 2000 + b"]" * 2000 + b"}]}"
    for content in (b"", b"{", b"[1]", b"null", b"\xff\xfe", deep, b'{"model": "tiny", "prompt": "\\ud800"}'):
        for path in (CHAT, TEXT):
            response = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == 400 and response.json()["error"]["message"], content
    plain = client.post(TEXT, content=b'{"model": "tiny", "prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 400 and "Content-Type" in plain.json()["error"]["message"]
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get(TEXT).status_code == 405 and "GET" in client.get(TEXT).json()["error"]["message"]


def test_half_of_a_surrogate_pair_in_a_message_is_refused(client):
    for said in ({"content": "\ud800"}, {"content": "x", "name": "\ud800"}):
        content = json.dumps({"model": "tiny", "messages": [{"role": "user", **said}]})
        assert client.post(CHAT, content=content, headers={"Content-Type": "application/json"}).status_code == 400


def test_a_body_that_is_too_large_is_refused_with_413(client):
    def pieces() -> Iterator[bytes]:
        yield from [b"x" * 1000] * 200

    for response in (client.post(TEXT, content=b"x" * 5001), client.post(TEXT, content=pieces())):
        assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"


def test_the_key_is_asked_for_and_nothing_tells_it():
    with serving(Scripted(list(b"abc")), slots=2, api_key="se cret") as client:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic se cret"}):
            for response in (client.post(TEXT, json=body, headers=given), client.get("/metrics", headers=given)):
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
                assert "cret" not in response.text
        assert client.post(TEXT, json=body, headers={"Authorization": "Bearer se cret"}).status_code == 200
        assert client.get("/healthz").status_code == client.get("/").status_code == 200


def test_on_loopback_other_host_names_are_refused(client):
    assert client.get("/healthz", headers={"Host": "evil.example:8000"}).status_code == 403
    assert client.get("/healthz", headers={"Host": "localhost:1"}).status_code == 200
    assert [is_loopback(h) for h in ("::1", "127.8.9.1", "a.localhost", "0.0.0.0", "localhost.evil.example", "")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_a_full_queue_answers_429_and_recovers():
    played = Scripted(list(b"abc"))
    with serving(played, slots=2, max_queue=1) as client:
        played.hold.set()
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2, "stream": True}
        with client.stream("POST", TEXT, json=body | {"n": 2}) as first, client.stream("POST", TEXT, json=body):
            until(lambda: played.num_active == 2)
            until(lambda: metric(client, "meshwright_queue_length") == 1)
            refused = client.post(TEXT, json=body)
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            played.hold.clear()
            assert "[DONE]" in first.read().decode()
        until(lambda: client.scheduler.num_open == 0)
        assert client.post(TEXT, json=body).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream):
    played = Scripted(list(b"abc"))
    with serving(played, slots=2) as client:
        played.hold.set()
        body = {"model": "tiny", "prompt": "x", "n": 3, "max_tokens": 50, "stream": stream}
        request = client.build_request("POST", TEXT, json=body)
        raw = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw += f"Content-Length: {len(request.content)}\r\n\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port)) as leaving:
            leaving.sendall(raw.encode() + request.content)
            until(lambda: played.num_active == 2 and played.num_waiting == 1)
        until(lambda: played.num_active == played.num_waiting == client.scheduler.num_open == 0)
        assert metric(client, "meshwright_cancelled_total") == 1


def test_an_answer_that_takes_too_long_ends_with_an_error_and_frees_its_slot():
    played = Scripted(list(b"abc"))
    with serving(played, slots=2, timeout=0.3) as client:
        played.hold.set()
        body = {"model": "tiny", "prompt": "x"}
        late = client.post(TEXT, json=body)
        assert late.status_code == 408 and late.json()["error"]["code"] == "timeout"
        streamed = client.post(TEXT, json=body | {"stream": True})
        assert json.loads(streamed.text.removeprefix("data: "))["error"]["type"] == "timeout_error"
        until(lambda: played.num_active == 0)


def test_a_failing_engine_answers_those_who_wait_and_turns_health_to_503(capfd):
    played = Scripted(list(b"abc"), slots=1)
    with serving(played, slots=1) as client:
        played.hold.set()
        body = {"model": "tiny", "prompt": "x", "stream": True}
        with client.stream("POST", TEXT, json=body) as first, client.stream("POST", TEXT, json=body) as second:
            until(lambda: played.num_active == 1 and played.num_waiting == 1)
            played.broken.set()
            assert all("the engine has failed" in response.read().decode() for response in (first, second))
        assert client.get("/healthz").status_code == client.post(TEXT, json=body).status_code == 503
        assert metric(client, "meshwright_up") == 0 and client.scheduler.failed
    assert "the device is gone" in capfd.readouterr().err


def test_metrics_count_what_was_done(client):
    before = metric(client, "meshwright_completion_tokens_total")
    assert client.post(TEXT, json={"model": "tiny", "prompt": "x", "max_tokens": 7}).status_code == 200
    text = client.get("/metrics").text
    assert metric(client, "meshwright_completion_tokens_total") == before + 7
    for name in ("request_seconds_bucket", "time_to_first_token_seconds_count", "tokens_per_second_count"):
        assert f"meshwright_{name}" in text
    client.get("/some/path")
    assert "/some/path" not in client.get("/metrics").text
    assert metric(client, "meshwright_active_slots") == metric(client, "meshwright_queue_length") == 0


def test_a_beginning_that_was_read_already_is_counted():
    with serving(engine(2), slots=2) as client:
        for _ in range(2):
            body = {"model": "tiny", "prompt": "a" * 100, "max_tokens": 2}
            assert client.post(TEXT, json=body).status_code == 200
        assert metric(client, "meshwright_prompt_tokens_total") == 200
        assert metric(client, "meshwright_reused_prompt_tokens_total") == 96


def test_the_page_asks_nobody_else(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    assert policy.count("'sha256-") == 2 and page_headers(page.text)["Content-Security-Policy"] == policy
    assert "http://" not in page.text and "https://" not in page.text and " style=" not in page.text


def test_settings_that_are_wrong_or_unsafe_are_refused_at_the_start():
    for change, why in (
        ({"max_num_seqs": 0}, "task.max_num_seqs=0"),
        ({"port": 70000}, "task.port=70000"),
        ({"timeout": 0.0}, "task.timeout=0"),
        ({"max_model_len": 1}, "task.max_model_len=1"),
        ({"api_key_env": "NOT_SET"}, "task.api_key_env=NOT_SET"),
    ):
        with pytest.raises(ValueError, match=why):
            check(ServeConfig(**change), {})
    assert check(ServeConfig(api_key_env="KEY"), {"KEY": " abc\n"}) == "abc"
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ValueError, match=r"task\.port=\d+: .*in use"):
            listen("127.0.0.1", taken.getsockname()[1])


# A crowd


def asked(i: int, rng: random.Random) -> dict:
    prompt = ("the same beginning, long enough to be shared " if i % 3 == 0 else "") + "x" * rng.randint(1, 90) + str(i)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": rng.randint(1, 30), "seed": i, "stream": i % 2 == 0}
    return body | {"temperature": (0, 1, 1.6)[i % 3], "top_p": (1, 0.8)[i % 2], "logprobs": 1}


async def answer(client: httpx.AsyncClient, body: dict, leave_after: float | None) -> tuple[str, list] | None:
    text, logprobs = "", []
    try:
        async with asyncio.timeout(leave_after), client.stream("POST", TEXT, json=body) as response:
            assert response.status_code == 200
            if not body["stream"]:
                choice = json.loads(await response.aread())["choices"][0]
                return choice["text"], choice["logprobs"]["token_logprobs"]
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    text += choice["text"]
                    logprobs += choice["logprobs"]["token_logprobs"]
        return text, logprobs
    except TimeoutError:
        return None


def resident_megabytes() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def test_64_clients_that_come_and_go_get_what_each_gets_alone_and_nothing_leaks():
    async def crowd(client: httpx.AsyncClient, round: int) -> list:
        rng = random.Random(round)
        leave = [rng.uniform(0.01, 0.6) if i % 4 == 1 else None for i in range(64)]
        found = await asyncio.gather(*(answer(client, body, at) for body, at in zip(bodies, leave, strict=True)))
        assert all(got is not None for got, at in zip(found, leave, strict=True) if at is None)
        return found

    async def everything(url: str) -> tuple[list, list, list]:
        # No connection twice: the server may close one that was idle for 5 s in the moment in which it is used again.
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            alone = [await answer(client, body, None) for body in bodies]
            rounds, memory = [], []
            for round in range(4):
                rounds.append(await crowd(client, round))
                memory.append(resident_megabytes())
            return alone, rounds, memory

    rng = random.Random(0)
    bodies = [asked(i, rng) for i in range(64)]
    begun = time.monotonic()
    with serving(engine(4), slots=4) as client:
        alone, rounds, memory = asyncio.run(everything(str(client.base_url)))
        for found in rounds:
            assert [got for got in found if got is not None] == [
                want for want, got in zip(alone, found, strict=True) if got is not None
            ]
        left = sum(got is None for found in rounds for got in found)
        assert left > 0
        until(lambda: client.scheduler.num_open == 0)
        until(lambda: metric(client, "meshwright_active_slots") == metric(client, "meshwright_queue_length") == 0)
    print(f"{left} of {4 * 64} left early; {time.monotonic() - begun:.0f} s; resident MB after each round: {memory}")
    assert memory[-1] < memory[0] + 25


def test_the_schema_tells_the_model_and_the_shape_of_errors(client):
    schema = client.get("/openapi.json").json()
    assert schema["components"]["schemas"]["ChatBody"]["properties"]["model"]["enum"] == ["tiny"]
    assert all("4XX" in op["responses"] for ops in schema["paths"].values() for op in ops.values())
    assert "422" not in json.dumps(schema)
