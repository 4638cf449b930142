"""The kernels of the bug chapters: right, and wrong in the way they describe."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

KERNELS = Path(__file__).parent / "kernels"
sys.path.insert(0, str(KERNELS))
pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from gemm_backward import BackwardA  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # without a GPU, Triton's interpreter
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
SHAPES = [
    (33, 70, 19),
    (5, 7, 11),
    (17, 16, 48),
    (1, 3, 2),
]  # m, n, k: all different


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def launch(m: int, n: int, k: int, order: tuple[int, int, int]) -> Tensor:
    """Memory of NaN behind grad_a, as the kernel left it. All else lies apart."""
    memory = torch.full((m * max(n, k) + max(n, k),), math.nan, device=DEVICE)
    # A swapped kernel also reads too far: zeros stand behind both operands.
    room = torch.zeros(m * max(n, k) + k * max(n, k) + 64, device=DEVICE)
    grad_c, b = room.clone(), room.clone()
    grad_c[: m * n] = randn(m * n)
    b[: k * n] = randn(k * n, seed=1)
    BackwardA(*order)(grad_c, b, memory, m, n, k)
    return memory.cpu()


def by_address(m: int, n: int, k: int, N: int, K: int, tile: int = 16) -> Tensor:
    """The same memory by plain loops over addresses; strides N and K."""
    memory = torch.full((m * max(n, k) + max(n, k),), math.nan)
    room = torch.zeros(m * max(n, k) + k * max(n, k) + 64, dtype=torch.float64)
    grad_c, b = room.clone(), room.clone()
    grad_c[: m * n] = randn(m * n).cpu()
    b[: k * n] = randn(k * n, seed=1).cpu()
    terms = min(n, math.ceil(N / tile) * tile)
    for row in range(m):
        for col in range(k):
            left = grad_c[row * N : row * N + terms]
            memory[row * K + col] = left @ b[col * N : col * N + terms]
    return memory


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_built_in_order_it_is_autograd(m: int, n: int, k: int) -> None:
    memory = launch(m, n, k, (m, n, k))
    a = torch.zeros(m, k, dtype=torch.float64, requires_grad=True)
    b = randn(k * n, seed=1).cpu().double().view(k, n)
    (a @ b).backward(randn(m * n).cpu().double().view(m, n))
    assert a.grad is not None
    got = memory[: m * k].view(m, k).double()
    assert torch.allclose(got, a.grad, rtol=0, atol=1e-4)
    assert memory[m * k :].isnan().all()  # and nothing else was written


@pytest.mark.parametrize(("m", "n", "k"), [(33, 70, 19), (17, 48, 16), (3, 9, 2)])
def test_swapped_it_writes_rows_n_apart(m: int, n: int, k: int) -> None:
    memory = launch(m, n, k, (m, k, n))
    expected = by_address(m, n, k, N=k, K=n)
    assert torch.allclose(memory, expected, rtol=0, atol=1e-4, equal_nan=True)
    assert memory[: m * k].isnan().any()  # the output has holes
    assert not memory[m * k :].isnan().all()  # the neighbour has not


def test_swapped_at_pitch_16_leaves_960_of_1024_floats_outside() -> None:
    memory = launch(32, 512, 32, (32, 32, 512))
    inside, outside = memory[: 32 * 32], memory[32 * 32 :]
    assert (~inside.isnan()).sum() == 64
    assert (~outside.isnan()).sum() == 960


@pytest.mark.parametrize(("m", "n", "k"), [(2, 2, 2), (32, 32, 32), (5, 19, 19)])
def test_equal_n_and_k_hide_the_swap(m: int, n: int, k: int) -> None:
    right, swapped = launch(m, n, k, (m, n, k)), launch(m, n, k, (m, k, n))
    assert torch.equal(right[: m * k], swapped[: m * k])
    assert swapped[m * k :].isnan().all()


@needs_gpu
def test_full_size_on_a_gpu() -> None:
    T, D, V = 128, 512, 32768
    grad_c, b = randn(T, V), randn(D, V, seed=1)
    memory = torch.full(((T - 1) * V + D,), math.nan, device="cuda")
    BackwardA(T, V, D)(grad_c, b, memory, T, V, D)
    exact = (grad_c.double() @ b.double().T).flatten()
    assert torch.allclose(memory[: T * D].double(), exact, rtol=0, atol=1e-2)
    assert memory[T * D :].isnan().all()
    memory.fill_(math.nan)
    BackwardA(T, D, V)(grad_c, b, memory, T, V, D)
    written = [int((~part.isnan()).sum()) for part in memory.split(T * D)[:3]]
    assert written == [1024, 1024, 1024]
    assert int((~memory.isnan()).sum()) == T * D


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "gemm_backward"
    source = KERNELS / "gemm_backward.cu"
    strict = ["-O2", "-Werror", "all-warnings"]
    subprocess.run(["nvcc", *strict, "-o", path, source], check=True)
    return path


@needs_nvcc
def test_the_cuda_file_compiles(binary: Path) -> None:
    assert binary.stat().st_size > 0
    if not GPU:
        ran = subprocess.run([binary], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (77, "no CUDA device\n")


@needs_nvcc
@needs_gpu
def test_the_cuda_file_writes_where_the_chapter_says(binary: Path) -> None:
    ran = subprocess.run([binary], capture_output=True, text=True, check=True)
    right, swapped = ran.stdout.splitlines()
    assert right == "right grad_a 65536 m 0 v 0 beyond 0 negative_v 0"
    assert re.fullmatch(
        r"swapped grad_a 1024 m 1024 v 1024 beyond 62464 negative_v \d+", swapped
    )
    assert 400 < int(swapped.split()[-1]) < 624
