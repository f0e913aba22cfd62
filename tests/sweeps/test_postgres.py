"""One sweep on several machines, through PostgreSQL."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.sweeps.sweeping import Sweeping, gone, kill_group, wait_for

_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
    pytest.mark.skipif(not _PROGRAMS, reason="PostgreSQL is not installed in /usr/lib/postgresql"),
]


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """The address of a server of our own; it refuses to run as root."""
    programs = _PROGRAMS[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="metaopt-postgres-"))  # pytest's own is for one user alone
    user: dict[str, object] = {}
    if os.geteuid() == 0:
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, "nobody", "nogroup")

    def call(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, cwd=folder, timeout=30, **user)

    data = folder / "data"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        call(programs / "initdb", "-D", data, "-U", "tester", "--auth=trust", "--no-sync", "--no-locale", "-E", "UTF8")
        call(programs / "pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "log", "start")
        try:
            call(programs / "createdb", "-h", folder, "-p", str(port), "-U", "tester", "sweeps")
            yield f"postgresql://tester@127.0.0.1:{port}/sweeps"
        finally:
            call(programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_machine_takes_up_what_another_one_left_when_it_went_away(tmp_path, database):
    sweeping = Sweeping(tmp_path)
    options = ("sweep.yaml", "--storage", database, "--heartbeat", "1")
    machine = "from metaopt.sweeps import process; process.machine = lambda: {!r}"
    first = sweeping.start("run", *options, before=machine.format("first"))
    program = sweeping.reached()
    second = sweeping.start("resume", *options, before=machine.format("second"))
    kill_group(first)
    assert wait_for(lambda: gone(program))
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert "12 complete; best validation/loss 0 (trial 4)" in output
    assert "trial 7:" in output
    sweeping.check_complete(database.replace("postgresql", "postgresql+psycopg"))


def test_a_database_without_the_sweep_or_without_a_server_is_said_in_one_line(tmp_path, database):
    sweeping = Sweeping(tmp_path)
    file = (tmp_path / "sweep.yaml").read_text()
    (tmp_path / "other.yaml").write_text(file)
    code, output, errors = sweeping.call("resume", "other.yaml", "--storage", database)
    assert (code, output) == (1, "")
    assert errors == "metaopt: sweep 'other' has not been started: metaopt sweep run does that\n"
    away = "postgresql://tester:secret@127.0.0.1:1/sweeps"
    code, output, errors = sweeping.call("run", "other.yaml", "--storage", away)
    assert (code, output) == (1, "")
    assert errors.startswith("metaopt: the database postgresql+psycopg://tester:***@127.0.0.1:1/sweeps cannot be used")
    assert errors.count("\n") == 1
    assert "secret" not in errors
