"""Muon for kernels, against torch's own on matrices, and AdamW beside it."""

import pytest
import torch
from torch import nn

from sigphi.train.muon import Muon, is_kernel, orthogonalized


def make_tower(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 24, 3, bias=False), nn.Tanh(), nn.Conv2d(24, 5, 2))
    return tower.to(memory_format=memory_format)


def take_steps(tower: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, last: int = 4) -> None:
    """Each with gradients that depend on its number and the weights."""
    for number in range(first, last):
        torch.manual_seed(number)
        tower(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(20, 7), (7, 20), (16, 16)])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_singular_values_come_near_one(shape, has_bfloat16, monkeypatch):
    monkeypatch.setattr("sigphi.train.muon.cpu_has_bfloat16", lambda: has_bfloat16)
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 1e3
    left, values, right = torch.linalg.svd(orthogonalized(matrix).float(), full_matrices=False)
    assert values.min() > 0.6 and values.max() < 1.3
    expected = torch.linalg.svd(matrix, full_matrices=False)
    assert ((left @ right) - (expected[0] @ expected[2])).norm() / (left @ right).norm() < 0.1
    assert orthogonalized(torch.zeros(shape)).abs().max() == 0
    assert orthogonalized(matrix).dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kernels_move_as_matrices_by_torch_and_the_rest_by_adamw(memory_format):
    towers = [make_tower(memory_format), make_tower()]
    kernels = [parameter for parameter in towers[1].parameters() if is_kernel(parameter)]
    matrices = [nn.Parameter(kernel.detach().flatten(1)) for kernel in kernels]
    assert [tuple(matrix.shape) for matrix in matrices] == [(24, 72), (5, 96)]
    rest = [parameter for parameter in towers[1].parameters() if not is_kernel(parameter)]
    adamw = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.3)
    by_torch = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    ours = Muon(towers[0].parameters(), lr=1e-2, weight_decay=0.3)
    for number in range(4):
        take_steps(towers[0], ours, number, number + 1)
        torch.manual_seed(number)
        towers[1](torch.randn(4, 3, 8, 8)).square().mean().backward()
        for kernel, matrix in zip(kernels, matrices, strict=True):
            matrix.grad = kernel.grad.flatten(1)
        adamw.step()
        by_torch.step()
        towers[1].zero_grad()
        for kernel, matrix in zip(kernels, matrices, strict=True):
            kernel.data.copy_(matrix.view_as(kernel))
    for (name, found), expected in zip(towers[0].named_parameters(), towers[1].parameters(), strict=True):
        # Rounding to bfloat16 may fall either way where the order of a sum differs.
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3, msg=name)
    assert ours.state[towers[0][1].weight].keys() == {"momentum_buffer", "step"}


def test_its_states_can_be_saved_and_loaded():
    whole, broken = make_tower(), make_tower()
    take_steps(whole, Muon(whole.parameters(), lr=1e-2))
    first = Muon(broken.parameters(), lr=1e-2)
    take_steps(broken, first, 0, 2)
    second = Muon(broken.parameters(), lr=1e-2)
    second.load_state_dict(first.state_dict())
    take_steps(broken, second, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))


def test_the_learning_rate_of_a_group_is_its_own():
    tower = make_tower()
    kernel = tower[1].weight
    before = kernel.detach().clone()
    groups = [{"params": [kernel], "lr": 0.0}, {"params": [tower[3].weight], "lr": 1e-2}]
    take_steps(tower, Muon(groups, lr=1.0), 0, 1)
    assert torch.equal(kernel, before)


def test_a_kernel_is_of_a_convolution_behind_the_first():
    named = make_tower().named_parameters()
    assert [name for name, parameter in named if is_kernel(parameter)] == ["1.weight", "3.weight"]
