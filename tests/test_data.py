import hashlib
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.data import photos, sets
from edgekit.data.photos import list_pictures, read_picture
from edgekit.data.sets import Picture, PictureSet, Shares
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError

SPLITS = ("train", "calibration", "evaluation")
LEAVES_GOLDEN = {
    (1, 96, 128): "555ceebf7790281500b93c324154cdf7feeac9528c1eb13013e5409da6a540a6",
    (3, 64, 64): "8fe21668bd5d2d2f89bfe711e2a8597f53010aabf79bf377f49171749d7f3ba9",
}
EVALUATION_GOLDEN = {
    1: "2995d2e668b89ba95a6d3f6f124e3f75dbcffef432182f272bc2a9cb928e771e",
    3: "f6ace1d79036cc06a680dc193f751ac865a5811aa2f15889eaaa36cef61e89f6",
}
LEAVES_DIGEST = (
    "import hashlib; from edgekit.data.synthetic import dead_leaves;"
    "print(hashlib.sha256(dead_leaves(7, 96, 128, 1).tobytes()).hexdigest())"
)
BARE_MACHINE = """
import socket, sys
for name in ("pydantic", "ruamel", "ruamel.yaml", "sklearn", "onnx", "onnxruntime", "pooch", "rich", "click"):
    sys.modules[name] = None
socket.socket = None
from edgekit.data import noise, photos, sets, synthetic
from edgekit.measure import quality
for split in ("train", "calibration", "evaluation"):
    print(*(picture.name for picture in sets.embedded(split, leaves=1)))
"""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def read_gray(path: Path) -> photos.Pixels:
    """Return the gray picture in a file, (h, w)."""
    return photos.read_picture(path, 1)[:, :, 0]


def write_png16(path: Path, *, colour: bool) -> None:
    """Write a 16-bit PNG by hand: Pillow writes none in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + b"\x12\x34" * (4 * (3 if colour else 1))
    header = struct.pack(">IIBBBBB", 4, 5, 16, 2 if colour else 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 5)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".tiff"])
def test_a_gray_file_keeps_its_values(tmp_path, rng, ending):
    pixels = rng.integers(0, 256, (9, 14), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(read_gray(tmp_path / f"a{ending}"), pixels)
    np.testing.assert_array_equal(photos.read_picture(tmp_path / f"a{ending}", 3), np.stack([pixels] * 3, 2))


@pytest.mark.parametrize("ending", [".jpg", ".webp"])
def test_a_lossy_file_comes_near_its_values(tmp_path, ending):
    pixels = np.tile(np.arange(64, dtype=np.uint8) * 3, (48, 1))
    Image.fromarray(pixels).save(tmp_path / f"a{ending}", quality=95)
    assert np.abs(read_gray(tmp_path / f"a{ending}").astype(int) - pixels).max() < 8


def test_colour_becomes_gray_by_the_stated_luma(tmp_path, rng):
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    red, green, blue = pixels.astype(np.int64).transpose(2, 0, 1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    np.testing.assert_array_equal(read_gray(tmp_path / "a.png"), luma)
    np.testing.assert_array_equal(photos.read_picture(tmp_path / "a.png", 3), pixels)


def test_alpha_is_dropped_and_the_colours_stay(tmp_path, rng):
    pixels = rng.integers(0, 256, (6, 7, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(photos.read_picture(tmp_path / "a.png", 3), pixels[:, :, :3])


def test_a_transparent_palette_keeps_its_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), mode="P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert photos.read_picture(tmp_path / "a.png", 3)[0].tolist() == [[10, 20, 30], [200, 100, 50]]


def test_a_picture_taken_sideways_stands_upright(tmp_path):
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_gray(tmp_path / "a.png"), np.rot90(stored, -1))


def test_sixteen_bits_are_refused_and_not_cut(tmp_path):
    write_png16(tmp_path / "gray.png", colour=False)
    write_png16(tmp_path / "colour.png", colour=True)
    Image.fromarray(np.zeros((3, 4), np.float32)).save(tmp_path / "float.tif")
    for name, mode in (("gray.png", "I;16"), ("colour.png", "RGB"), ("float.tif", "F")):
        with pytest.raises(InputError, match=rf"{name}.*mode {mode}.*convert it to 8 bit"):
            read_gray(tmp_path / name)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_of_separate_planes_says_its_bits_in_a_tag_alone(tmp_path, bits):
    """Pillow reads the bytes of its 16-bit values as pixels."""
    planes = np.arange(3 * 4 * 5, dtype=f"<u{bits // 8}").reshape(3, 4, 5)
    short, long, entries = 3, 4, []
    offset = 8 + 2 + 12 * 10 + 4
    places = struct.pack("<3I", *(offset + 18 + i * planes[0].nbytes for i in range(3)))
    for tag, kind, values in (
        (256, short, (5,)),
        (257, short, (4,)),
        (258, short, offset),
        (259, short, (1,)),
        (262, short, (2,)),
        (273, long, offset + 6),
        (277, short, (3,)),
        (278, short, (4,)),
        (279, long, offset + 18 + planes.nbytes),
        (284, short, (2,)),
    ):
        count, value = (3, values) if isinstance(values, int) else (1, values[0])
        entries.append(struct.pack("<HHII", tag, kind, count, value))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    sizes = struct.pack("<3I", *[planes[0].nbytes] * 3)
    file = tmp_path / "planes.tif"
    file.write_bytes(head + struct.pack("<3H", *[bits] * 3) + places + planes.tobytes() + sizes)
    if bits == 8:
        np.testing.assert_array_equal(read_picture(file, 3).transpose(2, 0, 1), planes)
    else:
        with pytest.raises(InputError, match=r"planes\.tif.*mode RGB.*convert it to 8 bit"):
            read_picture(file, 3)


def test_a_ppm_of_more_than_eight_bits_is_refused_whatever_it_is_called(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"P6 5 4 65535\n" + bytes(5 * 4 * 3 * 2))
    with pytest.raises(InputError, match=r"a\.png.*mode RGB.*convert it to 8 bit"):
        read_gray(file)
    file.write_bytes(b"P6 5 4 255\n" + bytes(range(5 * 4 * 3)))
    assert read_picture(file, 3).ravel().tolist() == list(range(5 * 4 * 3))


def test_a_link_that_leads_nowhere_is_told_and_not_left_out(tmp_path, rng):
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"b\.png: a link that leads nowhere; mount what it leads to, or remove it"):
        list_pictures(tmp_path)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_a_file_cut_short_is_named_with_the_reason(tmp_path, rng, ending):
    whole = tmp_path / f"whole{ending}"
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(whole)
    (tmp_path / f"cut{ending}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"cut\{ending}: not a readable picture: \S"):
        read_gray(tmp_path / f"cut{ending}")


def test_every_single_byte_of_damage_is_read_or_explained(tmp_path, rng):
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    explained = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "a.png").write_bytes(damaged)
        try:
            read_gray(tmp_path / "a.png")
        except InputError:
            explained += 1
    assert explained > len(whole) // 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such picture"), (b"", "not a readable picture"), (b"hello", "not a readable picture")],
    ids=["missing", "empty", "text"],
)
def test_what_is_no_picture_is_explained(tmp_path, content, message):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_gray(path)


def test_a_folder_instead_of_a_picture_is_explained(tmp_path):
    with pytest.raises(InputError, match="not a readable picture"):
        read_gray(tmp_path)


def test_pictures_are_listed_by_name_and_nothing_else_is(tmp_path):
    for name in ("b.PNG", "a.jpeg", "C.webp", "notes.txt", "._a.jpeg"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    assert [path.name for path in photos.list_pictures(tmp_path)] == ["C.webp", "a.jpeg", "b.PNG"]


def test_a_folder_without_pictures_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"holds no pictures.*\.png"):
        photos.list_pictures(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        photos.list_pictures(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder"):
        photos.list_pictures(tmp_path / "file")


@pytest.mark.skipif(sys.platform != "linux", reason="a file system that takes any bytes for a name")
def test_a_name_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(InputError, match=r"the name 'caf\\udce9\.png' is not UTF-8; rename the file"):
        photos.list_pictures(tmp_path)


@pytest.mark.parametrize(("channels", "height", "width"), LEAVES_GOLDEN, ids=["gray", "colour"])
def test_dead_leaves_have_the_recorded_bits(channels, height, width):
    made = dead_leaves(7, height, width, channels)
    assert made.shape == (channels, height, width)
    assert hashlib.sha256(made.tobytes()).hexdigest() == LEAVES_GOLDEN[channels, height, width]


def test_dead_leaves_have_the_same_bits_on_a_plainer_processor():
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    if not found:
        pytest.skip("NumPy uses no vector extensions on this processor")
    plain = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(found)}
    done = subprocess.run([sys.executable, "-c", LEAVES_DIGEST], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == LEAVES_GOLDEN[1, 96, 128]


def test_seeds_give_different_pictures_with_light_shade_and_edges():
    made = [dead_leaves(seed, 64, 64) for seed in range(20)]
    assert len({picture.tobytes() for picture in made}) == 20
    assert min(picture.std() for picture in made) > 15
    assert min(np.unique(picture).size for picture in made) > 60


@pytest.mark.parametrize(("seed", "height", "width"), [(-1, 64, 64), (0, 7, 64), (0, 64, 5000)])
def test_impossible_dead_leaves_are_refused(seed, height, width):
    with pytest.raises(InputError, match=f"{height}x{width} pixels from seed {seed}"):
        dead_leaves(seed, height, width)


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "colour"])
def test_the_embedded_splits_share_no_picture(channels):
    made = [sets.embedded(split, channels=channels, leaves=2) for split in SPLITS]
    sets.check_disjoint(*made)
    hashes = [picture.sha256 for one in made for picture in one]
    assert len(hashes) == len(set(hashes))
    sources = [{picture.name.split("@")[0] for picture in one} for one in made]
    assert len(set.union(*sources)) == sum(len(names) for names in sources)
    assert all(picture.pixels.shape[0] == channels for one in made for picture in one)


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "colour"])
def test_the_embedded_evaluation_set_is_the_recorded_one(channels):
    assert sets.digest(sets.embedded("evaluation", channels=channels)) == EVALUATION_GOLDEN[channels]


def test_embedded_calibration_pictures_have_one_size():
    made = sets.embedded("calibration")
    assert len(made) == sets.CALIBRATION_PICTURES
    assert {picture.pixels.shape for picture in made} == {(1, 256, 256)}


def test_a_dead_leaves_picture_is_made_once_a_process(monkeypatch):
    first = sets.embedded("train", leaves=3)
    monkeypatch.delattr(sets, "dead_leaves")
    assert sets.embedded("train", leaves=3).pictures[-3:] == first.pictures[-3:]


def test_embedded_sets_need_no_network_and_no_package_that_a_bare_machine_lacks():
    done = subprocess.run([sys.executable, "-c", BARE_MACHINE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    train, calibration, evaluation = done.stdout.splitlines()
    photographs = ("clock_motion", "grass", "gravel", "page", "retina", "rocket")
    assert train.split() == [*(f"skimage/{name}" for name in photographs), "dead-leaves/0"]
    assert len(calibration.split()) == sets.CALIBRATION_PICTURES
    assert evaluation.split() == [picture.name for picture in sets.embedded("evaluation")]


def test_the_training_set_names_the_photographs_of_scikit_learn_where_they_are_installed():
    pytest.importorskip("sklearn")
    assert {"sklearn/china", "sklearn/flower"} <= {picture.name for picture in sets.embedded("train", leaves=0)}


def save_pictures(folder: Path, names: list[str], rng: np.random.Generator) -> None:
    for name in names:
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name)


def test_a_folder_is_divided_into_disjoint_splits_that_make_the_whole(tmp_path, rng):
    save_pictures(tmp_path, [f"{i:03}.png" for i in range(60)], rng)
    made = [sets.folder(tmp_path, channels=1, split=split) for split in SPLITS]
    sets.check_disjoint(*made)
    assert sum(len(one) for one in made) == len(sets.folder(tmp_path, channels=1)) == 60
    assert len(made[0]) > len(made[1]) + len(made[2])


def test_a_picture_keeps_its_split_when_others_come(tmp_path, rng):
    save_pictures(tmp_path, [f"{i:03}.png" for i in range(30)], rng)
    before = {picture.name for picture in sets.folder(tmp_path, channels=1, split="train")}
    save_pictures(tmp_path, [f"new{i:03}.png" for i in range(30)], rng)
    after = {picture.name for picture in sets.folder(tmp_path, channels=1, split="train")}
    assert {name for name in after if not name.startswith("new")} == before


def test_two_formats_of_one_picture_fall_into_one_split(tmp_path, rng):
    save_pictures(tmp_path, [f"{i:03}{ending}" for i in range(30) for ending in (".png", ".bmp")], rng)
    stems = [picture.name[:3] for picture in sets.folder(tmp_path, channels=1, split="train")]
    assert all(stems.count(stem) == 2 for stem in stems)


def test_all_pictures_of_a_folder_that_cannot_be_taken_are_named_at_once(tmp_path, rng):
    save_pictures(tmp_path, ["a.png", "d.png"], rng)
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes(b"hello")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "e.png")
    with pytest.raises(InputError) as refused:
        sets.folder(tmp_path, channels=1)
    assert str(refused.value).startswith(f"{tmp_path / 'b.png'}: not a readable picture: ")
    assert str(refused.value).endswith("out of the folder; 2 more there cannot be taken: c.jpg, e.png")


def test_an_empty_split_says_what_to_do(tmp_path, rng):
    save_pictures(tmp_path, ["a.png"], rng)
    with pytest.raises(InputError, match=r"none of its 1 pictures .* 'evaluation'; .*a folder for each"):
        sets.folder(tmp_path, channels=1, split="evaluation", shares=Shares(train=100, calibration=0, evaluation=0))


def test_shares_must_make_a_hundred():
    with pytest.raises(InputError, match=r"\(70, 20, 20\)"):
        Shares(train=70, calibration=20, evaluation=20)


def test_the_same_pixels_under_two_names_are_found_in_two_sets():
    pixels = np.zeros((1, 8, 8), np.uint8)
    one = PictureSet(name="one", pictures=(Picture(name="a.png", pixels=pixels),))
    other = PictureSet(name="other", pictures=(Picture(name="b.png", pixels=pixels.copy()),))
    with pytest.raises(InputError, match=r"'a.png' of one and 'b.png' of other are the same picture"):
        sets.check_disjoint(one, other)


def test_the_digest_sees_order_and_shape_and_not_names():
    a, b = np.zeros((1, 4, 8), np.uint8), np.ones((1, 4, 8), np.uint8)

    def digest(*pixels: np.ndarray, name: str = "x") -> str:
        return sets.digest(PictureSet(name=name, pictures=tuple(Picture(name=name, pixels=p) for p in pixels)))

    assert digest(a, b) == digest(a, b, name="y")
    assert len({digest(a, b), digest(b, a), digest(a), digest(a.reshape(1, 8, 4))}) == 4


def test_pixels_of_a_set_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        sets.embedded("evaluation").pictures[0].pixels[0, 0, 0] = 1


def test_the_middle_of_each_picture_is_cut_out():
    pixels = np.arange(48, dtype=np.uint8).reshape(1, 6, 8)
    small = sets.centred(PictureSet(name="x", pictures=(Picture(name="a", pixels=pixels),)), 2, 4)
    assert small.name == "x-2x4"
    np.testing.assert_array_equal(small.pictures[0].pixels, pixels[:, 2:4, 2:6])


def test_a_picture_smaller_than_the_middle_asked_for_is_mirrored():
    pixels = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    grown = sets.centred(PictureSet(name="x", pictures=(Picture(name="a", pixels=pixels),)), 3, 5)
    np.testing.assert_array_equal(grown.pictures[0].pixels[0], [[0, 1, 2, 2, 1], [3, 4, 5, 5, 4], [3, 4, 5, 5, 4]])
