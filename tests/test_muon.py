"""The optimiser of step 2's kernels."""

import pytest
import torch

import hw2_step2_main as step2
from models.AR import MaskedConv2d
from utils.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (8, 200), (20, 8)])
def test_singular_values_become_alike_and_singular_vectors_stay(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    sizes = torch.logspace(0, -2, len(v))  # the largest is a hundred times the smallest
    found = u.mT @ orthogonalised(1000 * u * sizes @ v) @ v.mT
    assert found.diag().min() > 0.6 and found.diag().max() < 1.3
    assert torch.allclose(found, found.diag().diag(), atol=1e-3)


def test_no_gradient_gives_no_update():
    assert not orthogonalised(torch.zeros(4, 9)).any()


def test_updates_by_hand():
    weight = torch.nn.Parameter(torch.zeros(3, 2, 1, 4))
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    average, expected = torch.zeros(3, 8), torch.zeros(3, 8)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        gradient = weight.grad.flatten(1)
        average = 0.9 * average + 0.1 * gradient
        expected -= 0.1 * orthogonalised(0.9 * average + 0.1 * gradient)
    assert torch.allclose(weight.detach().flatten(1), expected, atol=1e-6)


def test_hidden_weights_do_not_move():
    layer = MaskedConv2d("B", 3, 4, 5, padding=2)
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
    Muon([layer.weight], lr=0.1).step()
    moved = layer.weight.detach() != before
    assert moved.equal(layer.mask.bool())


@pytest.mark.parametrize("conditional", [False, True])
def test_every_parameter_has_one_optimiser(conditional):
    network = step2.build_network(conditional, **step2.ARCHITECTURE)
    optimizers = step2.make_optimizers(network, step2.DEFAULTS)
    trained = [
        each
        for optimizer in optimizers.values()
        for group in optimizer.param_groups
        for each in group["params"]
    ]
    assert sorted(map(id, trained)) == sorted(map(id, network.parameters()))
    kernels = {id(layer.weight) for block in network.blocks for layer in block}
    assert {id(each) for each in optimizers["muon"].param_groups[0]["params"]} == kernels
    depthwise = step2.build_network(conditional, **{**step2.ARCHITECTURE, "block": "depthwise"})
    optimizers = step2.make_optimizers(depthwise, step2.DEFAULTS)
    kernels = {id(layer.weight) for block in depthwise.blocks for layer in block[1:]}
    assert {id(each) for each in optimizers["muon"].param_groups[0]["params"]} == kernels
    assert list(step2.make_optimizers(network, {**step2.DEFAULTS, "muon_rate": None})) == ["adam"]
