"""A real S3-compatible server on this machine (moto's), with one empty bucket.

What belongs here: starting it, and pointing this process and those it starts at it. What does not: what is kept there.
"""

import logging
from collections.abc import Iterator

import pytest

BUCKET = "atlas-tests"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The bucket's URI, while the environment names the server; each test takes a prefix of its own below it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    server.stop()


def point_at(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make `endpoint` this process's S3 server."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # it keeps clients, and with them the endpoint that they were made for
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-seen",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        patch.setenv(name, value)
