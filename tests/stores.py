"""Object stores for tests: S3 as moto serves it on this machine, and one in memory that fails when it is told to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data import object_store as store


class FlakyFileSystem(MemoryFileSystem):
    """`flaky://`: memory whose next `failures` reads and writes fail."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    failures = 0
    asked: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def unstrip_protocol(self, name: str) -> str:
        return "flaky:/" + self._strip_protocol(name)

    def _perhaps(self, path: str) -> None:
        FlakyFileSystem.asked.append(path)
        if FlakyFileSystem.failures > 0:
            FlakyFileSystem.failures -= 1
            raise OSError("503 Slow Down")

    def pipe_file(self, path: str, value: bytes, **more: Any) -> Any:
        self._perhaps(path)
        return super().pipe_file(path, value, **more)

    def put_file(self, lpath: str, rpath: str, **more: Any) -> Any:
        self._perhaps(rpath)
        return super().put_file(lpath, rpath, **more)

    def get_file(self, rpath: str, lpath: str, **more: Any) -> Any:
        self._perhaps(rpath)
        return super().get_file(rpath, lpath, **more)

    def cat_file(self, path: str, **more: Any) -> Any:
        self._perhaps(path)
        return super().cat_file(path, **more)


@contextmanager
def flaky_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyFileSystem]]:
    """An empty `flaky://`, whose clients try again without a pause."""
    monkeypatch.setattr(store, "PAUSES", (0.0, 0.0, 0.0))
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.store.clear()
    FlakyFileSystem.pseudo_dirs[:] = [""]
    FlakyFileSystem.failures = 0
    FlakyFileSystem.asked.clear()
    yield FlakyFileSystem
    FlakyFileSystem.failures = 0


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment in which `s3://bucket` is one of a server that ends with the test."""
    pytest.importorskip("s3fs", reason="reads and writes s3://: pip install -e '.[test]'")
    server = pytest.importorskip("moto.server", reason="serves s3:// here: pip install -e '.[test]'")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    try:
        with pytest.MonkeyPatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            patched.delenv("AWS_PROFILE", raising=False)
            store.file_system.cache_clear()
            # Servers of one process share what they hold.
            urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"), timeout=10).close()
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
            patched.setattr(fsspec.get_filesystem_class("s3"), "_cache", {})  # clients of another server
            yield environment
    finally:
        store.file_system.cache_clear()
        running.stop()
