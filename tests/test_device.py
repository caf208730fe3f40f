"""What this machine computes in: told from what a processor can do, and float32 where bf16 would only be a detour."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import profile

from ctvae import device
from ctvae.models.blocks import MOST_PASSED_OVER, Conv

X86 = {"architecture": "x86_64", "avx512_f": True}


@pytest.mark.parametrize(
    ("onednn", "capabilities", "expected"),
    [
        (True, {**X86, "amx_bf16": True}, True),  # Xeon since 2023
        (True, {**X86, "avx512_bf16": True}, True),  # Ryzen since 2022
        (True, X86, False),  # Xeon of 2019: oneDNN takes bf16 and computes in float32
        (False, {"architecture": "x86_64", "avx2": True}, False),
        (True, {"architecture": "arm64", "bf16": True}, True),
        (True, {}, True),  # a PyTorch that does not tell
    ],
)
def test_bf16_takes_instructions_for_it(monkeypatch, onednn, capabilities, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert device.computes_bf16() == expected


@pytest.mark.parametrize("has", [True, False])
def test_networks_in_use_are_in_bf16_where_it_is_computed_and_asked_for(monkeypatch, has):
    monkeypatch.setattr(device, "computes_bf16", lambda: has)
    x, layer = torch.randn(2, 3), nn.Linear(3, 3)
    for precision in ("bf16", "fp32"):
        with device.autocast(precision, torch.device("cpu")):
            assert layer(x).dtype == (torch.bfloat16 if has and precision == "bf16" else torch.float32)


@pytest.mark.parametrize(("channels", "size"), [(8, (6, 7, 9)), (64, (16, 20, 4)), (96, (4, 5, 3))])
def test_one_small_volume_is_convolved_by_onednn(channels, size):
    """PyTorch would take its own loop; the numbers are those of a convolution in float64."""
    torch.manual_seed(0)
    assert channels * size[0] * size[1] <= MOST_PASSED_OVER
    conv = Conv(channels, 5, kernel_size=3, padding=1)
    x = torch.randn(1, channels, *size)
    with torch.no_grad(), profile() as seen:
        found = conv(x)
    names = {event.key for event in seen.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert "aten::slow_conv3d_forward" not in names
    exact = nn.functional.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_what_learns_is_left_to_pytorch():
    """oneDNN's own call knows no gradients."""
    conv, x = Conv(4, 4, kernel_size=3, padding=1), torch.randn(1, 4, 5, 6, 7)
    conv(x).square().sum().backward()
    exact = nn.functional.conv3d(x, conv.weight, conv.bias, padding=1).square().sum()
    (expected,) = torch.autograd.grad(exact, conv.weight)
    torch.testing.assert_close(conv.weight.grad, expected)
