"""What is installed from the wheel is whole, and works without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgekit import __version__, recipe, target, zoo

ROOT = Path(__file__).parent.parent
FROM_CHECKOUT = ("edgekit", "recipes", "targets", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md")

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the tests do not lie in a checkout")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that was built from a copy of the checkout, whose caches are left behind."""
    pytest.importorskip("hatchling")
    source = tmp_path_factory.mktemp("checkout")
    for name in FROM_CHECKOUT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the wheel is installed in, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return folder


def python(installed: Path, code: str, cwd: Path) -> str:
    """Return what a program prints that imports the installed package, from a folder outside the checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "edgekit").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in inside
    assert {f"edgekit/recipes/{name}.yaml" for name in recipe.names()} <= inside
    assert {f"edgekit/targets/{name}.yaml" for name in target.names()} <= inside
    assert {f"edgekit/zoo/{name}.safetensors" for name in zoo.names()} <= inside


@pytest.mark.parametrize(
    "file",
    [
        "edgekit/recipes/quickstart.yaml",
        "edgekit/targets/android-arm64.yaml",
        "edgekit/zoo/nano.safetensors",
        "edgekit/zoo/nano.json",
        "edgekit/pipeline/templates/README.md.j2",
        "edgekit/backends/tvm/c/library.c.j2",
        "edgekit/backends/tvm/c/host.c",
        "edgekit/backends/coreml/Denoiser.swift.j2",
        f"edgekit-{__version__}.dist-info/licenses/LICENSE",
        f"edgekit-{__version__}.dist-info/licenses/THIRD_PARTY_NOTICES.md",
    ],
)
def test_the_wheel_holds_what_is_no_python(wheel, file):
    assert zipfile.ZipFile(wheel).getinfo(file).file_size > 0


def test_the_wheel_puts_nothing_beside_the_package(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"edgekit", f"edgekit-{__version__}.dist-info"}


def test_the_wheel_has_the_command_and_the_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    entry = archive.read(f"edgekit-{__version__}.dist-info/entry_points.txt").decode()
    assert entry == "[console_scripts]\nedgekit = edgekit.cli:main\n"
    metadata = archive.read(f"edgekit-{__version__}.dist-info/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nLicense-File: LICENSE\n" in metadata


def test_the_installed_package_finds_its_recipes_targets_and_weights(installed, tmp_path):
    code = (
        "import edgekit; from edgekit import recipe, target, zoo; "
        "print(edgekit.__file__, recipe.load('quickstart').name, target.load('onnx').name, zoo.weights('nano').name)"
    )
    assert python(installed, code, tmp_path) == f"{installed}/edgekit/__init__.py quickstart onnx nano.safetensors\n"


def test_the_installed_command_lists_what_is_shipped(installed, tmp_path):
    code = "import sys; sys.argv = ['edgekit', 'targets']; from edgekit.cli import main; main()"
    assert "android-arm64" in python(installed, code, tmp_path)
    assert (installed / "bin/edgekit").is_file()


def test_each_layer_imports_only_what_is_below_it():
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 1 kept, 0 broken." in done.stdout
