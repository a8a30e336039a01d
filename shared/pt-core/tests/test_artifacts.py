"""An artifact is whole or not there, comes back bit-equal, says which version knows its keys, and runs no code of its own."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from torch import Tensor, nn

import pt_core
from pt_core.artifacts import (
    CARD,
    CONFIG,
    FILES,
    TENSORS,
    load,
    load_artifact,
    model_card,
    push,
    save_artifact,
    write_folder,
)
from pt_core.errors import InputError
from pt_core.frozen import identity
from pt_core.method import Loss, Method, MethodConfig, Output

GOLDEN = Path(__file__).parent / "golden"


def backbone(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def config(**values: Any) -> dict[str, Any]:
    return {
        "method": "toy",
        "package": "pt_toy",
        "method_class": "pt_toy.methods:Toy",
        "method_config": {"length": 2},
        "backbone": identity(backbone(), "org/tiny", "v1"),
        **values,
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def edit(folder: Path, *removed: str, **values: Any) -> None:
    """Change and remove keys of a saved configuration."""
    content = {**json.loads((folder / CONFIG).read_text()), **values}
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if k not in removed}))


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_tensors_come_back_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    whole = {"prompt": values, "turned": values.t(), "scalar": values[0, 0], "again": values, "empty": values[:0]}
    save_artifact(tmp_path / "a", whole, config())
    loaded = load_artifact(tmp_path / "a")
    assert loaded.tensors.keys() == whole.keys() and loaded.folder == tmp_path / "a"
    for name, tensor in whole.items():
        assert loaded.tensors[name].dtype == dtype and loaded.tensors[name].shape == tensor.shape
        assert torch.equal(bits(loaded.tensors[name]), bits(tensor.contiguous()))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(
    task=st.none() | st.dictionaries(st.text(), JSON, max_size=4),
    metrics=st.dictionaries(st.text(), st.floats(-1e9, 1e9)),
)
def test_configuration_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, task: Any, metrics: Any) -> None:
    folder = tmp_path_factory.mktemp("a") / "artifact"
    save_artifact(folder, {}, config(task=task, metrics=metrics))
    loaded = load_artifact(folder).config
    assert (loaded.task, loaded.metrics) == (task, metrics)
    assert loaded.backbone == identity(backbone(), "org/tiny", "v1")


def test_defaults_name_the_versions_and_the_time(tmp_path: Path) -> None:
    saved = load_artifact(save_artifact(tmp_path / "a", {"p": torch.ones(2)}, config(package="safetensors"))).config
    assert saved.format_version == 1 and saved.task is None and saved.metrics == {}
    assert saved.libraries.keys() >= {"pt-core", "safetensors", "torch"} and saved.libraries["torch"].startswith("2.")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", json.loads((tmp_path / "a" / CONFIG).read_text())["created"]
    )


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (
            {"p": torch.tensor([1.0, torch.nan])},
            {},
            r"prompt\.safetensors, field 'p': holds values that are not finite",
        ),
        ({"p": torch.tensor([torch.inf]).bfloat16()}, {}, "not finite"),
        ({}, {"metrics": {"loss": float("nan")}}, r"prompt_config\.json: cannot be written as JSON"),
        ({}, {"method_config": {"x": float("inf")}}, r"prompt_config\.json: cannot be written as JSON"),
        ({}, {"method": None}, "field 'method': Input should be a valid string"),
        ({}, {"method_class": "Toy"}, "field 'method_class'"),
        ({}, {"extra": 1}, "unknown here: extra"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path, tensors: Any, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        save_artifact(tmp_path / "a", tensors, config(**changes))
    assert list(tmp_path.iterdir()) == []


# --- golden artifacts ------------------------------------------------------------------------------------------------


def test_golden_v1_loads() -> None:
    loaded = load_artifact(GOLDEN / "v1")
    saved = loaded.config
    assert (saved.format_version, saved.method, saved.package) == (1, "toy", "pt_toy")
    assert saved.method_config == {"length": 2, "init": "normal"}
    assert saved.task == {"labels": ["negative", "positive"], "template": "{text} It was [MASK]."}
    assert saved.metrics == {"accuracy": 0.875} and saved.created.year == 2026
    assert saved.backbone.name == "org/tiny" and saved.backbone.shapes == {
        "bias": ["1 x [3]"],
        "weight": ["1 x [3, 4]"],
    }
    tensors = {
        "prompt": torch.tensor([[0.5, -1.25, 3.0, 0.1], [2.0, 1e-30, -0.0, 7.0]]),
        "half": torch.tensor([0.1, -2.0, 300.0]).bfloat16(),
        "steps": torch.tensor(12),
    }
    assert loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(bits(loaded.tensors[name]), bits(tensor)) for name, tensor in tensors.items())


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda f: f.name)
def test_every_golden_artifact_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    old = load_artifact(folder)
    save_artifact(tmp_path / "a", old.tensors, old.config.model_dump(), card=(folder / CARD).read_text())
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (folder / name).read_bytes()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_artifact(tmp_path / "a", {"p": torch.ones(2, 3)}, config())


def test_unknown_keys_are_refused_with_the_version_that_knows_them(saved: Path) -> None:
    edit(saved, merging="slerp", libraries={"pt-core": "0.7.1"})
    with pytest.raises(InputError) as error:
        load_artifact(saved)
    text = str(error.value)
    assert "of format_version 1, written by pt-core 0.7.1, with keys that are unknown here: merging" in text
    assert "reads format_version 1" in text and text.endswith("Use pt-core 0.7.1")
    edit(saved, "merging", backbone={**json.loads((saved / CONFIG).read_text())["backbone"], "layers": 3})
    with pytest.raises(InputError, match=r"unknown here: backbone\.layers"):
        load_artifact(saved)


def test_a_later_format_is_refused_by_its_number(saved: Path) -> None:
    edit(saved, format_version=2, merging="slerp", libraries={"pt-core": "2.0"})
    with pytest.raises(
        InputError, match=r"of format_version 2, written by pt-core 2\.0, .*unknown here: merging;.*reads"
    ):
        load_artifact(saved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), r"prompt_config\.json: is missing"),
        (lambda f: (f / TENSORS).unlink(), r"prompt\.safetensors: is missing"),
        (lambda f: (f / CONFIG).write_text("{"), r"prompt_config\.json: is not JSON"),
        (lambda f: (f / CONFIG).write_text("[" * 100_000), r"prompt_config\.json: is not JSON"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), r"prompt_config\.json: is not JSON"),
        (lambda f: (f / CONFIG).write_text("[1]"), "should be a valid dictionary"),
        (lambda f: edit(f, "method"), "field 'method': Field required"),
        (lambda f: edit(f, "format_version"), "field 'format_version': Field required"),
        (lambda f: edit(f, metrics={"loss": "low"}), r"field 'metrics\.loss'"),
        (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-4]), r"prompt\.safetensors: is damaged"),
        (lambda f: (f / TENSORS).write_bytes(pickle.dumps({"p": [1.0]})), r"prompt\.safetensors: is damaged"),
        (lambda f: (f / TENSORS).write_bytes(nan_file()), r"field 'p': holds values that are not finite"),
    ],
)
def test_damage_is_named_by_file_and_field(saved: Path, damage: Any, message: str) -> None:
    damage(saved)
    with pytest.raises(InputError, match=message):
        load_artifact(saved)


def nan_file() -> bytes:
    from safetensors.torch import save

    return save({"p": torch.tensor([torch.nan])})


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(saved / "exploded"),)

    for name in ("prompt.pt", "prompt.safetensors.pkl", "pytorch_model.bin"):
        (saved / name).write_bytes(pickle.dumps(Bomb()))

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for module, function in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, function, forbidden)
    assert torch.equal(load_artifact(saved).tensors["p"], torch.ones(2, 3))
    assert not (saved / "exploded").exists()


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_saving_again_replaces_the_artifact_and_leaves_nothing_else(saved: Path) -> None:
    save_artifact(saved, {"q": torch.zeros(1)}, config())
    assert load_artifact(saved).tensors.keys() == {"q"}
    assert [f.name for f in saved.parent.iterdir()] == ["a"] and sorted(f.name for f in saved.iterdir()) == sorted(
        FILES
    )


def test_a_folder_with_other_files_is_not_replaced(saved: Path) -> None:
    (saved / "metrics.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"holds other files \(metrics\.jsonl\)\. Choose a new folder"):
        save_artifact(saved, {}, config())
    assert (saved / "metrics.jsonl").read_text() == "{}" and load_artifact(saved).tensors.keys() == {"p"}
    (saved.parent / "file").write_text("mine")
    with pytest.raises(InputError, match="file: is a file"):
        save_artifact(saved.parent / "file", {}, config())
    assert (saved.parent / "file").read_text() == "mine"


def test_a_full_disk_leaves_the_old_artifact(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if ".new-" in str(source):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        save_artifact(saved, {"q": torch.zeros(1)}, config())
    assert [f.name for f in saved.parent.iterdir()] == ["a"] and load_artifact(saved).tensors.keys() == {"p"}


def test_a_reader_between_the_two_renames_of_a_save_does_not_cost_the_new_artifact(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = os.rename, []

    def rename(source: Any, target: Any) -> None:
        real(source, target)
        if ".old-" in str(target) and not seen:
            seen.append(load_artifact(saved).tensors.keys())

    monkeypatch.setattr(os, "rename", rename)
    save_artifact(saved, {"q": torch.zeros(1)}, config())
    assert seen == [{"p"}] and load_artifact(saved).tensors.keys() == {"q"}
    assert [f.name for f in saved.parent.iterdir()] == ["a"]


def test_what_file_browsers_leave_is_no_other_file(saved: Path) -> None:
    (saved / ".DS_Store").write_bytes(b"0")
    save_artifact(saved, {"q": torch.zeros(1)}, config())
    assert load_artifact(saved).tensors.keys() == {"q"}


def test_all_that_is_read_is_of_one_save(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, saves = Path.read_bytes, iter(range(5))

    def read(path: Path) -> bytes:
        found = real(path)
        if (n := next(saves, None)) is not None:  # another process saves whenever this one has read a file
            save_artifact(saved, {"p": torch.full((1,), float(n))}, config(method_config={"n": n}))
        return found

    monkeypatch.setattr(Path, "read_bytes", read)
    found = load_artifact(saved)
    assert next(saves, None) is None
    assert (found.config.method_config["n"], float(found.tensors["p"])) == (4, 4.0)


def test_a_folder_that_another_reader_has_put_back_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename
    os.rename(saved, saved.with_name(".a.old-0123abcd"))

    def rename(source: Any, target: Any) -> None:
        real(source, target)
        raise FileNotFoundError(source)

    monkeypatch.setattr(os, "rename", rename)
    assert load_artifact(saved).tensors.keys() == {"p"}


def test_a_folder_that_is_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"loop: (is a link to itself|no such folder)"):
        load_artifact(tmp_path / "loop")


def test_names_that_look_alike_are_not_mixed_up(tmp_path: Path) -> None:
    for name in ("a", "a.old-00000000", ".a.old-1"):
        save_artifact(tmp_path / name, {name: torch.ones(1)}, config())
    shutil.copytree(tmp_path / "a.old-00000000", tmp_path / ".a.old-00000000.new-12345678")
    save_artifact(tmp_path / "a", {"b": torch.ones(1)}, config())
    assert (tmp_path / ".a.old-00000000.new-12345678").exists()
    assert load_artifact(tmp_path / ".a.old-1").tensors.keys() == {".a.old-1"}


def test_a_save_killed_between_the_two_renames_is_recovered(saved: Path) -> None:
    os.rename(saved, saved.with_name(".a.old-0123abcd"))
    (saved.with_name(".a.new-0123abcd")).mkdir()
    assert load_artifact(saved).tensors.keys() == {"p"}
    save_artifact(saved, {"q": torch.zeros(1)}, config())
    assert [f.name for f in saved.parent.iterdir()] == ["a"]


KILLED_SAVES = """
# For each n: a process that is killed at the n-th file event of a save over an existing artifact, or once a file has
# grown to n bytes. Prints how each ended.
import os, resource, shutil, signal, sys
import torch
from pt_core.artifacts import load_artifact, save_artifact

root = sys.argv[1]
old = load_artifact(root + "/old")
content = {k: v for k, v in old.config.model_dump().items() if k != "created"} | {"method": "new"}
tensors = {"p": torch.full((64, 64), 2.0), "q": torch.full((8,), 2.0)}

def killed_by_event(n):
    seen = [0]
    def hook(event, args):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"):
            seen[0] += 1
            if seen[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def killed_by_size(n):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

sizes = (0, 1, 700, 900, 2000, 9000, 16000)
for kind, trap, points in (("event", killed_by_event, range(1, 41)), ("size", killed_by_size, sizes)):
    for n in points:
        folder = f"{root}/{kind}-{n}/a"
        shutil.copytree(root + "/old", folder)
        child = os.fork()
        if child == 0:
            trap(n)
            save_artifact(folder, tensors, content)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(kind, n, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signals")
def test_whenever_a_save_is_killed_the_old_or_the_new_artifact_is_whole(tmp_path: Path) -> None:
    before = {"p": torch.full((4, 4), 1.0)}
    save_artifact(tmp_path / "old", before, config())
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    outcomes = [line.split() for line in run.stdout.splitlines()]
    after = {"p": torch.full((64, 64), 2.0), "q": torch.full((8,), 2.0)}
    found, hidden = [], []
    for kind, n, _ in outcomes:
        folder = tmp_path / f"{kind}-{n}" / "a"
        hidden.append(not folder.exists())
        loaded = load_artifact(folder)
        wanted = after if loaded.config.method == "new" else before
        assert loaded.tensors.keys() == wanted.keys()
        assert all(torch.equal(loaded.tensors[k], wanted[k]) for k in wanted)
        assert loaded.config.method in (folder / CARD).read_text().splitlines()[4]
        found.append(loaded.config.method)
        save_artifact(folder, before, config())  # the next save works, and clears away what the kill left
        assert [f.name for f in folder.parent.iterdir()] == ["a"]
    assert found.count("toy") > 10 and found.count("new") > 5  # kills before and after the swap,
    assert any(hidden)  # and in its middle
    assert sum(int(signal) > 0 for _, _, signal in outcomes) > 25


def test_write_folder_takes_any_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "er", {"x.bin": b"1", "y.json": b"2"})
    write_folder(tmp_path / "deep" / "er", {"x.bin": b"3", "y.json": b"4"})
    assert {f.name: f.read_bytes() for f in (tmp_path / "deep" / "er").iterdir()} == {"x.bin": b"3", "y.json": b"4"}


# --- hub -------------------------------------------------------------------------------------------------------------


class Hub:
    """A hub on this machine, for the real client: repositories of plain files, each revision with its commit."""

    def __init__(self) -> None:
        self.revisions: dict[tuple[str, str], tuple[str, dict[str, bytes]]] = {}  # (id, revision) -> commit, files
        self.asked: list[str] = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Answers, self))
        self.host = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str, revision: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.revisions[repo, revision] = self.revisions[repo, commit] = (commit, files)
        return commit


class Answers(http.server.BaseHTTPRequestHandler):
    """Those of the hub to what `push` and `load_artifact` ask."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/(me/\w+)/(revision|tree)/(\w+)", path):
            repo, what, revision = found.groups()
            if (repo, revision) not in self.hub.revisions:
                known = any(repo == other for other, _ in self.hub.revisions)
                return self.send({}, 404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
            commit, files = self.hub.revisions[repo, revision]
            if what == "revision":
                return self.send({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
            rows = [{"type": "file", "path": n, "size": len(d), "oid": sha(d)} for n, d in files.items()]
            return self.send(rows)
        if found := re.fullmatch(r"/(me/\w+)/resolve/(\w+)/(.+)", path):
            commit, files = self.hub.revisions[found[1], found[2]]
            return self.send(files[found[3]], 200, {"ETag": f'"{sha(files[found[3]])}"', "X-Repo-Commit": commit})
        return self.send({}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self.path, self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.asked.append(f"POST {path}")
        if self.headers["Authorization"] != "Bearer hf_me":
            return self.send({}, 401)
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            made = json.loads(body)
            repo = f"{made['organization']}/{made['name']}"
            if (repo, "main") in self.hub.revisions:
                return self.send({"url": f"{self.hub.host}/{repo}"}, 409)
            self.hub.commit(repo, "main", {})
            return self.send({"url": f"{self.hub.host}/{repo}"})
        repo = "/".join(path.split("/")[3:5])
        if path == f"/api/models/{repo}/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.send({"files": files})
        assert path == f"/api/models/{repo}/commit/main"
        lines = [json.loads(line)["value"] for line in body.splitlines()]
        files = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
        commit = self.hub.commit(repo, "main", self.hub.revisions[repo, "main"][1] | files)
        return self.send({"commitUrl": f"{self.hub.host}/{repo}/commit/{commit}", "commitOid": commit})

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


def sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client of this process talks to, as the user `me`; the working folder is empty of its repositories."""
    made = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", made.host)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.host + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    huggingface_hub.close_session()  # the next one reads these settings
    yield made
    huggingface_hub.close_session()
    made.close()


def test_push_and_load_from_the_hub(saved: Path, hub: Hub) -> None:
    (saved / "secrets.env").write_text("TOKEN=1")
    url = push(saved, "me/prompt")
    commit, files = hub.revisions["me/prompt", "main"]
    assert url == f"{hub.host}/me/prompt/commit/{commit}"
    assert files == {name: (saved / name).read_bytes() for name in FILES}
    loaded = load_artifact("me/prompt")
    assert torch.equal(loaded.tensors["p"], torch.ones(2, 3)) and loaded.config == load_artifact(saved).config
    assert loaded.folder.is_relative_to(Path("hub-cache").absolute())
    push(saved, "me/prompt")  # to a repository that is there


def test_a_revision_of_the_hub_is_the_one_that_is_loaded_and_only_once(saved: Path, hub: Hub) -> None:
    first = {name: (saved / name).read_bytes() for name in FILES}
    hub.commit("me/prompt", "v1", first | {"other.bin": b"large"})
    save_artifact(saved, {"p": torch.zeros(1)}, config())
    hub.commit("me/prompt", "main", {name: (saved / name).read_bytes() for name in FILES})
    assert load_artifact("me/prompt").tensors["p"].shape == (1,)
    folder = load_artifact("me/prompt", "v1").folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first  # and nothing else
    hub.asked.clear()
    assert load_artifact("me/prompt", "v1").folder == folder
    assert not [asked for asked in hub.asked if "/resolve/" in asked]
    with pytest.raises(InputError, match="me/prompt: neither a folder here nor to be had from the hub"):
        load_artifact("me/prompt", "v3")


def test_a_folder_goes_before_the_hub_and_has_no_revision(saved: Path, hub: Hub) -> None:
    load_artifact("a")
    with pytest.raises(InputError, match="a: is a folder, which has no revision 'v1'"):
        load_artifact("a", "v1")
    assert hub.asked == []


def test_what_is_neither_a_folder_nor_on_the_hub_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"\./a/b/c: no such folder"):
        load_artifact("./a/b/c")
    assert hub.asked == []
    with pytest.raises(
        InputError, match=r"me/nothing: neither a folder here nor to be had from the hub \(.*404"
    ) as error:
        load_artifact("me/nothing")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"me/nothing: neither a folder here nor to be had from the hub \(Cannot find"):
        load_artifact("me/nothing")


@pytest.mark.parametrize(
    "text", ["A review of a film that nobody should see. " * 10, "x" * 300], ids=["words", "a word"]
)
def test_a_long_text_in_the_place_of_a_folder_is_no_folder(text: str, hub: Hub) -> None:
    with pytest.raises(InputError, match="no such folder|neither a folder here nor to be had from the hub"):
        load_artifact(text)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["a/b/c", "-a", "a b", "x" * 200])
def test_a_name_that_the_hub_does_not_take_is_refused(saved: Path, hub: Hub, name: str) -> None:
    with pytest.raises(InputError, match="field 'repo_id': no id of the hub: "):
        push(saved, name)
    assert not hub.asked


def test_a_damaged_artifact_is_not_pushed(saved: Path, hub: Hub) -> None:
    (saved / TENSORS).write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        push(saved, "me/prompt")
    assert hub.asked == []


# --- model card ------------------------------------------------------------------------------------------------------


def test_model_card_says_what_it_is_and_how_to_load_it(saved: Path) -> None:
    values = config(metrics={"accuracy": 0.912345, "a|b": 1.0}, task={"labels": ["no", "yes"]})
    save_artifact(saved, {"p": torch.ones(20, 3)}, values)
    card = (saved / CARD).read_text()
    loaded = load_artifact(saved)
    assert card == model_card(loaded.config, loaded.tensors)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "prompt-tuning",
        "tags": ["prompt-tuning", "toy", "pt_toy"],
        "base_model": "org/tiny",
    }
    assert "load org/tiny at revision v1" in body and "method = load(" in body
    assert "| accuracy | 0.912345 |" in body and r"| a\|b | 1 |" in body
    assert "60 values in 1 tensors; the frozen backbone has 15 parameters (400.0000 %)" in body
    assert "| p | [20, 3] | torch.float32 |" in body and loaded.config.backbone.config_hash is None
    assert "Labels: no, yes." in body


def test_model_card_of_the_method_prompt_tuning_has_the_tag_once(tmp_path: Path) -> None:
    folder = save_artifact(tmp_path / "a", {}, config(method="prompt-tuning"))
    assert yaml.safe_load((folder / CARD).read_text().split("---\n")[1])["tags"] == ["prompt-tuning", "pt_toy"]


def test_model_card_of_a_local_backbone_names_no_base_model(tmp_path: Path) -> None:
    folder = save_artifact(tmp_path / "a", {}, config(backbone=identity(backbone())))
    card = (folder / CARD).read_text()
    assert "base_model" not in card and "None recorded." in card and str(tmp_path) not in card


# --- methods ---------------------------------------------------------------------------------------------------------


class ToyConfig(MethodConfig):
    length: int = Field(2, description="rows")


class Toy(Method):
    name = "toy"
    config_class = ToyConfig

    def __init__(self, backbone: nn.Module, config: ToyConfig | None = None) -> None:
        super().__init__(backbone, config)
        self.prompt = nn.Parameter(torch.zeros(self.config.length, 4))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, batch: Any) -> Output:
        return Output(logits=self.backbone(batch["x"] + self.prompt.sum(0)))

    def loss(self, batch: Any) -> Loss:
        return Loss(self(batch).logits.square().sum(), len(batch["x"]))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A registry of installed methods that knows Toy as a method of the package that this module is in."""
    known: dict[str, Any] = {"toy": Toy}

    def find_method(package: str, name: str) -> Any:
        if name not in known:
            raise InputError(f"unknown method {name!r}", remedy="Installed: none")
        return known[name]

    def short_name(module: str) -> str:
        if module != Toy.__module__.partition(".")[0]:
            raise InputError(f"{module} is not installed")
        return "toys"

    fake = types.ModuleType("pt_core.registry")
    fake.short_name = short_name  # type: ignore[attr-defined]
    fake.find_method = find_method  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pt_core.registry", fake)
    monkeypatch.setattr(pt_core, "registry", fake, raising=False)
    return known


def trained(seed: int = 0) -> Toy:
    method = Toy(backbone(seed), ToyConfig(length=3))
    nn.init.normal_(method.prompt)
    method.seen.fill_(5)
    return method


def test_a_saved_method_gives_the_same_output(tmp_path: Path, registry: dict[str, Any]) -> None:
    method = trained()
    method.save_pretrained(tmp_path / "a", backbone_name="org/tiny", task={"labels": ["x"]}, metrics={"accuracy": 0.5})
    again = load(tmp_path / "a", backbone(), strict=True)
    batch = {"x": torch.randn(6, 4)}
    assert isinstance(again, Toy) and again.config == method.config and again.seen == 5
    assert torch.equal(again(batch).logits, method(batch).logits)
    artifact = load_artifact(tmp_path / "a")
    assert artifact.config.metrics == {"accuracy": 0.5} and artifact.config.task == {"labels": ["x"]}
    assert artifact.tensors.keys() == {"prompt", "seen"}  # nothing of the backbone
    assert artifact.config.method_class.endswith(":Toy")


def test_a_method_may_keep_less_than_it_trains(tmp_path: Path, registry: dict[str, Any]) -> None:
    class Halved(Toy):
        def kept_state(self) -> dict[str, torch.Tensor]:
            return {"half": self.prompt.detach().half()}

        def load_kept_state(self, tensors: Any) -> None:
            self.prompt.data.copy_(tensors["half"].float())

    registry["toy"] = Halved
    method = Halved(backbone(), ToyConfig(length=3))
    nn.init.normal_(method.prompt)
    assert load_artifact(method.save_pretrained(tmp_path / "a")).tensors.keys() == {"half"}
    assert torch.equal(load(tmp_path / "a", backbone()).prompt, method.prompt.half().float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64])
def test_tensors_of_another_kind_of_numbers_are_refused(dtype: torch.dtype) -> None:
    method = trained()
    good = method.trained_state()
    method.load_trained_state(good | {"prompt": good["prompt"].half()})
    with pytest.raises(InputError, match=rf"prompt is {dtype}, torch\.float32 was expected"):
        method.load_trained_state(good | {"prompt": good["prompt"].to(dtype)})


def test_another_backbone_warns_once_and_strict_refuses(tmp_path: Path, registry: dict[str, Any]) -> None:
    trained().save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="weights differ") as caught:
        load(tmp_path / "a", backbone(seed=1))
    assert len(caught) == 1
    with pytest.raises(InputError, match="not bit for bit"):
        load(tmp_path / "a", backbone(seed=1), strict=True)
    with pytest.raises(InputError, match="shapes differ"):
        load(tmp_path / "a", nn.Linear(5, 3))


def test_no_code_that_a_file_names_is_imported(tmp_path: Path, registry: dict[str, Any]) -> None:
    (tmp_path / "evil.py").write_text("raise AssertionError('imported')")
    trained().save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", method_class="evil:Toy")
    sys.path.insert(0, str(tmp_path))
    try:
        assert isinstance(load(tmp_path / "a", backbone()), Toy)  # by its registered name
        edit(tmp_path / "a", method="unheard-of")
        with pytest.raises(InputError, match="needs the method 'unheard-of' of the package .*: unknown method"):
            load(tmp_path / "a", backbone())
    finally:
        sys.path.remove(str(tmp_path))
    edit(tmp_path / "a", method="toy", package="evil")
    with pytest.raises(InputError, match="needs the method 'toy' of the package evil: evil is not installed"):
        load(tmp_path / "a", backbone())


def test_a_method_from_the_hub_is_downloaded_once(tmp_path: Path, registry: dict[str, Any], hub: Hub) -> None:
    trained().save_pretrained(tmp_path / "a")
    push(tmp_path / "a", "me/toy")
    assert load("me/toy", backbone(), revision="main").config.length == 3
    asked = [asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET /me/toy/resolve/")]
    assert sorted(asked) == sorted(FILES)


def test_a_method_that_trains_its_backbone_is_not_held_against_it(tmp_path: Path, registry: dict[str, Any]) -> None:
    class FineTuned(Toy):
        frozen_backbone = False

    method = FineTuned(backbone())
    with torch.no_grad():
        method.backbone.weight.add_(1)
    method.save_pretrained(tmp_path / "a", backbone_name="org/tiny")
    saved = load_artifact(tmp_path / "a").config.backbone
    assert saved.sample == {} and saved.full_hash is None and saved.shapes
