"""Where weights come from: four kinds of source, one way to fetch a file from each.

    "huggingface"           endpoint/repo/resolve/revision/name   pinned revision; HF_ENDPOINT names a mirror
    "modelscope"            through the package `modelscope`      optional
    "http://..." a base     base/name                             a plain file server
    a folder                a link, nothing is copied             a Kaggle input data set

Why not `hf_hub_download`: as of 1.33 and 2.4 it writes each try to a file of its own and deletes it on failure, so
whoever is cut off at 1.9 GB starts again at 0. Why not `http_get`, which it uses inside: it waits as long as a server
says, follows one that drips for ever, and unpacks what was sent compressed. So session, headers and address are
huggingface_hub's, and the loop is ours. It speaks plain HTTP: hf_xet, which a mirror does not offer, is never asked.

    no more bytes than were published      not compressed twice       at least 1 KiB a second, over half a minute
    no waiting longer than a minute        6 tries without progress   half a minute for an answer's header
                                                                      then one sentence that says what to do
"""

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from huggingface_hub import close_session, constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers

from glmhelpers.utils.environment import machine_name
from glmhelpers.utils.types import Told

AGAIN = "call download_weights again: it goes on where it stopped"
TRIES = 6
"""So often a connection may break in a row; each that brings PROGRESS bytes begins the count anew."""
PROGRESS = 2**16
SLOWEST, PATIENCE = 2**10, 30.0
"""Fewer bytes a second than this, over so many seconds, are no connection."""
LONGEST_WAIT = 60
"""Seconds; a server that wants us to wait longer is told about instead."""
PACKED = {"gzip", "deflate", "br", "zstd"}
"""What httpx unpacks. Once is no danger for memory with gzip, a block of 64 KiB at a time; nothing else is taken."""
TRANSIENT = {"NetworkError", "TimeoutException", "RemoteProtocolError"}
"""Exceptions of httpx or httpx2, by version of huggingface_hub: by name, since there is no common class."""
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy")


class DownloadError(Told, OSError):
    """A file could not be fetched; the message names it, says what happened and what to do."""


class SettingError(DownloadError, ValueError):
    """A setting of the environment makes every download impossible; the message names it. A second try is no help."""


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
        elif not is_address(self.source):
            raise ValueError(
                f"source {self.source!r} is unknown: 'huggingface', 'modelscope', a http(s) URL or an existing folder"
            )

    def check_settings(self) -> None:
        """Refuse what no second try can mend, before anything is touched.

        Raises:
            SettingError: names the setting. Values are not shown: a token or a proxy's password may be in them.
        """
        if self.source == "modelscope":
            return
        if self.source == "huggingface":
            endpoint = self._endpoint()
            if endpoint is not None and not is_address(endpoint):
                raise SettingError(f"HF_ENDPOINT or endpoint= is {endpoint!r}: write it in full, as https://HOST")
            token = build_hf_headers().get("authorization", "Bearer ").removeprefix("Bearer ")
            if odd := re.search("[^!-~]", token):
                raise SettingError(
                    f"the token in HF_TOKEN (or that of `hf auth login`) has {odd[0]!r} in it: copy it again, letters, "
                    "digits and _ only; or take it away, the weights can be read without any"
                )
        if constants.HF_HUB_OFFLINE:
            names = _are_set("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") or "HF_HUB_OFFLINE"
            raise SettingError(f"{names} forbids every download: take it out of the environment, restart the kernel")
        proxy = "write it as http://HOST:PORT, or take it away; for socks5:// first pip install socksio"
        unused = "*" in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").replace(" ", "").split(",")
        for name in () if unused else PROXIES:
            # What stands before the last @ is a name and a password.
            if (value := os.environ.get(name)) and not _is_proxy(value):
                raise SettingError(f"{name} is {value.rpartition('@')[2]!r}, no address of a proxy: {proxy}")
        try:
            get_session()
        except OSError as error:
            name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
            found = f"{name} is {os.environ.get(name)!r}, which cannot be used ({error})"
            how = "name a file of certificates that is there, or take it out of the environment"
            raise SettingError(f"{found}: {how}") from None
        except Exception as error:  # httpx has several, of other kinds with each version, for a proxy that is none
            names = _are_set(*PROXIES, "NO_PROXY", "no_proxy") or "the environment"
            raise SettingError(f"{names} cannot be used ({error}): {proxy}") from None

    def _endpoint(self) -> str | None:
        # Read now and not at import: a learner sets the mirror in a cell, long after the import.
        return (self.endpoint or os.environ.get("HF_ENDPOINT") or "").strip().rstrip("/") or None

    def where(self, name: str) -> str:
        """Address of one file, for messages: without a password that stands in it."""
        return re.sub(r"//[^/?#]*@", "//", self._address(name))

    def _address(self, name: str) -> str:
        if self.source == "huggingface":
            place = self.facts["huggingface"]
            revision = self.revision or place.get("revision")
            return hf_hub_url(place["repo_id"], name, revision=revision, endpoint=self._endpoint())
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
        except Exception as error:
            close_session()  # the next call reads proxies and certificates anew
            if isinstance(error, ImportError):
                raise
            why = wrong_answer(part, self.where(name), size) or explain(error, name, self.where(name))
            raise DownloadError(why.replace(self._address(name), self.where(name))) from error

    def _fetch_http(self, name: str, part: Path, size: int, progress: Callable[[int], None]) -> None:
        # The reader's token goes to the hub and its mirrors, nowhere else.
        headers = build_hf_headers(token=None if self.source == "huggingface" else False)
        # A compressed answer cannot be continued at a byte of the file.
        headers["Accept-Encoding"] = "identity"
        left = TRIES
        with part.open("ab") as file:
            while (start := file.tell()) < size:
                left -= 1
                try:
                    wait = _receive(self._address(name), headers, file, size, progress, last=not left)
                except Exception as error:
                    if not left or not TRANSIENT & {kind.__name__ for kind in type(error).__mro__}:
                        raise
                    wait = 1
                if file.tell() >= start + PROGRESS:
                    left = TRIES
                time.sleep(wait)
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


def is_address(text: str) -> bool:
    """Whether a text is a whole http(s) address."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_proxy(text: str) -> bool:
    """Whether a text is the address of a proxy, with or without the scheme in front."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        known = parts.scheme in ("http", "https", "socks5", "socks5h")
        return known and bool((parts.hostname or "").strip()) and parts.port != 0 and not parts.path.startswith("//")
    except ValueError:
        return False


def _are_set(*names: str) -> str:
    return ", ".join(name for name in names if os.environ.get(name))


def _seconds(headers: Any) -> int:
    """What an answer's Retry-After says; a second where it says nothing, or a date."""
    wait = headers.get("Retry-After", "")[:12]
    return int(wait) if wait.isdecimal() else 1


class _Watch:
    """Within it, a connection that brings too little is shut down from another thread, whatever this one waits for.

    A limit on one read, which is all that httpx has, begins anew with every byte: of a header, of what TLS or a packer
    keeps to itself. `trace` learns of each connection that is made; there are more than one if the server redirects.
    """

    def __init__(self, url: str):
        self.url, self.came, self.slow = url, 0, ""
        self._connections: list[Any] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def trace(self, event: str, facts: dict[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._connections.append(facts["return_value"])

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self.slow and error is not None and not isinstance(error, DownloadError):
            raise DownloadError(f"{self.url} {self.slow} in {PATIENCE:.0f} s: {AGAIN}, or elsewhere") from None

    def header_is_here(self) -> None:
        self.came += int(SLOWEST * PATIENCE) + 1  # enough for the time that it took

    def _look(self) -> None:
        before = 0
        while not self._over.wait(min(1.0, PATIENCE) if self.slow else PATIENCE):
            new, before = self.came - before, self.came
            if new < SLOWEST * PATIENCE and not self.slow:
                self.slow = f"sent only {new:,} bytes" if before else "did not finish the header of its answer"
            for connection in self._connections if self.slow else ():
                with suppress(OSError, AttributeError):
                    connection.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def _receive(
    url: str, headers: dict[str, str], file: BinaryIO, size: int, progress: Callable[[int], None], last: bool
) -> float:
    """One request: write what comes behind the bytes of `file`; the seconds to wait before the next one.

    Raises:
        DownloadError: the server's answer can be of no use.
        Exception: what httpx raises; what came until then is in the file.
    """
    start, watch = file.tell(), _Watch(url)
    # A connection of its own, which the watch has seen being made.
    asked = headers | {"Connection": "close"} | ({"Range": f"bytes={start}-"} if start else {})
    how: dict[str, Any] = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
    how["extensions"] = {"trace": watch.trace}
    with watch, get_session().stream("GET", url, headers=asked, **how) as answer:
        watch.header_is_here()
        wait = _seconds(answer.headers)
        if answer.status_code in (408, 429) and not last and wait <= LONGEST_WAIT:
            return wait
        answer.raise_for_status()
        packed = [kind for kind in re.findall(r"[\w-]+", answer.headers.get("Content-Encoding", "")) if kind in PACKED]
        if start and (answer.status_code == 200 or packed):  # what comes is no continuation
            file.seek(0)
            file.truncate()
            progress(-start)
        if packed and (packed != ["gzip"] or answer.status_code == 206):
            raise DownloadError(
                f"{url} sends {', '.join(packed)}, which nobody asked for: {AGAIN}, or choose another source"
            )
        for block in answer.iter_bytes():
            room = size - file.tell() + 1  # one byte too many shows that it is another file
            file.write(block[:room])
            progress(len(block[:room]))
            watch.came += len(block)
            if len(block) >= room:
                raise DownloadError(f"{url} sends more than was published")
    if file.tell() < size:
        raise DownloadError(f"{unquote(url).rpartition('/')[2]} ended too early: {AGAIN}")
    return 0


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
    if isinstance(error, DownloadError):
        return str(error)
    if status == 404:
        return f"{name} is not at {url} (404): check source and revision, or choose another mirror with HF_ENDPOINT"
    if status in (401, 403):
        token = ", and that HF_TOKEN is not an old one (without any the weights can be read, too)"
        return f"{url} refuses to give {name} ({status}): check that the address is right{token}"
    if status == 429:
        wait = _seconds(error.response.headers)  # type: ignore[attr-defined]
        asked = f", and to come back in {wait} s" if wait > LONGEST_WAIT else ""
        return f"{url} says too many requests (429) for {name}{asked}: wait some minutes, then {AGAIN}"
    if status == 416:
        return f"{url} has fewer bytes than {name}: it is another version, choose another source"
    if status is not None and status >= 500:
        return f"{url} is in trouble ({status}) with {name}: {AGAIN}, later or from another source"
    if status is not None or type(error).__name__ in ("TooManyRedirects", "UnsupportedProtocol", "InvalidURL"):
        what = f"{name} ({status or error})"
        return f"{url} does not give {what}: a second try is no help; check the address, or choose another source"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        what = "free some disk space" if error.errno == errno.ENOSPC else "see to that"
        return f"{name} could not be written ({error.strerror}): {what}, then {AGAIN}"
    internet = " (Kaggle: Settings > Internet must be on)" if machine_name() == "Kaggle" else ""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        how = "is the clock right? In a network that looks into what is sent, SSL_CERT_FILE must name its certificates"
        return f"the certificate of {url} is not trusted here ({error}): {how}; then {AGAIN}"
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError"):
        scheme = urlsplit(url).scheme
        names = _are_set(*(name for name in PROXIES if name.lower() in (f"{scheme}_proxy", "all_proxy")))
        proxy = f" through the proxy of {names}" if names else ""
        internet += f", and whether {names} is right" if names else ""
        mirror = "set HF_ENDPOINT to a mirror that you can reach, or choose source='modelscope'"
        return f"there is no way to {url}{proxy} ({error}): look after the network{internet}, {mirror}; then {AGAIN}"
    return f"the connection broke off in {name} ({type(error).__name__}: {error}): {AGAIN}{internet}"
