"""Images from the web, asked of a real server that means harm."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vit_train.errors import ConfigError, DataError
from vit_train.inference import download
from vit_train.inference.images import find_images

MB = 1_000_000
IMAGE = b"the bytes of an image"


class Handler(BaseHTTPRequestHandler):
    """Each path answers in its own way."""

    def do_GET(self):
        getattr(self, self.path.strip("/").split("/")[0])()

    def log_message(self, *_):
        pass

    def start(self, code=200, kind="image/png", **headers):
        self.send_response(code)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def image(self):
        self.start(Content_Length=str(len(IMAGE)))
        self.wfile.write(IMAGE)

    def page(self):
        self.start(kind="text/html; charset=utf-8")
        self.wfile.write(IMAGE)

    def nothing(self):
        self.start(404)

    def claims_much(self):
        self.start(Content_Length=str(21 * MB))

    def endless(self):
        self.start()  # says no length
        try:
            while True:
                self.wfile.write(bytes(MB))
        except OSError:
            self.server.gone.set()

    def lies(self):
        self.start(Content_Length="1000")
        self.wfile.write(IMAGE)

    def drips(self):
        self.start(Content_Length="1000")
        try:
            while not self.server.over.wait(0.05):
                self.wfile.write(b".")
        except OSError:
            pass

    def silent(self):
        self.server.over.wait(20)

    def moved(self):
        self.start(302, Location="/image")

    def to_file(self):
        self.start(301, Location="file:///etc/passwd")

    def to_secret(self):
        self.start(302, Location="http://name:sesame@127.0.0.1:9/")

    def to_ftp(self):
        self.start(307, Location="ftp://127.0.0.1/image.png")

    def round(self):
        self.start(302, Location="/round")

    def big_redirect(self):
        self.start(302, Location="/image")
        try:
            while not self.server.over.is_set():
                self.wfile.write(bytes(MB))
        except OSError:
            pass


@pytest.fixture
def server(monkeypatch):
    """Its address."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.over, server.gone = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.over.set()
    server.shutdown()
    server.server_close()


def line_of(url):
    with pytest.raises(DataError) as raised:
        download.download(url)
    line = str(raised.value)
    assert line.startswith(f"{url} cannot be fetched (")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("path", ["image", "moved", "big_redirect"])
def test_an_image(server, path):
    assert download.download(f"{server}/{path}") == IMAGE


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("page", "it is text/html, not an image"),
        ("nothing", "HTTP Error 404: Not Found"),
        ("claims_much", "it is longer than 20 MB"),
        ("endless", "it is longer than 20 MB"),
        ("to_file", "it redirects to file:///etc/passwd: neither http nor https"),
        ("to_ftp", "it redirects to ftp://127.0.0.1/image.png: neither http nor https"),
        ("round", "it redirects more than 5 times"),
        ("lies", "it broke off after 21 of 1,000 bytes"),
    ],
)
def test_what_is_refused(server, path, words):
    assert words in line_of(f"{server}/{path}")


def test_an_at_sign_later_on_is_no_password():
    for url in ("https://host/x//photo@2x.jpg", "https://host/?back=//user@host", "http://[::1]:80/a"):
        assert download.shown(url) == url


def test_a_password_is_neither_sent_nor_shown(server):
    for url in (server.replace("//", "//name:sesame@"), f"{server}/to_secret"):
        with pytest.raises(DataError, match=r"cannot be fetched \(it holds a name or password") as raised:
            download.download(url)
        assert "sesame" not in str(raised.value)
    with pytest.raises(ConfigError, match="the list holds the URL http://here/x: type --allow-url"):
        find_images(["-"], stdin=["http://name:sesame@here/x"], allow_url=False)


@pytest.mark.parametrize("path", ["silent", "drips"])
def test_a_slow_server(server, monkeypatch, path):
    """One that sends a byte now and then keeps a socket's own timeout from ever running out."""
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.5)
    start = time.monotonic()
    assert "no whole answer within 0.5 s" in line_of(f"{server}/{path}") or path == "silent"
    assert time.monotonic() - start < 5


def test_nobody_listens(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "refused" in line_of("http://127.0.0.1:9/x.png")


def test_names_that_are_no_urls():
    assert download.is_url("HTTPS://example.org/a.png")
    assert not any(map(download.is_url, ("file:///a.png", "ftp://a/b.png", "http:/a.png", "a.png", "-")))
