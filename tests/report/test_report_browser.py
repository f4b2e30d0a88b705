"""The page in a headless Chromium: it runs nothing, fetches nothing, and fits a phone."""

import html as escaping
import json
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from reports import NAME, TITLES, fill, html

from slsgu_cli.store.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--enable-logging=stderr",
    "--window-size=1280,900",
)
# A window cannot be as narrow as a phone, a frame can.
FRAME = """<!doctype html><title>frame</title><pre id="found"></pre>
<iframe src="/report.html" style="width:390px;height:800px;border:0"></iframe><script>
document.querySelector("iframe").onload = ({target}) => {
  const page = target.contentDocument, wide = page.documentElement.scrollWidth;
  const outside = [...page.querySelectorAll("body *")].filter(
    (one) => !one.closest(".scroll, svg, .skip") && one.getBoundingClientRect().right > 391);
  const images = [...page.images].filter((one) => !one.complete || !one.naturalWidth).length;
  found.textContent = JSON.stringify({
    wide, images, outside: outside.map((one) => one.outerHTML.slice(0, 80)),
    titles: [...page.querySelectorAll("h3")].map((one) => one.textContent),
  });
};
</script>"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the page in a frame, and the paths that were asked for."""
    store = Store(str(tmp_path_factory.mktemp("browser") / "store"))
    fill(store)
    fill(store, concept="castle", name="castle")
    pages = {"/report.html": html(store, NAME, "castle"), "/frame.html": FRAME}
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            # To a proxy, a browser names the whole address.
            page = pages.get(f"/{self.path.rpartition('/')[2]}")
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((page or "").encode())

        def do_CONNECT(self):
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def browse(address, profile, *options):
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)


def test_the_page_fits_a_phone_and_requests_nothing(served, tmp_path):
    place, asked = served
    # Whatever is asked for, of any host, comes to this server.
    proxy = (f"--proxy-server={place}", "--proxy-bypass-list=<-loopback>")
    done = browse(
        f"http://{place}/frame.html", tmp_path, *proxy, "--virtual-time-budget=5000", "--dump-dom"
    )
    told = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1]
    found = json.loads(escaping.unescape(told))
    assert found["outside"] == []
    assert found["wide"] <= 390
    assert found["images"] == 0
    assert found["titles"] == [*TITLES, *TITLES]
    assert "CONSOLE" not in done.stderr
    ours = {f"http://{place}/{page}" for page in ("frame.html", "report.html", "favicon.ico")}
    assert ours - {f"http://{place}/favicon.ico"} <= set(asked)
    # What a browser asks its maker for is not the page's doing.
    assert {path for path in asked if "google" not in path} <= ours


def test_the_page_can_be_printed(served, tmp_path):
    place, _ = served
    page = tmp_path / "page.pdf"
    browse(f"http://{place}/report.html", tmp_path / "profile", f"--print-to-pdf={page}")
    data = page.read_bytes()
    assert data.startswith(b"%PDF")
    # One page each at least, and no empty ones by the dozen.
    assert 2 <= len(re.findall(rb"/Type /Page\b", data)) <= 24
