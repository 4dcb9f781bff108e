"""A local S3 server (moto) for tests of remote stores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pyarrow.fs

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Query of a location on a server that lives as long as the context: `s3://bucket/folder?<query>`.

    Credentials are in the environment meanwhile, as users have them; processes started then inherit them.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"scheme=http&region=us-east-1&endpoint_override={host}:{port}"
    with patch.dict(os.environ, CREDENTIALS):
        files, _ = pyarrow.fs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true&{query}")
        files.create_dir(BUCKET)
        try:
            yield query
        finally:
            server.stop()
