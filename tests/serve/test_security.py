"""Who may call, over what connection, and how much."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import trustme
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from serve import Client, Options
from serve.errors import Denied, Overloaded, Unreachable
from serve.server import security
from serve.server.refusal import Refusal
from serve.server.settings import Settings
from serve.stubs.admin.v1 import admin_pb2 as admin
from serve.stubs.admin.v1 import admin_pb2_grpc as admin_rpc
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import BIN, assert_clear_error, command, serving


class Authority:
    """A certificate authority with files."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.folder = folder
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, host: str = "127.0.0.1") -> tuple[Path, Path]:
        issued = self._ca.issue_cert("localhost", host)
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        issued.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return cert, key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def serial(address: str, ca: Path) -> int:
    """Return the serial number of the certificate that a server shows."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), 20) as plain,
        context.wrap_socket(plain, server_hostname=host) as s,
    ):
        shown = s.getpeercert()
        assert shown is not None
        return int(str(shown["serialNumber"]), 16)


def test_tls_and_a_certificate_that_is_renewed(smoke_bundle: Path, authority: Authority) -> None:
    cert, key = authority.issue("server")
    words = ("--model", smoke_bundle, "--tls-cert", cert, "--tls-key", key)
    with serving(*words) as (address, _):
        with Client(address, Options(ca=authority.ca)) as client:
            assert len(client.model().sample(0, 0, 3)) == 3
        for options, words in (
            (Options(), "if it uses TLS, pass --tls or --ca FILE"),
            (Options(tls=True), "not of an authority that this system trusts; give"),
            (Options(ca=authority.ca, server_name="elsewhere.org"), "for another name"),
        ):
            with Client(address, options) as client, pytest.raises(Unreachable, match=words):
                client.models()
        before = serial(address, authority.ca)
        renewed, its_key = authority.issue("renewed")
        os.replace(its_key, key)
        os.replace(renewed, cert)
        assert serial(address, authority.ca) != before
        now = serial(address, authority.ca)
        cert.write_text("half a certi")  # a renewal that went wrong keeps the one before
        assert serial(address, authority.ca) == now


def test_mutual_tls_asks_for_a_certificate_of_the_authority(
    smoke_bundle: Path, authority: Authority, tmp_path: Path
) -> None:
    host = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.8"  # one of many that nobody else listens on
    cert, key = authority.issue("server", host)
    mine, my_key = authority.issue("client")
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    theirs, their_key = stranger.issue("stranger")
    words = ("--model", smoke_bundle, "--listen", f"{host}:8470", "--tls-cert", cert)
    variables = {"SERVE_VAE_TLS_KEY": str(key), "SERVE_VAE_TLS_CLIENT_CA": str(authority.ca)}
    with serving(*words, **variables) as (address, process):
        health = command("python", "-m", "serve.healthcheck", "--pid", process.pid)
        assert (health.returncode, health.stderr) == (0, f"{address}: SERVING\n")
        with Client(address, Options(ca=authority.ca, cert=mine, key=my_key)) as client:
            assert len(client.model().sample(0, 0, 3)) == 3
        for options, words in (
            (Options(ca=authority.ca), "asks for this client's certificate; give one"),
            (Options(ca=authority.ca, cert=theirs, key=their_key), "does not take this client's certificate"),
        ):
            with Client(address, options) as client, pytest.raises(Unreachable, match=words):
                client.models()
        out = tmp_path / "out"
        tls = ("--ca", authority.ca, "--cert", mine, "--key", my_key)
        assert command("sample-cli", "--server", address, *tls, "--n", 3, "--out", out).returncode == 0
        check = [
            BIN / "python",
            "-m",
            "serve.healthcheck",
            address,
            "--ca",
            authority.ca,
            "--cert",
            mine,
            "--key",
            my_key,
        ]
        assert subprocess.run(check).returncode == 0


def token(file: Path, name: str, more: str = "") -> str:
    made = command("serve-vae", "--tokens", file, "--new-token", name)
    assert made.returncode == 0, made.stderr
    with file.open("a") as text:
        text.write(more)
    return made.stdout.strip()


def test_tokens(smoke_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    alice, bob = token(file, "alice"), token(file, "bob", "admin = true\n")
    assert alice not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "smoke.onnx").write_bytes(smoke_bundle.read_bytes())
    with serving("--models", folder, "--admin", "--tokens", file) as (address, _):
        with Client(address, Options(token=alice)) as client:
            assert len(client.model().sample(0, 0, 3)) == 3
        for wrong in ("", "x", alice[:-1], alice + "x", alice.upper()):
            with (
                Client(address, Options(token=wrong)) as client,
                pytest.raises(Denied, match="does not know the token" if wrong else "asks for a token"),
            ):
                client.models()
        assert subprocess.run([BIN / "python", "-m", "serve.healthcheck", address]).returncode == 0
        result = command("sample-cli", "--server", address, "--n", 3, "--out", tmp_path / "out")
        assert_clear_error(result, "UNAUTHENTICATED", "asks for a token; give one with --token or SAMPLE_TOKEN")
        result = command("sample-cli", "--server", address, "--n", 3, "--out", tmp_path / "out", SAMPLE_TOKEN=alice)
        assert result.returncode == 0, result.stderr
        with grpc.insecure_channel(address) as channel:
            stub = admin_rpc.AdminServiceStub(channel)
            request = admin.LoadModelRequest(file="smoke.onnx")
            with pytest.raises(grpc.RpcError) as error:
                stub.LoadModel(request, metadata=[("authorization", f"Bearer {alice}")], timeout=60)
            assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert stub.LoadModel(request, metadata=[("authorization", f"Bearer {bob}")], timeout=60).model == "smoke"
        # Taken out of the file, a token opens nothing any more; a file that makes no sense changes nothing.
        text = file.read_text()
        file.write_text("this is no toml")
        with Client(address, Options(token=alice)) as client:
            client.models()
        file.write_text(text[text.index("[tokens.bob]") :])
        with Client(address, Options(token=alice)) as client, pytest.raises(Denied):
            client.models()


def test_a_tokens_own_allowance(smoke_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    slow = token(file, "slow", "samples_per_second = 200\n")
    single = token(file, "single", "requests = 1\n")
    with serving("--model", smoke_bundle, "--tokens", file) as (address, _):
        with grpc.insecure_channel(address) as channel:
            stub = rpc.SamplingServiceStub(channel)
            mine = [("authorization", f"Bearer {slow}")]
            request = wire.SampleRequest(range=wire.Range(count=150))
            stub.Sample(request, metadata=mine, timeout=60)
            with pytest.raises(grpc.RpcError) as error:
                [stub.Sample(request, metadata=mine, timeout=60) for _ in range(3)]
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            status = rpc_status.from_call(error.value)
            info = RetryInfo()
            assert status.details[0].Unpack(info)
            assert 0 < info.retry_delay.ToTimedelta().total_seconds() <= 1
        with Client(address, Options(token=slow)) as client:
            assert len(client.model().sample(0, 0, 150)) == 150  # our client comes back by itself
        with Client(address, Options(token=single, patience=0)) as client:
            model = client.model()
            stream = model.stream(0, 0, 10**6)
            next(stream)
            with pytest.raises(Overloaded, match="requests at a time"):
                model.sample(0, 0, 1)
            stream.close()


def test_an_allowance_is_earned_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever took ten seconds' worth at once has a second's worth ten seconds later, and no more after a day."""
    now = [1000.0]
    monkeypatch.setattr(security, "time", SimpleNamespace(monotonic=lambda: now[0]))
    caller = security.Caller("slow", samples_per_second=10)

    def spend(samples: int) -> None:
        with caller.spending(samples):
            pass

    spend(100)
    for seconds, left in ((5.0, 5.0), (4.9, 0.1)):
        now[0] += seconds
        with pytest.raises(Refusal) as error:
            spend(10)
        assert error.value.retry_after == pytest.approx(left, abs=0.01)
    now[0] += 0.11
    spend(10)
    now[0] += 86_400
    spend(10)
    with pytest.raises(Refusal):
        spend(1)


def test_what_is_refused_costs_no_allowance() -> None:
    caller = security.Caller("eager", samples_per_second=10)
    for _ in range(5):
        with pytest.raises(Refusal, match="full"), caller.spending(10):
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "the server is full", 1.0)
    with caller.spending(10):
        pass


def test_streams_that_wait_for_their_allowance_hold_ten_seconds_of_it() -> None:
    caller = security.Caller("many", samples_per_second=10)
    waits = "its streams hold 500; wait for one to end"  # one stream may hold more
    with caller.holding(500), pytest.raises(Refusal, match=waits), caller.holding(1):
        pass
    with caller.holding(60), caller.holding(40), pytest.raises(Refusal, match="hold 100"), caller.holding(1):
        pass
    with security.Caller().holding(10**9), security.Caller().holding(10**9):
        pass


@pytest.mark.parametrize(
    "file",
    [
        "",
        "x",
        "[tokens.a]\nsha256 = 'ab'",
        "[tokens.a]\nrequests = 1",
        "tokens = 3",
        "tokens = " + "[" * 100_000,
        f"[tokens.a]\nsha256 = '{'ab' * 32}'\n_under_way = -1000",
    ],
    ids=range(7),
)
def test_files_of_tokens_that_are_none(file: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(file)
    assert_clear_error(command("serve-vae", "--tokens", path, "--listen", "127.0.0.1:0"), "no file of tokens")


def test_certificates_that_are_none(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    other = authority.issue("other")[1]
    for words in (("--tls-cert", cert, "--tls-key", other), ("--tls-cert", key, "--tls-key", cert)):
        assert_clear_error(command("serve-vae", *words, "--check"), "no certificate and its key")
    assert_clear_error(command("serve-vae", "--tls-cert", cert), "go together", code=2)
    absent = tmp_path / "absent.pem"
    for words in (("--tls-cert", absent, "--tls-key", key), ("--tls-cert", cert, "--tls-key", absent)):
        assert_clear_error(command("serve-vae", *words, "--check"), f"cannot read {absent}: No such file")
    mutual = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca")
    assert_clear_error(command("serve-vae", *mutual, absent, "--check"), f"cannot read {absent}: No such file")
    assert_clear_error(command("serve-vae", *mutual, key, "--check"), f"{key} holds no certificate")


def test_a_server_without_tls_says_so(server: str, authority: Authority) -> None:
    with Client(server, Options(ca=authority.ca)) as client, pytest.raises(Unreachable, match="does not use TLS"):
        client.models()


def test_listening_beyond_this_machine_needs_tls_tokens_or_insecure(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    file = tmp_path / "tokens.toml"
    token(file, "alice")
    beyond = ("serve-vae", "--listen", "0.0.0.0:8470", "--check")
    assert_clear_error(command(*beyond), "--insecure", code=2)
    shown = command("serve-vae", "--metrics", "0.0.0.0:9470", "--tokens", file)
    assert_clear_error(shown, "--metrics 0.0.0.0:9470 can be reached", "--metrics-insecure", code=2)
    for allowed in ({"metrics_insecure": True}, {"insecure": True}):
        Settings(metrics="0.0.0.0:9470", **allowed)
    for words in (("--tls-cert", cert, "--tls-key", key), ("--tokens", file), ("--insecure",)):
        result = command(*beyond, *words)
        assert result.returncode == 0, result.stderr
        assert "the configuration is good" in result.stdout
