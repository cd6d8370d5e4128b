"""Models by address, against a server on this machine that plays the web and the hub."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import pet_finetune as pf
from models import random_potential
from pet_finetune import hub
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.errors import CheckpointError
from pet_finetune.hub import SHIPPED, UPET_MODELS, find_model, is_address
from pet_finetune.keywords import as_model, checkpoint_of

SOURCES = Path(hub.__file__).resolve().parents[1]
FILE = "models/pet-mad-s-v1.6.0.ckpt"
COMMIT = "0123456789" * 4


def archive() -> bytes:
    """What looks like a checkpoint from outside."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("model/data.pkl", b"." * 1000)
    return stream.getvalue()


CONTENT = archive()
SUM = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Gives files; ``broken`` ones end early, ``refused`` ones have a status."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.refused: dict[str, int] = {}
        self.sums: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, name: str) -> None:
        """A file of upet's repository."""
        self.files[f"/lab-cosmo/upet/resolve/main/{name}"] = CONTENT


class Answer(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].replace(f"/resolve/{COMMIT}/", "/resolve/main/")
        self.server.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/lab-cosmo/upet"):
            prefix = "/lab-cosmo/upet/resolve/main/"
            names = [name.removeprefix(prefix) for name in self.server.files]
            tree = [{"type": "file", "path": name, "oid": COMMIT, "size": 1} for name in names]
            listed = {"id": "lab-cosmo/upet", "siblings": [{"rfilename": name} for name in names]}
            content = json.dumps(tree if "/tree/" in path else listed).encode()
        elif path in self.server.refused or path not in self.server.files:
            status = self.server.refused.get(path, 404)
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        else:
            content = self.server.files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        etag = self.server.sums.get(path, hashlib.sha256(content).hexdigest())
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            broken = path in self.server.broken
            self.wfile.write(content[: len(content) // 2] if broken else content)
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of what comes from the web."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "pet-finetune" / "models"


@pytest.fixture
def hugging(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server in the place of the hub."""
    constants = pytest.importorskip("huggingface_hub.constants")
    play_hub(monkeypatch, server.url)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its tries
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return server


def play_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT says when the library is imported."""
    where = "huggingface_hub.constants."
    monkeypatch.setattr(f"{where}ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{where}HUGGINGFACE_CO_URL_TEMPLATE", template)


def nobody() -> str:
    """An address where nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_a_file_of_the_web_is_fetched_once(server: Server, cache: Path) -> None:
    server.files["/some/model.ckpt"] = CONTENT
    path = find_model(f"{server.url}/some/model.ckpt?download=true")
    assert path.read_bytes() == CONTENT
    assert path.name == "model.ckpt"
    assert find_model(Path(f"{server.url}/some/model.ckpt?download=true")) == path  # one slash
    assert server.asked == ["GET /some/model.ckpt"]
    assert files_in(cache) == ["model.ckpt"]


def test_a_model_of_the_web_opens_as_its_file_does(server: Server, cache: Path) -> None:
    save_checkpoint(cache.parents[2] / "here.ckpt", random_potential())
    server.files["/a/water.v1.ckpt"] = Path("here.ckpt").read_bytes()
    url = f"{server.url}/a/water.v1.ckpt"
    opened, model = load_checkpoint(url), pf.load(url)
    assert opened.path.stem == "water.v1"
    assert model.source == opened.path
    assert checkpoint_of(model, Path("spare")) == str(opened.path)
    expected = weights_fingerprint(load_checkpoint("here.ckpt").model)
    assert weights_fingerprint(opened.model) == weights_fingerprint(model.potential) == expected
    assert pf.PETCalculator(url).model.species == opened.model.species
    assert as_model(url) == url


def test_a_cache_that_can_only_be_read_is_read(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/model.ckpt"] = CONTENT
    usual, other = tmp_path / "usual", tmp_path / "other"
    monkeypatch.setattr(hub, "cache_folders", lambda: [usual])
    path = find_model(f"{server.url}/model.ckpt")
    monkeypatch.setattr(hub, "cache_folders", lambda: [usual, other])
    assert find_model(f"{server.url}/model.ckpt") == path
    assert not other.exists()


def test_two_addresses_with_one_name_are_two_files(server: Server, cache: Path) -> None:
    server.files["/a/model.ckpt"] = CONTENT
    server.files["/b/model.ckpt"] = archive() + b""
    assert find_model(f"{server.url}/a/model.ckpt") != find_model(f"{server.url}/b/model.ckpt")


def test_a_sum_is_compared(server: Server, cache: Path) -> None:
    server.files["/model.ckpt"] = CONTENT
    assert find_model(f"{server.url}/model.ckpt#sha256={SUM}").read_bytes() == CONTENT
    with pytest.raises(CheckpointError, match=f"SHA-256 {SUM}, and {'0' * 64} was expected"):
        find_model(f"{server.url}/model.ckpt#sha256={'0' * 64}")
    with pytest.raises(CheckpointError, match=r"only sha256=\.\.\. can follow"):
        find_model(f"{server.url}/model.ckpt#md5=1")
    assert files_in(cache) == ["model.ckpt"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, r"127.0.0.1:\d+ has no such file \(404\)"),
        (403, r"refuses it \(403\): it is private"),
        (500, r"answers with an error \(500\)"),
    ],
)
def test_what_a_server_refuses(server: Server, cache: Path, status: int, said: str) -> None:
    server.refused["/model.ckpt"] = status
    with pytest.raises(CheckpointError, match=said):
        find_model(f"{server.url}/model.ckpt")
    assert files_in(cache) == []


def test_half_a_file_is_not_kept(server: Server, cache: Path) -> None:
    server.files["/model.ckpt"] = CONTENT
    server.broken.add("/model.ckpt")
    with pytest.raises(CheckpointError, match=r"only \d+ B of 1.1 kB came"):
        find_model(f"{server.url}/model.ckpt")
    assert files_in(cache) == []
    server.broken.clear()
    assert find_model(f"{server.url}/model.ckpt").read_bytes() == CONTENT


def test_a_web_page_is_not_kept(server: Server, cache: Path) -> None:
    server.files["/model.ckpt"] = b"<html>Log in</html>"
    with pytest.raises(CheckpointError, match="no whole checkpoint, perhaps a web page"):
        find_model(f"{server.url}/model.ckpt")
    assert files_in(cache) == []


def test_without_a_connection_the_message_says_what_to_do(cache: Path) -> None:
    address = f"{nobody()}/model.ckpt"
    with pytest.raises(CheckpointError) as caught:
        find_model(address)
    assert f"run `curl -LO '{address}'`" in str(caught.value)
    assert "refused" in str(caught.value)


def test_a_file_of_the_hub_is_fetched_once(hugging: Server, tmp_path: Path) -> None:
    hugging.publish(FILE)
    path = find_model(f"hf://lab-cosmo/upet/{FILE}")
    assert path.name == "pet-mad-s-v1.6.0.ckpt"
    assert path.read_bytes() == CONTENT
    count = len(hugging.asked)
    assert find_model("pet-mad-s-v1.6.0") == path
    assert find_model(f"https://huggingface.co/lab-cosmo/upet/blob/main/{FILE}") == path
    assert find_model("pet-mad-s") == path  # the newest that is here
    assert len(hugging.asked) == count


def test_a_name_without_a_version_is_the_newest(hugging: Server) -> None:
    for version in ("1.5.0", "1.10.0", "1.6.0"):
        hugging.publish(f"models/pet-mad-s-v{version}.ckpt")
    hugging.publish("models/pet-mad-xs-v2.0.0.ckpt")
    assert find_model("pet-mad-s").name == "pet-mad-s-v1.10.0.ckpt"
    with pytest.raises(CheckpointError, match="pet-oam-l: the hub has no such model"):
        find_model("pet-oam-l")


@pytest.mark.parametrize(
    ("status", "said"), [(404, r"has no such file \(404\)"), (403, r"refuses it \(403\)")]
)
def test_what_the_hub_refuses(hugging: Server, tmp_path: Path, status: int, said: str) -> None:
    hugging.refused[f"/lab-cosmo/upet/resolve/main/{FILE}"] = status
    with pytest.raises(CheckpointError, match=said):
        find_model("pet-mad-s-v1.6.0")
    assert not list((tmp_path / "hub").rglob("snapshots/*/*/*.ckpt"))


def test_half_a_file_of_the_hub_is_not_kept(hugging: Server, tmp_path: Path) -> None:
    hugging.publish(FILE)
    hugging.broken.add(f"/lab-cosmo/upet/resolve/main/{FILE}")
    with pytest.raises(CheckpointError, match="cannot be fetched from"):
        find_model("pet-mad-s-v1.6.0")
    assert not list((tmp_path / "hub").rglob("snapshots/*/*/*.ckpt"))
    hugging.broken.clear()
    assert find_model("pet-mad-s-v1.6.0").read_bytes() == CONTENT


def test_a_sum_of_the_hub_is_compared(hugging: Server, tmp_path: Path) -> None:
    hugging.publish(FILE)
    hugging.sums[f"/lab-cosmo/upet/resolve/main/{FILE}"] = "0" * 64
    with pytest.raises(CheckpointError, match=f"SHA-256 {SUM}"):
        find_model("pet-mad-s-v1.6.0")
    assert not list((tmp_path / "hub").rglob("snapshots/*/*/*.ckpt"))


def test_the_hub_without_a_connection(hugging: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    play_hub(monkeypatch, nobody())
    for name in ("pet-mad-s-v1.6.0", "pet-mad-s"):
        with pytest.raises(CheckpointError, match="hf download lab-cosmo/upet models/pet-mad-s-v"):
            find_model(name)


def test_the_hub_without_its_library(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pet_finetune.installation.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"pip install 'pet-finetune\[hub\]'") as caught:
        find_model(f"hf://lab-cosmo/upet@v1/{FILE}")
    assert f"https://huggingface.co/lab-cosmo/upet/resolve/v1/{FILE}" in str(caught.value)


def test_files_and_shipped_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("pet-xtb-s") == SHIPPED["pet-xtb-s"]
    assert zipfile.is_zipfile(SHIPPED["pet-xtb-s"])
    assert is_address("pet-xtb-s")
    Path("pet-xtb-s").write_bytes(b"mine")
    assert find_model("pet-xtb-s") == Path("pet-xtb-s")
    assert not is_address("pet-xtb-s")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("pet-mda-s", "no such checkpoint file.* Did you mean 'pet-mad-s'?"),
        ("pet-mad-xl", "no such checkpoint file"),
        ("pet-mad-s-v1.6.0.ckpt", "The name 'pet-mad-s-v1.6.0', without .ckpt, fetches it"),
        ("hf://lab-cosmo/upet", "hf://OWNER/REPOSITORY/FILE"),
        ("hf://", "hf://OWNER/REPOSITORY/FILE"),
    ],
)
def test_what_is_no_address(
    address: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        find_model(address)


def test_the_short_names_are_those_of_upet() -> None:
    """The list UPET_AVAILABLE_MODELS of upet 0.3.1."""
    theirs = """
    pet-mad-xs pet-mad-s pet-mad-m pet-omat-xs pet-omat-s pet-omat-m pet-omat-l pet-omat-xl pet-oam-l pet-oam-xl
    pet-omad-xs pet-omad-s pet-omad-l pet-omatpes-l pet-omol-s pet-omol-m pet-omol-l pet-mols-s pet-spice-s pet-spice-l
    """  # noqa: E501
    ours = [f"{family}-{size}" for family, sizes in UPET_MODELS.items() for size in sizes]
    assert ours == theirs.split()
    assert all(map(is_address, [*ours, "pet-mad-s-v1.6.0", "pet-mad-s-1.6.0"]))


def test_finding_a_model_imports_no_torch(server: Server, tmp_path: Path) -> None:
    server.publish(FILE)
    code = (
        "import sys; from pet_finetune.cli.common import check_models\n"
        "(path,) = check_models('pet-mad-s'); print(path); sys.exit('torch' in sys.modules)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(SOURCES),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == CONTENT
    assert "fetching models/pet-mad-s-v1.6.0.ckpt" in done.stderr
