import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny

from edgekit import bundle, target
from edgekit.errors import InputError, IntegrityError
from edgekit.files import sha256
from edgekit.pipeline import denoise, pages, verify


@pytest.fixture
def kept(finished: Path, cwd: Path) -> Path:
    """Return a copy of a bundle that keeps its limits."""
    return Path(shutil.copytree(finished / "bundles/kept", cwd / "kept"))


PROTOCOL = ("noise", "pictures", "files", "seeds", "sigma255", "golden_outputs")
MODEL = ("name", "channels", "stride", "halo_px", "global_ops")


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Change the JSON object in a file."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_a_bundle_is_what_its_manifest_says(kept):
    manifest = bundle.read(kept)
    assert (manifest.target.name, manifest.model.name, manifest.model.channels) == ("kept", "nano", 1)
    found = {p.relative_to(kept).as_posix() for p in kept.rglob("*") if p.is_file()}
    assert manifest.files.keys() == found - {"manifest.json"}
    assert {"README.md", "MODEL_CARD.md", "NOTICES.md", "reference/student.fp32.onnx"} <= found


def test_the_chain_leads_from_the_teacher_to_the_artifact_by_hashes(kept):
    chain = bundle.read(kept).chain
    assert [link.kind for link in chain] == ["teacher", "student", "fused", "onnx", "simplified", "int8", "artifact"]
    for before, link in pairwise(chain[1:]):
        assert link.made_from == before.sha256
    assert chain[0].made_from is None
    assert chain[4].sha256 == sha256(kept / "reference/student.fp32.onnx")
    built = bundle.read(kept).built
    assert chain[-1].sha256 == bundle.combined_sha256(bundle.artifact_files(kept, built.files))


@pytest.mark.parametrize("kind", ["artifact", "README.md", "reference/student.fp32.onnx", "golden"])
@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "changed"),
        (Path.unlink, "is missing"),
    ],
    ids=["cut", "one byte", "missing"],
)
def test_a_file_that_is_not_what_it_was_is_refused_by_name(kept, kind, damage, state):
    name = {
        "artifact": bundle.read(kept).built.files["artifact"],
        "golden": f"golden/{bundle.read(kept).protocol.files[0]}.noisy.f32",
    }.get(kind, kind)
    damage(kept / name)
    with pytest.raises(IntegrityError) as refused:
        bundle.read(kept)
    assert f"{name}: {state}" in str(refused.value)


@pytest.mark.parametrize("name", ["more.txt", "golden/more.png", ".hidden"])
def test_a_file_that_was_added_is_refused_by_name(kept, name):
    (kept / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match=rf"{name}: is not in the manifest; restore the bundle, or compile"):
        bundle.read(kept)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", "\0", '{"schema_version": 1, "kind": "edgekit-bundle"}'],
    ids=["empty", "cut", "list", "number", "null", "no keys", "binary", "nothing in it"],
)
def test_a_damaged_manifest_is_refused(kept, text):
    (kept / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"manifest\.json: "):
        bundle.read(kept)


def test_a_manifest_that_is_cut_anywhere_is_refused(kept):
    whole = (kept / "manifest.json").read_bytes()
    for length in range(0, len(whole) - 2, 97):
        (kept / "manifest.json").write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="damaged manifest"):
            bundle.read(kept)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda m: m.pop("protocol"), "protocol"),
        (lambda m: m.update(files=["README.md"]), "files"),
        (lambda m: m["files"].update({"README.md": 3}), "files.README.md"),
        (lambda m: m["budgets"].update(int8_drop_db="much"), "budgets.int8_drop_db"),
        (lambda m: m["chain"][0].pop("kind"), "chain.0.kind"),
        (lambda m: m.update(surprise=1), "surprise"),
        *((lambda m, key=key: m["protocol"].pop(key), f"protocol.{key}") for key in PROTOCOL),
        (lambda m: m["protocol"].update(files=[]), "protocol.files"),
        (lambda m: m["protocol"].update(files=["none"]), "protocol.files"),
        (lambda m: m["protocol"].update(seeds=["a"]), "protocol.seeds.0"),
        (lambda m: m["protocol"].update(sigma255=-1), "protocol.sigma255"),
        *((lambda m, key=key: m["model"].pop(key), f"model.{key}") for key in MODEL),
        (lambda m: m["model"].update(stride="eight"), "model.stride"),
        (lambda m: m["model"].update(stride=7), "model.stride"),
        (lambda m: m["model"].update(halo_px=None), "model"),
        (lambda m: m["built"]["files"].pop("artifact"), "built.files.artifact"),
        (lambda m: m["built"]["files"].update(artifact="../another.onnx"), "built.files.artifact"),
        (lambda m: m["built"]["files"].update(fp32="reference/student"), "built.files.fp32"),
    ],
    ids=[
        *("missing", "no table", "no hash", "no number", "chain", "unknown", *PROTOCOL, "no files", "no such file"),
        *("no seed", "no noise", *MODEL, "stride in words", "no such stride", "no halo"),
        *("no artifact", "an artifact outside", "part of a name"),
    ],
)
def test_a_manifest_that_does_not_follow_its_schema_is_refused_by_key(kept, change, key):
    rewrite(kept / "manifest.json", change)
    with pytest.raises(IntegrityError, match=rf"manifest\.json: '{key}': "):
        bundle.read(kept)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda m: m["target"].update(engine="abacus"), "target.engine"),
        (lambda m: m["budgets"].update(int8_drop_db=-1.0), "budgets.int8_drop_db"),
        (lambda m: m["built"].pop("files"), "built.files"),
    ],
    ids=["target", "budgets", "built"],
)
def test_verification_refuses_a_manifest_whose_parts_do_not_follow_their_schema(kept, change, key):
    rewrite(kept / "manifest.json", change)
    with pytest.raises(IntegrityError, match=rf"manifest\.json: '{key}': "):
        verify.verify(kept)


def test_a_manifest_of_another_version_is_refused(kept):
    rewrite(kept / "manifest.json", lambda m: m.update(schema_version=2))
    with pytest.raises(InputError, match="written by another version of edgekit; compile it again"):
        bundle.read(kept)


def test_a_picture_larger_than_the_tile_is_refused_with_the_reason_where_no_halo_is_known(kept):
    def of_one_piece(manifest: dict) -> None:
        manifest["model"].update(halo_px=None, halo_unknown="node 'x' (Softmax): how far it looks is not known")
        manifest["target"]["input"].update(height=48, width=64)

    rewrite(kept / "manifest.json", of_one_piece)
    opened = denoise.open_model(str(kept))
    assert opened(np.zeros((1, 1, 40, 64), np.float32), 0.1).shape == (1, 1, 40, 64)
    for height, width in ((56, 64), (48, 65)):
        said = rf"is {width}x{height}, larger than the tile 64x48, .* no halo is known: node 'x' \(Softmax\).*; compile"
        with pytest.raises(InputError, match=said):
            opened(np.zeros((1, 1, height, width), np.float32), 0.1)


def page(folder: Path, name: str, *, halo_px: int = 35) -> list[str]:
    """Return the lines of the README of a bundle for a shipped target, which holds nothing else."""
    roles = ("artifact", "swift", "header", "program", "static", *(("kotlin", "cmake") if "android" in name else ()))
    built = bundle.Built(
        files={role: f"lib/{role}.h" for role in roles},
        precision="int8",
        tools={},
        facts={"arena_bytes": 0, "halo_px": 0},
    )
    pages.write(folder, tiny.manifest(target.load(name), built, channels=3, halo_px=halo_px), None)
    return (folder / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("name", "halo_px", "said"),
    [
        ("onnx", 35, "tiles have to overlap by 80 px, of which each gives up 40, and to begin at multiples of 8"),
        ("ios-arm64", 63, "tiles have to overlap by 128 px, of which each gives up 64, and to begin at multiples of 8"),
        ("ios-arm64", 187, "compile with a larger one (`--tile`, more than 384)"),
        ("linux-arm64", 187, "px to each side |"),
    ],
)
def test_the_readme_says_how_tiles_overlap_in_whole_strides(tmp_path, name, halo_px, said):
    """A tile that begins elsewhere is another picture to the network's strides."""
    (line,) = (line for line in page(tmp_path, name, halo_px=halo_px) if "receptive field" in line)
    assert line.startswith(f"| receptive field | {halo_px} px to each side")
    assert said in line


@pytest.mark.parametrize(("name", "ending"), [("android-arm64", ""), ("linux-arm64", " -lpthread")])
def test_the_readme_links_threads_where_they_are_a_library_of_their_own(tmp_path, name, ending):
    """Android's are in its libc, and its NDK ends with an error where it is asked for more."""
    (line,) = (line for line in page(tmp_path, name) if line.endswith("-o example_static"))
    assert line == f"cc -Iinclude example.c lib/static.h{ending} -o example_static"


def test_a_folder_without_a_manifest_is_no_bundle(kept):
    (kept / "manifest.json").unlink()
    with pytest.raises(InputError, match="is not a bundle"):
        bundle.read(kept)
    with pytest.raises(InputError, match="neither a bundle nor a run with bundles"):
        verify.bundles_of(kept)


def test_verification_does_not_write_into_the_bundle(kept):
    before = bundle.hashes(kept)
    report = verify.verify(kept, settings=verify.Settings(seconds=0.1))
    assert verify.write(report, bundle.report_path(kept)) == kept.with_name("kept.report.json")
    assert bundle.hashes(kept) == before
    bundle.read(kept)


def test_equal_files_have_equal_hashes_under_equal_names_only(cwd):
    for folder, name in (("a", "x"), ("b", "x"), ("c", "y")):
        (cwd / folder).mkdir()
        (cwd / folder / name).write_bytes(b"same")
    assert sha256(cwd / "a") == sha256(cwd / "b") != sha256(cwd / "c")
    assert bundle.combined_sha256([cwd / "a/x"]) == sha256(cwd / "a/x")
    assert bundle.combined_sha256([cwd / "a/x", cwd / "b/x"]) != bundle.combined_sha256([cwd / "a/x"])
