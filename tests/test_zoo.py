"""The shipped weights: they are what their cards say, and still give the pictures that they gave."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgekit import models, target, zoo
from edgekit.data import sets
from edgekit.data.sets import PictureSet
from edgekit.errors import InputError, IntegrityError
from edgekit.files import sha256, write_json
from edgekit.measure import quality
from edgekit.models import weights
from edgekit.pipeline import networks
from edgekit.recipe import Model

GOLDENS = Path(__file__).parent / "goldens"
UPDATE = "EDGEKIT_UPDATE_GOLDENS"
HEAVY = 2_000_000
SIGMA = 25.0


def pictures(name: str) -> PictureSet:
    """Return the embedded evaluation set, or the middle of its first picture for a heavy network."""
    whole = sets.embedded("evaluation", channels=3 if zoo.card(name).options.get("channels") == 3 else 1)
    if zoo.card(name).parameters < HEAVY:
        return whole
    return sets.centred(PictureSet(name="first", pictures=whole.pictures[:1]), 128, 128)


@pytest.fixture(scope="module", params=zoo.names())
def measured(request) -> tuple[str, quality.QualityReport]:
    network = networks.shipped(request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = quality.evaluate(
        networks.as_function(network.net), pictures(request.param), sigma255=SIGMA, stride=network.net.stride
    )
    torch.set_num_threads(threads)
    return request.param, found


def test_something_is_shipped():
    assert {"nano"} <= set(zoo.names())
    assert {p.stem for p in Path(zoo.__file__).parent.glob("*.safetensors")} == set(zoo.names())


@pytest.mark.parametrize("name", target.names())
def test_the_student_of_a_target_is_shipped(name):
    assert target.load(name).student in (None, *zoo.names())


@pytest.mark.parametrize("name", zoo.names())
def test_shipped_weights_are_those_of_their_card(name):
    card, path = zoo.card(name), zoo.weights(name)
    assert sha256(path) == card.sha256
    net = models.create(card.model, card.options)
    weights.load_into(net, path)
    assert models.parameter_count(net) == card.parameters
    assert card.name == name
    assert all(torch.isfinite(value.float()).all() for value in load_file(path).values())


@pytest.mark.parametrize("name", zoo.names())
def test_a_card_says_how_its_weights_were_trained_and_what_they_reach(name):
    card = zoo.card(name)
    assert {"pictures", "noise", "teacher", "seed"} <= set(card.trained)
    assert {m.sigma for m in card.measured if m.pictures == "embedded-evaluation"} == {15, 25, 50}
    assert card.notes


def test_shipped_weights_beat_the_noisy_input_and_non_local_means(measured):
    name, found = measured
    for plain in (quality.noisy_input, quality.nlm):
        assert found.psnr_mdb > quality.evaluate(plain, pictures(name), sigma255=SIGMA).psnr_mdb


def test_shipped_weights_reach_the_figure_on_their_card(measured):
    name, found = measured
    if found.protocol.pictures != "embedded-evaluation":
        # A part of one picture does not compare with the mean over the set.
        assert zoo.card(name).parameters >= HEAVY
        return
    (said,) = (m for m in zoo.card(name).measured if (m.pictures, m.sigma) == ("embedded-evaluation", 25))
    # The card's figure is the mean of several draws of the noise, this one is of the first.
    assert found.psnr_mdb == pytest.approx(said.psnr_mdb, abs=30)


def test_shipped_weights_give_the_pictures_that_they_gave(measured):
    name, found = measured
    path = GOLDENS / f"{name}.json"
    now = {
        "pictures": found.protocol.pictures,
        "pictures_sha256": found.protocol.pictures_sha256,
        "psnr_mdb": {p.name: p.psnr_mdb for p in found.pictures},
        "sigma255": SIGMA,
        "weights_sha256": zoo.card(name).sha256,
    }
    if os.environ.get(UPDATE) == "1":
        write_json(path, now)
    assert path.is_file(), f"no golden of '{name}'; record one: {UPDATE}=1 pytest tests/test_zoo.py"
    golden = json.loads(path.read_text())
    assert golden["weights_sha256"] == now["weights_sha256"], f"other weights than the golden's; record it: {UPDATE}=1"
    assert golden["pictures_sha256"] == now["pictures_sha256"]
    assert set(golden["psnr_mdb"]) == set(now["psnr_mdb"])
    for picture, wanted in golden["psnr_mdb"].items():
        assert now["psnr_mdb"][picture] == pytest.approx(wanted, abs=10), picture


def test_goldens_are_of_weights_that_are_shipped():
    assert {p.stem for p in GOLDENS.glob("*.json")} <= set(zoo.names())


def test_weights_that_are_not_shipped_tell_the_nearest_name():
    with pytest.raises(InputError, match=r"no weights are shipped for 'nanno'; did you mean 'nano'\?"):
        zoo.card("nanno")


@pytest.fixture
def damaged(tmp_path, monkeypatch) -> Path:
    """A zoo of nano alone, to change."""
    for suffix in ("json", "safetensors"):
        source = Path(zoo.__file__).with_name(f"nano.{suffix}")
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    return tmp_path


def test_weights_whose_bytes_changed_are_refused_by_name(damaged):
    path = damaged / "nano.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{path}: is not the file that its card describes; reinstall edgekit"):
        networks.shipped("nano")


def test_weights_that_are_missing_are_refused_by_name(damaged):
    (damaged / "nano.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"nano\.safetensors: is not the file"):
        zoo.weights("nano")


@pytest.mark.parametrize("content", ["{", "[]", "{}"], ids=["cut short", "another shape", "empty"])
def test_a_damaged_card_is_refused_by_name(damaged, content):
    (damaged / "nano.json").write_text(content)
    with pytest.raises(IntegrityError, match=f"{damaged / 'nano.json'}: damaged card"):
        zoo.card("nano")


def test_shipped_weights_are_not_used_with_options_that_they_were_not_trained_with():
    with pytest.raises(InputError, match="trained with se=False, not True; name a file of weights, or set weights"):
        networks.shipped("nano", {"se": True})
    with pytest.raises(InputError, match=r"has no option 'sé'; known:|did you mean 'se'"):
        networks.shipped("nano", {"sé": True})
    assert networks.shipped("nano", {"se": False}).options == {}


@pytest.mark.parametrize("name", [n for n in zoo.names() if zoo.card(n).options])
def test_a_network_with_the_options_of_a_shipped_variant_gets_its_weights(name):
    card = zoo.card(name)
    assert networks.shipped(card.model, card.options).name == name
    assert networks.shipped(name).sha256 == card.sha256
    with pytest.raises(InputError, match=r"were trained with .*batchnorm=False"):
        networks.shipped(card.model, card.options | {"batchnorm": True})


def test_weights_for_colour_are_found_by_the_channels_of_the_data_and_never_used_for_gray():
    found = networks.from_recipe(Model(model="base"), 3)
    assert found is not None
    assert (found.name, found.net.channels) == ("base-color", 3)
    with pytest.raises(InputError, match=r"channels=1, not 3; .*; a teacher may be left out"):
        networks.from_recipe(Model(model="nano"), 3)
