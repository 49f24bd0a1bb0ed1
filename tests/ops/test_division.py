"""The operator that divides [N | Z]: beside its definition, where no key is visible, where Z is none; checks."""

import pytest
import torch

from taylor_attention.ops.division import divide, divide_backward

Z = torch.tensor([0.5, 2.0, -1.0, 0.0, torch.inf, 3.0], dtype=torch.float64)


def drawn():
    """[N | Z] of six queries of two heads; the fourth sees nothing."""
    out = torch.cat([torch.randn(1, 2, 6, 3, dtype=torch.float64), Z.expand(1, 2, 6)[..., None]], -1)
    out[:, :, 3] = 0
    return out, out[..., -1] == 0


def test_quotients():
    out, empty = drawn()
    y, z = divide(out, empty)
    assert torch.equal(y[:, :, [0, 1, 5]], out[:, :, [0, 1, 5], :-1] / out[:, :, [0, 1, 5], -1:])
    assert y[:, :, [2, 4]].isnan().all()
    assert torch.equal(y[:, :, 3], torch.zeros(1, 2, 3, dtype=torch.float64))
    assert torch.equal(z[0, 0, [0, 1, 3, 5]], torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("expanded", [True, False])
def test_gradients_are_those_of_the_definition(expanded):
    out, empty = (x[:, :, [0, 1, 3, 5]].contiguous() for x in drawn())
    grad = torch.randn(1, 2, 1, 3, dtype=torch.float64).expand(1, 2, 4, 3)
    grad = grad if expanded else grad * torch.arange(1, 5)[:, None]
    found, expected = out.clone().requires_grad_(), out.clone().requires_grad_()
    (by_found,) = torch.autograd.grad(divide(found, empty)[0], found, grad)
    quotient = expected[..., :-1] / torch.where(empty, 1, expected[..., -1])[..., None]
    (by_expected,) = torch.autograd.grad(quotient, expected, grad)
    assert torch.allclose(by_found, by_expected, rtol=1e-13, atol=0)


def test_the_operators_pass_pytorchs_own_checks():
    out, empty = (x[:, :, [0, 1, 3, 5]].contiguous() for x in drawn())
    found = torch.library.opcheck(divide, (out.requires_grad_(), empty))
    assert set(found.values()) == {"SUCCESS"}
    y, z = (x.detach() for x in divide(out, empty))
    checks = ("test_schema", "test_faketensor")
    found = torch.library.opcheck(divide_backward, (torch.ones_like(y), y, z, empty), test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")
