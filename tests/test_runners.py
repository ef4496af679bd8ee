"""Runners: the real adb against a phone's side of its protocol, the real ssh and sshd, QEMU, and this machine."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from board import Board
from devices import adb, board, connected
from phone import Phone

from edgekit.errors import EdgekitError, IncompleteError, InputError, ToolMissingError, UnsupportedError
from edgekit.measure import host
from edgekit.runners import Runner, devices, facts, ssh
from edgekit.runners import adb as runners_adb
from edgekit.runners.facts import Core

pytestmark = pytest.mark.emulated
KINDS = ("local", "qemu", "adb", "ssh")
REMOTE = ("adb", "ssh")

# The same program twice: for 64-bit ARM, and for whatever this machine is.
PROGRAM = r"""
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int count, char **arguments)
{
    const char *what = arguments[1];
    int number = count > 2 ? atoi(arguments[2]) : 0, byte;
    if (!strcmp(what, "echo"))
        while ((byte = getchar()) != EOF)
            putchar(byte), putc(byte, stderr);
    if (!strcmp(what, "kill"))
        signal(number, SIG_DFL), raise(number);
    if (!strcmp(what, "hang"))
        for (;;)
            pause();
    if (!strcmp(what, "write"))
        fputs("written", fopen(arguments[3], "w"));
    return number;
}
"""
SCRIPT = f"""\
#!{sys.executable}
import os, signal, sys
what, number = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
if what == "echo":
    given = sys.stdin.buffer.read()
    sys.stdout.buffer.write(given)
    sys.stderr.buffer.write(given)
if what == "kill":
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
if what == "hang":
    while True:
        signal.pause()
if what == "write":
    open(sys.argv[3], "w").write("written")
sys.exit(number)
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A device, opened, with the program on it. unplug: Takes the device away."""

    runner: Runner
    program: str
    unplug: Callable[[], None]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    link = pytest.importorskip("edgekit.backends.tvm.link")
    folder = tmp_path_factory.mktemp("programs")
    (folder / "program.c").write_text(PROGRAM)
    found = {kind: folder / kind / "program" for kind in ("arm64", "local")}
    for path in found.values():
        path.parent.mkdir()
    link.compile_program(folder / "program.c", found["arm64"], link.LINUX)
    found["local"].write_text(SCRIPT)
    found["local"].chmod(0o755)
    return found


@pytest.fixture
def place(request: pytest.FixtureRequest, programs: dict[str, Path]) -> Iterator[Place]:
    """Return a device of the kind that the test is parametrised with."""
    name, unplug = {"local": "local", "qemu": "qemu:cortex-a76"}.get(request.param, ""), lambda: None
    if request.param == "adb":
        phone: Phone = request.getfixturevalue("phone")
        name, unplug = f"adb:{phone.serial}", phone.unplug
    if request.param == "ssh":
        board: Board = request.getfixturevalue("sshed")
        name, unplug = f"ssh:{board.name}", board.unplug
    with devices.find(name) as runner:
        program = runner.push(programs["local" if request.param == "local" else "arm64"])
        yield Place(runner=runner, program=program, unplug=unplug)


everywhere = pytest.mark.parametrize("place", KINDS, indirect=True)
afar = pytest.mark.parametrize("place", REMOTE, indirect=True)


@everywhere
def test_a_program_gets_its_input_and_gives_its_outputs_and_exit_code(place: Place) -> None:
    done = place.runner.run([place.program, "echo", "7"], b"a\0picture\n")
    assert (done.code, done.stdout, done.stderr) == (7, b"a\0picture\n", b"a\0picture\n")
    assert done.ending() == "ended with exit code 7"


@everywhere
def test_exit_codes_that_clients_use_for_themselves_are_the_programs_own(place: Place) -> None:
    codes = (0, 1, 126, 127, 255)
    assert tuple(place.runner.run([place.program, "exit", str(code)]).code for code in codes) == codes


@everywhere
def test_a_program_that_crashes_names_its_signal(place: Place) -> None:
    for number in (signal.SIGSEGV, signal.SIGILL, signal.SIGABRT):
        done = place.runner.run([place.program, "kill", str(int(number))])
        assert done.code == -number
        assert done.ending().startswith(f"was killed by {number.name} (")


@everywhere
def test_a_program_that_hangs_is_stopped_on_the_device_too(place: Place) -> None:
    with pytest.raises(IncompleteError, match=r"program on .* did not end within 2 s"):
        place.runner.run([place.program, "hang"], timeout_s=2)
    assert not left_running(place)


@everywhere
def test_a_program_is_stopped_on_the_device_too_when_the_user_stops_the_command(place: Place) -> None:
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            place.runner.run([place.program, "hang"], timeout_s=60)
    finally:
        timer.cancel()
    assert not left_running(place)


@everywhere
def test_files_go_there_and_back_unchanged(place: Place, tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    (tmp_path / "file with 'quotes'").write_bytes(content)
    there = place.runner.push(tmp_path / "file with 'quotes'")
    assert there == place.runner.path("file with 'quotes'")
    place.runner.pull("file with 'quotes'", tmp_path / "back" / "file")
    assert (tmp_path / "back" / "file").read_bytes() == content
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["file"]


@everywhere
def test_what_a_program_wrote_is_fetched(place: Place, tmp_path: Path) -> None:
    assert place.runner.run([place.program, "write", "0", place.runner.path("result")]).code == 0
    place.runner.pull("result", tmp_path / "result")
    assert (tmp_path / "result").read_text() == "written"


@everywhere
def test_a_file_that_was_not_written_is_missed_and_nothing_is_made_of_it(place: Place, tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match=r"denoised\.f32: the program.* did not write it"):
        place.runner.pull("denoised.f32", tmp_path / "out" / "denoised.f32")
    assert not list(tmp_path.glob("out/*"))


@afar
def test_a_device_that_goes_away_in_mid_run_is_named(place: Place) -> None:
    timer = threading.Timer(2, place.unplug)
    timer.start()
    try:
        with pytest.raises(
            IncompleteError, match=rf"{place.runner.label}: the device went away while it ran .*program"
        ):
            place.runner.run([place.program, "hang"], timeout_s=60)
    finally:
        timer.cancel()


@afar
def test_a_device_that_went_away_gives_no_half_a_file(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    place.runner.push(tmp_path / "file")
    place.unplug()
    with pytest.raises(IncompleteError, match=f"{place.runner.label}: the device went away"):
        place.runner.pull("file", tmp_path / "out" / "file")
    with pytest.raises(IncompleteError, match=f"{place.runner.label}: the device went away"):
        place.runner.push(tmp_path / "file")
    assert not list(tmp_path.glob("out/*"))


def test_a_file_of_which_a_part_arrived_is_not_kept(phone: Phone, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 17))
    with devices.find("adb") as runner:
        runner.push(tmp_path / "file")
        phone.cuts = 1000
        with pytest.raises(IncompleteError, match="the device went away while file was copied from it"):
            runner.pull("file", tmp_path / "out" / "file")
    assert not list(tmp_path.glob("out/*"))


def test_a_phone_that_takes_no_files_is_told_with_its_reason(phone: Phone, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with devices.find("adb") as runner:
        phone.full = True
        with pytest.raises(IncompleteError, match=rf"adb {phone.serial}: adb push failed: .*No space left on device"):
            runner.push(tmp_path / "file")
    phone.full = False
    (phone.root / "data/local/tmp").rmdir()
    (phone.root / "data/local/tmp").write_text("no folder", encoding="utf-8")
    with pytest.raises(InputError, match=rf"adb {phone.serial}: /data/local/tmp/edgekit-\w+ cannot be made there: "):
        devices.find("adb").__enter__()


def test_the_folder_on_a_phone_goes_when_the_runner_goes(phone: Phone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with devices.find("adb") as runner:
        runner.push(tmp_path / "file")
        assert phone.files
    assert not phone.files


def test_a_folder_goes_even_after_an_error(phone: Phone) -> None:
    with pytest.raises(ZeroDivisionError), devices.find("adb"):
        raise ZeroDivisionError
    assert not phone.files


def test_a_phone_tells_what_it_is(phone: Phone) -> None:
    with devices.find(f"adb:{phone.serial}") as runner:
        told = runner.facts()
    assert (told.model, told.soc, told.system, told.api_level) == ("edgekit Phone 1", "QEMU virt", "Android 14", 34)
    assert (told.machine, told.cpu) == ("aarch64", "1x Cortex-A55, 1x Cortex-A76")
    assert told.features == ("asimd", "asimdhp", "asimddp")
    assert told.cores == (
        Core(index=0, min_khz=300_000, max_khz=1_800_000, governor="schedutil"),
        Core(index=1, min_khz=300_000, max_khz=2_400_000, governor="schedutil"),
    )
    assert told.temperature_mc == 44_100, "the battery is no processor, and the hottest counts"
    assert not told.emulated


def test_androids_emulator_says_that_it_is_one(server: None, tmp_path: Path) -> None:
    with connected(tmp_path, properties={"ro.boot.qemu": "1"}), devices.find("adb") as runner:
        assert runner.facts().emulated


def test_a_board_and_this_machine_tell_what_they_are(sshed: Board) -> None:
    with devices.find("ssh:board") as runner:
        afar = runner.facts()
    with devices.find("local") as runner:
        here = runner.facts()
    assert here.cpu == afar.cpu == host.describe().cpu.model
    assert here.features == afar.features == host.describe().cpu.features
    assert len(here.cores) == len(afar.cores) == os.cpu_count()
    assert (here.machine, afar.machine) == (os.uname().machine, "aarch64")
    assert here.api_level is None


@pytest.mark.parametrize(
    ("text", "cores", "temperature_mc"),
    [
        ("core=0   \ncore=1   ", (Core(index=0, min_khz=None, max_khz=None, governor=""),) * 2, None),
        ("core=0 100 200 performance", (Core(index=0, min_khz=100, max_khz=200, governor="performance"),), None),
        ("core=0  200 ondemand", (Core(index=0, min_khz=None, max_khz=200, governor="ondemand"),), None),
        ("core=0 100 200 sched2", (Core(index=0, min_khz=100, max_khz=200, governor="sched2"),), None),
        ("zone=cpu-thermal 51540\nzone=gpu 60000", (), 51_540),
        ("zone=soc_thermal 48\nzone=battery 300", (), 48_000),
        ("zone=CPU-max -2147483\nzone=cpu0 0\nzone=cpu1 ", (), None),
        ("", (), None),
    ],
    ids=[
        "no frequencies",
        "one core",
        "no least frequency",
        "digit in governor",
        "thousandths",
        "degrees",
        "sensors that are off",
        "nothing",
    ],
)
def test_what_a_device_does_not_tell_is_left_empty(
    text: str, cores: tuple[Core, ...], temperature_mc: int | None
) -> None:
    told = facts.parse(f"machine=aarch64\n{text}\ncpuinfo\n")
    assert [(c.min_khz, c.max_khz, c.governor) for c in told.cores] == [
        (c.min_khz, c.max_khz, c.governor) for c in cores
    ]
    assert told.temperature_mc == temperature_mc
    assert told.machine == "aarch64"


def test_the_only_phone_needs_no_name(phone: Phone) -> None:
    with devices.find("adb") as runner:
        assert runner.label == f"adb {phone.serial}"


def test_no_phone_is_said(server: None) -> None:
    refused("adb", InputError, "no device is connected", "adb connect")


def test_several_phones_are_named(server: None, tmp_path: Path) -> None:
    with ExitStack() as stack:
        names = [stack.enter_context(connected(tmp_path / name)).serial for name in ("one", "two")]
        refused("adb", InputError, *names, "name one: adb:SERIAL")
        with devices.find(f"adb:{names[1]}") as runner:
            assert runner.label.endswith(names[1])


def test_an_unknown_phone_is_refused_with_the_known_ones(phone: Phone) -> None:
    refused("adb:emulator-1", InputError, "no device 'emulator-1'", phone.serial)


def test_a_phone_that_allows_nobody_in_is_said(server: None, tmp_path: Path) -> None:
    with connected(tmp_path, locked=True):
        # 'authorizing' at first, 'unauthorized' once the client has shown all of its keys.
        refused("adb", InputError, "authoriz", "allow USB debugging")


def test_a_board_that_takes_no_key_is_said(sshed: Board) -> None:
    (sshed.folder / "authorized_keys").write_text("")
    refused("ssh:board", InputError, "cannot log in", "Permission denied", "ssh-copy-id")


def test_a_board_whose_key_changed_is_refused(sshed: Board) -> None:
    known = sshed.folder / "known_hosts"
    known.write_text(f"[127.0.0.1]:{sshed.port} {(sshed.folder / 'key.pub').read_text()}")
    refused("ssh:board", InputError, "Host key verification failed", "check the host's key")


def _let_say(board: Board, line: str) -> None:
    shell = board.folder / "arm64-shell"
    shell.write_text(shell.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{line}\n", 1))


@pytest.mark.parametrize(("line", "said"), [("echo Welcome here", "Welcome here"), (r"printf 'f\374r\n'", "f\ufffdr")])
def test_a_board_whose_shell_says_something_of_its_own_is_refused(sshed: Board, line: str, said: str) -> None:
    _let_say(sshed, line)
    refused("ssh:board", InputError, f"its shell says '{said}' before", "~/.bashrc")


def test_a_board_may_have_a_banner_in_another_encoding(sshed: Board) -> None:
    _let_say(sshed, r"printf 'f\374r\n' >&2")
    with devices.find("ssh:board") as runner:
        assert runner.facts().machine == "aarch64"


def test_a_board_whose_shell_hangs_is_said(sshed: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    _let_say(sshed, "sleep 20")
    monkeypatch.setattr(ssh, "ANSWER_S", 3.0)
    refused("ssh:board", InputError, "no answer within 3 s", "ssh HOST true")


def test_a_server_of_adb_that_hangs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("ADB_SERVER_SOCKET", f"tcp:localhost:{silent.getsockname()[1]}")
        monkeypatch.setattr(runners_adb, "ANSWER_S", 1.0)
        refused("adb", ToolMissingError, "'adb devices' did not answer within 1 s", "adb kill-server")


def test_a_board_that_is_off_is_said(sshed: Board) -> None:
    sshed.unplug()
    refused("ssh:board", InputError, "Connection refused", "start its SSH server")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("usb:1", ("no such kind of device", "adb:SERIAL")),
        ("abd:1", ("did you mean 'adb'",)),
        ("local:1", ("--device local:1",)),
        ("ssh:", ("names no host",)),
        ("ssh:-oProxyCommand=true", ("names no host",)),
        ("qemu:max", ("'max' is no real core",)),
    ],
)
def test_a_name_that_names_no_device_is_refused(name: str, words: tuple[str, ...]) -> None:
    refused(name, InputError, *words)


@pytest.mark.parametrize(
    ("name", "package"),
    [("adb", "adb"), ("ssh:board", "openssh-client"), ("qemu:cortex-a76", "qemu-user-static")],
)
def test_a_missing_tool_is_named_with_what_to_install(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(name, ToolMissingError, f"apt-get install {package}")


def test_a_program_of_another_machine_is_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(b"no program")
    (tmp_path / "program").chmod(0o755)
    with devices.find("local") as runner, pytest.raises(UnsupportedError, match="cannot be run on local"):
        runner.run([runner.push(tmp_path / "program")])


def refused(name: str, kind: type[EdgekitError], *words: str) -> None:
    with pytest.raises(kind) as raised, devices.find(name):
        pass
    for word in words:
        assert word in str(raised.value)


def left_running(place: Place) -> list[str]:
    """Return the command lines of programs that hang, once there are none or time was enough to end."""
    deadline = time.monotonic() + 10
    while (left := running(Path(place.program).parent.name, "hang")) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def running(*words: str) -> list[str]:
    """Return the command lines here that hold all of the words."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(line)
    return found


def test_adb_is_asked_on_a_socket_of_the_tests_own(server: None) -> None:
    assert "List of devices" in adb("devices")
    assert Path(os.environ["ADB_SERVER_SOCKET"].removeprefix("localfilesystem:")).is_socket()


def test_a_board_has_its_port_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, made = socket.create_server, list[socket.socket]()
    monkeypatch.setattr(socket, "create_server", lambda *given: made.append(create(*given)) or made[-1])
    with board(tmp_path) as opened:
        assert made[0].getsockname()[1] == opened.port
