"""Object storage on this machine, served from memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def s3_bucket() -> Iterator[str]:
    """Yield the address of a bucket that is reached as those of S3 are; `{}` is to be the path in it."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "none")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        options = {"endpoint_override": f"{host}:{port}", "scheme": "http", "region": "us-east-1"}
        S3FileSystem(allow_bucket_creation=True, **options).create_dir("bucket")
        yield "s3://bucket/{}?" + "&".join(f"{name}={value}" for name, value in options.items())
    server.stop()


@contextmanager
def gs_bucket() -> Iterator[str]:
    """Yield the address of a bucket that is reached as those of Google Cloud Storage are."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    port = server._api._httpd.server_port  # it was asked to choose one, and tells it nowhere else
    yield f"gs://anonymous@bucket/{{}}?scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=5"
    server.stop()
