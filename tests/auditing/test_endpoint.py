"""Models behind an address: black boxes at a rate."""

import http.server
import io
import json
import threading
import time

import pytest
import torch
from PIL import Image

from geobased.auditing import AccessDeniedError, AuditError, AuditTarget, Endpoint


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.headers["Authorization"], data))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/v1/completions")
            self.end_headers()
            return
        if self.path == "/broken":
            answer = {"nothing": 1}
        elif self.path == "/image":
            red = Image.open(io.BytesIO(data)).getpixel((0, 0))[0]
            answer = [{"label": "red" if red > 127 else "dark", "score": 0.9}]
        else:
            asked = json.loads(data)
            answer = {"choices": [{"text": f"{asked['prompt']}!{number}"} for number in range(asked["n"])]}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        served.asked = []
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def address(server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def test_texts_are_asked_for_at_the_rate(server, monkeypatch):
    monkeypatch.setenv("AUDIT_TEST_TOKEN", "secret")
    endpoint = Endpoint(address(server, "v1/completions"), requests_per_minute=600, token_variable="AUDIT_TEST_TOKEN")
    start = time.monotonic()
    with AuditTarget.open(endpoint, "black") as target, target.scope("x", "query", budget=10) as scope:
        assert scope.generate(["a", "b", "c"], samples=2) == [["a!0", "a!1"], ["b!0", "b!1"], ["c!0", "c!1"]]
        assert scope.spent == 6 and target.mode == "endpoint"
        with pytest.raises(AccessDeniedError):
            scope.score(["a"], ["b"])
        assert "secret" not in json.dumps(target.ledger())
    assert time.monotonic() - start >= 0.2
    assert server.asked[0][0] == "Bearer secret"


def test_images_are_sent_as_pixels(server):
    endpoint = Endpoint(address(server, "image"), requests_per_minute=6000, kind="image", image_size=(8, 8))
    with AuditTarget.open(endpoint, "black") as target, target.scope("x", "query", budget=10) as scope:
        images = scope.prepare([Image.new("RGB", (30, 20), (200, 0, 0))])
        assert images.shape == (1, 3, 8, 8)
        assert scope.answer(torch.cat([images, torch.zeros_like(images)])) == [{"label": "red"}, {"label": "dark"}]


def test_malformed_answers_and_silence_are_errors(server):
    endpoint = Endpoint(address(server, "broken"), requests_per_minute=6000)
    with AuditTarget.open(endpoint, "black") as target, target.scope("x", "query", budget=10) as scope:
        with pytest.raises(AuditError, match="something else than was expected"):
            scope.generate(["a"])
        assert target.ledger()[-1]["outcome"] == "failed"
    moved = Endpoint(address(server, "moved"), requests_per_minute=6000)
    with AuditTarget.open(moved, "black") as target, target.scope("x", "query", budget=10) as scope:
        with pytest.raises(AuditError, match="302"):
            scope.generate(["a"])
        assert len(server.asked) == 2, "no request goes on to another address"
    silent = Endpoint("http://127.0.0.1:9/v1/completions", requests_per_minute=6000, timeout=2)
    with (
        AuditTarget.open(silent, "black") as target,
        target.scope("x", "query", budget=10) as scope,
        pytest.raises(AuditError, match="does not answer"),
    ):
        scope.generate(["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:80", "requests_per_minute": 1}, "with http"),
        ({"url": "http://a:b@host/x", "requests_per_minute": 1}, "holds a password"),
        ({"url": "http://host/x", "requests_per_minute": 0}, "requests_per_minute=0"),
        ({"url": "http://host/x", "requests_per_minute": 1, "kind": "sound"}, "kind='sound'"),
        ({"url": "http://host/x", "requests_per_minute": 1, "token_variable": "NOT_SET_ANYWHERE"}, "is not set"),
    ],
)
def test_an_address_and_a_rate_are_needed(settings, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**settings)


def test_more_than_answers_cannot_be_granted():
    with pytest.raises(ValueError, match="more than an endpoint serves"):
        AuditTarget.open(Endpoint("http://host/x", requests_per_minute=1), "grey")
    with pytest.raises(TypeError):
        Endpoint("http://host/x")
