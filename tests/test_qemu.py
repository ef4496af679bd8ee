"""QEMU as a runner: real arm64 programs, made by zig without a libc, on named cores."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from edgekit.errors import IncompleteError, InputError, ToolMissingError
from edgekit.runners import qemu

pytestmark = pytest.mark.emulated

# argv[1]: "echo" copies the input to both outputs and exits with 7, "dot" runs a dot product, "loop" never ends.
PROGRAM = r"""
static long call(long number, long a, long b, long c)
{
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
}
static char input[1 << 16];
__attribute__((used)) static void run(long *stack)
{
    const char *what = (const char *)stack[2];
    if (what[0] == 'l')
        for (;;)
            __asm__ volatile("");
    if (what[0] == 'd')
        __asm__ volatile(".arch armv8.2-a+dotprod\n sdot v0.4s, v0.16b, v0.16b" ::: "v0");
    long size = what[0] == 'e' ? call(63, 0, (long)input, sizeof input) : 0;
    call(64, 1, (long)input, size);
    call(64, 2, (long)input, size);
    call(93, what[0] == 'e' ? 7 : 0, 0, 0);
}
__asm__(".globl _start\n_start: mov x0, sp\n bl run\n");
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    link = pytest.importorskip("edgekit.backends.tvm.link")
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.c").write_text(PROGRAM)
    link.link_program([link.compile_c(folder / "program.c", link.LINUX)], folder / "program")
    return str(folder / "program")


@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a72", "cortex-a76"])
def test_a_program_gets_its_input_and_gives_its_output_and_exit_code(program: str, cpu: str) -> None:
    done = qemu.find(cpu).run([program, "echo"], b"a\0picture")
    assert (done.code, done.stdout, done.stderr) == (7, b"a\0picture", b"a\0picture")


@pytest.mark.parametrize(("cpu", "code"), [("cortex-a53", -signal.SIGILL), ("cortex-a76", 0)])
def test_an_instruction_that_the_core_lacks_kills_the_program(program: str, cpu: str, code: int) -> None:
    assert qemu.find(cpu).run([program, "dot"]).code == code


def test_a_program_that_hangs_is_stopped(program: str) -> None:
    with pytest.raises(IncompleteError, match=r"on qemu cortex-a53 did not end within 0\.5 s"):
        qemu.find("cortex-a53").run([program, "loop"], timeout_s=0.5)


def test_the_label_names_the_core() -> None:
    assert qemu.find("cortex-a76").label == "qemu cortex-a76"


def test_qemus_own_default_core_is_refused() -> None:
    with pytest.raises(InputError, match="'max' is no real core"):
        qemu.find("max")


def test_an_unknown_core_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"does not know the core 'cortex-a7600'.*cortex-a76"):
        qemu.find("cortex-a7600")


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"\d+\.\d+[\d.]*", qemu.version())


def test_without_qemu_the_package_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissingError, match="apt-get install qemu-user-static"):
        qemu.find("cortex-a76")
