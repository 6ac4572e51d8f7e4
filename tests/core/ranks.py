"""What each of two processes does in test_processes.py: `python ranks.py FOLDER RANK`; results go to FOLDER/RANK.pt."""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_

from secateur.core.choose import broadcast, choose, reduce_scores
from secateur.core.errors import DataError, MaskError
from secateur.core.hold import Hold
from secateur.core.masks import Masks
from secateur.core.task import Task

WARM, STEPS, SWAP, CLIP = 2, 6, 3, 0.05


def network():
    """Float64, with output widths that two processes cannot share evenly (7, 3 and 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 3)).double()


def points(count=16, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=random, dtype=torch.float64), torch.randint(0, 3, (count,), generator=random)


def random_masks(model, seed):
    random = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(m.shape, generator=random) < 0.6 for n, m in Masks.dense(model).items()})


def part(batch, rank):
    """This process's half of a batch; all of it when there is one process."""
    return batch if rank is None else tuple(t.chunk(2)[rank] for t in batch)


def train(model, rank=None, sharded=False):
    """Warm-up, hold, clipped AdamW steps with a swap half-way; yields the hold after every step."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    hold = None
    for step in range(WARM + STEPS):
        if step == WARM:
            hold = random_masks(model, 1).hold(model, optimizer)
        if step == WARM + SWAP:
            hold.swap(random_masks(model, 2))
            yield hold
        x, y = part(points(seed=step), rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if sharded and hold:
            hold.mask_gradients_()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if hold:
            hold.check()
            yield hold


def refusal(act):
    """The message of the error that is expected."""
    try:
        act()
    except (MaskError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def digests(rank):
    """Equal masks pass; masks that differ in bits or in names are refused by every process."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    same, mine = random_masks(model, 1), random_masks(model, 5 + rank)
    first = Masks({"0.weight": same["0.weight"]})
    hold = same.hold(model, optimizer)
    return {
        "bits": refusal(lambda: mine.hold(model, optimizer)),
        "names": refusal(lambda: (first if rank else same).hold(model, optimizer)),
        "strangers": refusal(lambda: (Masks({"9.weight": same["0.weight"]}) if rank else same).hold(model, optimizer)),
        "swap": refusal(lambda: hold.swap(mine)),
        "swap names": refusal(lambda: hold.swap(first if rank else same)),
        "unchanged": hold.masks == same,
        "after broadcast": refusal(lambda: Hold(broadcast(mine), model, optimizer)),
        "broadcast": broadcast(mine).digest,
    }


def scores(rank):
    """Scores on unequal parts of the data, joined; then one decision for all."""
    x, y = points()
    mine = slice(0, 5) if rank == 0 else slice(5, 16)
    model = network()
    own = Task(model, nn.functional.cross_entropy, [(x[mine], y[mine])]).gradients()
    joined = reduce_scores(own, len(x[mine]))
    return {
        "joined": joined,
        "none here": reduce_scores(
            {n: g if rank == 0 else torch.zeros_like(g) for n, g in own.items()}, 5 if rank == 0 else 0
        ),
        "none": refusal(lambda: reduce_scores(own, 0)),
        "half": reduce_scores({n: torch.full_like(g, 3.0, dtype=torch.bfloat16) for n, g in own.items()}, 1001 + rank),
        "own decision": choose({n: g.abs() for n, g in own.items()}, 20).digest,
        "decision": broadcast(choose({n: g.abs() for n, g in own.items()}, 20)).digest,
    }


def replicated(rank):
    """DDP: the gradients that arrive are masked already, so clipping needs no help."""
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    kept = [(hold.masks.kept, hold.masks.digest) for hold in train(wrapped, rank)]
    return {"weights": {n: p.detach() for n, p in model.named_parameters()}, "kept": kept}


def sharded(rank):
    """FSDP2: each process holds a part of every tensor, some of them empty."""
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer)
    zeros, alive, clean = [], [], []
    for hold in train(model, rank, sharded=True):
        zeros.append(Masks.from_zeros(model).digest)
        alive.append((Masks.from_zeros(model) - hold.masks).kept)
        clean.append(dead_state(hold))
    whole = {n: p.detach().full_tensor() for n, p in model.named_parameters()}
    result = {"weights": whole, "zeros": zeros, "alive": alive, "clean": clean, "names": list(model.state_dict())}
    model[0].weight.to_local().detach().fill_(1)
    result["noticed"] = refusal(hold.check)
    hold.masks.apply_(model)
    return result | {"applied": refusal(hold.check)}


def dead_state(hold):
    """The largest optimizer state of a pruned weight on this process."""
    worst = 0.0
    for name, p in hold.masks.match(hold.model).items():
        for value in hold.optimizer.state[p].values():
            if value.dim():
                gone = ~hold.masks[name]
                worst = max(worst, float((value.full_tensor().abs() * gone).max()))
    return worst


def main(folder, rank):
    """Run everything once; an error is a result too."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for act in (digests, scores, replicated, sharded):
        try:
            results[act.__name__] = act(rank)
        except Exception:
            results[act.__name__] = traceback.format_exc()
        dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]), int(sys.argv[2]))
