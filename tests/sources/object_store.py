"""An S3 server on 127.0.0.1 that can be told to fail."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

KEYS = {
    "aws_access_key_id": "nobody",
    "aws_secret_access_key": "nothing",
    "region_name": "us-east-1",
}


class Store:
    """Moto's S3 server behind a gate.

    ``fault`` is asked for each GET of an object: None lets it through, a number answers with that
    status, ``cut`` sends half of the body and hangs up.
    """

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.fault: Callable[[str], Any] = lambda key: None
        self.gets: Counter[str] = Counter()
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        key = environ["PATH_INFO"].rsplit("/", 1)[-1]
        if environ["REQUEST_METHOD"] != "GET" or "." not in key:
            return self.app(environ, start_response)
        self.gets[key] += 1
        fault = self.fault(key)
        if fault is None:
            return self.app(environ, start_response)
        if fault == "cut":
            return half(self.app(environ, start_response))
        start_response(f"{fault} Broken", [("Content-Type", "text/plain")])
        return [b""]

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": self.url, **KEYS}

    def upload(self, folder: Path, bucket: str, prefix: str) -> str:
        client = boto3.client("s3", endpoint_url=self.url, **KEYS)
        client.create_bucket(Bucket=bucket)
        for path in folder.iterdir():
            if path.is_file() and not path.name.startswith("."):
                client.upload_file(str(path), bucket, f"{prefix}/{path.name}")
        return f"s3://{bucket}/{prefix}"


def half(body: Any) -> Iterator[bytes]:
    """Hang up in the middle; the length was announced already."""
    data = b"".join(body)
    yield data[: len(data) // 2]
    raise ConnectionAbortedError


@contextmanager
def running() -> Iterator[Store]:
    store = Store()
    thread = threading.Thread(target=store.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.server.shutdown()
        thread.join()
