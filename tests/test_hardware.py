"""Device, precision, attention kernel, memory: what a run asks of the machine."""

import subprocess
import sys

import pytest
import torch

import albor.hardware as hardware
from albor.attention import BlockAttention, attend, in_blocks
from albor.hardware import (
    KERNELS,
    OutOfMemory,
    attention_kernel,
    bytes_asked,
    free_memory,
    has_bf16,
    keep_freed_memory,
    memory_explained,
    pick_device,
    pick_precision,
)
from albor.shapes import ConfigError
from albor.weights import CheckpointError

CPU = torch.device("cpu")


def test_devices():
    assert pick_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert pick_device("auto") == pick_device() == CPU


@pytest.mark.parametrize(
    "name", ["mps", "tpu", "cuda:99", "CPU", "", "cuda:", 0, None]
)
def test_devices_are_refused_by_name(name):
    with pytest.raises(ConfigError, match="device = ") as caught:
        pick_device(name)
    assert repr(name) in str(caught.value) and "use" in str(caught.value)


def test_precisions(monkeypatch):
    assert {pick_precision(name, CPU) for name in ("fp32", "bf16", "fp16")} == {
        *("fp32", "bf16", "fp16")
    }
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    assert pick_precision("auto", CPU) == "bf16"
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    assert pick_precision("auto", CPU) == "fp32"
    for name in ("fp8", "float16", "", None, 16):
        with pytest.raises(ConfigError, match="precision = "):
            pick_precision(name, CPU)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), "fp32"),
        ((7, 0), "fp16"),
        ((7, 5), "fp16"),
        ((8, 0), "bf16"),
        ((12, 0), "bf16"),
    ],
)
def test_precision_by_gpu_generation(monkeypatch, capability, expected):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability
    )
    gpu = torch.device("cuda")
    assert pick_precision("auto", gpu) == expected
    assert pick_precision("fp16", gpu) == "fp16"
    if expected == "bf16":
        assert pick_precision("bf16", gpu) == "bf16"
    else:
        with pytest.raises(ConfigError, match="precision = 'bf16'"):
            pick_precision("bf16", gpu)


def test_bf16_without_the_probes_of_newer_torch(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert has_bf16(CPU) is False
    monkeypatch.setattr(
        torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False
    )
    assert has_bf16(CPU) is True


FAULTS = """
import resource, torch
from albor.hardware import keep_freed_memory
torch.ones(4)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(24 * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    default, obeyed, kept = done.stdout.split()
    if obeyed == "False":
        pytest.skip("no glibc")
    assert int(kept) < int(default) / 3


def test_freed_memory_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


def test_free_memory(monkeypatch, tmp_path):
    free = free_memory(CPU)
    assert free is None or 2**20 < free < 2**50
    monkeypatch.setattr(hardware, "Path", lambda name: tmp_path / "missing")
    assert free_memory(CPU) is None


def test_a_kernel_chosen_by_name_is_obeyed_and_gives_the_same():
    q, k, v = (torch.randn(2, heads, 70, 10) for heads in (6, 2, 2))
    ours = attend(q, k, v)
    assert torch.equal(ours, BlockAttention.apply(q, k, v))
    with attention_kernel("math"):
        assert not in_blocks(q)
        assert torch.allclose(attend(q, k, v), ours, atol=1e-5)
    assert in_blocks(q)
    with attention_kernel("auto"):
        assert in_blocks(q)


def test_kernels_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"attention = 'cudn'.*cudnn"):
        attention_kernel("cudn")
    assert {*KERNELS} == {"flash", "cudnn", "efficient", "math"}


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0", 20.5 * 2**30),
        ("CUDA out of memory. Tried to allocate 512.00 MiB (GPU 0", 2**29),
        ("can't allocate memory: you tried to allocate 4096 bytes. Error", 4096),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_what_was_asked_is_read_out_of_the_message(message, asked):
    assert bytes_asked(RuntimeError(message)) == asked
    assert bytes_asked(MemoryError()) == 0


def test_out_of_memory_names_asked_free_and_mend(monkeypatch):
    monkeypatch.setattr(hardware, "free_memory", lambda device: 12345)
    with (
        pytest.raises(OutOfMemory, match="free: 12,345") as caught,
        memory_explained(CPU, "Do less"),
    ):
        torch.empty(2**50, dtype=torch.uint8)
    assert f"{2**50:,} bytes" in str(caught.value)
    assert "Do less" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match="mine"), memory_explained(CPU, ""):
        raise ValueError("mine")
    unsaid = pytest.raises(OutOfMemory, match="how much is not said")
    with unsaid, memory_explained(CPU, ""):
        raise MemoryError


def test_an_error_of_ours_that_quotes_the_allocator_keeps_its_advice():
    words = "no host memory (you tried to allocate 5000 bytes); asynchronous=False"
    ours = pytest.raises(CheckpointError, match="asynchronous")
    with ours, memory_explained(CPU, "Do less"):
        raise CheckpointError(words)
