import pytest
import torch

from edgekit import models
from edgekit.errors import InputError
from edgekit.models.blocks import NoiseLevel
from edgekit.models.denoiser import Denoiser

# Parameters of gray pictures with default options, in thousands.
THOUSANDS = {
    "teacher": 8244,
    "teacher-a": 8155,
    "nano": 43,
    "small": 211,
    "base": 492,
    "large": 1440,
    "control": 460,
    "dncnn": 555,
}
STRIDES = {"teacher": 8, "teacher-a": 16, "control": 4, "dncnn": 1}
STUDENTS = ("nano", "small", "base", "large")


def pictures(channels: int = 1, *, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def level(sigma255: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), sigma255 / 255)


def trained_a_little(net: Denoiser) -> Denoiser:
    """Return the network with a noise level that counts: it starts at zero."""
    for module in net.modules():
        if isinstance(module, NoiseLevel):
            torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(2))
    return net.eval()


def test_the_table_of_sizes_lists_every_network():
    assert sorted(THOUSANDS) == sorted(models.names())


@pytest.mark.parametrize("name", models.names())
def test_a_network_has_the_parameters_that_it_is_known_for(name):
    count = models.parameter_count(models.create(name))
    assert count == pytest.approx(1000 * THOUSANDS[name], rel=0.02)


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "colour"])
@pytest.mark.parametrize("name", models.names())
def test_a_picture_comes_out_in_the_shape_in_which_it_went_in(name, channels):
    net = models.create(name, {"channels": channels}).eval()
    noisy = pictures(channels)
    with torch.no_grad():
        denoised = net(noisy, level(25) if net.takes_sigma else None)
    assert denoised.shape == noisy.shape
    assert net.channels == channels
    assert torch.isfinite(denoised).all()


@pytest.mark.parametrize("name", models.names())
def test_the_stride_is_the_least_that_the_network_takes(name):
    net = models.create(name).eval()
    assert net.stride == STRIDES.get(name, 8)
    sigma = level(25) if net.takes_sigma else None
    with torch.no_grad():
        side = 3 * net.stride
        assert net(pictures(height=side, width=side), sigma).shape[-2:] == (side, side)
        if net.stride > 1:
            with pytest.raises(RuntimeError):
                net(pictures(height=side + net.stride // 2, width=side), sigma)


@pytest.mark.parametrize("name", models.names())
def test_the_output_is_the_input_less_the_noise_that_was_found(name):
    net = models.create(name).eval()
    noisy = pictures(height=32, width=32)
    sigma = level(25) if net.takes_sigma else None
    with torch.no_grad():
        noise, _ = net.noise(noisy, sigma)
        assert torch.equal(net(noisy, sigma), noisy - noise)
    assert noise.abs().max() > 0


@pytest.mark.parametrize("name", [n for n in models.names() if n != "dncnn"])
def test_the_noise_level_moves_the_output_of_every_picture_by_its_own(name):
    net = trained_a_little(models.create(name))
    noisy = pictures()
    levels = torch.tensor([5.0, 50.0]).view(2, 1, 1, 1) / 255
    with torch.no_grad():
        together = net(noisy, levels)
        apart = torch.cat([net(noisy[i : i + 1], levels[i : i + 1]) for i in range(2)])
        swapped = net(noisy, levels.flip(0))
    assert torch.allclose(together, apart, atol=1e-5)
    assert (together - swapped).abs().amax((1, 2, 3)).min() > 1e-5


@pytest.mark.parametrize("name", ["teacher", "teacher-a", "control", *STUDENTS])
def test_a_blind_network_takes_no_noise_level_and_has_no_weights_for_it(name):
    blind, told = models.create(name, {"noise_level": False}).eval(), models.create(name)
    assert (blind.takes_sigma, told.takes_sigma) == (False, True)
    missing = set(told.state_dict()) - set(blind.state_dict())
    assert missing == {"level.weight"}
    with torch.no_grad():
        assert torch.equal(blind(pictures()), blind(pictures(), level(50)))


@pytest.mark.parametrize("name", models.names())
def test_feature_maps_have_the_channels_that_the_network_names(name):
    net = models.create(name).eval()
    noisy, sigma = pictures(), level(25) if net.takes_sigma else None
    if net.feature_channels is None:
        with pytest.raises(TypeError, match="no levels to compare"):
            net.forward_with_features(noisy, sigma)
        return
    with torch.no_grad():
        denoised, features = net.forward_with_features(noisy, sigma)
        assert torch.equal(denoised, net(noisy, sigma))
    assert tuple(f.shape[1] for f in features) == net.feature_channels
    bottleneck, deepest = features
    assert bottleneck.shape[-1] * 2 == deepest.shape[-1]


@pytest.mark.parametrize("name", STUDENTS)
def test_hardswish_stands_in_the_deep_half_only(name):
    net = models.create(name, {"activation": "hardswish"})
    found = {key for key, module in net.named_modules() if isinstance(module, torch.nn.Hardswish)}
    shallow = {key for key in found if key.startswith(("encoder.0", "decoder.1"))}
    assert found
    assert not shallow
    assert models.parameter_count(net) == models.parameter_count(models.create(name))


@pytest.mark.parametrize("name", STUDENTS)
def test_squeeze_and_excitation_stands_in_the_bottleneck_only(name):
    gates = [k for k, m in models.create(name, {"se": True}).named_modules() if type(m).__name__ == "SqueezeExcite"]
    assert gates
    assert all(key.startswith("encoder.2") for key in gates)
    assert not any(type(m).__name__ == "SqueezeExcite" for m in models.create(name).modules())


@pytest.mark.parametrize("name", STUDENTS)
def test_batchnorm_follows_every_convolution_of_blocks_head_and_down(name):
    net = models.create(name, {"batchnorm": True})
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in net.modules())
    without = 3  # two up-samplings and the tail
    assert norms == convolutions - without
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in models.create(name).modules())


@pytest.mark.parametrize("option", ["activation", "se", "batchnorm", "noise_level", "channels"])
def test_every_option_changes_what_a_student_computes_or_takes(option):
    changed = {"activation": "hardswish", "se": True, "batchnorm": True, "noise_level": False, "channels": 3}[option]
    assert models.options("nano")[option] != changed
    torch.manual_seed(0)
    plain = models.create("nano")
    torch.manual_seed(0)
    other = models.create("nano", {option: changed})
    if other.channels == plain.channels and other.takes_sigma:
        assert not torch.allclose(plain(pictures(), level(25)), other(pictures(), level(25)))
    else:
        assert (other.channels, other.takes_sigma) != (plain.channels, plain.takes_sigma)


def test_an_unknown_name_tells_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown model 'nanno'; did you mean 'nano'\?"):
        models.create("nanno")


def test_an_unknown_option_tells_the_nearest_one():
    with pytest.raises(InputError, match=r"model 'nano' has no option 'activaton'; did you mean 'activation'\?"):
        models.create("nano", {"activaton": "relu"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"se": 1}, "option 'se' is 1, expected bool"),
        ({"channels": True}, "option 'channels' is True, expected int"),
        ({"activation": "gelu"}, "option 'activation' is 'gelu'; known: relu, hardswish"),
        ({"widths": 3}, "has no option 'widths'"),
    ],
    ids=["number for a switch", "switch for a number", "unknown activation", "shape of the network"],
)
def test_an_option_of_the_wrong_kind_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        models.create("nano", given)


@pytest.mark.parametrize(
    ("name", "option", "least"), [("dncnn", "depth", 2), ("teacher", "blocks", 1)], ids=lambda value: str(value)
)
def test_a_number_of_layers_that_make_no_network_is_refused(name, option, least):
    picture = pictures()
    assert models.create(name, {option: least})(picture, level(25)).shape == picture.shape
    for value in (least - 1, -7):
        with pytest.raises(InputError, match=f"model '{name}': option '{option}' is {value}; the least is {least}"):
            models.create(name, {option: value})


@pytest.mark.parametrize("channels", [0, 2, 4, -3])
def test_a_number_of_channels_that_no_picture_has_is_refused(channels):
    with pytest.raises(InputError, match=f"option 'channels' is {channels}; known: 1, 3"):
        models.create("nano", {"channels": channels})


def test_a_new_network_depends_on_the_seed_alone():
    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return models.create("nano").tail.weight

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))
