"""Serving: OpenAI-compatible responses that equal generation without a server."""

import dataclasses
import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from data.records.chat_encoding import chat_ids, text_after_turn
from data.tokenizers.kinds import Bytes
from launch.generation import encode_prompt, generate_batches
from models.decode.engine import Request
from models.decode.sampling import SamplingConfig
from models.logical_axes import no_constraint
from tests.launch.served import Scripted, engine, model, serving, tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving(engine(4), slots=4) as client:
        yield client


def complete(client: httpx.Client, **body) -> dict:
    response = client.post("/v1/completions", json={"model": "tiny", "prompt": "once", "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return response.json()


def chat(client: httpx.Client, **body) -> dict:
    response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client: httpx.Client, path: str, **body) -> list[dict]:
    asked = {"model": "tiny", "stream": True, "temperature": 0, **body}
    with client.stream("POST", path, json=asked) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def alone(prompt, stop=(), **settings) -> str:
    params, config = model()
    sampling = SamplingConfig(**{"temperature": 0.0, **settings})
    return generate_batches(params, config, tokenizer(), [prompt], sampling, stop=stop, constrain=no_constraint)[0][0]


def test_a_greedy_completion_is_what_generate_writes(client):
    got = complete(client, max_tokens=24)
    assert got["choices"][0]["text"] == alone("once", max_new_tokens=24)
    assert got["usage"] == {"prompt_tokens": 4, "completion_tokens": 24, "total_tokens": 28}
    assert got["choices"][0]["finish_reason"] == "length" and got["model"] == "tiny"


def test_a_greedy_answer_in_a_chat_is_what_generate_writes(client):
    got = chat(client, max_completion_tokens=20)["choices"][0]
    ending = text_after_turn(tokenizer())
    want = alone(chat_ids(tokenizer(), HELLO), [] if ending is None else [ending], max_new_tokens=20).lstrip()
    assert got["message"] == {"role": "assistant", "content": want, "refusal": None}


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = chat(client, max_tokens=30, logprobs=True, top_logprobs=2)
    asked = {"messages": HELLO, "max_tokens": 30, "logprobs": True, "top_logprobs": 2}
    chunks = streamed(client, "/v1/chat/completions", **asked, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"] and len(chunks) > 5
    tokens = [t for c in chunks[:-1] for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert tokens == whole["choices"][0]["logprobs"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]].count("length") == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert {c["id"] for c in chunks} == {chunks[0]["id"]} and chunks[0]["usage"] is None


def test_log_probabilities_name_text_and_bytes_and_are_those_of_the_engine(client):
    got = chat(client, max_tokens=12, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    one = engine(2)
    one.submit(Request(chat_ids(tokenizer(), HELLO), SamplingConfig(12, 0.0), tokenizer().stop_ids, top_logprobs=3))
    want = []
    while one.busy:
        want += one.step()
    assert [t["bytes"] for t in got] == [[e.token] for e in want]
    assert [t["logprob"] for t in got] == [e.logprob for e in want]
    assert all(t["top_logprobs"][0]["logprob"] == t["logprob"] and len(t["top_logprobs"]) == 3 for t in got)


def test_completions_tell_log_probabilities_in_columns(client):
    choice = complete(client, max_tokens=10, logprobs=2)["choices"][0]
    columns = choice["logprobs"]
    assert len({len(columns[k]) for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset", "bytes")}) == 1
    assert bytes(b for piece in columns["bytes"] for b in piece).decode(errors="replace") == choice["text"]
    assert all(len(top) == 2 for top in columns["top_logprobs"]) and columns["text_offset"][0] == 0
    assert complete(client, max_tokens=2)["choices"][0]["logprobs"] is None


def test_choices_differ_and_a_seed_repeats_them(client):
    asked = {"n": 3, "temperature": 1.5, "seed": 11, "max_tokens": 12}
    first, again, unseeded = (
        complete(client, **asked),
        complete(client, **asked),
        complete(client, **asked | {"seed": None}),
    )
    texts = lambda got: [c["text"] for c in got["choices"]]
    assert len(set(texts(first))) == 3 and [c["index"] for c in first["choices"]] == [0, 1, 2]
    assert texts(first) == texts(again) != texts(unseeded)
    assert complete(client, **asked | {"n": 1})["choices"][0]["text"] == texts(first)[0]
    assert first["usage"]["completion_tokens"] == 36 and first["usage"]["prompt_tokens"] == 4


def test_several_prompts_and_prompts_of_tokens_are_answered_in_order(client):
    both = complete(client, prompt=["once", "twice"], n=2, max_tokens=6)["choices"]
    single = [complete(client, prompt=p, n=2, max_tokens=6)["choices"] for p in ("once", list(b"twice"))]
    assert [c["text"] for c in both] == [c["text"] for part in single for c in part]
    assert complete(client, prompt=[list(b"once")], max_tokens=6)["choices"][0]["text"] == both[0]["text"]


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(client):
    whole = complete(client, max_tokens=40, logprobs=0)["choices"][0]
    stop = whole["text"][5:8]
    got = complete(client, max_tokens=40, stop=["\n\n\n", stop], logprobs=0)["choices"][0]
    assert got["text"] == whole["text"][: whole["text"].find(stop)] and got["finish_reason"] == "stop"
    assert len(got["logprobs"]["tokens"]) == sum(at < len(got["text"]) for at in whole["logprobs"]["text_offset"])
    chunks = streamed(client, "/v1/completions", prompt="once", max_tokens=40, stop=stop)
    assert "".join(c["choices"][0]["text"] for c in chunks) == got["text"]


def test_a_stop_text_across_tokens_never_shows_its_beginning():
    with serving(Scripted(list(b"so it goes. END of it")), slots=2) as client:
        chunks = streamed(client, "/v1/completions", prompt="x", max_tokens=21, stop=[" END", "never"])
        assert "".join(c["choices"][0]["text"] for c in chunks) == "so it goes."
        assert not any("E" in c["choices"][0]["text"] for c in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        near = complete(client, max_tokens=13, stop=" ENDING")  # ends within a possible stop string
        assert near["choices"][0]["text"] == "so it goes. E" and near["choices"][0]["finish_reason"] == "length"


def test_half_a_character_is_never_sent():
    text = "ab 😀é日 👩‍👧!"
    with serving(Scripted([*text.encode(), 256]), slots=2) as client:
        chunks = streamed(client, "/v1/chat/completions", messages=HELLO, max_tokens=100, logprobs=True)
        pieces = [c["choices"][0]["delta"].get("content", "") for c in chunks]
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        tokens = [t for c in chunks for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert bytes(b for t in tokens for b in t["bytes"]) == text.encode()
        for chunk in chunks:  # the bytes of a character are sent together with it
            if found := (chunk["choices"][0]["logprobs"] or {}).get("content"):
                assert bytes(b for t in found for b in t["bytes"]).decode() == chunk["choices"][0]["delta"]["content"]
        broken = complete(client, max_tokens=4)["choices"][0]
        assert broken["text"] == "ab \ufffd"  # truncated within a character


def test_parameters_reach_the_engine_and_no_seed_is_a_random_one():
    played = Scripted(list(b"abc"))
    with serving(played, slots=2) as client:
        asked = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": -1}
        complete(client, **asked, temperature=0.5, top_p=0.9, seed=-7, max_tokens=3)
        complete(client, temperature=None)
        complete(client, top_p=0, temperature=1e-300)
        chat(client)
        found = [request.sampling for request in played.asked.values()]
    want = SamplingConfig(3, 0.5, 5, 0.9, 0.1, 1.2, 1.0, -1.0, -7)
    assert found[0] == want
    assert dataclasses.replace(found[1], seed=0) == SamplingConfig(max_new_tokens=16)
    assert found[1].seed != found[2].seed
    assert found[2].temperature == 0 and 0 < found[2].top_p < 1e-5
    assert found[3].max_new_tokens == 256 - len(chat_ids(tokenizer(), HELLO))


def test_models_are_listed_and_others_are_not_found(client):
    listed = client.get("/v1/models").json()
    assert listed["data"][0]["id"] == "tiny" and listed["data"][0]["chat"] is True
    assert client.get("/v1/models/tiny").json() == listed["data"][0]
    for response in (
        client.get("/v1/models/gpt"),
        client.post("/v1/completions", json={"model": "gpt", "prompt": "x"}),
    ):
        assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_a_run_without_a_template_completes_and_refuses_chats():
    with serving(Scripted(list(b"abc")), slots=2, tokenizer=Bytes()) as client:
        assert client.get("/v1/models").json()["data"][0]["chat"] is False
        assert complete(client, max_tokens=3)["choices"][0]["text"] == "abc"
        response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
        assert response.status_code == 400 and response.json()["error"]["code"] == "no_chat_template"


def test_an_empty_prompt_begins_a_document(client):
    got = complete(client, prompt="", max_tokens=5)
    assert got["usage"]["prompt_tokens"] == len(encode_prompt(tokenizer(), "")) == 1


def test_the_official_client_chats_streams_and_reads_log_probabilities(client):
    official = openai.OpenAI(base_url=f"{client.base_url}/v1/", api_key="none", max_retries=0)
    assert [m.id for m in official.models.list()] == ["tiny"]
    asked = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 15}
    whole = official.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens == 15
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = official.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    legacy = official.completions.create(model="tiny", prompt="once", max_tokens=4, logprobs=1, extra_body={"top_k": 1})
    assert legacy.choices[0].text == alone("once", max_new_tokens=4) and len(legacy.choices[0].logprobs.tokens) == 4
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        official.chat.completions.create(**asked, logit_bias={"50": 1})
    with pytest.raises(openai.NotFoundError):
        official.chat.completions.create(**asked | {"model": "other"})
