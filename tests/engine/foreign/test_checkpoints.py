"""Checkpoints as others build them: every table is found or told, and written back with nothing else changed."""

import collections

import pytest
import torch
from tests.engine.foreign.test_reading import random, same
from torch import nn

from secateur.core.errors import FileError
from secateur.engine.foreign import read


def layers(seed, *names):
    """A state dict of small matrices."""
    return {f"{name}.weight": random(4, 5, seed=seed + i) for i, name in enumerate(names)}


def adam(width=5):
    """The state of an optimizer that took a step."""
    layer = nn.Linear(width, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


A, B, C = layers(1, "fc", "out"), layers(10, "fc", "out"), layers(20, "fc")


def under(name, table):
    """The names of a table behind those of the table that holds it."""
    return {f"{name}.{key}": tensor for key, tensor in table.items()}


@pytest.mark.parametrize(("whole", "network", "others"), [
    ({"model_state": A, "loss": torch.tensor(0.3), "optimizer": adam(), "epoch": 1}, A, {}),
    ({"mine": A, "loss": torch.ones(1), "rng": torch.zeros(5056, dtype=torch.uint8), "my_optim": adam()}, A, {}),
    ({"generator": A, "discriminator": C, "g_ema": B, "g_optim": adam()},
     {**under("generator", A), **under("discriminator", C)}, {"g_ema": B}),
    ({"model": {"encoder": A, "decoder": C}, "epoch": 1}, {**under("encoder", A), **under("decoder", C)}, {}),
    ({"model": A, "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": list(B.values()), "collected_params": None}},
     A, {"ema": dict(zip("01", B.values(), strict=True))}),
    ({"model": A, "ema": {"module": B, "updates": 3}}, A, {"ema": B}),
    ({"checkpoint": {"state_dict": A, "ema": B, "epoch": 3}}, A, {"checkpoint.ema": B}),
    ({"state_dict": A, "criterion": C}, A, {"criterion": C}),
    ({"ema": {"shadow_params": list(B.values())}}, dict(zip("01", B.values(), strict=True)), {}),
    ({"models": [A, C]}, {**under("0", A), **under("1", C)}, {}),
    ({**A, "more": C}, {**A, **under("more", C)}, {}),
    ({**A, "optimizer": adam()}, A, {}),
], ids=["loss", "random state", "gan", "halves", "torch_ema", "ema module", "nested", "criterion", "average alone",
        "list", "top and table", "top and optimizer"])  # fmt: skip
def test_the_network_and_what_lies_beside_it(tmp_path, whole, network, others):
    """Names, numbers and order; and a copy with other numbers has them in the same places and no others changed."""
    torch.save(whole, tmp_path / "a.pt")

    found = read(tmp_path / "a.pt")

    assert list(found.tensors) == list(network)
    same(found.tensors, network)
    assert set(found.facts["others"]) == set(others)
    for name, table in others.items():
        same(found.facts["others"][name], table)
    assert set(found.facts["averages"]) == {name for name in others if "ema" in name}
    new = {name: tensor + 1 for name, tensor in network.items()}
    found.write(tmp_path / "b.pt", new)
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    ours = {id(tensor): tensor + 1 for tensor in leaves(whole) if any(tensor is one for one in network.values())}
    assert shape_of(back) == shape_of(whole)
    for one, other in zip(leaves(back), leaves(whole), strict=True):
        assert torch.equal(one, ours.get(id(other), other))


def leaves(value):
    """Every tensor in tables and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for entry in values for tensor in leaves(entry)]


def shape_of(value):
    """Tables and lists with the order of their keys, and what is no tensor."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, dict):
        return [type(value), [(key, shape_of(entry)) for key, entry in value.items()]]
    return [shape_of(entry) for entry in value] if isinstance(value, list | tuple) else value


def test_nothing_is_passed_over(tmp_path):
    """Whatever is neither network nor average, optimizer or number is named with the reason."""
    whole = {"net": A, "history": [[torch.ones(3)]], "grid": torch.ones(3, 3), "optim_d": adam(), "callbacks": {"x": 1},
             "optimizer": adam(), "ema": {"shadow_params": list(B.values()), "collected_params": list(A.values()),
             "opaque": {1, 2}}, "epoch": 3, "best": torch.tensor(0.5), "nothing": None, "empty": {}}  # fmt: skip
    torch.save(whole, tmp_path / "a.pt")

    found = read(tmp_path / "a.pt")

    assert set(found.left) == {"history", "grid", "optim_d", "callbacks", "ema.opaque"}
    assert set(found.facts["others"]) == {"ema", "ema.collected_params"} and found.facts["averages"] == ["ema"]
    assert found.facts["numbers"] == {"epoch": 3, "best": 0.5}
    assert found.facts["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]


def test_order_is_that_of_the_tensors_given(tmp_path):
    """Renamed and merged tensors stand where the others of their layer do; whatever else is there keeps its place."""
    layer = {"0.bias": random(2), "0.weight_orig": random(2, 3), "0.weight_mask": torch.ones(2, 3), "note": "x",
             "1.weight": random(2, 2, seed=2), "1.bias": random(2, seed=3)}  # fmt: skip
    table = collections.OrderedDict(layer)
    table._metadata = {"": {"version": 2}}
    torch.save({"model": table, "epoch": 1}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    new = {"0.weight": random(2, 3, seed=9), **{name: layer[name] for name in ("0.bias", "1.weight", "1.bias")}}

    found.write(tmp_path / "b.pt", new)

    back = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    assert [name for name in back if name != "note"] == list(new) and back["note"] == "x"
    assert type(back) is collections.OrderedDict and back._metadata == table._metadata
    assert list(read(tmp_path / "b.pt").tensors) == list(new)
    turned = dict(reversed(found.tensors.items()))
    found.write(tmp_path / "c.pt", turned)
    assert [n for n in torch.load(tmp_path / "c.pt", weights_only=True)["model"] if n != "note"] == list(turned)


def test_averages_and_optimizer_are_written_in_their_own_containers(tmp_path):
    """Of an average only the tensors that are given change; containers, settings and what hangs on them stay."""
    average = collections.OrderedDict(B)
    average._metadata = {"": {"version": 1}}
    whole = {"model": A, "ema": {"decay": 0.9, "shadow": average}, "optimizer": adam()}
    torch.save(whole, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    state = {**found.facts["optimizer"], "state": {}}
    zero = {"out.weight": torch.zeros(4, 5)}

    found.write(tmp_path / "b.pt", found.tensors, {"ema": zero}, state)

    back = torch.load(tmp_path / "b.pt", weights_only=True)
    same(back["model"], A)
    assert type(back["ema"]["shadow"]) is collections.OrderedDict
    assert back["ema"]["shadow"]._metadata == average._metadata and back["ema"]["decay"] == 0.9
    same(back["ema"]["shadow"], {**B, **zero})
    assert back["optimizer"]["state"] == {} and list(back) == list(whole)
    assert back["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]


def test_what_does_not_change_is_the_same_object(tmp_path):
    """Parameters stay parameters, with their attributes; a view stays a view of the memory it shares."""
    one, two = nn.Parameter(random(3, 3)), nn.Parameter(random(3, 3, seed=1), requires_grad=False)
    one.no_decay = True
    base = random(6, seed=2)
    whole = {"one": one, "two": two, "views": base[:3], "over": base[2:], "plain": random(2)}
    torch.save(whole, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")

    found.write(tmp_path / "b.pt", {**found.tensors, "two": torch.zeros(3, 3), "plain": torch.ones(2)})

    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert [type(tensor) for tensor in back.values()] == [nn.Parameter, nn.Parameter, *[torch.Tensor] * 3]
    assert back["one"].requires_grad and back["one"].no_decay and not back["two"].requires_grad
    assert not back["two"].any() and back["plain"].tolist() == [1.0, 1.0]
    assert back["views"].untyped_storage().data_ptr() == back["over"].untyped_storage().data_ptr()
    same({n: t.detach() for n, t in back.items() if n in ("one", "views", "over")},
         {n: whole[n].detach() for n in ("one", "views", "over")})  # fmt: skip


def test_a_transposed_view_is_no_tie(tmp_path):
    """The same memory read in another order is another matrix; the same view under two names is one."""
    weight = random(8, 8)
    torch.save({"a": weight, "b": weight.t(), "c": weight, "d": weight.view(-1), "e": weight[:1]}, tmp_path / "a.pt")

    assert read(tmp_path / "a.pt").ties == (("a", "c"),)


def test_names_that_no_table_takes_are_refused(tmp_path):
    """In tables within tables a new name goes into the table whose names begin so; else there is no place for it."""
    torch.save({"model": {"encoder": A, "decoder": C}}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    merged = {"encoder.new": random(2), **found.tensors}

    found.write(tmp_path / "b.pt", merged)

    same(torch.load(tmp_path / "b.pt", weights_only=True)["model"]["encoder"], {"new": random(2), **A})
    with pytest.raises(FileError, match="tables within tables, and none that `head.weight` belongs into"):
        found.write(tmp_path / "c.pt", {**found.tensors, "head.weight": random(2)})
    torch.save({"params": [random(2), random(3)]}, tmp_path / "d.pt")
    with pytest.raises(FileError, match="a list of tensors, whose number cannot change"):
        read(tmp_path / "d.pt").write(tmp_path / "e.pt", {"0": random(2)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt", "d.pt"]
