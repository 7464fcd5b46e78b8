"""An image from the web, for prediction: within limits that no server can stretch."""

from __future__ import annotations

import re
import urllib.request
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin
from urllib.response import addinfourl

from vit_train.errors import DataError

TIMEOUT_SECONDS = 10  # for everything: name lookup, redirects, a server that sends a byte now and then
MOST_BYTES = 20_000_000
_MOST_REDIRECTS = 5


def is_url(name: str) -> bool:
    """Whether a name is one that `download` fetches: http or https."""
    return name.lower().startswith(("http://", "https://"))


def shown(url: str) -> str:
    """A URL for messages: without the name and password it may hold."""
    return re.sub(r"\A(\w+://)[^/?#]*@", r"\1", url)


def download(url: str) -> bytes:
    """What an http or https URL answers, where it says that it is an image.

    Raises:
        DataError: there is no answer within 10 seconds, it is an error, not an image, longer than 20 MB, or
            leads elsewhere than to http and https; or the URL holds a name and password.
    """
    answers: list[bytes | Exception] = []
    # A thread, because a socket's own timeout begins anew with every byte. It ends with its process at last.
    thread = Thread(target=_fetch, args=(url, answers), daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    answer = answers[0] if answers else TimeoutError(f"no whole answer within {TIMEOUT_SECONDS} s")
    if isinstance(answer, bytes):
        return answer
    cause = answer.reason if isinstance(answer, URLError) and not isinstance(answer, HTTPError) else answer
    reason = " ".join(str(cause).split()) or type(cause).__name__
    raise DataError(f"{shown(url)} cannot be fetched ({reason})") from answer


def _fetch(url: str, answers: list[bytes | Exception]) -> None:
    try:
        answers.append(_follow(url))
    except Exception as error:  # for the thread that waits
        answers.append(error)


def _follow(url: str) -> bytes:
    # urllib's own way of following redirects also knows ftp, and reads whatever a redirect has as a body
    opener = _opener()
    for _ in range(_MOST_REDIRECTS + 1):
        if shown(url) != url:
            raise ValueError("it holds a name or password, which is never sent")
        if not is_url(url):
            raise ValueError(f"it redirects to {shown(url)}: neither http nor https")
        request = urllib.request.Request(url, headers={"User-Agent": "vit-predict", "Accept": "image/*"})
        try:
            with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                return _image(response)
        except HTTPError as error:
            error.close()
            target = error.headers.get("Location")
            if not 300 <= error.code < 400 or target is None:
                raise
            url = urljoin(url, target)
    raise ValueError(f"it redirects more than {_MOST_REDIRECTS} times")


def _image(response: addinfourl) -> bytes:
    kind = response.headers.get_content_type()
    if not kind.startswith("image/"):
        raise ValueError(f"it is {kind}, not an image")
    length = response.headers.get("Content-Length", "")
    too_long = length.isdecimal() and int(length) > MOST_BYTES
    # one byte more than allowed, because the length may be a lie or missing
    data: bytes = b"" if too_long else response.read(MOST_BYTES + 1)
    if too_long or len(data) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES // 1_000_000} MB")
    if length.isdecimal() and len(data) < int(length):
        raise ValueError(f"it broke off after {len(data):,} of {int(length):,} bytes")
    return data


def _opener() -> urllib.request.OpenerDirector:
    """Knows http and https only, and follows nothing."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
