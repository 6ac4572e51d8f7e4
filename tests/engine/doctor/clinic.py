"""Small networks of every kind, trained a few steps, pruned in several ways and saved: what a doctor should praise."""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from secateur.core.masks import Masks
from secateur.core.patterns import NM, Block, Unit, Unstructured
from secateur.core.prunable import coverage
from secateur.engine.doctor import Beside, examine, mend
from secateur.engine.foreign import read
from secateur.nets import build

NETS = {
    "mlp": ({"inputs": 48, "outputs": 8, "widths": (32, 24), "batch_norm": True}, (3, 4, 4)),
    "lenet_300_100": ({"inputs": 48, "outputs": 8}, (48,)),
    "lenet5": ({"channels": 2, "size": 13, "outputs": 8, "widths": (6, 12, 24)}, (2, 13, 13)),
    "vgg11": ({"width": 0.08, "outputs": 8}, (3, 32, 32)),
    "vgg13": ({"width": 0.08, "outputs": 8}, (3, 32, 32)),
    "vgg16": ({"width": 0.08, "outputs": 8}, (3, 32, 32)),
    "vgg19": ({"width": 0.08, "outputs": 8}, (3, 32, 32)),
    "resnet_cifar": ({"depth": 8, "width": 8, "outputs": 8, "shortcut": "B"}, (3, 9, 9)),
    "resnet20": ({"width": 8, "outputs": 8}, (3, 9, 9)),
    "resnet32": ({"width": 4, "outputs": 8}, (3, 8, 8)),
    "resnet56": ({"width": 4, "outputs": 8}, (3, 8, 8)),
    "wide_resnet": ({"depth": 10, "widen": 1, "outputs": 8}, (3, 8, 8)),
    "resnet18": ({"width": 8, "outputs": 8}, (3, 33, 33)),
    "resnet34": ({"width": 8, "outputs": 8}, (3, 33, 33)),
    "resnet50": ({"width": 4, "outputs": 8}, (3, 33, 33)),
    "mobilenet_v1": ({"width": 0.1, "outputs": 8}, (3, 32, 32)),
    "mobilenet_v2": ({"width": 0.1, "outputs": 8}, (3, 32, 32)),
    "vit_tiny": ({"size": 8, "dim": 24, "depth": 2, "outputs": 8}, (3, 8, 8)),
    "bert_tiny": ({"vocab": 40, "length": 6, "dim": 32, "outputs": 8}, (6,)),
    "gpt_tiny": ({"vocab": 40, "length": 6, "dim": 32, "depth": 2}, (6,)),
    "lstm": ({"vocab": 40, "hidden": 24, "layers": 2}, (6,)),
}
"""Each network small, and the shape of an input: floats, or token numbers below ``vocab``."""


def batch(name, count=8, seed=1):
    """Inputs and targets that fit."""
    options, shape = NETS[name]
    random = torch.Generator().manual_seed(seed)
    if "vocab" in options:
        inputs = torch.randint(options["vocab"], (count, *shape), generator=random)
    else:
        inputs = torch.randn(count, *shape, generator=random)
    return inputs, torch.randint(8, (count,), generator=random)


def fit(net, name, masks=None, steps=3):
    """A few steps of training; zeros are held."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    hold = masks.hold(net, optimizer) if masks is not None else None
    net.train()
    for step in range(steps):
        inputs, target = batch(name, seed=step)
        output = net(inputs)
        output = output.mean(1) if output.dim() == 3 else output
        optimizer.zero_grad()
        F.cross_entropy(output, target).backward()
        optimizer.step()
    if hold is not None:
        hold.release()
    return optimizer


def fresh(name, seed=0):
    """A network with weights of its own."""
    torch.manual_seed(seed)
    return build(name, **NETS[name][0])


def pruned_masks(net, pattern, density):
    """The largest weights of every tensor that takes the pattern; each keeps at least a unit."""
    masks = {}
    for name, p in coverage(net, pattern=pattern).prunable.items():
        units = pattern.units(tuple(p.shape))
        keep = pattern.fixed(tuple(p.shape)) or max(1, round(units * density))
        masks[name] = pattern.mask(p.detach().abs(), keep)
    return Masks(masks)


WAYS = {
    "50 %": (Unstructured(), 0.5), "90 %": (Unstructured(), 0.1), "99 %": (Unstructured(), 0.01),
    "2:4": (NM(2, 4), 0.5), "1:4": (NM(1, 4), 0.25), "4x1": (Block(4, 1), 0.2), "units": (Unit(), 0.5),
}  # fmt: skip


def pruned_net(name, way, steps=3):
    """A network trained, pruned and trained again, and its masks."""
    net = fresh(name)
    fit(net, name, steps=2)
    pattern, density = WAYS[way]
    masks = pruned_masks(net, pattern, density)
    masks.apply_(net)
    fit(net, name, masks, steps)
    return net, masks


def state_of(net):
    """The tensors of a network, each with memory of its own."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def write(state, path):
    """As safetensors or by ``torch.save``, as the name says."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def look(state, path, **beside):
    """Save and examine."""
    return examine(write(state, path), Beside(**beside))


def treat(path, **beside):
    """A mended copy beside the file: its tensors, and what was done; the original is as it was."""
    before = path.read_bytes()
    out = path.with_name(f"mended-{path.name}")
    done = mend(path, out, Beside(**beside))
    assert path.read_bytes() == before
    assert not done.report.fixable
    return read(out).tensors, done


def kinds(report):
    """Kind, tensors and count of every finding."""
    return [(finding.kind, finding.tensors, finding.count) for finding in report.findings]


def noted(report):
    """Kind and count of every note."""
    return {note.kind: note.count for note in report.notes}


def same(one, other):
    """Whether two sets of tensors are equal to the bit."""
    assert sorted(one) == sorted(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name].nan_to_num(7.0), other[name].nan_to_num(7.0)), name
    return True
