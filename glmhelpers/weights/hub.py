"""Where weights come from: four kinds of source, one way to fetch a file from each.

    "huggingface"           endpoint/repo/resolve/revision/name   pinned revision; HF_ENDPOINT names a mirror
    "modelscope"            through the package `modelscope`      optional
    "http://..." a base     base/name                             a plain file server
    a folder                a link, nothing is copied             a Kaggle input data set

Why not `hf_hub_download`: as of 1.33 and 2.4 it writes each try to a file of its own and deletes it on failure, so
whoever is cut off at 1.9 GB starts again at 0. `huggingface_hub.file_download.http_get`, which it uses inside, takes an
open file and the number of bytes that are already there: retries, 429 with Retry-After, redirects and time-outs are all
its own. It speaks plain HTTP, so hf_xet, which a plain mirror does not offer, is never asked.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from huggingface_hub import hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from glmhelpers.utils.environment import machine_name


class DownloadError(OSError):
    """A file could not be fetched; the message names it, says what happened and what to do."""


class _Silent(tqdm):
    """The bar that huggingface_hub would draw, switched off: `TextProgress` prints instead."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.pop("name", None)
        super().__init__(*args, **{**kwargs, "disable": True})


class _Counted:
    """An open file that reports the growth of what was written to it."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None]):
        self.file, self.progress = file, progress

    # huggingface_hub writes, seeks, truncates (when the server cannot resume) and asks for the position.
    def write(self, data: bytes) -> int:
        count = self.file.write(data)
        self.progress(count)
        return count

    def truncate(self, size: int | None = None) -> int:
        self.file.flush()
        before = os.fstat(self.file.fileno()).st_size
        size = self.file.truncate(size)
        self.progress(size - before)
        return size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@dataclass(frozen=True)
class Remote:
    """A source that is not a folder.

    Attributes:
        facts: the manifest.
        source: "huggingface", "modelscope" or a base URL.
        endpoint: a mirror of the hub; None: HF_ENDPOINT, else the hub itself.
        revision: of the repository; None: the manifest's.
    """

    facts: dict[str, Any]
    source: str
    endpoint: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Refuse with a ValueError what cannot be a source, before anything is touched."""
        keys = {"huggingface": "repo_id", "modelscope": "model_id"}
        if self.source in keys:
            if keys[self.source] not in (self.facts.get(self.source) or {}):
                wanted = f'"{self.source}": {{"{keys[self.source]}": ...}}'
                own = f"; the manifest itself says: {self.facts['mend']}" if "mend" in self.facts else ""
                raise ValueError(f"this manifest has no {wanted}: give a URL or a folder as source{own}")
        elif not self.source.startswith(("http://", "https://")):
            raise ValueError(
                f"source {self.source!r} is unknown: 'huggingface', 'modelscope', a http(s) URL or an existing folder"
            )

    def where(self, name: str) -> str:
        """Address of one file, for the request and for messages."""
        if self.source == "huggingface":
            place = self.facts["huggingface"]
            # Read now and not at import: a learner sets the mirror in a cell, long after the import.
            endpoint = (self.endpoint or os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None
            revision = self.revision or place.get("revision")
            return hf_hub_url(place["repo_id"], name, revision=revision, endpoint=endpoint)
        if self.source == "modelscope":
            return f"modelscope {self.facts['modelscope']['model_id']}"
        return f"{self.source.rstrip('/')}/{quote(name)}"

    def fetch(self, name: str, part: Path, size: int, progress: Callable[[int], None]) -> None:
        """Bring `part` to `size` bytes, going on where an earlier try stopped.

        Args:
            name: the file's name at the source.
            part: the unfinished file; created if it is not there.
            size: its final size in bytes.
            progress: called with the bytes that came (negative if some had to be thrown away).

        Raises:
            ImportError: "modelscope" without the package.
            DownloadError: it did not come whole; what came is kept in `part`.
        """
        try:
            if self.source == "modelscope":
                self._fetch_modelscope(name, part, progress)
            else:
                self._fetch_http(name, part, size, progress)
        except ImportError:
            raise
        except Exception as error:  # httpx or httpx2, by version of huggingface_hub: no common class to name
            why = wrong_answer(part, self.where(name), size) or explain(error, name, self.where(name))
            raise DownloadError(why) from error

    def _fetch_http(self, name: str, part: Path, size: int, progress: Callable[[int], None]) -> None:
        # The reader's token goes to the hub and its mirrors, nowhere else.
        headers = build_hf_headers(token=None if self.source == "huggingface" else False)
        # A compressed answer cannot be continued at a byte of the file.
        headers["Accept-Encoding"] = "identity"
        with part.open("ab") as file:
            http_get(
                self.where(name),
                cast(BinaryIO, _Counted(file, progress)),
                resume_size=file.tell(),
                headers=headers,
                expected_size=size,
                displayed_filename=name,
                tqdm_class=_Silent,
            )
            file.flush()
            os.fsync(file.fileno())

    def _fetch_modelscope(self, name: str, part: Path, progress: Callable[[int], None]) -> None:
        try:
            from modelscope.hub.file_download import model_file_download
        except ImportError as error:
            raise ImportError("source='modelscope' needs the package modelscope: pip install modelscope") from error
        place = self.facts["modelscope"]
        # It resumes by itself, in a folder of its own beside the final one.
        folder = part.parent / ".modelscope"
        revision = self.revision or place.get("revision")
        found = model_file_download(place["model_id"], name, revision=revision, local_dir=str(folder))
        progress(Path(found).stat().st_size - (part.stat().st_size if part.is_file() else 0))
        os.replace(found, part)


def wrong_answer(part: Path, url: str, size: int) -> str:
    """Says so if what came is no beginning of the file at all, and throws it away; "" if it may be one."""
    if not part.is_file():
        return ""
    with part.open("rb") as file:
        head = file.read(256).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        what = "a web page, not the file: the network may want you to sign in, or the address is wrong"
    elif head.startswith(b"version https://git-lfs"):
        what = "a git-lfs pointer, not the file: its address has /resolve/ or /media/ where yours may have /raw/"
    elif part.stat().st_size > size:
        what = f"more than the {size:,} bytes that were published: it is another file"
    else:
        return ""
    part.unlink()
    return f"{url} gave {what}. Put that right or choose another source, then call download_weights again"


def explain(error: Exception, name: str, url: str) -> str:
    """What went wrong with one file, and what to do, in one sentence each."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    again = "call download_weights again: it goes on where it stopped"
    if status == 404:
        return f"{name} is not at {url} (404): check source and revision, or choose another mirror with HF_ENDPOINT"
    if status in (401, 403):
        token = ", and that HF_TOKEN is not an old one (without any the weights can be read, too)"
        return f"{url} refuses to give {name} ({status}): check that the address is right{token}"
    if status == 429:
        return f"{url} says too many requests (429) for {name}: wait some minutes, then {again}"
    if status == 416:
        return f"{url} has fewer bytes than {name}: it is another version, choose another source"
    if status is not None and status >= 500:
        return f"{url} is in trouble ({status}) with {name}: {again}, later or from another source"
    if "Consistency check failed" in str(error):
        return f"{name} ended too early: {again}"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        what = "free some disk space" if error.errno == errno.ENOSPC else "see to that"
        return f"{name} could not be written ({error.strerror}): {what}, then {again}"
    internet = " (Kaggle: Settings > Internet must be on)" if machine_name() == "Kaggle" else ""
    if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
        mirror = "set HF_ENDPOINT to a mirror that you can reach, or choose source='modelscope'"
        return f"there is no way to {url} ({error}): look after the network{internet}, {mirror}; then {again}"
    return f"the connection broke off in {name} ({type(error).__name__}: {error}): {again}{internet}"
