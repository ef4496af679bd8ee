"""The classes for Android on a Java virtual machine: the native methods really run, Android's own classes do not."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")
from test_library import HOST, Bundle, _bundle, _noisy, _readme

driver = sys.modules["edgekit.backends.tvm.driver"]
library_files = sys.modules["edgekit.backends.tvm.library"]
pytestmark = [pytest.mark.backend, pytest.mark.slow]

STAND_INS = Path(__file__).parent / "android"
EXAMPLE = Path(__file__).parent.parent / "examples/android/app/src/main/kotlin/edgekit/example/DenoiseActivity.kt"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """Return the library for this machine, and the folder of the classes that the same generator writes."""
    folder = tmp_path_factory.mktemp("jni")
    texts: dict[str, str] = {}
    deliver = library_files.deliver

    def keep(*arguments: object) -> dict[str, str]:
        sources = next(a for a in arguments if isinstance(a, driver.Sources))
        texts.update({name: driver.render(f"{name}.j2", sources) for name in ("ByteDenoiser.kt", "Denoiser.kt")})
        return deliver(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(library_files, "deliver", keep)
        built = _bundle(folder, HOST)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return built, folder


def _compile(folder: Path, name: str, *kotlin: Path) -> Path:
    """Return a jar of Kotlin files, compiled without a warning against the stand-ins for Android's classes."""
    for tool in ("kotlinc", "javac", "java"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    stand_ins = sorted(map(str, STAND_INS.rglob("*.java")))
    subprocess.run(["javac", "-d", folder / "out", *stand_ins], check=True)
    command = ["kotlinc", *kotlin, "-cp", folder / "out", "-include-runtime", "-d", folder / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\.kt:\d+:\d+: warning", done.stderr), done.stderr
    return folder / name


@pytest.fixture(scope="module")
def classes(bundle: tuple[Bundle, Path]) -> Path:
    """Return the folder with the compiled classes of the bundle, of Android's stand-ins, and of the check."""
    _, folder = bundle
    _compile(folder, "check.jar", folder / "ByteDenoiser.kt", folder / "Denoiser.kt", STAND_INS / "Check.kt")
    return folder


def _run(bundle: Bundle, classes: Path, *arguments: object) -> str:
    options = ["-Xcheck:jni", f"-Djava.library.path={bundle.library.parent}"]
    path = f"{classes / 'check.jar'}:{classes / 'out'}"
    command = ["java", *options, "-cp", path, "CheckKt", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_picture_through_byte_buffers_and_bitmaps_is_that_of_the_python_wrapper(
    bundle: tuple[Bundle, Path], classes: Path
) -> None:
    built, folder = bundle
    height, width, gap = 61, 83, 20
    noisy = _noisy(height, width, 4)
    rows = np.full((height, 4 * width + gap), 9, np.uint8)
    rows[:, : 4 * width] = noisy.reshape(height, -1)
    rows.tofile(folder / "noisy")
    files = [folder / name for name in ("noisy", "beside", "in_place", "bitmap")]
    version = _run(built, classes, *files, width, height)
    python = built.python()
    assert version.strip() == python.version()
    with python.Denoiser() as denoiser:
        wanted = denoiser.denoise(noisy)
    for name, left, around in (("beside", gap, 0), ("in_place", gap, 9), ("bitmap", 12, 0)):
        got = np.fromfile(folder / name, np.uint8).reshape(height, 4 * width + left)
        assert np.array_equal(got[:, : 4 * width].reshape(wanted.shape), wanted), name
        assert (got[:, 4 * width :] == around).all(), name


def test_wrong_calls_throw_and_say_what_is_wrong(bundle: tuple[Bundle, Path], classes: Path) -> None:
    less = "IllegalArgumentException: a buffer has less bytes from its position to its limit than the picture has"
    size = "IllegalArgumentException: a width or height is 0, or larger than it can be"
    stride = "IllegalArgumentException: a stride is less than a row, or the picture ends beyond the address space"
    assert _run(bundle[0], classes).splitlines() == [
        "IllegalArgumentException: threads is 0, not 1 to 64",
        "IllegalArgumentException: threads is 65, not 1 to 64",
        "IllegalStateException: the denoiser is closed",
        "IllegalArgumentException: a buffer is not direct; make it with ByteBuffer.allocateDirect",
        less,
        less,
        less,
        less,
        "IllegalArgumentException: denoised is read-only",
        stride,
        less,
        stride,
        size,
        size,
        stride,
        "IllegalArgumentException: the format is none of gray, RGB and RGBA",
        "IllegalArgumentException: sigma255 is negative, infinite or not a number",
        "kotlin.Unit",
    ]


def test_the_example_and_the_lines_of_the_readme_compile(bundle: tuple[Bundle, Path], tmp_path: Path) -> None:
    built, folder = bundle
    kotlin = {"kotlin": "kotlin/edgekit_tiny/Denoiser.kt", "cmake": "cmake/edgekit_tiny.cmake"}
    android = dataclasses.replace(built, built=dataclasses.replace(built.built, files=built.built.files | kotlin))
    snippets = _readme(android, tmp_path)["kotlin"]
    assert len(snippets) == 2
    for number, snippet in enumerate(snippets):
        (tmp_path / f"Snippet{number}.kt").write_text(snippet)
    example = EXAMPLE.read_text()
    assert "import edgekit_base_color.Denoiser" in example
    (tmp_path / EXAMPLE.name).write_text(example.replace("edgekit_base_color", "edgekit_tiny"))
    files = [folder / "ByteDenoiser.kt", folder / "Denoiser.kt", *sorted(tmp_path.glob("*.kt"))]
    assert _compile(tmp_path, "example.jar", *files).is_file()
