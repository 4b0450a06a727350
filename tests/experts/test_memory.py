"""Scratch memory is ordinary memory, whatever the kernel makes of the advice."""

import pytest
import torch

from shunter.experts.memory import empty


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**21, 2**21 + 7, 2**23 + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_empty_has_the_shape_and_the_dtype_and_can_be_written(size, dtype):
    before = torch.arange(2**20)
    found = empty(torch.empty(0, dtype=dtype), size, 2)
    assert found.shape == (size, 2) and found.dtype == dtype and found.is_contiguous()
    found.fill_(3)
    assert torch.all(found == 3) and torch.equal(before, torch.arange(2**20))


def test_memory_elsewhere_than_on_the_cpu_is_left_alone():
    assert empty(torch.empty(0, device="meta"), 2**22, 2).device.type == "meta"
