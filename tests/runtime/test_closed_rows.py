"""A query that no key is open to gives zeros, in the reference and on every core, as in torch."""

import importlib.util
import pathlib

import numpy as np
import pytest
import torch

_spec = importlib.util.spec_from_file_location("native_kit", pathlib.Path(__file__).with_name("native_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)


@pytest.mark.parametrize(("queries", "keys"), [(9, 11), (4, 5), (33, 8)])
def test_closed_rows(queries, keys, tmp_path):
    net = kit.Net(queries)
    reads = [net.input(0, n, 8) for n in (queries, keys, keys)] + [net.input(1, 1, queries, keys)]
    case = kit.Case(net, [net.add("attention", *reads, heads=2, scale=0.5)], tmp_path / "plan")
    q, k, v, mask = case.inputs(2)
    mask[:] = 0
    mask[0, 0, 1] = mask[0, 0, -1] = -np.inf
    mask[0, 0, 2, :3] = -np.inf
    q[1, 2] = np.nan  # a row of its own: it stays NaN and reaches no other
    heads = [torch.tensor(x).unflatten(2, (2, 4)).transpose(1, 2) for x in (q, k, v)]
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=torch.tensor(mask), scale=0.5)
    wanted = mixed.transpose(1, 2).flatten(2).numpy()
    assert not wanted[:, 1].any() and not wanted[:, -1].any() and np.isnan(wanted[1, 2]).all()
    np.testing.assert_allclose(case.exact(q, k, v, mask)[0], wanted, atol=1e-6)
    for isa in kit.ISAS:
        for threads in (1, 3):
            with kit.Core(case.path, threads, isa) as core:
                np.testing.assert_allclose(core(q, k, v, mask)[0], wanted, atol=1e-6, err_msg=isa)
