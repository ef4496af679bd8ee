"""The Android bundle's CMake snippet, run by CMake: a C program finds header and library by the README's two lines.

There is no NDK here: zig compiles for glibc in its place, and glibc's loader loads what bionic's would.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

pytest.importorskip("tvm")
from test_library import (
    ANDROID,
    HOST,
    Bundle,
    _bundle,
    _cross_compiler,
    _read,
    _readme,
    _shell,
    _write_pictures,
)

qemu = sys.modules["edgekit.runners.qemu"]
pytestmark = [pytest.mark.backend]

GLIBC = Path("/usr/aarch64-linux-gnu")
PROJECT = """\
cmake_minimum_required(VERSION 3.22)
project(app C)
add_executable(app example.c)
add_library(native SHARED native.c)
{snippet}
{again}
"""
NATIVE = """\
#include "edgekit_tiny.h"

const char *version(void)
{
    return edgekit_tiny_version();
}
"""


@pytest.fixture(scope="module")
def android(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _bundle(tmp_path_factory.mktemp("android"), dataclasses.replace(ANDROID, input=HOST.input))


@pytest.fixture
def project(android: Bundle, tmp_path: Path) -> Path:
    """Return a folder with a CMake project of a program and a library, and the bundle in a folder of its own."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed: apt-get install cmake")
    shutil.copytree(android.folder, tmp_path / "an app" / "bundle")
    folder = tmp_path / "an app"
    blocks = _readme(android, tmp_path)
    snippet = blocks["cmake"][0].replace("PATH/TO/THIS/BUNDLE", "bundle")
    # A second library of the app includes the snippet as well.
    text = PROJECT.format(snippet=snippet, again=snippet.replace("(app ", "(native "))
    (folder / "CMakeLists.txt").write_text(text)
    (folder / "example.c").write_text(blocks["c"][0])
    (folder / "native.c").write_text(NATIVE)
    _cross_compiler(tmp_path, "aarch64-linux-gnu")
    return folder


def _configured(project: Path, abi: str) -> subprocess.CompletedProcess[str]:
    """Let CMake configure the project as the NDK's toolchain file would for an ABI."""
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": project.parent / "tools" / "cc",
        "ANDROID_ABI": abi,
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    command = ["cmake", "-S", project, "-B", project / "build", "-Werror=dev", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _needed(file: Path) -> list[str]:
    with file.open("rb") as stream:
        tags = ELFFile(stream).get_section_by_name(".dynamic").iter_tags()
        return [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]


@pytest.mark.slow
@pytest.mark.emulated
def test_a_program_that_cmake_links_by_the_snippet_denoises_a_picture(
    android: Bundle, project: Path, tmp_path: Path
) -> None:
    done = _configured(project, "arm64-v8a")
    assert done.returncode == 0, done.stderr
    built = subprocess.run(["cmake", "--build", project / "build"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for name in ("app", "libnative.so"):
        # By its name: a path of this machine would be looked for on the phone.
        assert _needed(project / "build" / name)[0] == android.library.name
    if not (GLIBC / "lib/ld-linux-aarch64.so.1").is_file():
        pytest.skip("no glibc for arm64 (Debian's libc6-arm64-cross) is installed")
    gray, _ = _write_pictures(project)
    place = project / "bundle" / android.library.parent.relative_to(android.folder)
    # What bionic calls libc.so, glibc calls libc.so.6.
    (place / "libc.so").symlink_to(GLIBC / "lib/libc.so.6")
    core = qemu.find("cortex-a76")
    _shell(f"{core.program} -cpu cortex-a76 -L {GLIBC} -E LD_LIBRARY_PATH='{place}' build/app", project)
    wanted = _by_host(tmp_path, gray)
    assert np.abs(_read(project / "denoised.pgm").astype(int) - wanted).max() <= 1
    assert np.abs(wanted.astype(int) - gray).max() > 5


def _by_host(folder: Path, pixels: np.ndarray) -> np.ndarray:
    """Return what the same network, compiled for this machine, makes of a picture."""
    (folder / "host").mkdir()
    with _bundle(folder / "host", HOST).python().Denoiser() as denoiser:
        return denoiser.denoise(pixels, sigma255=25)


@pytest.mark.parametrize("abi", ["x86_64", "armeabi-v7a", ""])
def test_another_abi_is_refused_by_name(project: Path, abi: str) -> None:
    done = _configured(project, abi)
    assert done.returncode != 0
    assert re.search(rf"edgekit_tiny\s+is for arm64-v8a, not\s+'{abi}'", done.stderr)
