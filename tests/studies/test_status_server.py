"""The page over HTTP: on this machine alone, two addresses, always as things are now."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gt_ray.errors import UserError
from gt_ray.studies.status_server import LOOPBACK, serve
from tests.studies.watched import ME, make_run, started, write_events


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", started(0, "curate", ME))


@pytest.fixture
def port(run: Path) -> Iterator[int]:
    with serve(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def get(port: int, path: str, host: str = "localhost", method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(LOOPBACK, port)
    connection.request(method, path, headers={"Host": host})
    answer = connection.getresponse()
    found = answer.status, answer.headers.get_content_type(), answer.read().decode()
    connection.close()
    return found


def test_half_an_address_as_host_is_refused(port: int) -> None:
    assert get(port, "/", host="[::1")[0] == 421


def test_the_page_and_the_json_are_as_things_are_now(port: int, run: Path) -> None:
    status, kind, html = get(port, "/")
    assert (status, kind) == (200, "text/html") and "train" in html
    stages = json.loads(get(port, "/status.json")[2])["runs"][0]["stages"]
    assert [stage["state"] for stage in stages[:2]] == ["running", "waiting"]
    write_events(run, (1, "curate", "end"), started(1, "train"))
    stages = json.loads(get(port, "/status.json", f"127.0.0.1:{port}")[2])["runs"][0]["stages"]
    assert [stage["state"] for stage in stages[:2]] == ["done", "running"]


def test_there_is_nothing_else(port: int) -> None:
    assert get(port, "/config.yaml")[0] == get(port, "/../run/config.yaml")[0] == 404
    assert get(port, "/", method="POST")[0] == 501


def test_another_name_that_leads_here_is_refused(port: int) -> None:
    assert get(port, "/", host="evil.example")[0] == 421
    assert get(port, "/status.json", host="")[0] == 421


def test_a_folder_that_goes_away_is_said(port: int, run: Path) -> None:
    shutil.rmtree(run)
    status, kind, text = get(port, "/")
    assert (status, kind) == (404, "text/plain") and "is neither a run nor a study" in text


def test_only_this_machine_is_answered(run: Path) -> None:
    with serve(run, 0) as server:
        assert server.server_address[0] == LOOPBACK


def test_a_taken_port_and_a_folder_that_is_no_run_are_refused(port: int, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"port {port} is not to be had: .*; give --serve another one"):
        serve(run, port)
    with pytest.raises(UserError, match="neither a run nor a study"):
        serve(tmp_path, 0)
