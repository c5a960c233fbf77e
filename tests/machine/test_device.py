"""What the device module changes of torch's state, and changes back."""

from __future__ import annotations

import pytest
import torch

from mmq.machine.device import tensor_cores

MATMUL = torch.backends.cuda.matmul


def test_fp32_products_of_a_gpu_are_exact_again_whatever_happens() -> None:
    before = MATMUL.fp32_precision
    assert before != "tf32"
    with tensor_cores(torch.device("cuda")):
        assert MATMUL.fp32_precision == "tf32"
    assert MATMUL.fp32_precision == before
    with pytest.raises(KeyError), tensor_cores(torch.device("cuda", 1)):
        raise KeyError
    assert MATMUL.fp32_precision == before
    with tensor_cores(torch.device("cpu")):
        assert MATMUL.fp32_precision == before
