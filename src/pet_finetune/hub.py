"""Models by address: a path, ``https://``, ``hf://`` or a short name; fetched once, then kept.

Whatever opens a checkpoint asks :func:`find_model` for its file, so an address may stand wherever a
path may. What was fetched before is taken from the cache without asking the network again.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from pet_finetune.errors import CheckpointError, PetFinetuneError, did_you_mean
from pet_finetune.files import check_room, replacing, size_text
from pet_finetune.installation import __version__, cache_folders, missing_extra
from pet_finetune.locks import only_one
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

_logger = get_logger(__name__)

#: The published models of upet 0.3.1: families, and the sizes of each.
UPET_MODELS = {
    "pet-mad": ("xs", "s", "m"),
    "pet-omat": ("xs", "s", "m", "l", "xl"),
    "pet-oam": ("l", "xl"),
    "pet-omad": ("xs", "s", "l"),
    "pet-omatpes": ("l",),
    "pet-omol": ("s", "m", "l"),
    "pet-mols": ("s",),
    "pet-spice": ("s", "l"),
}
_UPET = "lab-cosmo/upet"
#: Models that come with the package.
SHIPPED = {"pet-xtb-s": Path(__file__).with_name("pet-xtb-s.ckpt")}

# One slash is enough: pathlib leaves one of two.
_REMOTE = re.compile(r"(?P<scheme>https?|hf):/+(?P<rest>.*)", re.I)
_OF_HUB = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)")
_HUB_PAGE = re.compile(
    r"huggingface\.co/(?P<repo>[^/]+/[^/]+)/(?:resolve|blob)/(?P<revision>[^/]+)/(?P<file>[^?#]+)"
)
_NAME = re.compile(
    r"(?P<model>(?P<family>pet-\w+)-(?P<size>xs|s|m|l|xl))(?:-v?(?P<version>[\d.]+))?"
)
_TIMEOUT = 30.0  # seconds without an answer
_CHUNK = 1 << 20


def find_model(address: str | os.PathLike[str]) -> Path:
    """The file of a model, fetched where it is not here yet.

    Args:
        address: a path; ``https://...``, which may end with ``#sha256=...`` to be compared;
            ``hf://OWNER/REPOSITORY/FILE`` (or ``REPOSITORY@REVISION``) of the Hugging Face hub; or
            a short name: ``pet-mad-s``, ``pet-mad-s-v1.6.0``, ``pet-xtb-s``, after any file.

    Raises:
        CheckpointError: there is no such file, or it cannot be fetched; nothing half fetched stays.
    """
    text = os.fspath(address)
    path = Path(text)
    if path.is_file():
        return path
    if (remote := _REMOTE.fullmatch(text)) is not None:
        return _fetched(text, remote["scheme"].lower(), remote["rest"])
    if text in SHIPPED:
        return SHIPPED[text]
    if (named := _upet_name(text)) is not None:
        if named["version"] is None:
            return _newest(text)
        return _from_hub(text, _HubFile(_UPET, f"models/{named['model']}-v{named['version']}.ckpt"))
    _refuse(path)
    return path


def is_address(text: str) -> bool:
    """Whether this is an address or a short name, and not the path of a file."""
    known = _REMOTE.fullmatch(text) or text in SHIPPED or _upet_name(text)
    return bool(known) and not Path(text).is_file()


@dataclass(frozen=True)
class _HubFile:
    """A file of a repository on the Hugging Face hub."""

    repository: str
    name: str
    revision: str | None = None

    def by_hand(self) -> str:
        """Command that fetches the file by hand."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.repository} {self.name}{revision} --local-dir ."

    def url(self) -> str:
        """Its plain address."""
        revision = self.revision or "main"
        return f"https://huggingface.co/{self.repository}/resolve/{revision}/{self.name}"


def _upet_name(text: str) -> re.Match[str] | None:
    """The parts of a short name, if it is one of upet's."""
    match = _NAME.fullmatch(text)
    known = match is not None and match["size"] in UPET_MODELS.get(match["family"], ())
    return match if known else None


def _refuse(path: Path) -> None:
    """Refuse a path that is not a model file, with the checkpoints in its folder."""
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path}: this is an adapter folder, and a checkpoint file is needed here. Give "
                "the base checkpoint, and this folder as the adapter."
            )
        raise CheckpointError(
            f"{path}: this is a folder, and a checkpoint file is needed here, e.g. "
            f"{path / 'best_model.ckpt'}."
        )
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.ckpt"))[:5]
        there = f" Checkpoints in that folder: {', '.join(near)}." if near else ""
        names = [f"{family}-{size}" for family, sizes in UPET_MODELS.items() for size in sizes]
        meant = ""
        if _upet_name(path.stem) is not None and path.suffix == ".ckpt":
            meant = f" The name {path.stem!r}, without .ckpt, fetches it."
        elif path.suffix == "" and path.parent == Path():
            meant = did_you_mean(path.name, [*names, *SHIPPED])
        raise CheckpointError(f"{path}: no such checkpoint file.{there}{meant}")


def _fetched(address: str, scheme: str, rest: str) -> Path:
    """The file behind an address with a scheme."""
    if scheme == "hf":
        match = _OF_HUB.fullmatch(rest)
        if match is None:
            raise CheckpointError(
                f"{address}: an address of the hub is hf://OWNER/REPOSITORY/FILE, or "
                "hf://OWNER/REPOSITORY@REVISION/FILE, e.g. "
                f"hf://{_UPET}/models/pet-mad-s-v1.6.0.ckpt."
            )
        return _from_hub(address, _HubFile(match["repo"], match["file"], match["revision"]))
    page = _HUB_PAGE.match(rest)
    if page is not None:
        file = _HubFile(page["repo"], unquote(page["file"]), unquote(page["revision"]))
        if missing_extra("huggingface_hub", "hub") is None:
            return _from_hub(address, file)
        rest = file.url().partition("://")[2]
    return _from_web(f"{scheme}://{rest}")


def _from_hub(address: str, file: _HubFile) -> Path:
    """A file of the hub, from the hub's own cache where it is there."""
    hub = _library(address, file)
    found = hub.try_to_load_from_cache(file.repository, file.name, revision=file.revision)
    if isinstance(found, str):
        return Path(found)
    _logger.info("%s: fetching %s of %s from the hub", address, file.name, file.repository)
    with _explained(address, hub.constants.ENDPOINT, file.by_hand()):
        _knock(hub.constants.ENDPOINT)
        path = Path(hub.hf_hub_download(file.repository, file.name, revision=file.revision))
    blob = path.resolve()
    # The hub names large files by their SHA-256, and others by Git's hash.
    if len(blob.name) == 64 and (actual := _sha256(blob)) != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise _wrong_sum(address, blob.name, actual)
    _logger.info("%s: %s, kept as %s", address, size_text(blob.stat().st_size), path)
    return path


def _newest(name: str) -> Path:
    """The newest version of one of upet's models: of those in the cache, else of the hub."""
    file = _HubFile(_UPET, f"models/{name}-vVERSION.ckpt")
    hub = _library(name, file)
    cache = Path(hub.constants.HF_HUB_CACHE, f"models--{_UPET.replace('/', '--')}", "snapshots")
    here = {
        version: path
        for path in cache.glob(f"*/models/{name}-v*.ckpt")
        if (version := _version(path.name)) is not None and path.exists()
    }
    if here:
        path = here[max(here)]
        _logger.info("%s: taken from the cache, %s", name, path)
        return path
    with _explained(name, hub.constants.ENDPOINT, file.by_hand()):
        _knock(hub.constants.ENDPOINT)
        there = {
            version: path
            for path in hub.HfApi().list_repo_files(_UPET)
            if path.startswith(f"models/{name}-v") and (version := _version(path)) is not None
        }
    if not there:
        raise CheckpointError(
            f"{name}: the hub has no such model in {_UPET}. What there is: "
            f"{hub.constants.ENDPOINT}/{_UPET}/tree/main/models"
        )
    return _from_hub(name, _HubFile(_UPET, there[max(there)]))


def _knock(server: str) -> None:
    """Detect a missing connection at once; the hub's library tries six times.

    Raises:
        OSError: nobody answers; other trouble is left to the library.
    """
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(server, method="HEAD"), timeout=_TIMEOUT).close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, (socket.gaierror, ConnectionError, TimeoutError)):
            raise


def _version(name: str) -> tuple[int, ...] | None:
    """The version in the name of a checkpoint."""
    match = re.search(r"-v(\d+(?:\.\d+)*)\.ckpt$", name)
    return None if match is None else tuple(int(part) for part in match[1].split("."))


def _library(address: str, file: _HubFile) -> Any:
    """``huggingface_hub``."""
    if (problem := missing_extra("huggingface_hub", "hub")) is not None:
        raise CheckpointError(
            f"{address}: the hub {problem} Without it, fetch {file.url()} yourself and give its "
            "path."
        )
    import huggingface_hub
    import huggingface_hub.constants

    return huggingface_hub


def _from_web(url: str) -> Path:
    """A file of any server, kept in the cache under its address."""
    plain, _, fragment = url.partition("#")
    wanted = fragment.removeprefix("sha256=").lower()
    if fragment and re.fullmatch(r"[0-9a-f]{64}", wanted) is None:
        raise CheckpointError(
            f"{url}: after # only sha256=... can follow, with the 64 digits of a SHA-256."
        )
    name = unquote(PurePosixPath(urlsplit(plain).path).name) or "model.ckpt"
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    places = [folder / "models" / key / name for folder in cache_folders()]
    for place in places:
        if place.is_file():
            _logger.info("%s: fetched before, %s", plain, place)
            return place
    place = places[-1]
    with only_one(place):
        if not place.is_file():  # else another process was faster
            with replacing(place) as partial:
                _download(plain, partial, wanted)
            _logger.info("%s: kept as %s", plain, place)
    return place


def _download(url: str, place: Path, wanted: str) -> None:
    """Write what a server gives to a file, and see that it is whole."""
    from urllib.request import Request, urlopen

    request = Request(url, headers={"User-Agent": f"pet-finetune/{__version__}"})
    done = 0
    with (
        _explained(url, urlsplit(url).netloc, f"curl -LO '{url}'"),
        urlopen(request, timeout=_TIMEOUT) as answer,
        place.open("wb") as file,
    ):
        size = answer.length
        check_room(place.parent, size or 0)
        total = None if size is None else -(-size // _CHUNK)
        with Watch(f"fetching {place.name}", "MiB", total) as watch:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                watch.step()
    if size is not None and done != size:
        raise CheckpointError(
            f"{url}: only {size_text(done)} of {size_text(size)} came, then the connection broke "
            "off. Nothing was kept; try again."
        )
    if wanted and (actual := _sha256(place)) != wanted:
        raise _wrong_sum(url, wanted, actual)
    if not zipfile.is_zipfile(place):
        raise CheckpointError(
            f"{url}: what came ({size_text(done)}) is no whole checkpoint, perhaps a web page. "
            "Nothing was kept. Give the address of the file itself."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _wrong_sum(address: str, wanted: str, actual: str) -> CheckpointError:
    return CheckpointError(
        f"{address}: what came has the SHA-256 {actual}, and {wanted} was expected. Nothing was "
        "kept; try again, and if it is the same, do not trust the file."
    )


@contextmanager
def _explained(address: str, server: str, by_hand: str) -> Iterator[None]:
    """Turn what goes wrong between here and a server into one message."""
    try:
        yield
    except PetFinetuneError:
        raise
    except Exception as error:  # of the system, of two HTTP libraries, and of the hub's own
        status = _status(error)
        if status in (404, 410):
            why = f"{server} has no such file ({status}). Look at the spelling and the version."
        elif status in (401, 403):
            why = (
                f"{server} refuses it ({status}): it is private, gated, or not there. On the hub, "
                "accept the model's terms on its page and log in with `hf auth login`."
            )
        elif status is not None:
            why = f"{server} answers with an error ({status}). Try again later."
        else:
            why = (
                f"cannot be fetched from {server} ({_reason(error)}). Without a connection here, "
                f"run `{by_hand}` on a machine that has one, copy the file, and give its path."
            )
        raise CheckpointError(f"{address}: {why}") from error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, if there was an answer."""
    while error is not None:
        status = getattr(error, "code", None)
        status = getattr(getattr(error, "response", None), "status_code", status)
        if isinstance(status, int) and status >= 400:
            return status
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    """Root cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
    return (str(text).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
