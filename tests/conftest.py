"""What the tests share; the notebooks run in processes of their own."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # Triton asks once, when anything imports it
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and wait for them when busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
