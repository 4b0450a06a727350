"""Orders of training: each pass has all rows, and what memory cannot hold is an error at once."""

import pytest
import torch

from shunter.data.orders import passes


def test_each_pass_has_all_rows_in_an_order_of_its_own(seed):
    rows = int(torch.randint(20, 40, ()))
    count = int(torch.randint(1, 5 * rows, ()))
    found = passes(rows, count, torch.Generator().manual_seed(seed))
    assert len(found) == count
    each = found[: count // rows * rows].view(-1, rows)
    assert torch.equal(each.sort(1).values, torch.arange(rows).expand_as(each))
    by_hand = torch.Generator().manual_seed(seed)
    assert torch.equal(found, torch.cat([torch.randperm(rows, generator=by_hand) for _ in range(5)])[:count])


def test_more_than_memory_is_an_error_at_once():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        passes(10, 2**45, torch.Generator())
