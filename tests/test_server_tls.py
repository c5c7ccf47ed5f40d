"""TLS: who is trusted gets answers, nobody else does, and wrong certificates are refused."""

from __future__ import annotations

import shutil

import pytest
from served import QUIET, answer, asking, assert_equal, certificates, random_images

from serving import server
from serving.connection import ClientTls
from serving.listening import Tls
from vqunet_tf.errors import UserError


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    return certificates(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(tiny_path, pem, mutual):
    tls = Tls(pem["server.pem"], pem["server.key"], pem["ca.pem"] if mutual else None)
    running = server.start(server.Options("tiny", tiny_path, port=0, tls=tls), QUIET)
    images = random_images(1)
    trusting = ClientTls(pem["ca.pem"])
    proven = ClientTls(pem["ca.pem"], pem["client.pem"], pem["client.key"])
    try:
        with asking(running, tls=proven) as client:
            assert_equal(client.predict(images), answer(images))
        for refused in [None, ClientTls(pem["client.pem"])] + [trusting] * mutual:
            with asking(running, tls=refused, retries=0, timeout=10) as client, pytest.raises(UserError):
                client.predict(images)
        if not mutual:
            with asking(running, tls=trusting) as client:
                assert_equal(client.predict(images), answer(images))
    finally:
        running.stop(0)


def test_wrong_certificates_are_refused(tiny_path, pem, tmp_path):
    (tmp_path / "text").write_text("no certificate")
    for tls, words in (
        (Tls(str(tmp_path / "nowhere"), pem["server.key"]), "--tls_certificate .*nowhere cannot be read"),
        (Tls(pem["server.pem"], str(tmp_path / "text")), "--tls_key .*PEM"),
        (Tls(pem["server.pem"], pem["client.key"]), "the key does not belong"),
    ):
        with pytest.raises(UserError, match=words):
            server.start(server.Options("tiny", tiny_path, port=0, tls=tls), QUIET)
