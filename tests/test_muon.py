"""Our extra, the optimiser of step 2: orthogonal updates of kernels, Adam for the rest, one schedule, resumption."""

import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from models.AR import PixelCNN
from utils.muon import Muon, orthogonalise, split_parameters

SMALL = dict(num_blocks=2, channels=4, head_channels=6, first_kernel_size=3, kernel_size=3)


@pytest.mark.parametrize("shape", [(8, 8), (8, 200), (20, 8)])
def test_singular_values_become_alike_and_singular_vectors_stay(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    sizes = torch.logspace(0, -2, len(v))  # the largest is a hundred times the smallest
    found = u.mT @ orthogonalise(1000 * u * sizes @ v) @ v.mT
    assert found.diag().min() > 0.6 and found.diag().max() < 1.3
    assert torch.allclose(found, found.diag().diag(), atol=1e-3)
    assert not orthogonalise(torch.zeros(shape)).any()


def test_updates_of_kernels_by_hand():
    weight, other = nn.Parameter(torch.zeros(3, 2, 1, 4)), nn.Parameter(torch.zeros(5))
    optimizer = Muon([weight], [other], muon_rate=0.1, learning_rate=0.2, momentum=0.9)
    average, expected = torch.zeros(3, 8), torch.zeros(3, 8)
    for _ in range(3):
        weight.grad, other.grad = torch.randn_like(weight), torch.randn_like(other)
        optimizer.step()
        gradient = weight.grad.flatten(1)
        average = 0.9 * average + 0.1 * gradient
        expected -= 0.1 * orthogonalise(0.9 * average + 0.1 * gradient)
    assert torch.allclose(weight.detach().flatten(1), expected, atol=1e-6)


def small_training(muon_rate):
    """Return a small network, its optimiser, and a schedule that changes the rates in every step."""
    torch.manual_seed(0)
    network = PixelCNN(**SMALL)
    optimizer = Muon(*split_parameters(network), muon_rate, 3e-3)
    return network, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(network, optimizer, schedule, num_steps):
    x = (torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    for _ in range(num_steps):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network(x), x).backward()
        optimizer.step()
        schedule.step()


class OtherBlocks(nn.Module):
    """A network whose `blocks` hold other modules and parameters, or none."""

    def __init__(self, blocks):
        super().__init__()
        self.first, self.blocks = nn.Conv2d(1, 2, 1), blocks


def test_blocks_may_be_missing_or_hold_anything():
    layers = [nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Conv2d(2, 2, 1), nn.Linear(2, 2))]
    network = OtherBlocks(nn.Sequential(*layers))
    network.blocks.shift = nn.Parameter(torch.zeros(1, 2, 1, 1))
    kernels, others = split_parameters(network)
    assert [id(each) for each in kernels] == [id(layers[0].weight), id(layers[2][0].weight)]
    assert len(kernels) + len(others) == len(list(network.parameters()))
    for network in (nn.Sequential(nn.Conv2d(1, 1, 1)), OtherBlocks(8)):
        kernels, others = split_parameters(network)
        assert not kernels and len(others) == 2
        optimizer = Muon(kernels, others, 0.02, 1e-3)
        before = others[0].detach().clone()
        sum(each.sum() for each in others).backward()
        optimizer.step()
        assert (others[0] < before).all()


def test_other_parameters_are_updated_by_adam():
    kernels = {f"blocks.{i}.{j}.weight" for i in (0, 1) for j in (0, 1)}
    for muon_rate, by_muon in ((0.02, kernels), (None, set())):
        network, *others = small_training(muon_rate)
        train(network, *others, num_steps=1)
        expected = small_training(None)[0]
        adam = torch.optim.Adam(expected.parameters(), 3e-3, betas=(0.9, 0.99), fused=True)
        train(expected, adam, SimpleNamespace(step=lambda: None), num_steps=1)
        pairs = zip(network.named_parameters(), expected.parameters())
        assert {name for (name, weight), other in pairs if not torch.equal(weight, other)} == by_muon


@pytest.mark.parametrize("forgotten", [(), ("decoupled_weight_decay", "capturable")])
@pytest.mark.parametrize("muon_rate", [0.02, None])
def test_training_resumes_bit_for_bit(muon_rate, forgotten):
    """Also where an older torch has saved the state, which knew fewer options of Adam."""
    whole = small_training(muon_rate)
    train(*whole, num_steps=6)
    first = small_training(muon_rate)
    train(*first, num_steps=3)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in first], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for name in forgotten:
        states[1]["param_groups"][0].pop(name, None)
    second = small_training(muon_rate)
    train(*second, num_steps=1)  # what is loaded replaces these states
    for each, state in zip(second, states):
        each.load_state_dict(state)
    train(*second, num_steps=3)
    train(*first, num_steps=3)  # which saving and loading has not changed
    for network, *_ in (first, second):
        assert all(map(torch.equal, whole[0].parameters(), network.parameters()))
