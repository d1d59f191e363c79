"""Bytes and work of operators on tensors with and without data."""

from contextlib import nullcontext

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import PhiForCausalLM

from sigphi.train.memory import MemoryMeter, Speed, fake_mode, materialize

CPU = torch.device("cpu")
KB = 2**10


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count * KB, dtype=torch.uint8)


def test_a_tensor_counts_from_its_making_to_its_release_by_kind():
    with MemoryMeter(CPU) as meter:
        meter.kind = "first"
        one = kib(3)
        meter.kind = "second"
        two = kib(5)
        assert (meter.alive["first"], meter.alive["second"], meter.total) == (3 * KB, 5 * KB, 8 * KB)
        del one
        assert (meter.alive["first"], meter.total) == (0, 5 * KB)
        del two
    assert meter.total == 0


def test_views_and_results_in_place_add_nothing():
    with MemoryMeter(CPU) as meter:
        tensor = kib(4)
        views = [tensor[:8], tensor.view(2, -1).t(), tensor.add_(1)]
        assert meter.total == 4 * KB
        del tensor
        assert meter.total == 4 * KB, "the views hold its storage"
        del views
        assert meter.total == 0


def test_a_moment_keeps_what_was_alive_at_its_highest():
    with MemoryMeter(CPU) as meter:
        meter.kind = "weights"
        weights = kib(1)
        meter.begin("forward", "activations")
        kept, freed = kib(2), kib(7)
        del freed
        meter.begin("backward", "gradients")
        gradients = kib(4)
        meter.end()
        after = kib(100)
    assert meter.moments == {
        "forward": {"weights": 1 * KB, "activations": 9 * KB},
        "backward": {"weights": 1 * KB, "activations": 2 * KB, "gradients": 4 * KB},
    }
    del weights, kept, gradients, after


def test_a_tensor_can_be_moved_to_another_kind():
    with MemoryMeter(CPU) as meter:
        meter.kind = "one"
        tensor = kib(2)
        meter.move(tensor[:5], "other")
        assert (meter.alive["one"], meter.alive["other"]) == (0, 2 * KB)
        del tensor
        assert meter.total == 0


def test_tensors_elsewhere_are_not_counted():
    with MemoryMeter(torch.device("cuda")) as meter:
        kept = kib(2)
    assert meter.total == 0 and kept.numel() == 2 * KB


def test_work_is_flops_traffic_or_latency_whichever_takes_longest():
    with MemoryMeter(CPU, Speed(flops=1e3, bandwidth=1e9, latency=1e-9)) as meter:
        torch.zeros(2, 3) @ torch.zeros(3, 5)
    assert meter.flops == 2 * 2 * 3 * 5
    assert meter.seconds == pytest.approx(meter.flops / 1e3, rel=1e-3)
    with MemoryMeter(CPU, Speed(flops=1e30, bandwidth=1e3)) as meter:
        torch.ones(10).add(1)
    assert meter.seconds == pytest.approx((40 + 80) / 1e3), "made: 40 bytes, then 40 read and 40 written"


def small_network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 32))


def test_tensors_without_data_need_what_those_with_data_need():
    moments = []
    for has_data in (True, False):
        with MemoryMeter(CPU) as meter:
            with nullcontext() if has_data else torch.device("meta"):
                network = small_network()
            mode = fake_mode()
            if not has_data:
                materialize(network, CPU, mode, meter, lambda name, tensor: "weights")
            meter.begin("forward", "activations")
            with nullcontext() if has_data else mode:
                inputs = torch.empty(128, 64)
            loss = network(inputs).square().mean()
            meter.begin("backward", "gradients")
            loss.backward()
            meter.end()
        moments.append({name: sum(kinds.values()) for name, kinds in meter.moments.items()})
    assert moments[0] == moments[1]
    assert moments[0]["forward"] > 128 * 4 * (64 + 256 + 256 + 32)


def test_a_mask_with_data_indexes_tensors_without():
    mode = fake_mode()
    with mode:
        hidden = torch.empty(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    with MemoryMeter(CPU):
        chosen = hidden[mask]
        chosen.sum().backward()
    assert chosen.shape == (3, 8) and hidden.grad.shape == hidden.shape


def test_tied_weights_stay_one_tensor(tiny_language_model):
    tiny_language_model.config.tie_word_embeddings = True
    with torch.device("meta"):
        model = PhiForCausalLM(tiny_language_model.config)
    with MemoryMeter(CPU) as meter:
        materialize(model, CPU, fake_mode(), meter, lambda name, tensor: name.split(".")[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert meter.alive["lm_head"] == model.lm_head.bias.numel() * 4


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("shape", [(256, 1024), (960, 320)])
def test_nf4_weights_take_what_bitsandbytes_takes(shape):
    options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4", "compress_statistics": True}
    real = bitsandbytes.nn.Linear4bit(*shape, **options).to("cpu")
    state = real.weight.quant_state
    expected = bytes_of(real.weight, state.absmax, state.state2.absmax, state.offset, state.code, state.state2.code)
    with torch.device("meta"):
        fake = bitsandbytes.nn.Linear4bit(*shape, **options)
    with MemoryMeter(CPU) as meter:
        materialize(fake, CPU, fake_mode(), meter, lambda name, tensor: "weights")
        assert meter.total == expected
        assert expected == pytest.approx(shape[0] * shape[1] * (0.5 + 1 / 64 + 4 / 64 / 256), abs=2000)
        inputs = torch.zeros(3, shape[0], dtype=torch.bfloat16)
        assert fake(inputs).shape == (3, shape[1])


def test_a_product_with_nf4_weights_dequantises_them():
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(1024, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    mode = fake_mode()
    with MemoryMeter(CPU) as meter:
        materialize(layer, CPU, mode, meter, lambda name, tensor: "weights")
        with mode:
            inputs = torch.empty(4, 1024, dtype=torch.bfloat16)
        meter.flops = 0
        meter.begin("forward", "activations")
        layer(inputs)
    assert meter.moments["forward"]["activations"] >= 1024 * 512 * 2
    assert meter.flops == 2 * 4 * 1024 * 512


def test_int8_weights_take_a_byte_and_a_scale_a_row():
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    with MemoryMeter(CPU) as meter:
        materialize(layer, CPU, fake_mode(), meter, lambda name, tensor: "weights")
        assert meter.total == 128 * 64 + 4 * 64
