"""Resolving a hub name to a directory, with a small fake hub server. Run: python -m pytest tests/test_hub.py"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from resilient_t5 import hub
from resilient_t5.errors import DataError

pytestmark = pytest.mark.slow

COMMIT, NEXT_COMMIT = "a" * 40, "b" * 40
NAME = "maker/model"
SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
CONFIG = json.dumps({"model_type": "t5", **SIZES}).encode()
BYT5, UMT5 = b'{"tokenizer_class": "ByT5Tokenizer", "model_type": "t5"}', b'{"model_type": "umt5"}'
RESOLVE = """
import sys
from resilient_t5 import hub
from resilient_t5.errors import ResilientError
name, want, setting = sys.argv[1:]
try:
    print(hub.resolve(name, want, setting=setting))
except ResilientError as error:
    sys.exit(f"{type(error).__name__} {error}")
"""


class Hub(ThreadingHTTPServer):
    """Repositories in memory, at one commit each; records requests, and can answer with errors."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commit, self.asked, self.downloaded, self.tokens = COMMIT, [], [], set()
        self.refusals: dict[str, tuple[int, dict[str, str]]] = {}
        """Instead of the `listing`, or of any `file`: a status and its headers."""
        self.stated_sizes: dict[str, int] = {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The three requests that the hub's client sends: what a repository holds, and the head and the content of a file."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def log_message(self, *_):
        pass

    def answer(self, with_body):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        self.server.tokens.add(self.headers.get("Authorization"))
        kind = "listing" if path.startswith("api/models/") else "file"
        if kind in self.server.refusals:
            status, headers = self.server.refusals[kind]
            return self.send(status, b"{}", headers, with_body)
        if kind == "listing":
            return self.listing(path.removeprefix("api/models/"))
        name, _, rest = path.partition("/resolve/")
        commit, _, file = rest.partition("/")
        content = self.server.repositories.get(name, {}).get(file)
        if content is None or commit not in (COMMIT, NEXT_COMMIT):
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        if with_body:
            self.server.downloaded.append(file)
        etag = hashlib.sha256(content).hexdigest()
        return self.send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, with_body)

    def listing(self, name):
        files = self.server.repositories.get(name)
        if files is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, True)
        siblings = [
            {
                "rfilename": file,
                "size": self.server.stated_sizes.get(file, len(content)),
                "blobId": "0" * 40,
                "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130},
            }
            for file, content in files.items()
        ]
        body = json.dumps({"_id": "1", "id": name, "modelId": name, "sha": self.server.commit, "siblings": siblings})
        return self.send(200, body.encode(), {"Content-Type": "application/json"}, True)

    def send(self, status, body, headers, with_body):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def server():
    """A hub on the loopback interface."""
    with Hub() as hub_server:
        thread = threading.Thread(target=hub_server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield hub_server
        hub_server.shutdown()
        thread.join()


@pytest.fixture
def environment(server, tmp_path):
    """Of a process that knows this hub only, and a cache of its own. huggingface_hub reads it when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def resolve(environment):
    """(want, setting, name, other environment) -> the process that resolved it."""

    def run(want="model", setting="model.name_or_path", name=NAME, **others):
        command = [sys.executable, "-c", RESOLVE, name, want, setting]
        return subprocess.run(command, capture_output=True, text=True, env=environment | others, timeout=120)

    return run


def files_of(done):
    """The names in the directory that was printed."""
    assert done.returncode == 0, done.stderr
    return set(os.listdir(done.stdout.strip()))


def log_lines(done):
    """Our lines on standard error, without the progress bars of the client."""
    return [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("hub    ")]


def refused(done, kind="DataError"):
    """The message of a refusal."""
    assert done.returncode == 1, done.stderr
    message = done.stderr[done.stderr.index(f"{kind} ") :].strip()
    assert "\n" not in message
    return message


def real_weights(tmp_path):
    """A small T5: its config.json, and its tensors as pytorch_model.bin."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    torch.save(T5ForConditionalGeneration(T5Config(**SIZES)).state_dict(), tmp_path / "w.bin")
    return (tmp_path / "w.bin").read_bytes()


def test_a_repository_with_a_bin_alone_gives_the_configuration_and_the_bin_and_loads(server, environment, resolve, tmp_path):
    """As google/mt5-base is published: nothing of TensorFlow, Flax or the tokenizer is fetched for the model."""
    unneeded = dict.fromkeys(("tf_model.h5", "flax_model.msgpack", "README.md", "spiece.model", "onnx/model.onnx"), b"x")
    server.repositories[NAME] = {"config.json": CONFIG, "pytorch_model.bin": real_weights(tmp_path), **unneeded}
    done = resolve()
    assert files_of(done) == {"config.json", "pytorch_model.bin"}
    assert sorted(server.downloaded) == ["config.json", "pytorch_model.bin"]
    code = (
        "from resilient_t5.model.load import load_model\nfrom resilient_t5.config.sections import ModelConfig\n"
        f"print(sum(p.numel() for p in load_model({NAME!r}, ModelConfig()).parameters()))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert int(loaded.stdout) > 1000, loaded.stderr
    assert len(server.downloaded) == 2


def test_safetensors_are_fetched_and_no_other_weights(server, resolve):
    """Never both formats; generation_config.json where there is one."""
    others = dict.fromkeys(("pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "model.fp16.safetensors"), b"x" * 99)
    server.repositories[NAME] = {"config.json": CONFIG, "generation_config.json": b"{}", "model.safetensors": b"s", **others}
    assert files_of(resolve()) == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize(("stem", "suffix"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_of_sharded_weights_the_index_and_its_shards_are_fetched(stem, suffix, server, resolve):
    """Both formats; a shard of another model in the same repository stays there."""
    shards = [f"{stem}-0000{k}-of-00002{suffix}" for k in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}).encode()
    names = [*shards, f"{stem}-00001-of-00009{suffix}", "flax_model.msgpack"]
    server.repositories[NAME] = {"config.json": CONFIG, f"{stem}{suffix}.index.json": index, **dict.fromkeys(names, b"x")}
    assert files_of(resolve()) == {"config.json", f"{stem}{suffix}.index.json", *shards}
    del server.repositories[NAME][shards[1]]
    server.commit = NEXT_COMMIT
    assert f"lacks the shard {shards[1]}" in refused(resolve())


def test_for_a_tokenizer_its_files_are_fetched_and_no_weights(server, resolve):
    """All companions of the slow tokenizer, config.json among them."""
    own = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors": b"w" * 999, **dict.fromkeys(own, b"{}")}
    assert files_of(resolve("tokenizer", "tokenizer.name_or_path")) == {"config.json", *own}


def test_a_download_is_logged_in_one_line_with_its_size_and_a_cached_model_is_not(server, resolve):
    """Files and megabytes before the download; a second time nothing is downloaded or logged."""
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors": b"s" * 3_000_000, "spiece.model": b"p"}
    first = log_lines(resolve())
    assert len(first) == 1
    assert f"downloading the model {NAME} from {server.url}: 2 files, 3.00 MB" in first[0]
    again = resolve()
    assert log_lines(again) == []
    assert len(server.downloaded) == 2
    tokenizer = log_lines(resolve("tokenizer", "tokenizer.name_or_path"))
    assert len(tokenizer) == 1
    assert "1 file, 0.00 MB (spiece.model)" in tokenizer[0]


def test_a_new_commit_with_the_same_weights_fetches_what_changed_only(server, resolve):
    """The cache holds contents, not names."""
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors": b"s" * 1000}
    resolve()
    server.commit = NEXT_COMMIT
    server.repositories[NAME]["config.json"] = CONFIG + b" "
    done = resolve()
    assert done.stdout.strip().endswith(NEXT_COMMIT)
    assert "1 file" in log_lines(done)[0]
    assert server.downloaded.count("model.safetensors") == 1


def test_a_download_that_the_disk_has_no_room_for_is_refused_before_it_begins(server, resolve):
    """Exit 73; only config.json was fetched."""
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors": b"s"}
    server.stated_sizes = {"model.safetensors": 10**18}
    message = refused(resolve(), "DiskFull")
    assert "needs 1000000000.00 GB" in message
    assert "HF_HOME" in message
    assert server.downloaded == ["config.json"]


@pytest.mark.parametrize(("want", "setting"), [("model", "model.name_or_path"), ("tokenizer", "tokenizer.name_or_path")])
@pytest.mark.parametrize("how", ["no server", "no such host", "offline", "503", "no hub"])
def test_a_hub_that_cannot_be_reached_is_reported_with_the_setting_and_three_fixes(how, want, setting, server, resolve):
    """The setting that the user set, HF_ENDPOINT, and a local directory with the files that it needs."""
    others = {}
    if how == "no server":
        with socket.create_server(("127.0.0.1", 0)) as free:
            others = {"HF_ENDPOINT": f"http://127.0.0.1:{free.getsockname()[1]}"}
    elif how == "no such host":
        others = {"HF_ENDPOINT": "http://hub.invalid"}
    elif how == "offline":
        others = {"HF_HUB_OFFLINE": "1"}
    else:
        server.refusals["listing"] = (503, {}) if how == "503" else (200, {"Content-Type": "text/html"})
    message = refused(resolve(want, setting, **others))
    assert message.startswith(f"DataError data error: {setting}: {NAME} is not a local directory, and ")
    assert "cannot be reached: " in message
    for way in ("Check the network", "HF_ENDPOINT to a mirror", "a local directory"):
        assert way in message
    needed = (
        ("config.json", "model.safetensors", "pytorch_model.bin") if want == "model" else ("tokenizer.json", "spiece.model")
    )
    assert all(file in message for file in needed)
    assert ("HF_HUB_OFFLINE is set" in message) == (how == "offline")


@pytest.mark.parametrize("want", ["model", "tokenizer"])
@pytest.mark.parametrize("at", ["listing", "file"])
def test_what_is_cached_serves_when_the_hub_cannot_be_reached(at, want, server, resolve):
    """Logged in one line, unless HF_HUB_OFFLINE is set."""
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors": b"s", "spiece.model": b"p"}
    first = resolve(want)
    if at == "file":
        server.commit = NEXT_COMMIT
        server.repositories[NAME] = dict.fromkeys(server.repositories[NAME], b"other")
    server.refusals[at] = (501, {})  # no status that the client asks again for half a minute
    down = resolve(want)
    assert down.stdout == first.stdout
    lines = [line for line in log_lines(down) if "downloading" not in line]
    assert len(lines) == 1
    assert "the local cache is used, revision aaaaaaaaaaaa" in lines[0]
    offline = resolve(want, HF_HUB_OFFLINE="1")
    assert (offline.stdout, log_lines(offline)) == (first.stdout, [])


@pytest.mark.parametrize("want", ["model", "tokenizer"])
def test_a_later_revision_that_is_incomplete_is_ignored(want, server, resolve):
    """An interrupted download does not hide the complete one before it."""
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors": b"s", "spiece.model": b"p"}
    first = resolve(want)
    snapshots = Path(first.stdout.strip()).parent
    (snapshots / NEXT_COMMIT).mkdir()
    (snapshots / NEXT_COMMIT / "config.json").write_bytes(CONFIG)
    (snapshots.parent / "refs" / "main").write_text(NEXT_COMMIT)
    assert resolve(want, HF_HUB_OFFLINE="1").stdout == first.stdout


def test_transformers_finds_what_was_fetched_in_the_same_cache(server, environment, resolve, tmp_path):
    """Offline, by the name: the cache knows which revision the name means."""
    server.repositories[NAME] = {"config.json": CONFIG, "pytorch_model.bin": real_weights(tmp_path)}
    resolve()
    code = (
        f"from transformers import T5ForConditionalGeneration as T; print(T.from_pretrained({NAME!r}).shared.weight.shape[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.stdout.strip() == "32", done.stderr


def test_a_cache_that_lacks_a_file_does_not_serve(server, resolve):
    """config.json and the first shard are no model."""
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors.index.json": index, **dict.fromkeys(shards, b"x")}
    done = resolve()
    os.unlink(os.path.join(done.stdout.strip(), shards[1]))
    assert "HF_HUB_OFFLINE is set" in refused(resolve(HF_HUB_OFFLINE="1"))


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "has no such repository or does not show it to you (404)"),
        (401, {}, "has no such repository or does not show it to you (401)"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "does not show it to you (401)"),
        (403, {"X-Error-Message": "not for you"}, "does not show it to you (403)"),
        (403, {"X-Error-Code": "GatedRepo"}, "its repository is gated (403)"),
    ],
)
@pytest.mark.parametrize("at", ["listing", "file"])
def test_a_repository_that_is_missing_private_or_gated_is_reported_with_the_way_to_log_in(
    at, status, headers, expected, server, resolve
):
    """The status, the setting, `hf auth login`; a gated repository lists its files and refuses them."""
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors": b"s"}
    server.refusals[at] = (status, headers)
    message = refused(resolve())
    assert expected in message
    assert message.startswith(f"DataError data error: model.name_or_path: {NAME} is not a local directory, and ")
    assert "`hf auth login`" in message
    assert "HF_TOKEN" in message


def test_the_message_for_a_name_with_the_hub_prefix_does_not_mention_a_directory(resolve):
    """`bin/restore hub:NAME` uses the hub only."""
    message = refused(resolve(setting=f"hub:{NAME}"))
    assert message.startswith(f"DataError data error: hub:{NAME}: the hub has no such repository")


def test_a_name_that_the_hub_cannot_have_is_refused(resolve):
    """Two dots, or two dashes."""
    assert "it is not a valid name of a hub repository" in refused(resolve(name="maker/mo..del"))


def test_the_token_of_the_environment_is_sent(server, resolve):
    """HF_TOKEN, for private repositories and mirrors with a log-in."""
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors": b"s"}
    files_of(resolve(HF_TOKEN="hf_secret"))
    assert server.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("files", "want", "expected"),
    [
        ({"config.json": CONFIG}, "model", "neither model.safetensors nor pytorch_model.bin"),
        ({"config.json": CONFIG, "tf_model.h5": b"x"}, "model", "TensorFlow and Flax"),
        ({"model.safetensors": b"x"}, "model", "no config.json"),
        ({"config.json": CONFIG, "model.safetensors": b"x"}, "tokenizer", "neither tokenizer.json nor spiece.model"),
        ({"config.json": CONFIG, "vocab.txt": b"x"}, "tokenizer", "BERT vocabulary"),
        (
            {"config.json": b'{"tokenizer_class": "ByT5Tokenizer", "model_type": "t5"}', "pytorch_model.bin": b"x"},
            "model",
            "ByT5",
        ),
        ({"tokenizer_config.json": BYT5}, "tokenizer", "ByT5"),
        ({"config.json": UMT5, "pytorch_model.bin": b"x", "spiece.model": b"x"}, "model", "umT5"),
        ({"config.json": UMT5, "pytorch_model.bin": b"x", "spiece.model": b"x"}, "tokenizer", "umT5"),
    ],
)
def test_a_repository_that_cannot_be_used_is_refused_before_its_weights_are_fetched(files, want, expected, server, resolve):
    """Gigabytes are not downloaded to be refused."""
    server.repositories[NAME] = files
    assert expected in refused(resolve(want))
    assert not {"pytorch_model.bin", "model.safetensors", "spiece.model"} & set(server.downloaded)


def test_an_index_of_the_hub_with_a_path_outside_the_repository_is_refused(server, resolve):
    """No other file of the repository or the machine is fetched or read."""
    index = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors.index.json": index}
    assert "not a shard in its directory" in refused(resolve())


def test_a_local_directory_is_taken_as_it_is_and_asks_no_hub(server, resolve, tmp_path):
    """Also with ~ for the home directory, and also where its name is shaped like that of a repository."""
    (tmp_path / "maker" / "model").mkdir(parents=True)
    server.repositories[NAME] = {"config.json": CONFIG, "model.safetensors": b"s"}
    assert resolve(name="~/maker/model", HOME=str(tmp_path)).stdout.strip() == str(tmp_path / "maker" / "model")
    assert resolve(name=str(tmp_path / "maker" / "model")).returncode == 0
    assert server.asked == []


@pytest.mark.parametrize("name", ["./missing", "/no/such", "a/b/c", "~/missing", "with space", "-x", "", "x" * 5000 + "/"])
@pytest.mark.parametrize("want", ["model", "tokenizer"])
def test_what_is_neither_a_directory_nor_shaped_like_a_hub_name_asks_no_hub(name, want):
    """The message names the setting."""
    with pytest.raises(DataError, match=f"no such {want} directory.*Check x.name_or_path"):
        hub.resolve(name, want, setting="x.name_or_path")
    assert hub.cached(name, want) is None


def test_a_file_is_no_directory(tmp_path):
    """The message names the setting and the file."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"hub:x: a model is a directory, this is a file .*model\.safetensors"):
        hub.resolve(str(tmp_path / "model.safetensors"), "model", setting="hub:x")


def test_a_plan_sees_the_cache_and_never_the_network(server, environment, resolve):
    """A whole model, a configuration alone, nothing; and the refusal of an unsupported model is that of the loader."""
    code = "import sys\nfrom resilient_t5 import hub\nprint(hub.cached(sys.argv[1], sys.argv[2]))"

    def cached(want):
        command = [sys.executable, "-c", code, NAME, want]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()

    assert (cached("model"), cached("tokenizer")) == ("None", "None")
    server.repositories[NAME] = {"config.json": CONFIG, "spiece.model": b"p", "model.safetensors": b"s"}
    directory = resolve("tokenizer").stdout.strip()
    asked = len(server.asked)
    assert (cached("model"), cached("tokenizer")) == (directory, directory)
    assert len(server.asked) == asked
