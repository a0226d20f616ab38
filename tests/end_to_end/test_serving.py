"""`meshwright serve` from the command line: started, asked and ended as a user would."""

import re
import signal
import subprocess
import sys

import httpx
import pytest

from tests.end_to_end.run import ROOT, TINY, environment, meshwright, start

RUN = [*TINY, "source=[text]", "tokenizer.chat_template=plain", "task.num_steps=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "text.txt").write_text("the cat sees the tree. " * 400)
    meshwright(folder, "train", "run=a", *RUN, "data.sources.text.paths=[text.txt]")
    return folder


def test_a_run_is_served_until_it_is_told_to_end(folder):
    asked = ["prompt=the cat", "task.max_new_tokens=12", "task.temperature=0"]
    written, _ = meshwright(folder, "generate", "run=a", *asked)
    server = start(
        folder, "serve", "run=a", "task.port=0", "task.max_num_seqs=2", "task.api_key_env=KEY", KEY="open sesame"
    )
    said = ""
    for line in server.stdout:
        said += line
        if found := re.search(r"(http://\S+) \(page\)", line):
            break
    with httpx.Client(base_url=found[1], headers={"Authorization": "Bearer open sesame"}, timeout=120) as client:
        body = {"model": "a", "prompt": "the cat", "max_tokens": 12, "temperature": 0}
        got = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert "the cat" + got + "\n" == written
        assert "<title>" in client.get("/").text
        with client.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 2000}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"  # what was begun is finished
    out, err = server.communicate(timeout=60)
    assert server.returncode == 0, err
    assert "a at step 2" in said and "has a chat template" in said and "sesame" not in said + out + err


def test_serving_others_without_a_key_or_in_many_processes_is_refused(folder):
    _, err = meshwright(folder, "serve", "run=a", "task.host=0.0.0.0", expect=2)
    assert "task.host=0.0.0.0" in err and "task.api_key_env=" in err
    _, err = meshwright(folder, "serve", "run=a", "launcher.num_processes=2", expect=2)
    assert "launcher.num_processes=2" in err and "one process" in err
    _, err = meshwright(folder, "serve", "run=a", "task.port=0", "task.max_model_len=9000", expect=2)
    assert "task.max_model_len=9000" in err


def test_other_tasks_do_not_load_the_server_and_its_absence_is_said_in_words():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from launch.cli import run; run(['runs'])\n"
        "assert not {'uvicorn', 'starlette', 'prometheus_client', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(run(['serve', 'run=a']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "pip install -e '.[serve]'" in done.stderr, done.stderr
