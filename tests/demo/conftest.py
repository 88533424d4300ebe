"""A client of the geolocalization page; modules about another page have a client of their own."""

import socket

import pytest


@pytest.fixture(scope="module")
def client():
    gradio_client = pytest.importorskip("gradio_client")
    from geobased.demo import geolocalization
    from geobased.demo.serving import launch

    page = geolocalization.build_demo()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield gradio_client.Client(launch(page, port), verbose=False)
    page.close(verbose=False)
