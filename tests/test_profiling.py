"""The sorting of traces by hand-made records; on CUDA, planted copies and waits."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from albor.config import OptimizerConfig
from albor.model import Albor
from albor.optimizer import build_optimizer, clip_by_global_norm
from albor.profiling import (
    MARK,
    Record,
    collect,
    count_events,
    own_times,
    part_of,
    read_trace,
    refuse_waits,
    sort_events,
    sort_parts,
    step_parts,
    window,
)
from albor.shapes import ModelConfig

CPU = torch.device("cpu")
CONFIG = ModelConfig(131, 48, 112, 3, 6, 2, 40, head_dim=10)
CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="counts what a GPU's driver does"
)

# Names as PyTorch, cuBLAS, cuDNN, NCCL and Triton give them on CUDA, cut short.
NAMES = {
    "matrix products": """
        nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT
        sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas
        ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x3_tn
        void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>
        void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>
        void gemv2T_kernel_val<int, int, float, float, float, float, 128>
        triton_tem_fused_mm_3""",
    "attention": """
        void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>, cutlass::>
        void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>
        cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128
        cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128
        void cudnn::fusion::compute_dot_do_o_specialized<true, 128, 32>
        fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Attention)""",
    "optimizer and clip": """
        void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4> >
        void at::native::multi_tensor_apply_kernel<LpNormFunctor<float> >
        triton_for_fused_2""",
    "softmax and loss": """
        void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>
        void at::native::(anonymous namespace)::softmax_warp_forward<float>
        void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel
        triton_red_fused__log_softmax_nll_loss_forward_5""",
    "elementwise and norms": """
        triton_poi_fused__to_copy_mul_silu_4
        triton_per_fused_add_mean_mul_pow_rsqrt_0
        void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>
        void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float> >""",
    "copies and casts": """
        void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>
        void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>
        Memcpy DtoD (Device -> Device)""",
    "memory set": """
        void at::native::vectorized_elementwise_kernel<4, FillFunctor<int>>
        Memset (Device)""",
    "communication": """
        ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)""",
    "other": """
        my_own_kernel""",
}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (name.strip(), part)
        for part, names in NAMES.items()
        for name in names.strip().splitlines()
    ],
)
def test_kernels_are_sorted_by_their_names(name: str, part: str) -> None:
    assert part_of(name) == part


@pytest.mark.parametrize(
    ("name", "callers", "part"),
    [
        ("aten::mm", "aten::matmul < aten::linear < ", "matrix products"),
        ("aten::mm", "_LinearCrossEntropy < ", "matrix products"),
        ("aten::bmm", "aten::scaled_dot_product_attention < ", "attention"),
        ("aten::bmm", "BlockAttentionBackward < ", "attention"),
        ("aten::_softmax", "BlockAttention < ", "attention"),
        ("aten::mul", "_LinearCrossEntropy < ", "softmax and loss"),
        ("aten::mul", "", "elementwise and norms"),
        ("aten::silu_backward", "SiluBackward0 < ", "elementwise and norms"),
        ("SiluBackward0", "", "other"),
        ("aten::copy_", "aten::_to_copy < aten::to < ", "copies and casts"),
        (
            "aten::copy_",
            "aten::to < Optimizer.step#AdamW.step < ",
            "optimizer and clip",
        ),
        ("aten::_fused_adamw_", "", "optimizer and clip"),
        ("aten::t", "", "other"),
        ("aten::tanh", "", "elementwise and norms"),
        ("aten::fill_", "aten::zeros < ", "memory set"),
    ],
)
def test_operations_are_sorted_by_name_and_callers(
    name: str, callers: str, part: str
) -> None:
    assert part_of(name, callers) == part


def mark(start: float, duration: float) -> Record:
    return Record(MARK, "user_annotation", start, duration, thread="1/1")


def op(name: str, start: float, duration: float, link: int = 0) -> Record:
    return Record(name, "cpu_op", start, duration, thread="1/1", link=link)


def test_own_times_take_off_what_is_within() -> None:
    records = [
        op("aten::mm", 12, 6),
        mark(0, 100),
        op("aten::linear", 10, 10),
        op("aten::add", 20, 5),  # begins where the one before ends
        Record("aten::far", "cpu_op", 12, 50, thread="1/2"),  # another thread
    ]
    own = {
        record.name: (time, callers) for record, time, callers in own_times(records)
    }
    assert own["aten::linear"] == (4, f"{MARK} < ")
    assert own["aten::mm"] == (6, f"aten::linear < {MARK} < ")
    assert own["aten::add"] == (5, f"{MARK} < ")
    assert own[MARK][0] == 100 - 10 - 5
    assert own["aten::far"] == (50, "")
    assert math.isclose(sum(time for time, _ in own.values()), 100 + 50)


def test_parts_and_gaps_add_up_to_the_whole_on_a_cpu() -> None:
    records = [
        mark(100, 50),
        op("aten::mm", 50, 7),  # before the work
        op("aten::linear", 105, 20),
        op("aten::mm", 107, 16),
        op("aten::_scaled_dot_product_flash_attention_for_cpu", 130, 10),
    ]
    parts = sort_parts(records)
    assert parts.seconds == pytest.approx(50e-6)
    assert parts.parts["matrix products"] == (pytest.approx(16e-6), 1)
    assert parts.parts["attention"] == (pytest.approx(10e-6), 1)
    assert parts.parts["other"] == (pytest.approx(4e-6), 1)
    assert parts.gaps == pytest.approx(20e-6)
    assert parts.attention_kernels == (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    )
    rates = parts.rates({"matrix products": 32, "attention": 5})
    assert rates == pytest.approx({"matrix products": 2e6, "attention": 5e5})


def gpu(name: str, start: float, duration: float, **more: object) -> Record:
    kind = {"Memcpy": "gpu_memcpy", "Memset": "gpu_memset"}.get(name[:6], "kernel")
    stream = more.pop("thread", "0/7")
    return Record(name, kind, start, duration, thread=stream, **more)  # type: ignore


def test_on_a_gpu_its_events_count_and_streams_may_overlap() -> None:
    flash = "void pytorch_flash::flash_fwd_kernel<>"
    records = [
        mark(0, 20),
        op("_LinearCrossEntropy", 2, 9, link=5),
        op("aten::copy_", 3, 1, link=6),
        op("_LinearCrossEntropy", 15, 1),  # no number: says nothing of a kernel
        gpu("nvjet_tst_128x256_TNT", 10, 20, link=5),
        gpu("at::native::direct_copy_kernel_cuda", 30, 5, link=6),  # in the loss
        gpu(flash, 50, 10),
        gpu("Memset (Device)", 55, 10, thread="0/9"),  # beside it
    ]
    parts = sort_parts(records)
    assert parts.seconds == pytest.approx(55e-6)  # from 10 to 65, not from 0
    assert parts.gaps == pytest.approx(15e-6)  # from 35 to 50
    assert parts.parts == {
        "matrix products": (pytest.approx(20e-6), 1),
        "attention": (pytest.approx(10e-6), 1),
        "softmax and loss": (pytest.approx(5e-6), 1),
        "memory set": (pytest.approx(10e-6), 1),
    }
    assert parts.attention_kernels == (flash,)


# ----------------------------------------------------------------- copies and waits


def call(name: str, start: float) -> Record:
    return Record(name, "cuda_runtime", start, 1, thread="1/1")


PLANTED = [  # one .item() and one .to("cuda") from pageable memory
    mark(100, 100),
    call("cudaMemcpyAsync", 110),
    gpu("Memcpy HtoD (Pageable -> Device)", 112, 2, size=4096),
    call("cudaStreamSynchronize", 115),
    call("cudaLaunchKernel", 120),
    gpu("void at::native::vectorized_elementwise_kernel<>", 122, 2),
    call("cudaMemcpyAsync", 130),
    gpu("Memcpy DtoH (Device -> Pageable)", 133, 2, size=4),
    call("cudaStreamSynchronize", 136),
    call("cudaEventRecord", 140),
    call("cudaStreamWaitEvent", 141),  # the device waits, the host does not
    call("cudaDeviceSynchronize", 90),  # before the work
    call("cudaDeviceSynchronize", 201),  # the profiler's own
]


def test_copies_and_waits_of_a_trace() -> None:
    events = sort_events(PLANTED)
    assert events.copies == {"DtoH": (1, 4), "HtoD": (1, 4096)}
    assert events.waits == {"cudaStreamSynchronize": 2}
    assert events.launches == 1
    assert [events.number(kind) for kind in ("HtoD", "DtoH", "DtoD")] == [1, 1, 0]


@pytest.mark.parametrize(
    "name",
    [
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cudaStreamSynchronize_ptsz",
        "cuStreamSynchronize",
        "cudaMemcpy",
        "cudaFree",
    ],
)
def test_each_call_that_waits_is_counted(name: str) -> None:
    events = sort_events([mark(0, 10), call(name, 5)])
    assert events.waits == {name: 1}


@pytest.mark.parametrize(
    "name", ["cudaMemcpyAsync", "cudaFreeAsync", "cudaEventQuery"]
)
def test_calls_that_do_not_wait_are_not(name: str) -> None:
    assert sort_events([mark(0, 10), call(name, 5)]).waits == {}


def test_copies_within_and_between_devices_have_names_of_their_own() -> None:
    records = [
        mark(0, 10),
        gpu("Memcpy DtoD (Device -> Device)", 1, 1, size=8),
        gpu("Memcpy DtoD (Device -> Device)", 2, 1, size=16),
        gpu("Memcpy PtoP (Device -> Device)", 3, 1, size=32),
    ]
    assert sort_events(records).copies == {"DtoD": (2, 24), "PtoP": (1, 32)}


def test_a_trace_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    """A file in the form of a GPU's trace, with what must be left out."""
    common = {"ph": "X", "pid": 7, "tid": 8, "args": {}}
    events = [
        {"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "args": {}},
        common | {"cat": "user_annotation", "name": MARK, "ts": 5.5, "dur": 50},
        common | {"cat": "python_function", "name": "train.py", "ts": 6, "dur": 1},
        common
        | {
            "cat": "cuda_runtime",
            "name": "cudaEventSynchronize",
            "ts": 9,
            "dur": 1,
        },
        common | {"cat": "cuda_sync", "name": "Event Sync", "ts": 9, "dur": 1},
        common
        | {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 8}
        | {"dur": 2, "pid": 0, "tid": 7, "args": {"bytes": 64, "External id": 3}},
        {
            "ph": "s",
            "cat": "ac2g",
            "name": "ac2g",
            "pid": 7,
            "tid": 8,
            "ts": 8,
            "id": 1,
        },
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    records = read_trace(path)
    assert [record.kind for record in records] == [
        "user_annotation",
        "cuda_runtime",
        "gpu_memcpy",
    ]
    assert records[2] == Record(
        "Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 8, 2, 64, "0/7", 3
    )
    assert window(records).end == 55.5
    found = sort_events(records)
    assert found.copies == {"HtoD": (1, 64)}
    assert found.waits == {"cudaEventSynchronize": 1}


def test_a_trace_without_the_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="make it with `collect`"):
        sort_events(PLANTED[1:])


# ---------------------------------------------------------------------- on this CPU


@pytest.fixture(scope="module")
def small() -> tuple[Albor, torch.optim.Optimizer, Tensor]:
    model = Albor(CONFIG, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.1))
    return model, optimizer, torch.arange(2 * 18).view(2, 18) % 131


def test_the_operations_of_a_step_by_number(
    small: tuple[Albor, torch.optim.Optimizer, Tensor], tmp_path: Path
) -> None:
    model, optimizer, ids = small

    def work() -> None:
        model.loss(ids[:, :-1], ids[:, 1:].contiguous()).backward()
        clip_by_global_norm(model.parameters(), 1.0)
        optimizer.step()

    work()
    records = collect(work, CPU, keep=tmp_path / "trace.json")
    assert read_trace(tmp_path / "trace.json") == records
    parts = sort_parts(records)
    products = sum(record.name == "aten::mm" for record in records)
    assert parts.parts["matrix products"][1] == products  # without attention's
    assert products >= 3 * 7 * CONFIG.num_hidden_layers + 3  # three for the head
    assert parts.attention_kernels == ("BlockAttention",)
    assert parts.parts["optimizer and clip"][1] > 0
    total = sum(seconds for seconds, _ in parts.parts.values()) + parts.gaps
    assert total == pytest.approx(parts.seconds, rel=1e-3)
    assert all(seconds >= 0 for seconds, _ in parts.parts.values())
    rows = parts.table().splitlines()
    assert [row[:22].strip() for row in rows] == [*parts.parts, "gaps", "in all"]


def test_the_kernel_that_was_asked_for_is_the_one_that_is_named(
    small: tuple[Albor, torch.optim.Optimizer, Tensor],
) -> None:
    model, _, ids = small

    def kernels(backend: SDPBackend) -> tuple[str, ...]:
        with sdpa_kernel(backend):
            return step_parts(lambda: model(ids), CPU).attention_kernels

    flash, plain = (
        kernels(b) for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    )
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in flash
    assert "aten::_scaled_dot_product_attention_math" in plain
    assert not set(flash) & {"aten::_scaled_dot_product_attention_math"}


def test_more_work_in_one_part_shows_in_that_part() -> None:
    x = torch.randn(300, 300)

    def parts(products: int) -> float:
        return step_parts(lambda: [x @ x for _ in range(products)], CPU).parts[
            "matrix products"
        ][1]

    assert (parts(3), parts(11)) == (3, 11)


def test_without_cuda_the_copies_are_those_that_pytorch_is_asked_for() -> None:
    there, here = torch.zeros(5, device="meta"), torch.zeros(3, 7)
    events = count_events(
        lambda: (here.to("meta"), there.sum().item()), torch.device("meta")
    )
    assert events.copies == {"DtoH": (1, 4), "HtoD": (1, 3 * 7 * 4)}
    assert events.waits == {} and events.launches == 0
    assert count_events(lambda: here + 1, CPU).copies == {}


def test_refuse_waits_runs_the_work_where_there_is_no_gpu() -> None:
    done: list[int] = []
    refuse_waits(lambda: done.append(1), CPU)
    assert done == [1]


# ---------------------------------------------------------------------- with a GPU


@CUDA
def test_planted_copies_and_waits_are_seen() -> None:
    device = torch.device("cuda")
    pageable, there = torch.randn(1000), torch.randn(3, device=device)

    def work() -> None:
        pageable.to(device)
        there.sum().item()

    work()
    events = count_events(work, device)
    assert events.copies["HtoD"] == (1, 4000) and events.copies["DtoH"] == (1, 4)
    assert sum(events.waits.values()) == 2
    with pytest.raises(RuntimeError, match="synchroniz"):
        refuse_waits(work, device)


@CUDA
def test_work_that_waits_for_nothing_has_nothing_to_count() -> None:
    device = torch.device("cuda")
    layer = nn.Linear(64, 32, device=device)
    x = torch.randn(16, 64, device=device)

    def work() -> None:
        layer(x).square().mean().backward()

    work()
    events = count_events(work, device)
    assert events.number("HtoD") == events.number("DtoH") == 0 and not events.waits
    assert events.launches > 3
    refuse_waits(work, device)
    parts = step_parts(work, device)
    assert (
        parts.parts["matrix products"][1] >= 2 and 0 <= parts.gaps < parts.seconds
    )


@CUDA
def test_a_trace_that_saw_no_gpu_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(RuntimeError, match="saw nothing"):
        count_events(lambda: None, torch.device("cuda"))
