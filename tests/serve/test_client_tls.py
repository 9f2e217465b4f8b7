"""Whom clients and commands trust, and what they show of themselves."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from serve import AsyncClient, Client, Options, RemoteError
from tests.conftest import assert_clear_error, command, serving
from tests.serve.test_security import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def assert_refused(options: dict[str, Path], *words: str) -> None:
    """In one line, by both clients and both commands, before anything is sent: nobody listens there."""
    address = "127.0.0.1:1"
    with pytest.raises(RemoteError) as refused:
        Client(address, Options(**options))  # type: ignore[arg-type]

    async def use() -> None:
        with pytest.raises(RemoteError, match=re.escape(str(refused.value))):
            AsyncClient(address, Options(**options))  # type: ignore[arg-type]

    asyncio.run(use())
    flags = [word for name, path in options.items() for word in (f"--{name}", path)]
    assert_clear_error(command("sample-cli", "--server", address, "--n", 1, "--out", "/absent", *flags), *words)
    assert_clear_error(command("python", "-m", "serve.healthcheck", address, *flags), *words)


def test_a_certificate_and_its_key_go_together(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("client")
    _, another = authority.issue("another")
    assert_refused({"key": key}, "go together", f"the key {key} alone")
    assert_refused({"cert": cert}, "go together", f"the certificate {cert} alone")
    assert_refused({"ca": authority.ca, "key": key}, "go together")  # of which gRPC would abort the process
    assert_refused({"cert": cert, "key": another}, "are no certificate and its key")
    assert_refused({"cert": key, "key": cert}, "are no certificate and its key")


@pytest.mark.parametrize("content", ["", "half a certi", None])
def test_files_that_are_no_certificates(authority: Authority, content: str | None) -> None:
    wrong = authority.folder / "wrong.pem"
    if content is None:
        assert_refused({"ca": wrong}, f"cannot read {wrong}")
        return
    wrong.write_text(content)
    cert, key = authority.issue("client")
    assert_refused({"ca": wrong}, f"{wrong} holds no certificate")  # gRPC takes an empty one for no answer at all
    assert_refused({"cert": wrong, "key": key}, "are no certificate and its key")
    assert_refused({"cert": cert, "key": wrong}, "are no certificate and its key")


def test_tls_by_whom_the_system_trusts(
    smoke_bundle: Path, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = authority.issue("server")
    folder = tmp_path / "trusted"
    folder.mkdir()
    (folder / "0a1b2c3d.0").write_bytes(authority.ca.read_bytes())
    with serving("--model", smoke_bundle, "--tls-cert", cert, "--tls-key", key) as (address, _):
        check = ("python", "-m", "serve.healthcheck", address, "--tls")
        ask = ("sample-cli", "--server", address, "--tls", "--n", 1, "--out", tmp_path / "out")
        for file, directory in ((authority.ca, tmp_path), (tmp_path / "absent", folder)):
            trust = {"SSL_CERT_FILE": str(file), "SSL_CERT_DIR": str(directory)}
            assert command(*check, **trust).returncode == 0
            assert command(*ask, **trust).returncode == 0
            for name, value in trust.items():
                monkeypatch.setenv(name, value)
            with Client(address, Options(tls=True)) as client:
                assert len(client.model().sample(0, 0, 3)) == 3
            monkeypatch.undo()
        Authority(folder)
        stranger = {"SSL_CERT_FILE": str(folder / "ca.pem"), "SSL_CERT_DIR": str(folder / "absent")}
        assert_clear_error(command(*check, **stranger), "not of an authority that this system trusts")
        assert_clear_error(command(*ask, **stranger), "not of an authority that this system trusts")
