from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from edgekit import models, recipe, zoo
from edgekit.data import sets
from edgekit.data.synthetic import dead_leaves
from edgekit.errors import InputError, IntegrityError
from edgekit.files import sha256
from edgekit.measure import quality
from edgekit.models import weights
from edgekit.models.denoiser import Denoiser
from edgekit.pipeline import networks
from edgekit.recipe import Distillation, Model, Noise
from edgekit.training import __main__ as command
from edgekit.training import checkpoint, job_file, loop, losses, rounding, schedule
from edgekit.training.distill import Learner, Lesson
from edgekit.training.loop import Job, Moment
from edgekit.training.optimizer import Muon, is_matrix, orthogonal
from edgekit.training.patches import PatchBank

CPU = torch.device("cpu")
QUIET = (0.0, 0.0)
PICTURES = [dead_leaves(seed, 48, 64) for seed in range(4)]
BARE = ("pydantic", "ruamel", "rich", "skimage", "sklearn", "onnx", "onnxruntime", "click", "jinja2", "onnxsim")


def job(net: Denoiser | None = None, *, teacher: Denoiser | None = None, **changes: object) -> Job:
    made = Job(
        net=net or tiny.network("nano"),
        teacher=teacher,
        pictures=PICTURES,
        sigma=(5.0, 50.0),
        training=tiny.training(),
        distillation=Distillation(),
        validate=lambda net: 0.0,
        identity="job",
    )
    return dataclasses.replace(made, **changes)


def silent(moment: Moment) -> None:
    pass


def state(net: Denoiser) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


# Patches


def draw(pictures: list[np.ndarray], *, batch: int, patch: int, sigma: tuple[float, float] = QUIET, seed: int = 0):
    return PatchBank(pictures, CPU).draw(batch=batch, patch=patch, sigma=sigma, seed=seed)


def test_a_batch_depends_on_its_seed_alone():
    bank = PatchBank(PICTURES, CPU)
    wanted = {"batch": 4, "patch": 16, "sigma": (0.0, 50.0)}
    first = bank.draw(**wanted, seed=7)
    torch.manual_seed(99)
    other = bank.draw(**wanted, seed=8)
    again = bank.draw(**wanted, seed=7)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_a_seed_may_be_any_whole_number(tmp_path):
    drawn = [draw(PICTURES, batch=1, patch=16, seed=seed)[0] for seed in (7, 2**64 + 7, 2**64 + 8)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    for seed in (20241201123456, 2**64, -1):
        _, outcome = loop.train(job(training=tiny.training(steps=2, seed=seed)), tmp_path, silent)
        assert outcome.steps == 2


def test_patches_come_in_all_eight_orientations_and_no_other():
    picture = np.arange(16 * 16, dtype=np.uint8).reshape(1, 16, 16)
    turned = [np.rot90(p, k) for p in (picture[0], picture[0].T) for k in range(4)]
    known = {t.tobytes(): i for i, t in enumerate(turned)}
    assert len(known) == 8
    clean, _, _ = draw([picture], batch=400, patch=16)
    found = [known[patch.numpy().tobytes()] for patch in (clean[:, 0] * 255).round().to(torch.uint8)]
    counts = np.bincount(found, minlength=8)
    assert counts.min() > 20


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "colour"])
def test_no_patch_reaches_from_one_picture_into_the_next(channels):
    def flat(first: int, height: int, width: int) -> np.ndarray:
        tones = np.arange(first, first + channels, dtype=np.uint8).reshape(-1, 1, 1)
        return np.broadcast_to(tones, (channels, height, width)).copy()

    clean, _, _ = draw([flat(10, 40, 17), flat(100, 16, 61), flat(200, 23, 23)], batch=500, patch=16)
    pixels = (clean * 255).round().to(torch.uint8)
    assert torch.equal(pixels.amax((2, 3)), pixels.amin((2, 3)))
    assert set(pixels[:, 0, 0, 0].tolist()) == {10, 100, 200}
    for plane in range(channels):
        assert torch.equal(pixels[:, plane, 0, 0], pixels[:, 0, 0, 0] + plane)


def test_patches_are_cut_everywhere_up_to_the_edges():
    rows = np.repeat(np.arange(40, dtype=np.uint8)[:, None], 24, axis=1)
    columns = np.repeat(np.arange(100, 124, dtype=np.uint8)[None], 40, axis=0)
    clean, _, _ = draw([np.stack([rows, columns])], batch=2000, patch=16)
    pixels = (clean * 255).round().to(torch.uint8)
    assert set(pixels[:, 0].amin((1, 2)).tolist()) == set(range(25))
    assert set(pixels[:, 1].amin((1, 2)).tolist()) == set(range(100, 109))
    assert set((pixels[:, 0].amax((1, 2)) - pixels[:, 0].amin((1, 2))).tolist()) == {15}


def test_the_noise_has_the_level_that_comes_with_it():
    clean, noisy, sigma = draw(PICTURES, batch=200, patch=32, sigma=(10.0, 50.0))
    found = (noisy - clean).std((1, 2, 3)) / sigma.flatten()
    assert found.mean().item() == pytest.approx(1, abs=0.005)
    assert (found - 1).abs().max() < 0.1
    levels = 255 * sigma
    assert sigma.shape == (200, 1, 1, 1)
    assert 10 <= levels.min() < 12
    assert 48 < levels.max() <= 50
    assert levels.mean().item() == pytest.approx(30, abs=3)
    assert noisy.min() < 0


def test_clean_patches_are_pixels_on_the_scale_of_0_to_1():
    clean, noisy, _ = draw(PICTURES, batch=8, patch=32)
    assert torch.equal(clean, noisy)
    assert torch.equal((clean * 255).round() / 255, clean)
    assert 0 <= clean.min() < clean.max() <= 1


def test_a_patch_that_is_larger_than_a_picture_is_refused():
    with pytest.raises(InputError, match=r"a patch of 56 pixels does not fit .* side of 48; set training.patch lower"):
        draw(PICTURES, batch=1, patch=56)


def test_no_pictures_are_refused():
    with pytest.raises(InputError, match="no training pictures"):
        PatchBank([], CPU)


# Schedule and losses


def test_the_rate_warms_up_linearly_and_falls_by_a_cosine_to_its_end():
    settings = tiny.training(steps=1000, peak_rate=1e-3, final_rate=1e-5, warmup_steps=9)
    rates = [schedule.learning_rate(settings, s, schedule.progress(settings, s, 0.0)) for s in range(1001)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[4] == pytest.approx(5e-4, rel=1e-3)
    assert max(rates) == pytest.approx(1e-3, rel=1e-3)
    assert rates.index(max(rates)) == 9
    assert rates[500] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[1000] == pytest.approx(1e-5)
    assert all(one > two for one, two in itertools.pairwise(rates[9:]))


def test_without_a_number_of_steps_the_run_follows_the_clock():
    settings = tiny.training(steps=0, max_minutes=2.0)
    assert [schedule.progress(settings, 10**6, s) for s in (0, 30, 120, 500)] == [0, 0.25, 1, 1]
    assert [schedule.is_over(settings, 10**6, s) for s in (0, 119.9, 120)] == [False, False, True]


def test_whichever_limit_comes_first_ends_a_run():
    settings = tiny.training(steps=100, max_minutes=1.0)
    assert not schedule.is_over(settings, 99, 59)
    assert schedule.is_over(settings, 100, 0)
    assert schedule.is_over(settings, 0, 60)
    assert schedule.progress(settings, 50, 59) == 0.5


def test_late_patches_come_late():
    settings = tiny.training(patch=32, late_patch=48, late_from=0.75)
    assert [schedule.patch_side(settings, done) for done in (0, 0.74, 0.75, 1)] == [32, 32, 48, 48]
    assert schedule.patch_side(tiny.training(patch=32), 1.0) == 32


def test_the_feature_loss_fades_out():
    found = [schedule.feature_weight(0.2, 0.5, done) for done in (0, 0.25, 0.5, 0.9)]
    assert found == pytest.approx([0.2, 0.1, 0, 0])
    assert schedule.feature_weight(0.2, 0.0, 0.0) == 0


def test_losses_are_what_their_papers_say():
    got, want = torch.tensor([0.0, 3.0]), torch.tensor([0.0, -1.0])
    assert losses.charbonnier(got, want).item() == pytest.approx((1e-3 + math.sqrt(16 + 1e-6)) / 2)
    assert losses.mean_squared(got, want).item() == pytest.approx(8)
    clean, noisy, _ = draw(PICTURES, batch=4, patch=32, sigma=(5.0, 50.0))
    psnr_db = [quality.psnr(a, b) for a, b in zip(noisy.numpy(), clean.numpy(), strict=True)]
    per_db = losses.log_squared(noisy, clean).item() / -np.mean(psnr_db)
    assert per_db == pytest.approx(0.01 * math.log(10) / 10, rel=0.01)


def test_the_distance_of_feature_maps_ignores_their_scale_and_not_their_shape():
    one, other = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert losses.feature_distance(one, 5 * one).item() == pytest.approx(0, abs=1e-10)
    assert losses.feature_distance(one, other).item() == pytest.approx(2, rel=0.2)
    finer = one.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert losses.feature_distance(one, finer).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("compare", [losses.charbonnier, losses.mean_squared, losses.log_squared])
def test_a_lesson_shares_its_loss_between_the_clean_pictures_and_the_teacher(compare):
    teacher, net = tiny.network("nano", seed=1), tiny.network("small", seed=2)
    clean, noisy, sigma = draw(PICTURES, batch=2, patch=32, sigma=(5.0, 50.0))
    settings = Distillation(output_weight=0.25, feature_weight=0.1)
    learner = Learner(net, teacher, with_features=True)
    learned = learner(noisy, sigma)
    lesson = Lesson(teacher, settings)
    got = lesson.loss(learned, clean, noisy, sigma, feature_weight=0.1, compare=compare).item()
    with torch.no_grad():
        wanted, maps = teacher.forward_with_features(noisy, sigma)
    features = sum(losses.feature_distance(mine, its) for mine, its in zip(learned[1], maps, strict=True))
    want = 0.75 * compare(learned[0], clean) + 0.25 * compare(learned[0], wanted) + 0.1 * features
    assert got == pytest.approx(want.item(), rel=1e-5)
    alone = Lesson(None, settings).loss(learned, clean, noisy, sigma, feature_weight=0.1, compare=compare)
    assert alone.item() == pytest.approx(compare(learned[0], clean).item())


def test_the_loss_is_the_one_asked_for_and_charbonniers_ends_as_squared_error():
    ordinary, psnr = tiny.training(mse_from=0.9), tiny.training(loss="psnr", mse_from=0.9)
    assert [schedule.loss(ordinary, done) for done in (0.0, 0.89, 0.9, 1.0)] == ["charbonnier"] * 2 + ["mse"] * 2
    assert {schedule.loss(psnr, done) for done in (0.0, 0.9, 1.0)} == {"psnr"}


# Rounding


def grids(net: Denoiser, noisy: torch.Tensor, sigma: torch.Tensor) -> dict[str, int]:
    """Return how many values each map has that a module of the network gives."""
    found: dict[str, int] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(
            lambda module, given, result, name=name: found.update({name: len(torch.unique(result))})
        )
    net(noisy, sigma)
    return found


ROUNDED = {
    "nano": ["head", "level", "down.0", "up.1", "tail", "encoder.0.0.act2", "encoder.2.0.project", "decoder.1.0"],
    "control": ["head", "level", "down", "up", "tail", "encoder.0.body.1", "bottleneck.4.body", "decoder.1"],
}


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(("name", "rounded"), ROUNDED.items(), ids=ROUNDED)
def test_maps_have_few_values_in_training_and_all_of_them_after_it(name, rounded, bits):
    net = tiny.network(name)
    learner = Learner(net, None, with_features=False, rounding_bits=bits)
    _, noisy, sigma = draw(PICTURES, batch=4, patch=32, sigma=(5.0, 50.0))
    untouched = tiny.network(name)
    assert torch.equal(learner.eval()(noisy, sigma)[0], untouched(noisy, sigma))
    learner.train()
    assert learner.rounding is not None
    assert grids(net, noisy, sigma)["head"] > 256
    learner.rounding.begin(0, rounds=lambda step: True)
    found = grids(net, noisy, sigma)
    assert all(2**bits / 4 < found[part] <= 2**bits for part in rounded)
    assert {name for name, _ in net.named_buffers()} == set()


def test_rounding_that_the_clock_begins_between_two_looks_rounds_no_map_to_nothing():
    net = tiny.network("nano")
    learner = Learner(net, None, with_features=False, rounding_bits=8).train()
    _, noisy, sigma = draw(PICTURES, batch=4, patch=32, sigma=(5.0, 50.0))
    assert learner.rounding is not None
    learner.rounding.begin(37, rounds=lambda step: False)
    plain = learner(noisy, sigma)[0]
    learner.rounding.begin(38, rounds=lambda step: True)
    rounded = learner(noisy, sigma)[0]
    assert 0 < (rounded - plain).abs().mean() < 0.2 * (plain - noisy).abs().mean()
    ranges = {name: value.clone() for name, value in learner.rounding.named_buffers()}
    for before, step in ((True, 39), (False, 40)):  # the second as in a run that goes on, which forgot that it rounds
        learner.rounding.rounds = before
        learner.rounding.begin(step, rounds=lambda step: True)
        learner(2 * noisy, sigma)
        assert all(torch.equal(value, ranges[name]) for name, value in learner.rounding.named_buffers())


def test_rounded_weights_have_8_bits_for_each_channel_and_the_gradient_of_the_others():
    net = tiny.network("nano")
    weights_ = rounding.Rounding.weights(net)
    assert weights_.keys() == {f"{name}.weight" for name, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)}
    for name, rounded in weights_.items():
        original = net.get_parameter(name)
        step = original.abs().amax((1, 2, 3), keepdim=True) / 127
        assert (rounded - original).abs().max() <= step.max() * 0.501
        assert ((rounded / step) - (rounded / step).round()).abs().max() < 1e-3
        (gradient,) = torch.autograd.grad((3 * rounded).sum(), original)
        assert torch.equal(gradient, torch.full_like(original, 3))


def test_a_range_follows_its_map_leaves_outliers_out_and_holds_zero():
    values = torch.linspace(2, 4, 100_000)
    values[7] = 1000.0
    made = rounding.MapRounding(8)
    made(values)
    assert (made.low.item(), made.high.item()) == (0, pytest.approx(4, rel=1e-3))
    made(2 * values)
    assert made.high.item() == pytest.approx(4.8, rel=1e-3)
    made.looks = False
    made(100 * values)
    assert made.high.item() == pytest.approx(4.8, rel=1e-3)


def test_a_value_that_its_range_leaves_out_is_not_pushed_farther_out():
    values = torch.linspace(-2, 4, 100_000)
    values[7], values[8] = 1000.0, -1000.0
    values.requires_grad_()
    made = rounding.MapRounding(8)
    rounded = made(values)
    assert rounded[7] < 4.1
    assert rounded[8] > -2.1
    (gradient,) = torch.autograd.grad(rounded.sum(), values)
    assert gradient[7] == gradient[8] == 0
    assert (gradient == 1).float().mean() > 0.999


def test_a_run_with_rounding_goes_on_where_it_was_cut_off(tmp_path):
    settings = tiny.training(steps=60, rounding_from=0.4, loss="psnr", checkpoint_seconds=1e-9)
    whole, _ = loop.train(job(training=settings), tmp_path / "whole", silent)
    for steps in (10, 20, 30, 40, 50):
        _, outcome = loop.train(job(training=settings), tmp_path / "parts", silent, pause_after_seconds=1e-9)
        assert (outcome.ended_by, outcome.steps) == ("pause", steps)
    resumed, _ = loop.train(job(training=settings), tmp_path / "parts", silent)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    plain, _ = loop.train(job(training=dataclasses.replace(settings, rounding_from=1.0)), tmp_path / "plain", silent)
    assert (plain["tail.weight"] - whole["tail.weight"]).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["teacher", "dncnn"])
def test_a_network_without_an_int8_form_is_not_trained_for_it(tmp_path, name):
    with pytest.raises(InputError, match=r"training\.rounding_from: .* has no INT8 form to be trained for"):
        loop.train(job(tiny.network(name), training=tiny.training(rounding_from=0.0)), tmp_path, silent)


# The optimizer


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 144), (2, 96, 32), (1, 48, 48)])
def test_orthogonal_keeps_the_singular_vectors_and_brings_the_values_near_1(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for before, after in zip(matrices, orthogonal(matrices), strict=True):
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        turned = left.T @ after @ right.T
        large = values > 0.1 * values[0]
        assert large.sum() > 0.7 * len(values)
        assert ((turned.diag()[large] > 0.6) & (turned.diag()[large] < 1.25)).all()
        assert (turned - torch.diag(turned.diag())).abs().max() < 1e-3


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonal(torch.zeros(1, 16, 32)), torch.zeros(1, 16, 32))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_dense_convolutions_get_the_steps_of_torchs_muon():
    conv = torch.nn.Conv2d(16, 24, 3, bias=False).to(memory_format=torch.channels_last)
    alike = torch.nn.Conv2d(16, 24, 3, bias=False)
    matrices = [torch.nn.Parameter(c.weight.detach().flatten(1).clone()) for c in (conv, alike)]
    theirs = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    weights = [conv.weight, alike.weight]
    ours = Muon(weights, lr=0.01, weight_decay=0.1, fused=False, precision=torch.bfloat16)
    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        for weight, matrix in zip(weights, matrices, strict=True):
            matrix.grad = torch.randn(matrix.shape, generator=draw)
            weight.grad = matrix.grad.view_as(weight)
        before = weights[0].detach().flatten(1).clone()
        ours.step()
        theirs.step()
        for weight, matrix in zip(weights, matrices, strict=True):
            # bfloat16 in another order: a part in a hundred of a step.
            moved = (weights[0].detach().flatten(1) - before).norm()
            assert (weight.detach().flatten(1) - matrix.detach()).norm() < 0.02 * 5 * moved


def test_all_but_dense_convolutions_get_the_steps_of_adamw():
    net = tiny.network("nano")
    matrices = {name for name, parameter in net.named_parameters() if is_matrix(parameter)}
    assert {"head.0.weight"} <= matrices
    assert "tail.weight" not in matrices
    assert not any(name.endswith("bias") for name in matrices)
    other = tiny.network("nano")
    ours = Muon(net.parameters(), lr=0.01, weight_decay=0.1, fused=False, precision=torch.float32)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        for one, two in zip(net.parameters(), other.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=draw)
            two.grad = one.grad.clone()
        ours.step()
        theirs.step()
    same = {n for (n, p), q in zip(net.named_parameters(), other.parameters(), strict=True) if torch.equal(p, q)}
    assert same == {name for name, _ in net.named_parameters()} - matrices


def test_muon_learns_more_in_as_many_steps_than_adamw(tmp_path):
    reached = {}
    for optimizer in ("adamw", "muon"):
        moments: list[Moment] = []
        settings = tiny.training(steps=60, batch=4, peak_rate=1e-3, optimizer=optimizer, loss="psnr")
        loop.train(job(tiny.network("control"), training=settings), tmp_path / optimizer, moments.append)
        reached[optimizer] = np.mean([m.loss for m in moments[-3:]])
    assert reached["muon"] < reached["adamw"] - 0.0005, reached


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_where_it_was_cut_off(tmp_path, optimizer):
    settings = tiny.training(steps=30, optimizer=optimizer, checkpoint_seconds=1e-9)
    whole, _ = loop.train(job(training=settings), tmp_path / "whole", silent)
    for _ in range(2):
        loop.train(job(training=settings), tmp_path / "parts", silent, pause_after_seconds=1e-9)
    resumed, outcome = loop.train(job(training=settings), tmp_path / "parts", silent)
    assert outcome.steps == 30
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


# The loop


def test_the_loss_falls(tmp_path):
    moments: list[Moment] = []
    net = tiny.network("nano")
    settings = tiny.training(steps=120, batch=4, mse_from=1.0)
    values, outcome = loop.train(job(net, training=settings), tmp_path, moments.append)
    assert moments[-1].loss < 0.6 * moments[0].loss
    assert [m.step for m in moments] == list(range(10, 121, 10))
    assert (outcome.steps, outcome.images, outcome.ended_by, outcome.kept) == (120, 480, "steps", "trained")
    assert moments[-1].done == 1
    assert set(values) == set(net.state_dict())


def test_the_average_follows_the_weights(tmp_path):
    net = tiny.network("nano")
    start = state(net)
    values, _ = loop.train(job(net, training=tiny.training(steps=1)), tmp_path, silent)
    for name, value in values.items():
        assert torch.allclose(value, 0.1 * start[name] + 0.9 * net.state_dict()[name], atol=1e-7), name
    assert any(not torch.equal(values[name], start[name]) for name in values)


def test_without_averaging_a_run_keeps_its_last_weights(tmp_path):
    net = tiny.network("nano")
    values, _ = loop.train(job(net, training=tiny.training(steps=3, ema=0.0)), tmp_path, silent)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in values.items())


def test_a_network_with_batchnorm_learns_its_statistics(tmp_path):
    net = tiny.network("nano", {"batchnorm": True})
    values, _ = loop.train(job(net), tmp_path, silent)
    assert values["head.1.num_batches_tracked"] == 20
    assert values["head.1.running_mean"].abs().max() > 1e-3
    assert all(torch.isfinite(value).all() for value in values.values())


def test_two_precisions_train_one_after_the_other_in_one_process(tmp_path):
    trained = {
        precision: loop.train(job(training=tiny.training(steps=5, precision=precision)), tmp_path / precision, silent)[
            0
        ]["tail.weight"]
        for precision in ("bf16", "float32", "bf16")
    }
    assert not torch.equal(trained["bf16"], trained["float32"])
    assert torch.allclose(trained["bf16"], trained["float32"], atol=0.02)


def test_several_forward_passes_of_one_step_are_one_larger_batch(tmp_path, monkeypatch):
    class Halves(PatchBank):
        """Gives a batch of 4 as the two batches of 2 that the other run draws."""

        def draw(self, *, batch, patch, sigma, seed):
            if batch == 2:
                return super().draw(batch=2, patch=patch, sigma=sigma, seed=seed)
            halves = [super(Halves, self).draw(batch=2, patch=patch, sigma=sigma, seed=2 * seed + i) for i in (0, 1)]
            return tuple(torch.cat(parts) for parts in zip(*halves, strict=True))

    monkeypatch.setattr(loop, "PatchBank", Halves)
    found = {}
    for batch, accumulate in ((4, 1), (2, 2)):
        # With a tiny rate Adam's rounding stays small; its first moment has the scale of the gradients.
        settings = tiny.training(batch=batch, accumulate=accumulate, steps=10, peak_rate=1e-5, checkpoint_seconds=1e-9)
        folder = tmp_path / str(batch)
        values, outcome = loop.train(job(training=settings), folder, silent)
        found[batch] = values, load_file(folder / "checkpoint.safetensors")
        assert outcome.images == 40
    (one, one_state), (two, two_state) = found[4], found[2]
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-6), name
        moment = f"optimizer/net.{name}/{'momentum' if is_matrix(one[name]) else 'exp_avg'}"
        assert torch.allclose(one_state[moment], two_state[moment], rtol=1e-3, atol=1e-7), name
    assert not torch.equal(one["tail.weight"], tiny.network("nano").tail.weight)


class Breaking(torch.nn.Module):
    """Multiplies by NaN, or lets an infinite gradient through, at one call."""

    def __init__(self, *, at: int, forward: bool) -> None:
        super().__init__()
        self.calls, self.at, self.breaks_forward = 0, at, forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls != self.at:
            return x
        if self.breaks_forward:
            return x * math.nan
        x.register_hook(lambda gradient: gradient * math.inf)
        return x * 1


@pytest.mark.parametrize("forward", [True, False], ids=["loss", "gradient of a look's last step"])
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_state_is_kept(tmp_path, forward):
    net = tiny.network("nano")
    net.tail = torch.nn.Sequential(net.tail, Breaking(at=30 if not forward else 25, forward=forward))
    settings = tiny.training(steps=100, checkpoint_seconds=1e-9)
    with pytest.raises(InputError, match="not finite at step 30; the last good state is kept in") as error:
        loop.train(job(net, training=settings), tmp_path, silent)
    path = tmp_path / "checkpoint.safetensors"
    assert str(path) in str(error.value)
    assert "lower training.peak_rate" in str(error.value)
    assert str(error.value).endswith(f"from here on with --set student.weights={path}")
    kept = load_file(path)
    begun = tiny.network("nano", seed=1)
    begun.tail = torch.nn.Sequential(begun.tail)
    weights.load_into(begun, path)
    assert torch.equal(begun.state_dict()["head.0.weight"], kept["ema/head.0.weight"])
    assert kept["optimizer/net.head.0.weight/step"] == 20
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_names_no_file(tmp_path):
    net = tiny.network("nano")
    net.tail = torch.nn.Sequential(net.tail, Breaking(at=3, forward=True))
    with pytest.raises(InputError, match="not finite at step 10; no state was saved yet"):
        loop.train(job(net), tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch": 56}, "training.patch is 56, and the smallest training picture has a side of 48"),
        ({"late_patch": 64}, "training.late_patch is 64, and the smallest training picture has a side of 48"),
        ({"patch": 36}, "training.patch is 36, no multiple of the networks' stride 8"),
        ({"late_patch": 44}, "training.late_patch is 44, no multiple of the networks' stride 8"),
        ({"steps": 0}, "training.steps and training.max_minutes are both 0; set one of them"),
    ],
    ids=["patch too large", "late patch too large", "patch off the stride", "late patch off the stride", "no end"],
)
def test_settings_that_cannot_end_well_are_refused_before_the_first_step(tmp_path, changes, said):
    net = tiny.network("nano")
    before = state(net)
    with pytest.raises(InputError, match=said):
        loop.train(job(net, training=tiny.training(**changes)), tmp_path, silent)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_picture_that_is_too_small_is_named_where_its_name_is_known(tmp_path):
    small = [*PICTURES, dead_leaves(7, 24, 64), dead_leaves(8, 40, 64)]
    names = [f"photos/{number}.png" for number in range(len(small))]
    said = r"training.patch is 32, and the smallest training picture \('photos/4.png'\) has a side of 24; set it lower"
    with pytest.raises(InputError, match=said):
        loop.train(job(pictures=small, names=names, training=tiny.training(patch=32)), tmp_path, silent)


def test_a_patch_has_to_suit_the_teachers_stride_too(tmp_path):
    taught = job(teacher=tiny.network("teacher-a"), training=tiny.training(patch=40))
    with pytest.raises(InputError, match="no multiple of the networks' stride 16"):
        loop.train(taught, tmp_path, silent)


@pytest.mark.parametrize("name", recipe.names())
def test_the_patches_of_a_shipped_recipe_fit_its_pictures(name):
    loaded = recipe.load(name)
    assert loaded.data.train == ("embedded",)
    pictures = sets.embedded("train", channels=loaded.data.channels, leaves=1)
    wanted = [model for model in (loaded.student, loaded.teacher) if model is not None]
    nets = [networks.architecture(model, loaded.data.channels) for model in wanted]
    loop.check(loaded.training, nets, [p.pixels for p in pictures], [p.name for p in pictures])


def test_a_run_without_a_number_of_steps_ends_by_the_clock(tmp_path):
    settings = tiny.training(steps=0, max_minutes=0.8 / 60)
    _, outcome = loop.train(job(training=settings), tmp_path, silent)
    assert outcome.ended_by == "time"
    assert 0.8 <= outcome.seconds < 20
    assert outcome.steps > 0


@pytest.mark.parametrize(("keep_better", "kept"), [(True, "start"), (False, "trained")])
def test_weights_that_did_not_get_better_are_kept_only_where_asked_for(tmp_path, keep_better, kept):
    net = tiny.network("nano")
    start = state(net)

    def likes_the_start(tried: Denoiser) -> float:
        assert not tried.training
        return 30.0 if torch.equal(tried.tail.weight, start["tail.weight"]) else 29.0

    settings = tiny.training(keep_better=keep_better)
    values, outcome = loop.train(job(net, training=settings, validate=likes_the_start), tmp_path, silent)
    assert (outcome.kept, outcome.start_psnr_db, outcome.psnr_db) == (kept, 30.0, 29.0)
    assert torch.equal(values["tail.weight"], start["tail.weight"]) == (kept == "start")


def test_better_weights_are_kept(tmp_path):
    net = tiny.network("nano")
    start = state(net)

    def likes_change(tried: Denoiser) -> float:
        return (tried.tail.weight - start["tail.weight"]).norm().item()

    settings = tiny.training(keep_better=True)
    values, outcome = loop.train(job(net, training=settings, validate=likes_change), tmp_path, silent)
    assert outcome.kept == "trained"
    assert not torch.equal(values["tail.weight"], start["tail.weight"])


@pytest.mark.parametrize(
    ("validated", "start", "end", "told"),
    [
        ((30.1, 29.0), 28.0, 29.9, "29.90 dB on the held-out pictures, 0.20 less than at step 10; lower"),
        ((29.0, 29.5), 30.0, 29.8, "29.80 dB on the held-out pictures, 0.20 less than those it began with; lower"),
        ((30.1, 29.0), 28.0, 30.05, ""),
        ((29.0, 29.5), 28.0, 29.9, ""),
    ],
    ids=["fell", "worse than before", "rounding", "rose"],
)
def test_training_that_fell_apart_is_told(tmp_path, caplog, validated, start, end, told):
    found = iter((*validated, start, end))
    settings = tiny.training(steps=20, validate_every=10, keep_better=False)
    with caplog.at_level(logging.WARNING, logger="edgekit"):
        _, outcome = loop.train(job(training=settings, validate=lambda net: next(found)), tmp_path, silent)
    assert (outcome.start_psnr_db, outcome.psnr_db, outcome.kept) == (start, end, "trained")
    assert [told in line for line in caplog.messages] == ([True] if told else [])


def test_training_that_fell_apart_in_another_sitting_is_told(tmp_path, caplog):
    settings = tiny.training(steps=20, validate_every=10)
    found = iter((30.1, 28.0, 30.1))
    _, outcome = loop.train(
        job(training=settings, validate=lambda net: next(found)), tmp_path, silent, pause_after_seconds=1e-9
    )
    assert (outcome.steps, outcome.ended_by) == (10, "pause")
    found = iter((29.0, 28.0, 29.9))
    with caplog.at_level(logging.WARNING, logger="edgekit"):
        loop.train(job(training=settings, validate=lambda net: next(found)), tmp_path, silent)
    assert any("29.90 dB on the held-out pictures, 0.20 less than at step 10; lower" in m for m in caplog.messages)


def test_looking_at_the_held_out_pictures_does_not_change_a_run(tmp_path):
    found = []
    for every in (10, 1000):
        settings = tiny.training(steps=30, validate_every=every)
        net = tiny.network("nano", {"batchnorm": True})
        values, _ = loop.train(job(net, training=settings), tmp_path / str(every), silent)
        found.append(values)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("teacher", ["small", "teacher-a", "control"])
def test_distillation_trains_the_adapters_and_leaves_the_teacher_alone(tmp_path, teacher):
    taught_by = tiny.network(teacher, seed=3)
    before = state(taught_by)
    settings = tiny.training(steps=10, checkpoint_seconds=1e-9)
    values, _ = loop.train(job(teacher=taught_by, training=settings), tmp_path, silent)
    assert all(torch.equal(value, before[name]) for name, value in taught_by.state_dict().items())
    kept = load_file(tmp_path / "checkpoint.safetensors")
    adapters = {name for name in kept if name.startswith("net/adapters.")}
    assert adapters == {f"net/adapters.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    torch.manual_seed(settings.seed)
    untrained = Learner(tiny.network("nano"), taught_by, with_features=True)
    shapes = {name: tuple(kept[name].shape) for name in sorted(adapters) if name.endswith("weight")}
    assert [s[0] for s in shapes.values()] == list(taught_by.feature_channels)
    assert all(kept[f"optimizer/adapters.{i}.weight/momentum"].abs().max() > 0 for i in (0, 1))
    assert untrained.adapters is not None
    assert not any(name.startswith("adapters") for name in values)


def test_a_student_learns_what_its_teacher_shows(tmp_path):
    class Dimmer(Denoiser):
        """Returns half of what it is given: nothing that clean pictures would teach."""

        channels, stride, takes_sigma = 1, 1, False

        def noise(self, noisy, sigma):
            return noisy / 2, None

    noisy = draw(PICTURES, batch=4, patch=32, sigma=(5.0, 5.0))[1]
    level = torch.full((4, 1, 1, 1), 5 / 255)
    distance = {}
    for share in (0.0, 1.0):
        net = tiny.network("nano")
        taught = job(
            net,
            teacher=Dimmer(),
            training=tiny.training(steps=150, batch=4, ema=0.9),
            distillation=Distillation(output_weight=share, feature_weight=0.0),
        )
        values, _ = loop.train(taught, tmp_path / str(share), silent)
        net.load_state_dict(values)
        with torch.no_grad():
            distance[share] = (net.eval()(noisy, level) - noisy / 2).square().mean().item()
    assert distance[1.0] < distance[0.0] / 4


def test_the_teachers_features_matter(tmp_path):
    found = []
    for feature_weight in (0.0, 0.5):
        taught = job(teacher=tiny.network("small", seed=3), distillation=Distillation(feature_weight=feature_weight))
        found.append(loop.train(taught, tmp_path / str(feature_weight), silent)[0]["encoder.2.0.expand.0.weight"])
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_a_checkpoint_of_another_job_is_refused(tmp_path):
    settings = tiny.training(steps=10, checkpoint_seconds=1e-9)
    loop.train(job(training=settings), tmp_path, silent)
    with pytest.raises(InputError, match=r"checkpoint.safetensors: is the checkpoint of another run .*delete it"):
        loop.train(job(training=settings, identity="another"), tmp_path, silent)


@pytest.mark.parametrize("cut", [0, 100, 5000], ids=["empty", "in the header", "in the tensors"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, cut):
    settings = tiny.training(steps=10, checkpoint_seconds=1e-9)
    loop.train(job(training=settings), tmp_path, silent)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(IntegrityError, match=f"{path}: damaged checkpoint"):
        loop.train(job(training=settings), tmp_path, silent)


def test_a_safetensors_file_that_is_no_checkpoint_is_refused_by_name(tmp_path):
    path = tiny.write_weights("nano", tmp_path / "checkpoint.safetensors")
    with pytest.raises(IntegrityError, match=f"{path}: damaged checkpoint"):
        loop.train(job(), tmp_path, silent)


def test_a_restored_optimizer_lies_in_memory_as_the_one_that_was_saved(tmp_path):
    def learner() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        net = tiny.network("nano").to(memory_format=torch.channels_last)
        return net, Muon(net.parameters(), lr=1e-3, weight_decay=0.0, fused=False, precision=torch.float32)

    net, optimizer = learner()
    net(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 1, 1)).sum().backward()
    optimizer.step()
    position = checkpoint.Position(job="job", step=1, seconds=0.5)
    checkpoint.save(tmp_path / "c.safetensors", position, net, state(net), optimizer)
    other, fresh = learner()
    assert checkpoint.restore(tmp_path / "c.safetensors", "job", other, state(other), fresh) == position
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert one.stride() == two.stride()
        for key, value in optimizer.state[one].items():
            assert torch.equal(fresh.state[two][key], value)
            assert fresh.state[two][key].stride() == value.stride(), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu_validates_where_its_network_lies(tmp_path):
    held_out = sets.PictureSet(name="one", pictures=(sets.Picture(name="0", pixels=dead_leaves(9, 48, 64)),))

    def validate(net: Denoiser) -> float:
        assert next(net.parameters()).is_cuda
        return quality.evaluate(networks.as_function(net), held_out, sigma255=25).psnr_mdb / 1000

    settings = tiny.training(steps=300, batch=16, precision="bf16", keep_better=True)
    _, outcome = loop.train(job(training=settings, validate=validate), tmp_path, silent)
    assert outcome.psnr_db > outcome.start_psnr_db


# A machine with torch and little else


def bare(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process in which the packages of `BARE` cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({BARE!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
    )


def test_the_loop_runs_where_there_is_torch_and_little_else(tmp_path):
    code = """
from pathlib import Path
import numpy, torch
from edgekit import models, zoo
from edgekit.recipe import Distillation, Training
from edgekit.training import loop
job = loop.Job(
    net=models.create("nano"), teacher=models.create("small"), sigma=(5.0, 50.0), identity="job",
    pictures=[numpy.random.default_rng(0).integers(0, 255, (1, 32, 32), dtype=numpy.uint8)],
    training=Training(steps=3, batch=1, patch=32), distillation=Distillation(), validate=lambda net: 0.0,
)
values, outcome = loop.train(job, Path(sys.argv[1]), lambda moment: None)
print(outcome.steps, len(values))
"""
    done = bare(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", str(len(models.create("nano").state_dict()))]


@pytest.mark.parametrize("module", ["pydantic", "skimage.metrics"])
def test_what_a_bare_machine_lacks_cannot_be_imported_there(module):
    """The tests of a bare machine would pass for nothing otherwise."""
    assert "ModuleNotFoundError" in bare(f"import {module}").stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return tiny.write_pictures(tmp_path_factory.mktemp("photos") / "pictures")


@pytest.fixture
def written(tmp_path, photos) -> Path:
    """A job with a teacher and starting weights, both from files."""
    recipe = tiny.recipe(
        photos,
        student=Model(model="nano", weights=str(tiny.write_weights("nano", tmp_path / "mine.safetensors"))),
        teacher=Model(model="nano", weights="shipped"),
        training=tiny.training(steps=40, checkpoint_seconds=1e-9),
    )
    path = job_file.write(recipe, tmp_path / "job" / "job.json")
    (tmp_path / "mine.safetensors").unlink()
    return path


def test_a_job_file_says_what_the_recipe_said(written, photos):
    read = job_file.read(written)
    recipe = tiny.recipe(photos, training=tiny.training(steps=40, checkpoint_seconds=1e-9))
    assert (read.noise, read.training, read.distillation) == (recipe.noise, recipe.training, recipe.distillation)
    assert (read.name, read.channels) == ("tiny", 1)
    assert read.teacher is not None
    for model in (read.student, read.teacher):
        assert Path(model.weights).parent == written.parent
        weights.load_into(models.create(model.model, model.options), Path(model.weights))


def test_a_job_file_keeps_options_and_channels(tmp_path, photos):
    student = Model(model="nano", weights="random", options={"se": True})
    path = job_file.write(tiny.recipe(photos, channels=3, student=student), tmp_path / "job.json")
    read = job_file.read(path)
    assert read.student == Model(model="nano", weights="random", options={"se": True, "channels": 3})
    assert read.teacher is None


def test_a_job_finds_its_weights_after_its_folder_was_moved(written, tmp_path):
    written.parent.rename(tmp_path / "elsewhere")
    read = job_file.read(tmp_path / "elsewhere" / "job.json")
    assert Path(read.student.weights).parent == tmp_path / "elsewhere"


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_job_whose_weights_are_not_those_it_was_written_with_is_refused(written, damage):
    path = written.parent / "job.teacher.safetensors"
    if damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match=f"{path}: is missing or changed"):
        job_file.read(written)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("{", "is not a training job"),
        ("[]", "is not a training job"),
        ('{"kind": "edgekit-bundle", "schema_version": 1}', "not a training job of this version"),
        (
            '{"kind": "edgekit-training-job", "schema_version": 1, "files": {}, "name": "x", "channels": 1}',
            "is not a training job: 'student' is missing",
        ),
    ],
    ids=["missing", "cut short", "another shape", "another file of edgekit's", "without a student"],
)
def test_a_file_that_is_no_job_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "job.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said) as error:
        job_file.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("training", {"optimizer": "adam"}, "'training.optimizer' is 'adam'; expected 'muon' or 'adamw'"),
        ("training", {"loss": "mse"}, "'training.loss' is 'mse'; expected 'charbonnier' or 'psnr'"),
        ("training", {"precision": "fp16"}, "'training.precision' is 'fp16'; expected 'bf16' or 'float32'"),
        ("training", {"batch": 0}, "'training.batch' is 0; expected 1 or more"),
        ("training", {"accumulate": 0}, "'training.accumulate' is 0; expected 1 or more"),
        ("training", {"batch": True}, "'training.batch' is True; expected a whole number"),
        ("training", {"steps": "40"}, "'training.steps' is '40'; expected a whole number"),
        ("training", {"peak_rate": 0}, "'training.peak_rate' is 0; expected more than 0.0"),
        ("training", {"peak_rate": math.nan}, "'training.peak_rate' is nan; expected a number"),
        ("training", {"peak_rate": 10**400}, "too large"),
        ("training", {"rounding_bits": 9}, "'training.rounding_bits' is 9; expected 8 or less"),
        ("training", {"late_patch": "no"}, "'training.late_patch' is 'no'; expected a whole number"),
        ("training", {"stepps": 4}, "unknown key 'training.stepps'; did you mean 'steps'?"),
        ("noise", {"train": [55, 5]}, "'noise.train' is [55, 5]; give the lower noise level first"),
        ("noise", {"train": [5]}, "'noise.train' is [5]; expected 2 values"),
        ("noise", {"train": 5}, "'noise.train' is 5; expected a list"),
        ("noise", {"train": [5, 300]}, "'noise.train.1' is 300; expected 255.0 or less"),
        ("noise", {"evaluate": 60}, "give as `evaluate`, which is 25 unless told, a noise level within `train`"),
        ("student", {"options": {"se": 1.5}}, "'student.options.se' is 1.5; expected true or false or"),
        ("student", {"options": 3}, "'student.options' is 3; expected a section"),
        ("teacher", {"model": None}, "'teacher.model' is None; expected text"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_setting_of_a_job_that_was_changed_by_hand_is_checked(written, section, changes, said):
    settings = json.loads(written.read_text())
    settings[section] |= changes
    written.write_text(json.dumps(settings))
    with pytest.raises(InputError) as error:
        job_file.read(written)
    assert str(error.value).startswith(f"{written}: is not a training job: ")
    assert said in str(error.value)


def test_a_whole_number_in_a_job_does_where_any_number_is_wanted(written):
    settings = json.loads(written.read_text())
    settings["training"] |= {"peak_rate": 1}
    settings["noise"] |= {"train": [5, 50]}
    written.write_text(json.dumps(settings))
    read = job_file.read(written)
    assert (repr(read.training.peak_rate), repr(read.noise.train)) == ("1.0", "(5.0, 50.0)")


def test_a_job_refuses_options_that_the_shipped_weights_were_not_trained_with(tmp_path, photos):
    recipe = tiny.recipe(photos, student=Model(model="nano", options={"se": True}))
    with pytest.raises(InputError, match="the shipped weights of 'nano' were trained with se=False, not True"):
        job_file.write(recipe, tmp_path / "job.json")


def test_a_job_carries_the_shipped_weights_that_fit_the_options_and_the_data(tmp_path, photos):
    student = Model(model="base", options={"noise_level": False})
    read = job_file.read(job_file.write(tiny.recipe(photos, student=student), tmp_path / "blind" / "job.json"))
    assert read.student.options == {"noise_level": False}
    assert sha256(Path(read.student.weights)) == zoo.card("base-blind").sha256
    read = job_file.read(
        job_file.write(tiny.recipe(photos, channels=3, student=Model(model="base")), tmp_path / "colour" / "job.json")
    )
    assert read.student.options == {"channels": 3}
    assert sha256(Path(read.student.weights)) == zoo.card("base-color").sha256


def test_the_held_out_figure_is_that_of_the_protocol():
    pictures = sets.PictureSet(
        name="two", pictures=tuple(sets.Picture(name=str(s), pixels=dead_leaves(s, 44, 61)) for s in (1, 2))
    )
    net = tiny.network("nano")
    weights.load_into(net, networks.shipped("nano").weights)
    want = quality.evaluate(networks.as_function(net), pictures, sigma255=25.0).psnr_mdb / 1000
    assert command.psnr_db(net, pictures, 25.0) == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize("role", ["train", "held_out"])
@pytest.mark.parametrize(
    ("part", "said"),
    [
        (160, "'shown.png' of {role} and 'whole.png' of kept-out are the same picture"),
        (120, r"'shown.png' of {role} .* shows what is kept back as 'whole.png' of kept-out"),
    ],
)
def test_no_picture_that_a_figure_will_be_taken_on_is_learned_or_chosen_from(written, tmp_path, role, part, said):
    folders = tiny.write_pictures(tmp_path / "pictures")
    picture = Image.fromarray(dead_leaves(99, 160, 160)[0])
    picture.crop((0, 0, part, part)).save(folders / role / "shown.png")
    kept_out = tmp_path / "kept-out"
    kept_out.mkdir()
    picture.save(kept_out / "whole.png")
    with pytest.raises(InputError, match=said.format(role=role)):
        command.train(
            job_file.read(written), [folders / "train"], folders / "held_out", tmp_path / "out", kept_out=[kept_out]
        )


def test_pictures_that_are_kept_out_later_are_looked_for_and_the_same_ones_not_twice(
    written, photos, tmp_path, monkeypatch
):
    job, looked = job_file.read(written), list[str]()
    refuse = command.overlap.refuse_overlaps
    monkeypatch.setattr(
        command.overlap, "refuse_overlaps", lambda one, *others: looked.append(one.name) or refuse(one, *others)
    )

    def sitting(*kept_out: Path) -> str:
        folders = [photos / "train"], photos / "held_out", tmp_path / "out"
        return command.train(job, *folders, kept_out=kept_out, pause_at=0.0)[1].ended_by

    shown = shutil.copytree(photos / "evaluation", tmp_path / "shown")
    assert [sitting(), sitting()] == ["pause", "pause"]
    assert looked == ["train", "held_out"]
    assert sitting(photos / "evaluation") == "pause"
    assert looked == ["train", "held_out"] * 2
    shutil.copyfile(photos / "train" / "0.png", shown / "0.png")
    with pytest.raises(InputError, match=r"'0\.png' of train and '0\.png' of shown are the same picture"):
        sitting(shown)


def test_two_folders_to_learn_from_may_share_a_picture(written, photos, tmp_path):
    twice = [photos / "train", shutil.copytree(photos / "train", tmp_path / "again")]
    path, outcome = command.train(job_file.read(written), twice, photos / "held_out", tmp_path / "out")
    assert (path.name, outcome.ended_by) == ("nano.safetensors", "steps")


@pytest.mark.slow
def test_a_job_trains_and_goes_on_where_there_is_torch_and_little_else(written, photos, tmp_path):
    run = "import runpy; runpy.run_module('edgekit.training', run_name='__main__')"

    def start(out: str, *more: str) -> subprocess.CompletedProcess[str]:
        pictures = ("--pictures", str(photos / "train"), "--held-out", str(photos / "held_out"))
        return bare(run, str(written), *pictures, "--out", str(tmp_path / out), *more)

    whole = start("whole")
    assert whole.returncode == 0, whole.stderr + whole.stdout
    result = tmp_path / "whole" / "nano.safetensors"
    weights.load_into(models.create("nano"), result)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:-1]] == [10, 20, 30, 40]
    assert lines[-1]["ended_by"] == "steps"
    assert "step 40, loss 0." in whole.stdout
    assert "nan dB" not in whole.stdout
    assert whole.stdout.splitlines()[-1] == str(result)

    for step in (10, 20, 30):
        paused = start("parts", "--pause-after", "1e-9")
        assert paused.returncode == 0, paused.stderr + paused.stdout
        assert f"step {step}, loss 0." in paused.stdout
        assert paused.stdout.splitlines()[-1].endswith("(paused; the same command goes on)")
    on = start("parts")
    assert on.returncode == 0, on.stderr + on.stdout
    assert (tmp_path / "parts" / "nano.safetensors").read_bytes() == result.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_train_one_network_until_one_clock_says_so(written, photos, tmp_path, launcher):
    out = tmp_path / "out"
    launch = ("-m", *launcher, "-m", "edgekit.training")
    pictures = ("--pictures", str(photos / "train"), "--held-out", str(photos / "held_out"), "--out", str(out))
    ran = subprocess.run(
        [sys.executable, *launch, str(written), *pictures, "--max-minutes", "0.05"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["ended_by"] == "time"
    assert last["images"] == last["steps"] * 2 * 2  # two processes with a batch of two
    weights.load_into(models.create("nano"), out / "nano.safetensors")


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_a_warning_and_counts_its_patches(written, photos, tmp_path):
    code, said = two_machines(written, photos, tmp_path, "--pause-after 1e-9")
    assert code == 0, said
    folders = (
        "--pictures",
        str(photos / "train"),
        "--held-out",
        str(photos / "held_out"),
        "--out",
        str(tmp_path / "0"),
    )
    ran = subprocess.run(
        [sys.executable, "-m", "edgekit.training", str(written), *folders],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    assert "its steps took 4 patches each, these take 2: the number of processes is another\n" in ran.stdout
    last = json.loads((tmp_path / "0" / "log.jsonl").read_text().splitlines()[-1])
    assert last["images"] == 10 * 4 + 30 * 2


def two_machines(job: Path, photos: Path, out: Path, rank_0: str = "", rank_1: str = "") -> tuple[int, str]:
    """Train in two processes, each with a folder and options of its own; return the exit code and what they said."""
    each = (
        f'[ "$RANK" = 0 ] && more="{rank_0}" || more="{rank_1}"; exec "{sys.executable}" -m edgekit.training "{job}" '
        f'--pictures "{photos}/train" --held-out "{photos}/held_out" --out "{out}/$RANK" $more'
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", "sh", "-c", each)
    ran = subprocess.run(
        [sys.executable, *launch],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.slow
def test_two_machines_pause_together_and_go_on_from_the_main_ones_checkpoint(written, photos, tmp_path):
    code, said = two_machines(written, photos, tmp_path / "whole")
    assert code == 0, said
    # The pictures are looked through on the main one, which comes later to the first step, and so pauses earlier.
    code, said = two_machines(written, photos, tmp_path / "parts", "--pause-after 1e-9", "--pause-after 9")
    assert code == 0, said
    assert "step 10, loss 0." in said
    assert "step 20" not in said
    assert "(paused; the same command goes on)" in said
    assert [p.parent.name for p in (tmp_path / "parts").rglob("checkpoint.safetensors")] == ["0"]
    code, said = two_machines(written, photos, tmp_path / "parts")
    assert code == 0, said
    assert "going on at step 10\n" in said
    assert "step 10, loss" not in said
    whole, parts = ((tmp_path / name / "0" / "nano.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "told"),
    [(0, "damaged checkpoint"), (1, "is there for process 1, not for the main one, which would start over")],
    ids=["damaged", "of another process alone"],
)
def test_each_machine_says_why_it_cannot_go_on(written, photos, tmp_path, rank, told):
    (tmp_path / str(rank)).mkdir()
    (tmp_path / str(rank) / "checkpoint.safetensors").write_bytes(b"half")
    code, said = two_machines(written, photos, tmp_path)
    assert code != 0
    assert f"error: {tmp_path}/{rank}/checkpoint.safetensors: {told}" in said


@pytest.mark.slow
def test_two_machines_with_different_jobs_do_not_train_together(written, photos, tmp_path):
    code, said = two_machines(written, photos, tmp_path, "--max-minutes 1", "--max-minutes 2")
    assert code != 0
    assert "error: process 1 has another job than the main one (other settings, pictures, weights" in said
    assert not list(tmp_path.rglob("log.jsonl"))
    assert "Connection closed" not in said


@pytest.fixture
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_batch_that_memory_does_not_hold_is_refused_with_one_that_it_may_hold(little_memory, tmp_path):
    big = job(training=tiny.training(batch=4_000_000, accumulate=2, patch=16))
    said = r"out of memory on cpu with training\.batch=4000000 patches of 16 pixels; " + (
        r"--set training\.batch=2000000 --set training\.accumulate=4 makes the same step"
    )
    with pytest.raises(InputError, match=said):
        loop.train(big, tmp_path, silent)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["allocator", "driver", "cuDNN", "cuBLAS"],
)
def test_memory_that_runs_out_on_a_gpu_is_known_by_all_its_names(tmp_path, monkeypatch, error):
    taken = 0

    def step(self: object, step: int, seconds: float) -> None:
        nonlocal taken
        taken += 1
        if taken > 20:
            raise error
        taking(self, step, seconds)

    taking = loop._Run.step
    monkeypatch.setattr(loop._Run, "step", step)
    settings = tiny.training(steps=100, batch=4, patch=16, late_patch=24, checkpoint_seconds=1e-9)
    with pytest.raises(InputError, match=r"with training\.batch=4 patches of 24 pixels") as told:
        loop.train(job(training=settings), tmp_path, silent)
    assert "--set training.batch=2 --set training.accumulate=2 makes the same step" in str(told.value)
    path = tmp_path / "checkpoint.safetensors"
    assert str(told.value).endswith(f"from here on with --set student.weights={path}")


def test_pictures_that_memory_does_not_hold_are_told_from_a_batch(tmp_path, monkeypatch):
    def bank(pictures: object, device: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "PatchBank", bank)
    with pytest.raises(InputError, match=r"out of memory on cpu with 0\.0 MB of training pictures; take fewer"):
        loop.train(job(), tmp_path, silent)


def test_a_teacher_with_random_weights_teaches_nothing(photos, tmp_path):
    def trained(teacher: Model | None) -> bytes:
        torch.manual_seed(0)
        path = job_file.write(
            tiny.recipe(photos, teacher=teacher, training=tiny.training(steps=2)), tmp_path / "job.json"
        )
        out = tmp_path / ("alone" if teacher is None else "taught")
        return command.train(job_file.read(path), [photos / "train"], photos / "held_out", out)[0].read_bytes()

    assert trained(Model(model="nano", weights="random")) == trained(None)


def test_a_limit_of_minutes_makes_the_learning_rate_follow_time(written, photos, tmp_path):
    job = command.timed(job_file.read(written), 0.005)
    result, outcome = command.train(job, [photos / "train"], photos / "held_out", tmp_path / "out")
    assert result.is_file()
    assert outcome.ended_by == "time"
    assert outcome.seconds >= 0.3


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.json", "--pictures", "."], 2, "missing.json: no such file"),
        (["JOB", "--pictures", "nowhere"], 2, "nowhere: no such folder"),
    ],
    ids=["no job", "no pictures"],
)
def test_the_command_explains_what_is_wrong_in_one_line(written, tmp_path, capsys, arguments, code, said):
    given = [str(written) if a == "JOB" else a for a in arguments]
    assert command.main([*given, "--out", str(tmp_path / "out")]) == code
    assert capsys.readouterr().out.startswith(f"error: {said}")


@pytest.mark.parametrize("minutes", ["-1", "0", "nan", "inf"])
def test_a_limit_of_minutes_that_no_training_reaches_is_refused(written, photos, tmp_path, capsys, minutes):
    given = [str(written), "--pictures", str(photos / "train"), "--held-out", str(photos / "held_out")]
    assert command.main([*given, "--out", str(tmp_path / "out"), f"--max-minutes={minutes}"]) == 2
    assert capsys.readouterr().out.startswith(f"error: training cannot last {minutes} minutes; give a positive number")


def out_is_a_file(out: Path) -> str:
    out.write_text("")
    return f"{out}: cannot be written: File exists; choose another place with -o"


def out_is_below_a_file(out: Path) -> str:
    out.parent.rmdir()
    out.parent.write_text("")
    return f"{out}: cannot be written: Not a directory; choose another place with -o"


def log_is_a_folder(out: Path) -> str:
    (out / "log.jsonl").mkdir(parents=True)
    return f"{out}: cannot be written: Is a directory; choose another place with -o"


def disk_is_full(out: Path) -> str:
    out.mkdir()
    (out / "log.jsonl").symlink_to("/dev/full")
    return f"{out}: no space is left on the disk for it"


def weights_are_a_folder(out: Path) -> str:
    (out / "nano.safetensors" / "other").mkdir(parents=True)
    return f"{out / 'nano.safetensors'}: cannot be written: "


@pytest.mark.parametrize(
    "prepare",
    [out_is_a_file, out_is_below_a_file, log_is_a_folder, disk_is_full, weights_are_a_folder],
    ids=lambda prepare: prepare.__name__,
)
def test_an_out_that_cannot_be_written_is_told_in_one_line(written, photos, tmp_path, capsys, prepare):
    out = tmp_path / "folder" / "out"
    out.parent.mkdir()
    said = prepare(out)
    given = [str(written), "--pictures", str(photos / "train"), "--held-out", str(photos / "held_out")]
    assert command.main([*given, "--out", str(out)]) == 2
    assert f"error: {said}" in capsys.readouterr().out


def test_a_folder_that_is_in_use_is_refused(written, photos, tmp_path, capsys):
    out = tmp_path / "out"
    held = """
import pathlib, sys
from edgekit import run
with run.lock(pathlib.Path(sys.argv[1])):
    print(flush=True)
    input()
"""
    out.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", held, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        given = [str(written), "--pictures", str(photos / "train"), "--held-out", str(photos / "held_out")]
        assert command.main([*given, "--out", str(out)]) == 2
        other.kill()
    assert f"error: {out}: is in use by process {other.pid}" in capsys.readouterr().out
    assert command.main([*given, "--out", str(out)]) == 0


def test_a_training_that_comes_apart_is_told_as_a_setting_that_is_wrong(written, photos, tmp_path, capsys):
    settings = json.loads(written.read_text())
    settings["training"] |= {"peak_rate": 1e30, "final_rate": 1e30, "warmup_steps": 0, "optimizer": "adamw"}
    written.write_text(json.dumps(settings))
    given = [str(written), "--pictures", str(photos / "train"), "--held-out", str(photos / "held_out")]
    assert command.main([*given, "--out", str(tmp_path / "out")]) == 2
    assert "error: the loss or its gradient is not finite" in capsys.readouterr().out


def test_one_folder_gives_both_pictures_to_learn_from_and_held_out_ones(written, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    from PIL import Image

    for seed in range(24):
        Image.fromarray(dead_leaves(seed, 32, 32)[0]).save(folder / f"{seed}.png")
    result, _ = command.train(job_file.read(written), [folder], None, tmp_path / "out")
    assert result.is_file()


def test_of_large_held_out_pictures_the_middle_is_looked_at_with_the_jobs_noise(written, photos, tmp_path, monkeypatch):
    from PIL import Image

    large = tmp_path / "large"
    large.mkdir()
    Image.fromarray(dead_leaves(7, 520, 600)[0]).save(large / "0.png")
    seen: list[tuple[int, ...]] = []
    seeds: list[int] = []

    def look(net: Denoiser, pictures: sets.PictureSet, sigma255: float, *, seed: int) -> float:
        seen.extend(p.pixels.shape for p in pictures)
        seeds.append(seed)
        return 0.0

    monkeypatch.setattr(command, "psnr_db", look)
    job = job_file.read(written)
    job = dataclasses.replace(job, noise=dataclasses.replace(job.noise, seed=7))
    command.train(job, [photos / "train"], large, tmp_path / "out")
    assert set(seen) == {(1, 512, 512)}
    assert set(seeds) == {7}


def test_a_noise_range_survives_the_job_file(tmp_path, photos):
    recipe = tiny.recipe(photos, noise=Noise(train=(1.5, 20.0), evaluate=15.0, seed=3))
    assert job_file.read(job_file.write(recipe, tmp_path / "job.json")).noise == recipe.noise
