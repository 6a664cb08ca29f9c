"""The optimiser of step 2: orthogonal updates of kernels, Adam for the rest, one schedule, resumption."""

import io

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import hw2_step2_main as step2
from models.AR import MaskedConv2d, PixelCNN
from utils.muon import Muon, orthogonalise

SMALL = dict(num_blocks=2, channels=4, head_channels=6, first_kernel_size=3, kernel_size=3)


@pytest.mark.parametrize("shape", [(8, 8), (8, 200), (20, 8)])
def test_singular_values_become_alike_and_singular_vectors_stay(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    sizes = torch.logspace(0, -2, len(v))  # the largest is a hundred times the smallest
    found = u.mT @ orthogonalise(1000 * u * sizes @ v) @ v.mT
    assert found.diag().min() > 0.6 and found.diag().max() < 1.3
    assert torch.allclose(found, found.diag().diag(), atol=1e-3)


def test_no_gradient_gives_no_update():
    assert not orthogonalise(torch.zeros(4, 9)).any()


def test_updates_of_kernels_by_hand():
    weight, other = torch.nn.Parameter(torch.zeros(3, 2, 1, 4)), torch.nn.Parameter(torch.zeros(5))
    optimizer = Muon([weight], [other], muon_rate=0.1, learning_rate=0.2, momentum=0.9)
    average, expected = torch.zeros(3, 8), torch.zeros(3, 8)
    for _ in range(3):
        weight.grad, other.grad = torch.randn_like(weight), torch.randn_like(other)
        optimizer.step()
        gradient = weight.grad.flatten(1)
        average = 0.9 * average + 0.1 * gradient
        expected -= 0.1 * orthogonalise(0.9 * average + 0.1 * gradient)
    assert torch.allclose(weight.detach().flatten(1), expected, atol=1e-6)


def test_hidden_weights_do_not_move():
    layer = MaskedConv2d("B", 3, 4, 5, padding=2)
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
    Muon([layer.weight], [layer.bias], muon_rate=0.1, learning_rate=0.1).step()
    moved = layer.weight.detach() != before
    assert moved.equal(layer.mask.bool())


def small_training(muon_rate):
    """Return a small network, its optimiser, and a schedule that changes the rates in every step."""
    torch.manual_seed(0)
    network = PixelCNN(**SMALL)
    optimizer = Muon(*step2.split_parameters(network), muon_rate, 3e-3)
    return network, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(network, optimizer, schedule, num_steps):
    x = (torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    for _ in range(num_steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(network(x), x).backward()
        optimizer.step()
        schedule.step()


def same_weights(network, other):
    return all(map(torch.equal, network.parameters(), other.parameters()))


def test_every_parameter_is_in_one_group():
    network, optimizer, _ = small_training(0.02)
    others, kernels = (group["params"] for group in optimizer.param_groups)
    assert sorted(map(id, others + kernels)) == sorted(map(id, network.parameters()))
    assert set(map(id, kernels)) == {id(layer.weight) for block in network.blocks for layer in block}
    network, optimizer, _ = small_training(None)
    (group,) = optimizer.param_groups
    assert sorted(map(id, group["params"])) == sorted(map(id, network.parameters()))


def test_without_a_rate_for_kernels_it_is_adam():
    network, *others = small_training(None)
    train(network, *others, num_steps=4)
    expected = small_training(None)[0]
    adam = torch.optim.Adam(expected.parameters(), 3e-3, betas=(0.9, 0.99), fused=True)
    train(expected, adam, LambdaLR(adam, lambda step: 1 / (1 + step)), num_steps=4)
    assert same_weights(network, expected)


def test_other_parameters_are_updated_by_adam():
    network, optimizer, schedule = small_training(0.02)
    train(network, optimizer, schedule, num_steps=1)
    expected = small_training(None)[0]
    adam = torch.optim.Adam(expected.parameters(), 3e-3, betas=(0.9, 0.99), fused=True)
    train(expected, adam, LambdaLR(adam, lambda step: 1), num_steps=1)
    kernels = {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in range(2)}
    differ = {
        name
        for name, weight in network.named_parameters()
        if not torch.equal(weight, expected.get_parameter(name))
    }
    assert differ == kernels


def test_one_schedule_scales_both_rates():
    network, optimizer, schedule = small_training(0.02)
    train(network, optimizer, schedule, num_steps=3)
    assert schedule.get_last_lr() == [pytest.approx(3e-3 / 4), pytest.approx(0.02 / 4)]
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    before = [each.detach().clone() for each in network.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, network.parameters()))


@pytest.mark.parametrize("muon_rate", [0.02, None])
def test_training_resumes_bit_for_bit(muon_rate):
    whole = small_training(muon_rate)
    train(*whole, num_steps=6)
    first = small_training(muon_rate)
    train(*first, num_steps=3)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in first], file)
    file.seek(0)
    second = small_training(muon_rate)
    train(*second, num_steps=1)  # what is loaded replaces these states
    for each, state in zip(second, torch.load(file, weights_only=True)):
        each.load_state_dict(state)
    train(*second, num_steps=3)
    assert same_weights(whole[0], second[0])
    # Saving and loading has not changed the first training.
    train(*first, num_steps=3)
    assert same_weights(whole[0], first[0])


def test_a_negative_rate_is_refused_and_zero_freezes_the_kernels():
    kernel, other = torch.nn.Parameter(torch.ones(2, 2, 1, 1)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="muon_rate"):
        Muon([kernel], [other], -0.1, learning_rate=1e-3)
    optimizer = Muon([kernel], [other], 0.0, learning_rate=1e-3)
    (kernel.sum() + other.sum()).backward()
    optimizer.step()
    assert kernel.eq(1).all() and other.lt(1).all()
